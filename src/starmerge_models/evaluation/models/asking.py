"""The two scorers: greedy generation and likelihood ranking of a row's answers.

Each asks one model all rows of one task. What comes back is raw: a response a row, in the order of
the rows. Reading and scoring them is another matter, so that responses can be kept.
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
"""The scorers by the name the command line gives them."""

Advance = Callable[[int], None]
"""Is called with a number of rows that are done."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote when it was asked a row."""

    response: str
    shortened: bool = False
    """Whether the passage was too long for the model's context and lost its end."""


class Backend(Protocol):
    """A loaded model that takes and gives tokens."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers."""

    @property
    def context(self) -> int | None:
        """Tokens that the model can attend to."""

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
        """Return the text that the model writes greedily after each prompt."""

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
    """A model of transformers in this process."""

    model: Any
    tokenizer: Any

    @property
    def context(self) -> int | None:
        """Tokens that the model can attend to."""
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
    """Return what makes rows into the tokens of a model."""
    return Prompter(model.tokenizer, model.context, model.is_encoder_decoder)


def check_scorer(scorer: str, task: Task, examples: Sequence[Example]) -> None:
    """Make sure that a scorer can score a task.

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


def ask(
    model: Backend,
    task: Task,
    examples: Sequence[Example],
    scorer: str = "generate",
    *,
    mode: Mode = "strict",
    batch_size: int | None = None,
    advance: Advance,
) -> list[Answer]:
    """Ask a model the rows of a task.

    Generation stops at the end of the text, at the task's ``max_new_tokens``, and, in the mode
    ``strict``, as soon as nothing that may follow can change what is read. In ranking, a choice's
    log-likelihood is the sum over its tokens and the end-of-sequence token: without the end, a
    choice that begins another would always win against it. Of two that are equally likely, the
    first counts.

    Args:
        model: The model.
        task: The task.
        examples: Its rows.
        scorer: A name of :data:`SCORERS`.
        mode: How the responses will be read.
        batch_size: Rows asked at once, at most; None: as many as there is room for.
        advance: Is told of rows that are done.

    Returns:
        What the model wrote, or the choice that is most likely; a row each.
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
    """Read the answers of one model to the rows of a task.

    An answer of ranking is one of the choices as it stands, and is not read.
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


def scored(
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    scorer: str = "generate",
    mode: Mode = "strict",
) -> Score:
    """Read answers and score them by the task's metric."""
    labels = [words[0] for words in task.words]
    return score(predictions(task, examples, answers, scorer, mode), task.scored_by, labels)
