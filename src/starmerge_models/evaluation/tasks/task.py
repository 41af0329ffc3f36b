"""Tasks of text: source of the rows, prompt, parsing and scoring of the answers.

A task is data, modelled on inspect_ai's ``Task``: a small YAML file, or the same as an object.
Unknown keys are errors.
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
    describe,
    look_up,
    missing_marker,
    read_rows,
    text_of,
)
from starmerge_models.plugins import Registry

Chat = Literal["auto", "none", "template", "template-without-generation-prompt"]
"""Whether a prompt is a message of the tokenizer's chat template; auto: if it has one."""


def _known_in(registry: Registry[Any]) -> AfterValidator:
    """Return a validator that a registry has a name."""

    def check(name: str) -> str:
        try:
            registry.find(name)
        except StarmergeError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


MatcherName = Annotated[str, _known_in(MATCHERS)]
"""Name of a matcher of :mod:`starmerge_models.evaluation.scoring.matching` or of an
installed package, or one of a file, ``path/to/file.py:NAME``."""

MetricName = Annotated[str, _known_in(METRICS)]
"""Name of a metric of :mod:`starmerge_models.evaluation.scoring.metrics` or of an
installed package, or one of a file, ``path/to/file.py:NAME``."""

_PATH = re.compile(r"\w+(\[\d+\]|\.\w+)*")


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    id: str
    """The row's id in its source: "validation/17"."""
    fields: Mapping[str, Any]
    """The row's fields, which fill in the prompt."""
    label: str
    """The right answer as text: a label's first word, a text, or a number."""
    choices: tuple[str, ...] = ()
    """The answers to rank, including the label; a row without choices cannot be ranked."""


class Gold(Data):
    """The location of a row's right answer, if it is only part of a field."""

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
"""The notations of labels in a file."""


def normalise_labels(labels: object) -> object:
    """Convert the shorter notations of labels into the full one: data value → its words."""
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
    """The task's name; a fine-tune with the same name is this task's own."""
    description: str = ""
    source: HubSource | FileSource | GeneratorSource
    sample: Sample = Sample()
    prompt: str
    """The prompt; ``{field}``, ``{field[0]}`` or ``{field.part}`` are filled in from the row."""
    passage: str | None = None
    """Field that is truncated when a prompt is too long; by default the longest of the row."""
    chat: Chat = "auto"
    gold: str | Gold = "label"
    """Field of the right answer, such as ``label`` or ``output[0]``."""
    labels: Annotated[
        dict[str, tuple[str, ...]] | None,
        BeforeValidator(normalise_labels, json_schema_input_type=Labels),
    ] = None
    """A closed set of answers: the values in ``gold``, and the words for each value, the first
    of which is trained on and ranked. Without labels, any text or number may be right."""
    choices: str | None = None
    """Field with a row's own answers to rank, for tasks without labels."""
    match: MatcherName = "whole-word"
    """How answers are parsed, see :mod:`starmerge_models.evaluation.scoring.matching`; by default
    ``whole-word`` with labels and ``contains`` without."""
    answer: str = r"\w+"
    """For ``contains``: regular expression of a readable answer."""
    range: tuple[float, float] | None = None
    """Least and greatest answer, for ``number``."""
    metric: MetricName = DEFAULT
    max_new_tokens: int = Field(default=10, ge=1)
    """Most tokens of an answer; arXiv 2502.10339 uses 10."""
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
            check_labels(self.labels)
        if self.range is not None and not self.read_by.reads_numbers:
            raise ValueError("range is for match 'number'")
        self.scored_by.check(self.read_by, closed=closed)
        return self

    @cached_property
    def read_by(self) -> Matcher:
        """The matcher that ``match`` names."""
        return MATCHERS.find(self.match)

    @cached_property
    def scored_by(self) -> Metric:
        """The metric that ``metric`` names."""
        return METRICS.find(self.metric)

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The words of each label, in order; empty for tasks without labels."""
        return tuple(self.labels.values()) if self.labels is not None else ()

    @property
    def answers(self) -> str:
        """Short description of the answers, for lists."""
        return f"{len(self.words)} labels" if self.words else self.read_by.name

    @property
    def where(self) -> str:
        """Short description of the source, for lists."""
        if isinstance(self.source, GeneratorSource):
            return "made at run time"
        return describe(self.source)

    def beside(self, folder: Path) -> Task:
        """Return the task with the relative paths of its source resolved against a folder."""
        return self.model_copy(update={"source": self.source.beside(folder)})

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return the rows of a split, sampled and shuffled with the sample's seed.

        Args:
            split: "test": the sample of the rows to score; "train": all training rows.
            limit: Most rows.

        Raises:
            UsageError: There are no such rows, they cannot be read, or a row lacks a field or has
                an unknown label.
        """
        found = [_example(self, place, fields) for place, fields in self._rows(split)]
        if split == "train":
            return self.sample.shuffled(found)[:limit]
        return self.sample.take(found, lambda row: row.label, limit)

    def unlabelled_examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return rows for their prompts alone, which need no right answer.

        The rows are shuffled with the sample's seed. Their label is the empty string.

        Args:
            split: "test": the rows to score; "train": the training rows.
            limit: Most rows.

        Raises:
            UsageError: There are no such rows, they cannot be read, or a row lacks a field.
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

    def render(self, fields: Mapping[str, Any], passage: str | None = None) -> str:
        """Return the prompt of a row.

        Args:
            fields: The row.
            passage: Text that replaces the passage, to shorten the prompt.

        Raises:
            LookupError: The row lacks a field of the prompt.
        """
        place = self.passage_field(fields)
        parts = []
        for literal, name, _, _ in Formatter().parse(self.prompt):
            parts.append(literal)
            if name is not None and name == place and passage is not None:
                parts.append(passage)
            elif name is not None:
                parts.append(text_of(look_up(fields, name)))
        return "".join(parts)

    def passage_text(self, fields: Mapping[str, Any]) -> str:
        """Return the passage of a row, which is truncated when the prompt is too long."""
        place = self.passage_field(fields)
        return "" if place is None else text_of(look_up(fields, place))

    def passage_field(self, fields: Mapping[str, Any]) -> str | None:
        """Return the field that is truncated in a too long prompt; None if it has no fields."""
        if self.passage is not None:
            return self.passage
        places = list(_placeholders(self.prompt))
        return max(places, key=lambda place: len(text_of(look_up(fields, place))), default=None)

    def fingerprint(self, examples: list[Example]) -> str:
        """Return a hash of everything that determines the prompts and their parsing."""
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


def check_labels(labels: Mapping[str, tuple[str, ...]]) -> None:
    """Make sure that there are at least two labels, each with its own words.

    Raises:
        ValueError: There are fewer than two labels, a label has no word, or two share one.
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
    """Make an example from a row, with its right answer and choices.

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
    """Make sure that a row has every field of the prompt; return its name for error messages.

    Raises:
        UsageError: A field of the prompt is missing or empty, or is not valid text.
    """
    where = f"Task {task.name}, row {place}"
    try:
        task.render(fields).encode()
        for path in _placeholders(task.prompt):
            nothing = missing_marker(look_up(fields, path))
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
    nothing = missing_marker(look_up(fields, field))
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
    """Return the words of the label with the data value ``gold``."""
    assert task.labels is not None
    if gold in task.labels:
        return task.labels[gold]
    for value, words in task.labels.items():
        if not task.case_sensitive and value.casefold() == gold.strip().casefold():
            return words
    raise UsageError(
        f"{where}: the label {gold!r} is not one of the task's: "
        f"{', '.join(map(repr, task.labels))}."
    )
