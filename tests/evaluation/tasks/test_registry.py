"""The tasks of arXiv 2502.10339 as data, on small files with the columns of the real datasets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from starmerge_models.errors import UsageError
from starmerge_models.evaluation import tasks
from starmerge_models.evaluation.scoring import matching
from starmerge_models.evaluation.tasks.sources import HubSource, Sample
from starmerge_models.evaluation.tasks.task import Example, Task

Labels = Mapping[Any, str]
"""What the dataset has, with its type, and the answer in words; in the paper's order."""


@dataclass(frozen=True)
class Published:
    """A row of the paper's protocol."""

    dataset: str
    config: str | None
    split: str
    sample: Sample
    labels: Labels = field(default_factory=dict)
    metric: str = "accuracy"
    max_new_tokens: int = 10


ALL = Sample()
GLUE, SUPER_GLUE, LORAS = "nyu-mll/glue", "aps/super_glue", "Lots-of-LoRAs/task"


def balanced(n: int) -> Sample:
    return Sample(kind="balanced", n=n)


def random(n: int) -> Sample:
    return Sample(kind="random", n=n)


def loras(task: str, n: int | None, labels: Labels | None = None, **rest: Any) -> Published:
    sample = random(n) if n else ALL
    return Published(LORAS + task, None, "test", sample, labels or {}, **rest)


def same(*words: str) -> Labels:
    return {word: word for word in words}


NO_YES, YES_NO = {0: "no", 1: "yes"}, {1: "yes", 0: "no"}
NO_YES_REVERSED = {1: "no", 0: "yes"}
SENTIMENT = {1: "positive", 0: "negative"}
ENDINGS = {"0": "0", "1": "1", "2": "2", "3": "3"}
SECTIONS = {0: "World", 1: "Sports", 2: "Business", 3: "Sci/Tech"}
DEVICES = same(
    "SINGLE_S_COORD",
    "SINGLE_CATAPHORA",
    "SINGLE_CONN_INNER",
    "SINGLE_APPOSITION",
    "SINGLE_VP_COORD",
    "SINGLE_CONN_START",
    "PAIR_ANAPHORA",
    "PAIR_CONN",
    "SINGLE_RELATIVE",
    "SINGLE_CONN_INNER_ANAPHORA",
    "SINGLE_S_COORD_ANAPHORA",
    "PAIR_CONN_ANAPHORA",
    "PAIR_NONE",
)

B = balanced(150)
TRAIN, VAL, TEST = "train", "validation", "test"
MNLI = {0: "entailment", 1: "neutral", 2: "contradiction"}
LLAMA_MNLI = {0: "entail", 1: "neither", 2: "contradict"}

PROTOCOL = {
    "flan-t5/qqp": Published(GLUE, "qqp", VAL, balanced(1000), NO_YES),
    "flan-t5/mnli": Published(GLUE, "mnli_matched", VAL, balanced(400), MNLI),
    "flan-t5/mrpc": Published(GLUE, "mrpc", TEST, balanced(1000), NO_YES),
    "flan-t5/qnli": Published(GLUE, "qnli", VAL, balanced(1000), NO_YES_REVERSED),
    "flan-t5/rte": Published(GLUE, "rte", VAL, balanced(1000), NO_YES_REVERSED),
    "flan-t5/sst2": Published(GLUE, "sst2", VAL, ALL, SENTIMENT),
    "flan-t5/stsb": Published(GLUE, "stsb", VAL, ALL, metric="spearman"),
    "flan-t5/imdb": Published("stanfordnlp/imdb", None, TEST, balanced(1000), SENTIMENT),
    "flan-t5/finance": Published(
        "takala/financial_phrasebank",
        "sentences_allagree",
        TRAIN,
        ALL,
        {2: "positive", 1: "neutral", 0: "negative"},
    ),
    "flan-t5/agnews": Published("SetFit/ag_news", None, TEST, balanced(50), SECTIONS),
    "flan-t5/hella": Published("Rowan/hellaswag", None, VAL, balanced(40), ENDINGS),
    "flan-t5/boolq": Published(
        "google/boolq", None, VAL, balanced(80), {True: "true", False: "false"}
    ),
    "flan-t5/piqa": Published(
        "ybisk/piqa", None, VAL, balanced(1000), {1: "Option 2", 0: "Option 1"}
    ),
    "llama-3.2/cola": Published(GLUE, "cola", VAL, B, NO_YES),
    "llama-3.2/mrpc": Published(GLUE, "mrpc", TEST, B, NO_YES),
    "llama-3.2/wic": Published(SUPER_GLUE, "wic", VAL, B, NO_YES),
    "llama-3.2/multirc": Published(SUPER_GLUE, "multirc", VAL, B, NO_YES),
    "llama-3.2/rte": Published(GLUE, "rte", VAL, B, NO_YES_REVERSED),
    "llama-3.2/wsc": Published(SUPER_GLUE, "wsc", VAL, B, YES_NO),
    "llama-3.2/qqp": Published(GLUE, "qqp", VAL, B, YES_NO),
    "llama-3.2/sst2": Published(GLUE, "sst2", VAL, B, SENTIMENT),
    "llama-3.2/qnli": Published(GLUE, "qnli", VAL, B, {1: "false", 0: "true"}),
    "llama-3.2/mnli": Published(GLUE, "mnli_matched", VAL, B, LLAMA_MNLI),
    "llama-3.2/copa": Published(SUPER_GLUE, "copa", VAL, B, {1: "choice2", 0: "choice1"}),
    "llama-3.2/cb": Published(SUPER_GLUE, "cb", VAL, ALL, {0: "yes", 1: "no", 2: "maybe"}),
    "llama-3.2/stsb": Published(GLUE, "stsb", VAL, random(200), metric="spearman"),
    "mistral-nli/ethos": loras(
        "1605_ethos_text_classification",
        None,
        {"not_violence": "not violence", "violence": "violence"},
    ),
    "mistral-nli/wino": loras("1391_winogrande_easy_answer_generation", 200, same("A", "B")),
    "mistral-nli/stereo": loras(
        "280_stereoset_classification_stereotype_type",
        200,
        same("gender", "profession", "race", "religion"),
    ),
    "mistral-nli/causal": loras("391_causal_relationship", 200, same("not plausible", "plausible")),
    "mistral-nli/answerable": loras(
        "290_tellmewhy_question_answerability",
        200,
        {"Not Answerable": "not answerable", "Answerable": "answerable"},
    ),
    "mistral-nli/qasc": loras("039_qasc_find_overlapping_words", 200, metric="f1"),
    "mistral-nli/dream": loras(
        "247_dream_answer_generation",
        200,
        {"(A) On Monday.": "(A)", "(B) Not before May.": "(B)", "(C) A week ago.": "(C)"},
    ),
    "mistral-nli/ncbi": loras(
        "1448_disease_entity_extraction_ncbi_dataset", None, max_new_tokens=20
    ),
    "mistral-nli/owant": loras("1198_atomic_classification_owant", 200, same("Yes", "No")),
    "mistral-nli/amazon": loras(
        "587_amazonfood_polarity_correction_classification", 200, same("True", "False")
    ),
    "mistral-nli/msr": loras("1341_msr_text_classification", None, same("Good", "Bad")),
    "mistral-nli/gap": loras("330_gap_answer_generation", 100, max_new_tokens=20),
    "mistral-nli/snli": loras(
        "190_snli_classification", 100, same("C", "N", "E"), max_new_tokens=2
    ),
    "mistral-nli/argue": loras(
        "513_argument_stance_classification", None, same("in favor", "against"), max_new_tokens=8
    ),
    "mistral-nli/disco": loras("564_discofuse_classification", 80, DEVICES, max_new_tokens=12),
    "mistral-nli/math": loras(
        "834_mathdataset_classification",
        100,
        same("algebra", "arithmetic", "measurement", "numbers", "probability"),
    ),
    "mistral-nli/casino": loras(
        "357_casino_classification_negotiation_small_talk", 75, same("Yes", "No")
    ),
    "mistral-nli/story": loras(
        "298_storycloze_correct_end_classification", 100, same("Yes", "No"), max_new_tokens=3
    ),
    "mistral-nli/pubmed": loras(
        "846_pubmedqa_classification", 100, same("Yes", "No"), max_new_tokens=3
    ),
    "mistral-nli/sst2": loras(
        "363_sst2_polarity_classification", 100, same("NEG", "POS"), max_new_tokens=3
    ),
}

OPEN = {
    "flan-t5/stsb": 3.2,
    "llama-3.2/stsb": 3.2,
    "mistral-nli/qasc": "salt water",
    "mistral-nli/ncbi": "hay fever",
    "mistral-nli/gap": "Aunt Jane",
}
"""A right answer for the tasks without labels, as their datasets have it."""

PAIR = {"sentence1": "Rain fell all night.", "sentence2": "It was a wet night.", "idx": 0}
TWO = {"premise": "The lid was off.", "hypothesis": "The pan was open."}

COLUMNS: dict[tuple[str, str | None], dict[str, Any]] = {
    (GLUE, "qqp"): {"question1": "Why is it cold?", "question2": "What made it cold?", "idx": 0},
    (GLUE, "mnli_matched"): {**TWO, "idx": 0},
    (GLUE, "mrpc"): PAIR,
    (GLUE, "rte"): PAIR,
    (GLUE, "stsb"): PAIR,
    (GLUE, "qnli"): {"question": "Who rowed?", "sentence": "Two men rowed over.", "idx": 0},
    (GLUE, "sst2"): {"sentence": "a slow but warm tale ", "idx": 0},
    (GLUE, "cola"): {"sentence": "The boat the men rowed sank.", "idx": 0},
    (SUPER_GLUE, "wic"): {
        "word": "bank",
        "sentence1": "The bank was shut.",
        "sentence2": "We sat on the bank.",
        "start1": 4,
        "start2": 14,
        "end1": 8,
        "end2": 18,
        "idx": 0,
    },
    (SUPER_GLUE, "multirc"): {
        "paragraph": "Ann sold the mill in May. In June it burnt.",
        "question": "Who sold it?",
        "answer": "Ann",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
    },
    (SUPER_GLUE, "wsc"): {
        "text": "Ann thanked Eve, for she had helped.",
        "span1_index": 2,
        "span2_index": 4,
        "span1_text": "Eve",
        "span2_text": "she",
        "idx": 0,
    },
    (SUPER_GLUE, "copa"): {
        "premise": "The ice broke.",
        "choice1": "It was warm.",
        "choice2": "It was dark.",
        "question": "cause",
        "idx": 0,
    },
    (SUPER_GLUE, "cb"): {**TWO, "idx": 0},
    ("stanfordnlp/imdb", None): {"text": "Two hours, well spent.<br /><br />See it."},
    ("takala/financial_phrasebank", "sentences_allagree"): {"sentence": "Sales rose by 4 % ."},
    ("SetFit/ag_news", None): {"text": "The cup goes north.", "label_text": "any"},
    ("Rowan/hellaswag", None): {
        "ind": 7,
        "activity_label": "Baking",
        "ctx_a": "A man rolls dough.",
        "ctx_b": "he",
        "ctx": "A man rolls dough. he",
        "endings": ["sings.", "cuts it.", "leaves.", "wakes."],
        "source_id": "made~up",
        "split": "val",
        "split_type": "indomain",
    },
    ("google/boolq", None): {"question": "is tin a metal", "passage": "Tin is a soft metal."},
    ("ybisk/piqa", None): {"goal": "Dry a cup.", "sol1": "Use a cloth.", "sol2": "Use soap."},
}
"""A row of each dataset, but for the right answer: the columns and types of the Hub."""

LORAS_COLUMNS = {"id": "task0-0", "input": "Definition: Say which.\n\nInput: {this}\nOutput:"}

HUB_TASKS = sorted(PROTOCOL)
CLOSED = sorted(set(PROTOCOL) - set(OPEN))


def rows_of(name: str, golds: Sequence[Any]) -> list[dict[str, Any]]:
    """Make rows as the dataset has them, with these right answers."""
    published, gold_column = PROTOCOL[name], _gold_column(name)
    if published.dataset.startswith(LORAS):
        return [{**LORAS_COLUMNS, gold_column: [gold, "another"]} for gold in golds]
    columns = COLUMNS[published.dataset, published.config]
    return [{**columns, gold_column: gold} for gold in golds]


def task_on(name: str, folder: Path, golds: Sequence[Any]) -> Task:
    """Put rows of these right answers, in a Parquet file, in place of the task's dataset."""
    file = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows_of(name, golds)), file)
    return tasks.with_rows_of({name: tasks.find_task(name)}, {name: file})[0]


def golds_of(name: str) -> list[Any]:
    return list(PROTOCOL[name].labels) or [OPEN[name]]


def words_of(name: str) -> list[str]:
    return list(PROTOCOL[name].labels.values()) or [str(OPEN[name])]


def test_the_registry_holds_the_paper_s_tasks_and_our_own() -> None:
    suites = Counter(name.partition("/")[0] for name in tasks.TASKS)
    assert suites == {"flan-t5": 13, "llama-3.2": 13, "mistral-nli": 20, "demo": 8, "results": 14}
    ours = ("demo/", "results/")
    assert set(PROTOCOL) == {name for name in tasks.TASKS if not name.startswith(ours)}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_task_is_as_published(name: str) -> None:
    task, published = tasks.find_task(name), PROTOCOL[name]
    assert isinstance(task.source, HubSource)
    part = task.source.config or task.source.data_dir
    assert (task.source.hub, part) == (published.dataset, published.config)
    assert (task.source.split, task.sample) == (published.split, published.sample)
    assert [words[0] for words in task.words] == list(published.labels.values())
    assert (task.metric, task.max_new_tokens) == (published.metric, published.max_new_tokens)
    assert task.chat == ("none" if name.startswith("flan-t5/") else "template")
    assert task.name == name.partition("/")[2]
    assert task.description


def test_a_tenth_of_the_phrase_bank_is_scored_as_in_the_paper() -> None:
    source = tasks.find_task("finance").source
    assert isinstance(source, HubSource)
    assert source.test_share == 0.1


@pytest.mark.parametrize("name", HUB_TASKS)
def test_rows_of_the_dataset_become_examples(name: str, tmp_path: Path) -> None:
    golds = golds_of(name)
    task = task_on(name, tmp_path, golds)
    examples = sorted(task.examples("test"), key=_row_number)
    assert [example.label for example in examples] == words_of(name)
    for example, row in zip(examples, rows_of(name, golds), strict=True):
        assert dict(example.fields) == row
        assert set(example.choices) == set(PROTOCOL[name].labels.values())


@pytest.mark.parametrize("name", HUB_TASKS)
def test_rows_of_a_jsonl_file_are_the_same_as_those_of_parquet(name: str, tmp_path: Path) -> None:
    golds = golds_of(name)
    lines = map(json.dumps, rows_of(name, golds))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    in_json = tasks.with_rows_of({name: tasks.find_task(name)}, {name: tmp_path / "rows.jsonl"})[0]
    in_parquet = task_on(name, tmp_path, golds)

    def content(task: Task) -> list[tuple[dict[str, Any], str, tuple[str, ...]]]:
        return [(dict(row.fields), row.label, row.choices) for row in task.examples("test")]

    assert content(in_json) == content(in_parquet)


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_prompt_shows_the_whole_row_and_says_what_to_answer(name: str, tmp_path: Path) -> None:
    task = task_on(name, tmp_path, golds_of(name))
    example = task.examples("test")[0]
    prompt = task.render(example.fields)
    for text in _texts(_shown(name)):
        assert text in prompt
    if name.startswith("mistral-nli/"):
        assert prompt == LORAS_COLUMNS["input"]  # it has its own instruction
        return
    assert "{" not in prompt
    instruction = prompt.partition("\n")[0].casefold()
    for word in words_of(name) if name in CLOSED else ["number"]:
        assert word.casefold() in instruction


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("mode", ["strict", "reference"])
def test_the_words_of_a_label_are_right_for_it_alone(
    name: str, mode: matching.Mode, tmp_path: Path
) -> None:
    task = task_on(name, tmp_path, golds_of(name))
    for example in task.examples("test"):
        for words in task.words:
            for word in words:
                reading = matching.read(task, word, example.label, mode)
                if mode == "strict" or not _hidden(task, word):
                    assert reading.value == words[0]
                    assert reading.credit == (words[0] == example.label)


@pytest.mark.parametrize("name", sorted(OPEN))
def test_the_right_answer_of_an_open_task_is_read_as_right(name: str, tmp_path: Path) -> None:
    gold = OPEN[name]
    task = task_on(name, tmp_path, [gold])
    (example,) = task.examples("test")
    reading = matching.read(task, f"{gold}", example.label)
    assert reading.value == gold
    assert reading.credit == (None if isinstance(gold, float) else 1.0)


@pytest.mark.parametrize(
    "name", [name for name in HUB_TASKS if PROTOCOL[name].sample.kind == "balanced"]
)
def test_balanced_samples_have_as_many_rows_of_each_label(name: str, tmp_path: Path) -> None:
    first, *others = golds_of(name)
    n = PROTOCOL[name].sample.n
    assert n is not None
    scarce = task_on(name, tmp_path, [first] * 2 + others * 3)
    assert _counts(scarce.examples("test")) == dict.fromkeys(words_of(name), 2)
    plenty = task_on(name, tmp_path, [first] * (n + 1) + others * (n + 2))
    assert _counts(plenty.examples("test")) == dict.fromkeys(words_of(name), n)


@pytest.mark.parametrize(
    "name", [name for name in HUB_TASKS if PROTOCOL[name].sample.kind == "random"]
)
def test_random_samples_have_n_rows(name: str, tmp_path: Path) -> None:
    n = PROTOCOL[name].sample.n
    assert n is not None
    task = task_on(name, tmp_path, golds_of(name)[:1] * (n + 1))
    assert len(task.examples("test")) == n


@pytest.mark.parametrize("name", CLOSED)
def test_a_label_that_the_task_does_not_know_is_named(name: str, tmp_path: Path) -> None:
    golds = golds_of(name)
    unknown = "perhaps so" if isinstance(golds[0], str) else 9
    kept = [] if isinstance(golds[0], bool) else golds  # a column has one type
    with pytest.raises(UsageError, match=f"{unknown}"):
        task_on(name, tmp_path, [*kept, unknown]).examples("test")


@pytest.mark.parametrize("name", HUB_TASKS)
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    (row,) = rows_of(name, golds_of(name)[:1])
    task = tasks.find_task(name)
    for key in {*_shown(name), _gold_column(name)}:
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({other: value for other, value in row.items() if other != key})
        )
        with pytest.raises(UsageError, match=f"no field '{key}"):
            tasks.with_rows_of({"t": task}, {"t": tmp_path / "rows.jsonl"})[0].examples("test")


@pytest.mark.parametrize("name", ["flan-t5/finance", "flan-t5/piqa", "llama-3.2/wic"])
def test_a_dataset_that_was_a_script_says_what_to_do(name: str) -> None:
    source = tasks.find_task(name).source
    assert isinstance(source, HubSource)
    assert source.note is not None
    assert "script" in source.note


SUITES = Path(tasks.__file__).parent / "suites"


@pytest.mark.parametrize("name", ["flan-t5", "llama-3.2", "mistral-nli"])
def test_a_suite_names_a_fine_tune_for_each_of_its_tasks(name: str) -> None:
    suite = yaml.safe_load((SUITES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert sorted(suite["tasks"]) == [task for task in HUB_TASKS if task.startswith(f"{name}/")]
    assert [f"{name}/{task}" for task in suite["models"]] == suite["tasks"]
    for numbers in suite["published"].values():
        assert numbers.keys() == {"base", "average", "ties", "tall_masks", "metagpt", "star"}


def _gold_column(name: str) -> str:
    if name.startswith("mistral-nli/"):
        return "output"
    return "answer" if name == "flan-t5/boolq" else "label"


def _row_number(example: Example) -> int:
    return int(example.id.rpartition("/")[2])


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    return dict(Counter(example.label for example in examples))


def _shown(name: str) -> dict[str, Any]:
    """Return the columns that a model must see."""
    if name.startswith("mistral-nli/"):
        return {"input": LORAS_COLUMNS["input"]}
    hidden = {"idx", "start1", "start2", "end1", "end2", "span1_index", "span2_index", "label_text"}
    hidden |= {"ind", "activity_label", "ctx_a", "ctx_b", "source_id", "split", "split_type"}
    published = PROTOCOL[name]
    columns = COLUMNS[published.dataset, published.config]
    return {key: value for key, value in columns.items() if key not in hidden}


def _texts(columns: Mapping[str, Any]) -> Iterator[str]:
    for value in columns.values():
        yield from [value] if isinstance(value, str) else value


def _hidden(task: Task, word: str) -> bool:
    """Tell whether another label's word is a part of this one: the paper's rule may read that."""
    parts = {part for words in task.words for part in words if word not in words}
    return any(part.casefold() in word.casefold() for part in parts)
