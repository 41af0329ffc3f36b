"""Reading of responses: every matcher on its traps, and when a reading is final."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from starmerge_models.evaluation.scoring.matching import Reading, is_final, read
from starmerge_models.evaluation.tasks.sources import FileSource
from starmerge_models.evaluation.tasks.task import Task

DISCO = ("pair_conn", "single_conn_inner", "single_conn_inner_anaphora", "pair_conn_anaphora")
OPTIONS = {"1": ["(a)", "a"], "2": ["(b)", "b"], "3": ["(c)", "c"]}
NLI = {"0": ["entailment", "entail"], "1": ["neutral"], "2": ["contradiction", "contradict"]}


def _task(*labels: str, **settings: Any) -> Task:
    if labels:
        settings["labels"] = list(labels)
    source = FileSource(file=Path("rows.jsonl"))
    return Task(name="t", source=source, prompt="{text}", **settings)


def _value(task: Task, response: str) -> str | float | None:
    return read(task, response, task.words[0][0] if task.words else "0").value


@pytest.mark.parametrize(
    ("labels", "response", "answer"),
    [
        (("no", "yes"), "I know: yes", "yes"),
        (("no", "yes"), "Not at all", None),
        (("no", "yes"), "No. Yes would be wrong.", "no"),
        (("plausible", "not plausible"), "It is not plausible.", "not plausible"),
        (("plausible", "not plausible"), "Not\nplausible.", "not plausible"),
        (("plausible", "not plausible"), "implausible", None),
        (("plausible", "not plausible"), "not_plausible", None),
        (("acceptable", "unacceptable"), "Unacceptable", "unacceptable"),
        (("entail", "does not entail"), "does not entail", "does not entail"),
        (("in favor", "against"), "In  favor of it, not against", "in favor"),
        (("a", "b"), "A: the answer", "a"),
        (("a", "b"), "banana", None),
        (("a", "d"), "I'd say (a)", "a"),
        (("a", "d"), "I’d say 'a'", "a"),
        (("positive", "negative"), "negative, not positive", "negative"),
        (("0", "1"), "10", None),
        (("0", "1"), "0.5, -1", None),
        (("0", "1"), "It is 1.", "1"),
        (("0", "1"), "option-1, then", "1"),
        (("1999", "2024"), "2,024", "2024"),
        (("yes", "no"), "1.yes", "yes"),
        (("North", "North America"), "North America", "North America"),
        (("North America", "Asia"), "north america!", "North America"),
        (("World", "Sci/Tech"), "Topic: sci/tech", "Sci/Tech"),
        (DISCO, "single_conn_inner_anaphora", "single_conn_inner_anaphora"),
        (DISCO, "SINGLE_CONN_INNER", "single_conn_inner"),
        (DISCO, "single_conn_inner_ana", None),
        (("STRASSE", "weg"), "Straße", "STRASSE"),
        (("in", "out"), "İn", None),
        (("yes", "no"), "", None),
    ],
)
def test_reads_the_first_label_that_is_a_whole_word(
    labels: tuple[str, ...], response: str, answer: str | None
) -> None:
    task = _task(*labels)
    for label in labels:
        assert read(task, response, label) == Reading(answer, float(answer == label))


@pytest.mark.parametrize(
    ("labels", "response", "answer"),
    [
        (("entail", "neither", "contradict"), "It does not entail it", None),
        (("acceptable", "unacceptable"), "not acceptable", None),
        (("acceptable", "unacceptable"), "This is not an acceptable sentence", None),
        (("acceptable", "unacceptable"), 'It isn’t "acceptable".', None),
        (("positive", "negative"), "not positive but negative", None),
        (("positive", "negative"), "neither positive nor negative", None),
        (("positive", "negative"), "Why not? Positive", "positive"),
        (("violence", "not violence"), "non-violence", None),
        (("violence", "not violence"), "not violence", "not violence"),
        (("true", "false"), "No, false", "false"),
        (("no", "yes"), "no yes", "no"),
        (("no", "yes"), "not no", None),
        (("knot", "yes"), "a knot", "knot"),
        (("true", "false"), "a knot true", "true"),
    ],
)
def test_a_label_that_is_negated_first_is_not_read(
    labels: tuple[str, ...], response: str, answer: str | None
) -> None:
    assert _value(_task(*labels), response) == answer


@given(
    st.lists(st.sampled_from(["yes", "no", "maybe", "know", "yesterday", "not", "I", "x1"])),
    st.sampled_from([" ", "  ", "\n", "\t"]),
)
def test_plain_words_are_read_as_a_split_would(words: list[str], gap: str) -> None:
    found = next((word for word in words if word in ("yes", "no", "maybe")), None)
    if found is not None:
        before = words[: words.index(found)]
        found = None if before and before[-1] == "not" else found
    assert _value(_task("yes", "no", "maybe"), gap.join(words)) == found


def test_all_words_of_a_label_mean_its_first() -> None:
    task = _task(labels=NLI)
    assert read(task, "They contradict.", "contradiction") == Reading("contradiction", 1.0)
    assert read(task, "They contradict.", "neutral") == Reading("contradiction", 0.0)


def test_case_counts_where_the_task_says_so() -> None:
    task = _task("US", "UK", case_sensitive=True)
    assert _value(task, "Between us: the UK") == "UK"
    assert _value(_task("US", "UK"), "Between us: the UK") == "US"
    assert read(_task(match="contains"), "paris", "Paris").credit == 1
    assert read(_task(match="contains", case_sensitive=True), "paris", "Paris").credit == 0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("(B) because", "(b)"),
        ("b", "(b)"),
        (' "(c)"', "(c)"),
        ("**b**", "(b)"),
        ("(a)The first", "(a)"),
        ("[B]", "(b)"),
        ("apple (b)", None),
        ("The answer is (b)", None),
        (".b", None),
        ("(", None),
        ("", None),
    ],
)
def test_starts_with_reads_the_label_that_opens_the_response(
    response: str, answer: str | None
) -> None:
    assert _value(_task(labels=OPTIONS, match="starts-with"), response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("yes", "yes"),
        (" “Yes!”\n", "yes"),
        ("'no'.", "no"),
        ("in  between", "in between"),
        ("yes no", None),
        ("yes indeed", None),
        ("yess", None),
        ("...", None),
        ("", None),
    ],
)
def test_exact_takes_the_whole_response(response: str, answer: str | None) -> None:
    assert _value(_task("yes", "no", "in between", match="exact"), response) == answer


def test_exact_without_labels_compares_with_the_right_answer() -> None:
    task = _task(match="exact")
    assert read(task, "Paris.", "paris") == Reading("paris", 1.0)
    assert read(task, "Paris, I think.", "Paris") == Reading("Paris, I think", 0.0)
    assert read(task, " 12,345 ", "12345").credit == 1
    assert read(task, '"."', "?") == Reading(None, 0.0)


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("It is 12.", "12", True),
        ("It is 123.", "12", False),
        ("It is 12.5 or 3,12.", "12", False),
        ("It is -12, or 5-12", "12", True),
        ("It is -12", "12", False),
        ("It is −12", "-12", True),
        ("5-12", "-12", False),
        ("12,345", "12345", True),
        ("12345", "12,345", True),
        ("1,234,567.", "1234567", True),
        ("12,345", "345", False),
        ("12,3456", "12345", False),
        ("12345", "1,2345", False),
        ("the breast\ncancer gene", "breast cancer", True),
        ("breast cancers", "breast cancer", False),
        ("not Paris", "Paris", False),
        ("not London, it is Paris, not Rome", "Paris", True),
        ("not Paris; Paris", "Paris", True),
        ("no evidence", "no evidence", True),
        ("f(x) = a+b", "f(x) = a+b", True),
    ],
)
def test_contains_finds_the_right_answer_as_whole_words(
    response: str, gold: str, right: bool
) -> None:
    assert read(_task(match="contains"), response, gold).credit == right


def test_contains_reads_a_wrong_answer_by_the_pattern_of_answers() -> None:
    task = _task(answer=r"\d+")
    assert task.match == "contains"
    assert read(task, "maybe 7", "12") == Reading("7", 0.0)
    assert read(task, "seven", "12") == Reading(None, 0.0)
    assert read(task, "7 or 12", "12") == Reading("12", 1.0)


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("3.8", 3.8),
        ("The score is 4.", 4.0),
        ("Score:-2 or 3", -2.0),
        ("−2", -2.0),
        ("- 2", 2.0),
        ("+.5", 0.5),
        ("4/5", 4.0),
        ("$1,234.50", 1234.5),
        ("1e-3", 0.001),
        ("the 1st word2vec: 4", 4.0),
        ("4\n5", 4.0),
        ("3,5", None),
        ("1.2.3", None),
        ("12,3456", None),
        ("...5", None),
        ("five", None),
        ("1e999", None),
        ("", None),
    ],
)
def test_reads_the_first_number(response: str, number: float | None) -> None:
    assert _value(_task(match="number"), response) == number


def test_a_number_out_of_range_is_unreadable_and_the_paper_clips_it() -> None:
    task = _task(match="number", range=(1, 5))
    assert read(task, "5.0", "5.0") == Reading(5.0, 1.0)
    assert read(task, "7", "5.0") == Reading(None, 0.0)
    assert read(task, "7", "5.0", "reference") == Reading(5.0, 1.0)
    assert read(task, "none", "5.0", "reference") == Reading(0.0, 0.0)


def test_a_row_earns_nothing_towards_a_correlation() -> None:
    task = _task(match="number", metric="spearman")
    assert read(task, "4.20", "4.2") == Reading(4.2, None)
    assert read(task, "four", "4.2") == Reading(None, None)
    assert read(task, "four", "4.2", "reference") == Reading(0.0, None)
    assert read(_task(match="number"), "4.20", "4.2") == Reading(4.2, 1.0)


def _squad_f1(response: str, gold: str) -> float:
    """F1 from precision and recall of the shared tokens, each of which is paired off once."""

    def tokens(text: str) -> list[str]:
        text = re.sub(r"[^a-z0-9\s]", "", text.lower())
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    predicted, right = tokens(response), tokens(gold)
    rest, shared = list(right), 0
    for token in predicted:
        if token in rest:
            rest.remove(token)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(right)
    return 2 * precision * recall / (precision + recall)


_PHRASES = st.lists(
    st.sampled_from(["the", "A", "an", "cat", "Cat", "sat,", "sat", "it's", "(mat)", "-", "then"])
).map(" ".join)


@given(_PHRASES, _PHRASES)
def test_token_f1_is_that_of_squad(response: str, gold: str) -> None:
    reading = read(_task(match="token-f1", metric="f1"), response, gold)
    assert reading.credit == pytest.approx(_squad_f1(response, gold), abs=1e-12)


def test_token_f1_counts_tokens_as_often_as_they_occur() -> None:
    task = _task(match="token-f1", metric="f1")
    assert read(task, " The cat, the cat! ", "cat") == Reading(
        "The cat, the cat!", pytest.approx(2 / 3)
    )
    assert read(task, "the ...", "cat") == Reading(None, 0.0)


@pytest.mark.parametrize(
    ("task", "response", "gold", "strict", "reference"),
    [
        (_task("no", "yes"), "I know: yes", "no", "yes", "no"),
        (_task("no", "yes"), "Yes, not no", "no", "yes", "no"),
        (_task(labels=NLI), "does not ENTAIL", "entailment", None, "entailment"),
        (_task("World", "Sports"), "underworld", "World", None, "World"),
        (_task(*DISCO), DISCO[2], DISCO[1], DISCO[2], DISCO[1]),
        (_task("0", "1"), "10", "0", None, "0"),
        (_task("US", "UK", case_sensitive=True), "us, UK", "US", "UK", "US"),
        (_task(labels=OPTIONS, match="starts-with"), " Apple", "(a)", None, "(a)"),
        (_task(labels=OPTIONS, match="starts-with"), "[b]", "(a)", "(b)", None),
        (_task(match="contains"), "Parisian", "Paris", "Parisian", "Paris"),
        (_task(match="number"), "-3", "3", -3.0, 3.0),
        (_task(match="number"), "-3.5", "3", -3.5, -3.5),
    ],
)
def test_reference_mode_reads_as_the_paper_does(
    task: Task, response: str, gold: str, strict: object, reference: object
) -> None:
    assert read(task, response, gold).value == strict
    reading = read(task, response, gold, "reference")
    assert reading.value == reference
    assert reading.credit == (str(reference) in (gold, f"{gold}.0"))


def test_reference_mode_compares_words_with_characters() -> None:
    # Of the words {a, cat, sat} and the characters {c, a, t}, "a" is shared.
    task = _task(match="token-f1", metric="f1")
    assert read(task, "A cat sat", "cat", "reference").credit == pytest.approx(1 / 3)
    assert read(task, "cat", "cat", "reference").credit == 0
    assert read(task, "cat", "cat").credit == 1


CLOSED = [
    _task("positive", "negative"),
    _task("no", "yes", "not plausible", "plausible"),
    _task("in favor", "favor", "in favor of it"),
    _task(*DISCO),
    _task("0", "1", "10", "12345"),
    _task("North America", "North", "America"),
    _task(labels=OPTIONS),
    _task("a", "d", "a b"),
    _task("one", "not one b"),
    _task("US", "us all", case_sensitive=True),
    _task("STRASSE", "weg"),
]
TASKS = [
    *CLOSED,
    _task(labels=OPTIONS, match="starts-with"),
    _task("yes", "no", "no one", match="starts-with"),
    _task("1", "10", "1.5", match="starts-with"),
    _task("yes", "no", match="exact"),
    _task(match="contains"),
    _task(match="exact"),
    _task(match="number"),
    _task(match="number", range=(0, 5)),
    _task(match="token-f1", metric="f1"),
]


@st.composite
def _responses(draw: st.DrawFn) -> tuple[Task, str]:
    """A task, and a response made of pieces of its labels and of what joins or parts words."""
    task = draw(st.sampled_from(TASKS))
    words = [word for words in task.words for word in words] or ["5", "12345", "one"]
    pieces = [word[:end] for word in words for end in range(1, len(word) + 1)]
    pieces += [word[start:] for word in words for start in range(1, len(word))]
    joints = [*" \n.,'’\"(-−_+ae0159ß", ", ", "not ", "n't ", "1,234", ",345", ".5", "e-3", "K"]
    piece = st.sampled_from([*words, *words]) | st.sampled_from(pieces) | st.sampled_from(joints)
    return task, "".join(draw(st.lists(piece, max_size=12)))


@settings(max_examples=500)
@given(_responses(), st.sampled_from(["0", "1", "5", "12345"]))
@example((_task("in favor", "favor", "in favor of it"), "in favor of it"), "0")
@example((_task(match="number"), "1,234,567.5e-3 "), "0")
def test_a_final_reading_stays_whatever_is_written_after_it(
    drawn: tuple[Task, str], gold: str
) -> None:
    task, response = drawn
    right = gold if task.match == "number" or not task.words else task.words[0][0]
    reading = read(task, response, right)
    for end in range(len(response)):
        if is_final(task, response[:end]):
            assert read(task, response[:end], right) == reading
            assert is_final(task, response)


@pytest.mark.parametrize("task", CLOSED)
def test_a_label_is_final_as_soon_as_its_sentence_ends(task: Task) -> None:
    for words in task.words:
        for word in words:
            assert is_final(task, f"{word}.\n")
            assert is_final(task, f"The answer: {word}. ")


@pytest.mark.parametrize(
    ("task", "text", "final"),
    [
        (_task("positive", "negative"), "positive", False),
        (_task("positive", "negative"), "positive.", True),
        (_task("positive", "negative"), "Positive\n", True),
        (_task("positive", "negative"), "not positive ", True),
        (_task("positive", "negative"), "The answer", False),
        (_task("yes", "no"), "yes, ", True),
        (_task("yes", "no"), "yes,", True),
        (_task("yes", "no"), "no", False),
        (_task("0", "1"), "1.", False),
        (_task("0", "1"), "1. ", True),
        (_task("0", "1"), "1)", True),
        (_task("North", "North America"), "North ", False),
        (_task("North", "North America"), "North Am", False),
        (_task("North", "North America"), "North A-", True),
        (_task("one", "not one b"), "not one ", False),
        (_task(*DISCO), "single_conn_inner", False),
        (_task(*DISCO), "single_conn_inner\n", True),
        (_task(labels=OPTIONS), "(a)", True),
        (_task(labels=OPTIONS, match="starts-with"), "(a", False),
        (_task(labels=OPTIONS, match="starts-with"), "( (", False),
        (_task(labels=OPTIONS, match="starts-with"), "The", True),
        (_task("yes", "no", match="starts-with"), "The", True),
        (_task("yes", "no", match="starts-with"), "N", False),
        (_task("yes", "no", match="starts-with"), "Now", True),
        (_task(match="number"), "4", False),
        (_task(match="number"), "4.", False),
        (_task(match="number"), "4.2", False),
        (_task(match="number"), "4.2 ", True),
        (_task(match="number"), "4.\n", True),
        (_task(match="number"), "four ", False),
        (_task("yes", "no", match="exact"), "yes\n", False),
        (_task(match="exact"), "yes\n", False),
        (_task(match="contains"), "Paris.\n\n", False),
        (_task(match="token-f1", metric="f1"), "Paris.\n\n", False),
    ],
)
def test_tells_when_a_reading_is_final(task: Task, text: str, final: bool) -> None:
    assert is_final(task, text) is final
