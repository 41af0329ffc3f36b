"""What a task is: where its rows come from, how they are asked, how answers are read and scored.

A task is data, after inspect_ai's ``Task``: a small YAML file, or the same as an object. Unknown
keys are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.scoring.matching import MATCHERS, Matcher
from starmerge_models.evaluation.scoring.metrics import DEFAULT, METRICS, Metric
from starmerge_models.evaluation.tasks.sources import (
    Data,
    FileSource,
    GeneratorSource,
    HubSource,
    Row,
    Sample,
    Split,
    absence,
    describe,
    look_up,
    read_rows,
    text_of,
)
from starmerge_models.plugins import Registry

Chat = Literal["auto", "none", "template", "template-without-generation-prompt"]
"""Whether a prompt is a message of the tokenizer's chat template; auto: if it has one."""


def _known_in(registry: Registry[Any]) -> AfterValidator:
    """Return what makes sure that a registry knows a name."""

    def check(name: str) -> str:
        try:
            registry.find(name)
        except StarmergeError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


MatcherName = Annotated[str, _known_in(MATCHERS)]
"""How a response is read: a matcher of :mod:`starmerge_models.evaluation.scoring.matching` or of an
installed package, or one of a file, ``path/to/file.py:NAME``."""

MetricName = Annotated[str, _known_in(METRICS)]
"""What a score is: a metric of :mod:`starmerge_models.evaluation.scoring.metrics` or of an
installed package, or one of a file, ``path/to/file.py:NAME``."""

_PATH = re.compile(r"\w+(\[\d+\]|\.\w+)*")


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    id: str
    """Where the row stands in its source: "validation/17"."""
    fields: Mapping[str, Any]
    """The row; the prompt is filled from it."""
    label: str
    """The right answer in words: a label's first word, a text, or a number."""
    choices: tuple[str, ...] = ()
    """The answers to rank, the label among them; without any, the row cannot be ranked."""


class Gold(Data):
    """Where a row's right answer stands, if it is but a part of a field."""

    field: str
    pattern: str
    """Regular expression whose first group is the answer."""

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            if re.compile(pattern).groups:
                return pattern
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        raise ValueError("needs a group, in parentheses")


Labels = list[str | int] | dict[str, str | tuple[str, ...]] | None
"""How a file may write labels."""


def as_words(labels: object) -> object:
    """Bring the shorter ways to write labels into the long one: data value → its words."""
    if isinstance(labels, list | tuple):
        labels = {label: label for label in labels}
    if not isinstance(labels, Mapping):
        return labels
    for value in (*labels, *labels.values()):
        if isinstance(value, bool):
            raise ValueError(f"{str(value).lower()} stands for yes, no, true or false: quote it")
    return {
        str(value) if isinstance(value, int) else value: (words,)
        if isinstance(words, str)
        else words
        for value, words in labels.items()
    }


class Task(Data):
    """A task: rows with one right answer each.

    Example:
        .. code-block:: yaml

            description: Do two questions ask the same thing?
            source: {hub: nyu-mll/glue, config: qqp, split: validation, train_split: train}
            sample: {kind: balanced, n: 1000}
            prompt: |-
              Do these questions ask the same thing? Answer yes or no.
              {question1}
              {question2}
            labels: {"0": "no", "1": "yes"}
    """

    kind: Literal["text"] = "text"
    name: str = Field(min_length=1)
    """In tables, and by which a fine-tune is matched to it."""
    description: str = ""
    source: HubSource | FileSource | GeneratorSource
    sample: Sample = Sample()
    prompt: str
    """What is asked; ``{field}``, ``{field[0]}`` or ``{field.part}`` stand for those of a row."""
    passage: str | None = None
    """Field that loses its end when a prompt is too long; by default the longest of the row."""
    chat: Chat = "auto"
    gold: str | Gold = "label"
    """Field of the right answer, such as ``label`` or ``output[0]``."""
    labels: Annotated[
        dict[str, tuple[str, ...]] | None, BeforeValidator(as_words, json_schema_input_type=Labels)
    ] = None
    """A closed set of answers: what the rows have in ``gold``, and the words that say so, the first
    of which is trained on and ranked. Without, any text or number may be right."""
    choices: str | None = None
    """Field with a row's own answers to rank, for tasks without labels."""
    match: MatcherName = "whole-word"
    """How an answer is read, see :mod:`starmerge_models.evaluation.scoring.matching`; by default
    ``whole-word`` with labels and ``contains`` without."""
    answer: str = r"\w+"
    """For ``contains``: regular expression of what counts as an answer at all."""
    range: tuple[float, float] | None = None
    """Least and greatest answer, for ``number``."""
    metric: MetricName = DEFAULT
    max_new_tokens: int = Field(default=10, ge=1)
    """Length of an answer; 10 is the rule of arXiv 2502.10339."""
    case_sensitive: bool = False

    @model_validator(mode="before")
    @classmethod
    def _match_by_labels(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("labels") is None:
            return {"match": "contains", **data}
        return data

    @model_validator(mode="after")
    def _parts_fit(self) -> Task:
        places = list(_placeholders(self.prompt))
        if self.passage is not None and self.passage not in places:
            raise ValueError(f"passage {self.passage!r} is not in the prompt: it has {places}")
        try:
            re.compile(self.answer)
        except re.error as error:
            raise ValueError(f"answer: not a regular expression: {error}") from error
        closed = self.labels is not None
        self.read_by.check(closed=closed)
        if self.labels is not None:
            if self.choices is not None:
                raise ValueError("choices are for tasks without labels: labels are ranked")
            check_words(self.labels)
        if self.range is not None and not self.read_by.reads_numbers:
            raise ValueError("range is for match 'number'")
        self.scored_by.check(self.read_by, closed=closed)
        return self

    @cached_property
    def read_by(self) -> Matcher:
        """The matcher itself."""
        return MATCHERS.find(self.match)

    @cached_property
    def scored_by(self) -> Metric:
        """The metric itself."""
        return METRICS.find(self.metric)

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The words of each label, in their order; none for tasks without labels."""
        return tuple(self.labels.values()) if self.labels is not None else ()

    @property
    def answers(self) -> str:
        """What is answered, in a word or two, for lists."""
        return f"{len(self.words)} labels" if self.words else self.read_by.name

    @property
    def where(self) -> str:
        """Where the rows come from, for lists."""
        if isinstance(self.source, GeneratorSource):
            return "made at run time"
        return describe(self.source)

    def beside(self, folder: Path) -> Task:
        """Return the task with the paths of its source beginning at a folder."""
        return self.model_copy(update={"source": self.source.beside(folder)})

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return the rows of a split, sampled and shuffled with the sample's seed.

        Args:
            split: "test": the rows to score; "train": those to train on, of which all are taken.
            limit: How many at most.

        Raises:
            UsageError: There are no such rows, they cannot be had, or one lacks a field or has a
                label that the task does not know.
        """
        found = [_example(self, place, fields) for place, fields in self._rows(split)]
        if split == "train":
            return self.sample.shuffled(found)[:limit]
        return self.sample.take(found, lambda row: row.label, limit)

    def questions(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return rows to ask without looking at their answers, which they need not have.

        They come shuffled with the sample's seed. Their label is the empty text.

        Args:
            split: "test": the rows to score; "train": those to train on.
            limit: How many at most.

        Raises:
            UsageError: There are no such rows, they cannot be had, or one lacks a field.
        """
        rows = self.sample.shuffled(self._rows(split))[:limit]
        for place, fields in rows:
            _check_prompt(self, place, fields)
        return [Example(place, fields, "") for place, fields in rows]

    def _rows(self, split: Split) -> list[Row]:
        rows = read_rows(self.source, split, self.name)
        if not rows:
            raise UsageError(
                f"Task {self.name} has no rows for {split}ing in {describe(self.source)}. Give "
                "more, or name a split or a file that has some."
            )
        return rows

    def ask(self, fields: Mapping[str, Any], passage: str | None = None) -> str:
        """Return the prompt of a row.

        Args:
            fields: The row.
            passage: What stands in place of the passage, if it is to be shortened.

        Raises:
            LookupError: The row lacks a field of the prompt.
        """
        place = self.passage_of(fields)
        parts = []
        for literal, name, _, _ in Formatter().parse(self.prompt):
            parts.append(literal)
            if name is not None and name == place and passage is not None:
                parts.append(passage)
            elif name is not None:
                parts.append(text_of(look_up(fields, name)))
        return "".join(parts)

    def passage_text(self, fields: Mapping[str, Any]) -> str:
        """Return the passage of a row, which a too long prompt loses the end of."""
        place = self.passage_of(fields)
        return "" if place is None else text_of(look_up(fields, place))

    def passage_of(self, fields: Mapping[str, Any]) -> str | None:
        """Return which field a too long prompt is shortened by; None if it has no fields."""
        if self.passage is not None:
            return self.passage
        places = list(_placeholders(self.prompt))
        return max(places, key=lambda place: len(text_of(look_up(fields, place))), default=None)

    def fingerprint(self, examples: list[Example]) -> str:
        """Return a hash of all that decides what a model is asked, and how it is read."""
        spec = self.model_dump(mode="json", exclude={"name", "description", "source", "sample"})
        spec |= {
            key: [found.name, found_in.record()]
            for key, found, found_in in (
                ("match", self.read_by, MATCHERS.origin(self.read_by)),
                ("metric", self.scored_by, METRICS.origin(self.scored_by)),
            )
            if found_in is not None
        }
        rows = [(row.id, dict(row.fields), row.label, row.choices) for row in examples]
        content = json.dumps([spec, rows], sort_keys=True, default=str)
        return str(blake3(content.encode()).hexdigest())


def _placeholders(prompt: str) -> Iterator[str]:
    for _, name, spec, conversion in Formatter().parse(prompt):
        if name is not None:
            if not _PATH.fullmatch(name) or spec or conversion:
                raise ValueError(
                    f"prompt: {{{name}}} is no field such as {{text}}, {{list[0]}} or "
                    "{part.text}; write {{ and }} for braces"
                )
            yield name


def check_words(labels: Mapping[str, tuple[str, ...]]) -> None:
    """Make sure that there are two labels at least, each with words of its own.

    Raises:
        ValueError: There are fewer, one has no word, or two share one.
    """
    if len(labels) < 2:
        raise ValueError("labels: there must be two at least")
    owners: dict[str, str] = {}
    for value, words in labels.items():
        if not words or not all(word.strip() for word in words):
            raise ValueError(f"labels: {value!r} has no word")
        for word in words:
            if owners.setdefault(word.casefold(), value) != value:
                other = owners[word.casefold()]
                raise ValueError(f"labels: {word!r} stands for both {other!r} and {value!r}")


def _example(task: Task, place: str, fields: dict[str, Any]) -> Example:
    """Find a row's right answer, and make sure that it can be asked.

    Raises:
        UsageError: A field is missing, or the label is unknown.
    """
    where = _check_prompt(task, place, fields)
    try:
        gold = _gold(task, fields, where)
        own = look_up(fields, task.choices) if task.choices is not None else ()
    except LookupError as error:
        raise _no_field(where, fields, error) from error
    if task.labels is not None:
        words = _words_of(task, gold, where)
        return Example(place, fields, words[0], tuple(words[0] for words in task.words))
    try:
        gold = task.read_by.gold(gold)
    except ValueError as error:
        raise UsageError(f"{where}: {error}.") from error
    if task.read_by.reads_numbers:
        return Example(place, fields, gold)
    is_list = isinstance(own, list | tuple)
    if not is_list or not all(isinstance(choice, str) for choice in own):
        raise UsageError(f"{where}: {task.choices!r} is no list of texts.")
    choices = tuple(dict.fromkeys(own))
    if choices and gold not in choices:
        raise UsageError(f"{where}: the right answer {gold!r} is not in {task.choices!r}.")
    return Example(place, fields, gold, choices)


def _check_prompt(task: Task, place: str, fields: dict[str, Any]) -> str:
    """Make sure that a row can be asked; return what errors call it.

    Raises:
        UsageError: A field of the prompt is missing or empty, or is no text.
    """
    where = f"Task {task.name}, row {place}"
    try:
        task.ask(fields).encode()
        for path in _placeholders(task.prompt):
            nothing = absence(look_up(fields, path))
            if nothing is not None:
                raise UsageError(f"{where}: the field {path!r} is empty ({nothing}).")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: the prompt holds half a character: {error}.") from error
    except LookupError as error:
        raise _no_field(where, fields, error) from error
    return where


def _no_field(where: str, fields: dict[str, Any], error: LookupError) -> UsageError:
    known = ", ".join(map(str, fields))
    return UsageError(f"{where}: there is no field {error.args[0]!r}. It has: {known}.")


def _gold(task: Task, fields: dict[str, Any], where: str) -> str:
    field = task.gold.field if isinstance(task.gold, Gold) else task.gold
    nothing = absence(look_up(fields, field))
    if nothing is not None:
        raise UsageError(
            f"{where}: the right answer {field!r} is empty ({nothing}). Fill it in, or leave the "
            "row out."
        )
    text = text_of(look_up(fields, field))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {field!r} holds half a character: {error}.") from error
    if not isinstance(task.gold, Gold):
        return text
    found = re.search(task.gold.pattern, text)
    if found is None or found[1] is None:
        raise UsageError(f"{where}: the pattern of 'gold' finds nothing in {text!r}.")
    return str(found[1])


def _words_of(task: Task, gold: str, where: str) -> tuple[str, ...]:
    """Return the words of the label that the data has as ``gold``; it is never guessed."""
    assert task.labels is not None
    if gold in task.labels:
        return task.labels[gold]
    for value, words in task.labels.items():
        if not task.case_sensitive and value.casefold() == gold.strip().casefold():
            return words
    raise UsageError(
        f"{where}: the label {gold!r} is none of the task's: {', '.join(map(repr, task.labels))}."
    )
