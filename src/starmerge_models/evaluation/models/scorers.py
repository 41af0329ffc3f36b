"""The two scorers: greedy generation and likelihood ranking of a row's answers.

Each runs one model on all rows of one task and returns one raw response for each row, in order.
Parsing and scoring are separate steps, so that the cache can hold responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models import generation, ranking
from starmerge_models.evaluation.models.loading import context_length
from starmerge_models.evaluation.models.prompts import Prompter
from starmerge_models.evaluation.scoring.matching import Mode, is_final, read
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score
from starmerge_models.evaluation.tasks.task import Example, Task

SCORERS = {
    "generate": "greedy generation, read by the task's matcher",
    "rank": "the answer with the highest likelihood",
}
"""The scorers by their name on the command line."""

Advance = Callable[[int], None]
"""A callback that gets the number of rows that were just completed."""


@dataclass(frozen=True)
class Answer:
    """A model's response to a row."""

    response: str
    shortened: bool = False
    """Whether the passage was truncated to fit into the model's context."""


class Backend(Protocol):
    """A loaded model with the two operations of the scorers."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, from transformers."""

    @property
    def context(self) -> int | None:
        """Number of tokens that the model can attend to."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go to an encoder."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        is_final: Callable[[str], bool],
        batch_size: int | None,
        advance: Advance,
    ) -> list[str]:
        """Return the greedy continuation of each prompt as text."""

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        batch_size: int | None,
        advance: Advance,
    ) -> list[list[float]]:
        """Return the log-likelihood (nats) of each continuation of each prompt."""


@dataclass(frozen=True)
class LocalModel:
    """A transformers model in this process."""

    model: Any
    tokenizer: Any

    @property
    def context(self) -> int | None:
        """Number of tokens that the model can attend to."""
        return context_length(self.model, self.tokenizer)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go to an encoder."""
        return bool(self.model.config.is_encoder_decoder)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        is_final: Callable[[str], bool],
        batch_size: int | None,
        advance: Advance,
    ) -> list[str]:
        """See :func:`starmerge_models.evaluation.models.generation.generate`."""
        return generation.generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            is_final=is_final,
            batch_size=batch_size,
            advance=advance,
        )

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        batch_size: int | None,
        advance: Advance,
    ) -> list[list[float]]:
        """See :func:`starmerge_models.evaluation.models.ranking.log_likelihoods`."""
        return ranking.log_likelihoods(
            self.model,
            self.tokenizer,
            prompts,
            continuations,
            batch_size=batch_size,
            advance=advance,
        )


def prompter_of(model: Backend) -> Prompter:
    """Return the prompter of a model."""
    return Prompter(model.tokenizer, model.context, model.is_encoder_decoder)


def check_scorer(scorer: str, task: Task, examples: Sequence[Example]) -> None:
    """Make sure that a scorer fits a task.

    Raises:
        UsageError: A row has no answers to rank.
    """
    if scorer == "rank":
        for example in examples:
            if not example.choices:
                raise UsageError(
                    f"Task {task.name}, row {example.id}: there are no answers to rank. Give the "
                    "task labels or choices, or use the scorer generate."
                )


def run_scorer(
    model: Backend,
    task: Task,
    examples: Sequence[Example],
    scorer: str = "generate",
    *,
    mode: Mode = "strict",
    batch_size: int | None = None,
    advance: Advance,
) -> list[Answer]:
    """Run a model on the rows of a task.

    Generation stops at the end-of-sequence token, at the task's ``max_new_tokens``, and, in the
    mode ``strict``, as soon as no further text can change the parsed answer. In ranking, a choice's
    log-likelihood is the sum over its tokens and the end-of-sequence token: without the latter, a
    choice that is a prefix of another would always win against it. Of equally likely choices, the
    first wins.

    Args:
        model: The model.
        task: The task.
        examples: The rows.
        scorer: A name of :data:`SCORERS`.
        mode: How the responses will be parsed.
        batch_size: Most rows of a batch; None: as many as fit.
        advance: Called with the number of rows that were just completed.

    Returns:
        For each row, the generated text or the most likely choice.
    """
    prompter = prompter_of(model)
    if scorer == "rank":
        options = [[prompter.answer(choice) for choice in row.choices] for row in examples]
        prompts = [
            prompter.prompt(task, row, max(map(len, own)))
            for row, own in zip(examples, options, strict=True)
        ]
        likelihoods = model.log_likelihoods(
            [prompt.ids for prompt in prompts],
            options,
            batch_size=batch_size,
            advance=advance,
        )
        texts = [
            example.choices[max(range(len(scores)), key=scores.__getitem__)]
            for example, scores in zip(examples, likelihoods, strict=True)
        ]
    else:
        prompts = [prompter.prompt(task, row) for row in examples]
        texts = model.generate(
            [prompt.ids for prompt in prompts],
            max_new_tokens=task.max_new_tokens,
            is_final=lambda text: mode == "strict" and is_final(task, text),
            batch_size=batch_size,
            advance=advance,
        )
    return [Answer(text, prompt.shortened) for text, prompt in zip(texts, prompts, strict=True)]


def predictions(
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    scorer: str = "generate",
    mode: Mode = "strict",
) -> list[Prediction]:
    """Parse one model's responses to the rows of a task.

    With the scorer ``rank`` a response is one of the choices, and is not parsed.
    """
    found = []
    for example, answer in zip(examples, answers, strict=True):
        value: str | float | None
        credit: float | None
        if scorer == "rank":
            value, credit = answer.response, float(answer.response == example.label)
        else:
            reading = read(task, answer.response, example.label, mode)
            value, credit = reading.value, reading.credit
        found.append(
            Prediction(example.id, answer.response, value, example.label, credit, answer.shortened)
        )
    return found


def score_answers(
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    scorer: str = "generate",
    mode: Mode = "strict",
) -> Score:
    """Parse answers and score them by the task's metric."""
    labels = [words[0] for words in task.words]
    return score(predictions(task, examples, answers, scorer, mode), task.scored_by, labels)
