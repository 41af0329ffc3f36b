"""Tasks of EleutherAI's lm-evaluation-harness, asked by the harness and scored row by row.

``lm-eval:arc_easy`` names one. The harness makes the prompts (with the few-shot examples its task
file asks for, without a chat template), asks the model and says what each row earns; from there on
the rows are like those of any other task.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from starmerge_models.errors import StarmergeError, UsageError, near
from starmerge_models.evaluation.scoring.metrics import Prediction, Score, score

PREFIX = "lm-eval:"
"""What the names of the harness's tasks begin with."""

SEED = 1234
"""The harness's own seed, by which few-shot examples are drawn."""

BATCH_SIZE = 16
"""Rows at once, where nothing else is asked for."""

_RIGHT_OR_WRONG = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that the harness itself gives a row as 0 or 1."""

_NOTHING_FOUND = "[invalid]"
"""What the harness's filters put where a response has no answer."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, with its dataset; :func:`load_tasks` makes them."""

    name: str
    """With :data:`PREFIX`."""
    measure: str
    """The harness's name of what is scored: the first of the task's metrics whose mean over the
    rows is its value, and of which more is better."""
    task: Any
    """An ``lm_eval.api.task.Task``."""

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether the harness itself gives each row 0 or 1: the score then is an accuracy."""
        return self.task.config.process_results is None and self.measure in _RIGHT_OR_WRONG

    def fingerprint(self, rows: int | None, skipped: int = 0) -> str:
        """Return a hash of all that decides what a model is asked, and what a row earns.

        Args:
            rows: How many of the first rows are asked; None for all.
            skipped: How many of those are left out at the beginning.
        """
        from lm_eval import __version__  # noqa: PLC0415

        self._seed()
        which = self._which(rows, skipped)
        with _without_bars():
            self.task.build_all_requests(**which)
        asked = [request.args for request in self.task.instances]
        gold = [self.task.doc_to_target(doc) for _, doc in self.task.doc_iterator(**which)]
        content = [__version__, self.measure, self.task.dump_config(), asked, gold]
        return str(blake3(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest())

    def size(self, rows: int | None) -> int:
        """Return how many rows are asked, of the first ``rows``."""
        return sum(1 for _ in self.task.doc_iterator(limit=rows))

    def ask(
        self,
        model: Any,
        tokenizer: Any,
        *,
        rows: int | None = None,
        skipped: int = 0,
        batch_size: int | None = None,
    ) -> list[Prediction]:
        """Ask a model the task.

        The response of a multiple-choice row is the choice with the highest log-likelihood,
        whatever the measure. Of a task with several filters the first one's reading counts.

        Args:
            model: A causal or encoder-decoder model of transformers, on its device.
            tokenizer: The model's.
            rows: How many of the first rows to ask; None for all. They are the ones that the
                harness takes with ``--limit``.
            skipped: How many of those to leave out at the beginning. Few-shot examples are drawn
                as if the rows began there.
            batch_size: Rows at once.

        Raises:
            StarmergeError: The harness cannot run the task; the model gives NaN.
            UsageError: What the harness gives a row is not from 0 to 1.
        """
        from lm_eval.evaluator import evaluate  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        self._seed()
        name = self.task.task_name
        which = self._which(rows, skipped)
        if skipped:
            which = {"samples": {name: which["samples"]}}
        try:
            with _without_bars():
                harness = HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=batch_size or BATCH_SIZE
                )
                samples = evaluate(
                    lm=harness,
                    task_dict={"tasks": {name: self.task}},
                    bootstrap_iters=0,
                    **which,
                )["samples"][name]
        except Exception as error:  # whatever a task's own code raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StarmergeError(f"{self.name}: lm-evaluation-harness failed: {reason}") from error
        counted = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        return [self._prediction(sample, harness) for sample in counted]

    def score(self, predictions: Sequence[Prediction]) -> Score:
        """Score what a model answered: the share of right rows, or the mean of what rows earn."""
        if self.is_right_or_wrong:
            return score(predictions, "accuracy")
        return replace(score(predictions, "f1"), metric=self.measure)  # the mean of the credits

    def _which(self, rows: int | None, skipped: int) -> dict[str, Any]:
        """Return the rows as the harness's functions take them."""
        if not skipped:
            return {"limit": rows}
        return {"samples": list(range(skipped, self.size(rows)))}

    def _seed(self) -> None:
        """Set all that the harness draws from, so that each model gets the same prompts."""
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        self.task.set_fewshot_seed(SEED)

    def _prediction(self, sample: dict[str, Any], harness: Any) -> Prediction:
        config = self.task.config
        split = config.test_split if self.task.has_test_docs() else config.validation_split
        place = f"{split}/{sample['doc_id']}"
        choices = self.task.doc_to_choice(sample["doc"]) if config.doc_to_choice else None
        response, value = self._answer(sample, choices, place)
        credit = sample.get(self.measure)
        if not isinstance(credit, int | float | np.number | np.bool_) or not 0 <= credit <= 1:
            raise UsageError(
                f"{self.name}, row {place}: the harness gives {credit!r} as its {self.measure}, "
                "and a row can earn from 0 to 1. Choose another task."
            )
        return Prediction(
            id=place,
            response=response,
            value=value,
            gold=self._gold(sample, choices),
            credit=float(credit),
            shortened=any(_is_cut(harness, *asked) for asked in sample["arguments"]),
        )

    def _answer(
        self, sample: dict[str, Any], choices: Sequence[str] | None, place: str
    ) -> tuple[str, str | None]:
        """Return what the model answered to a row, and what the harness read in it."""
        first = sample["resps"][0][0]
        if isinstance(first, str):
            read = sample["filtered_resps"][0]
            return first, None if read == _NOTHING_FOUND else str(read)
        likelihoods = [responses[0][0] for responses in sample["resps"]]
        if any(map(math.isnan, likelihoods)):
            raise StarmergeError(
                f"{self.name}, row {place}: the model gives NaN. Look for NaN in its weights, or "
                "load it in a wider dtype."
            )
        if choices is None:  # whether the text given is what the model would have written
            answer = sample["arguments"][0][1] if first[1] else ""
        else:
            answer = choices[int(np.argmax(likelihoods[: len(choices)]))]
        return answer, answer

    def _gold(self, sample: dict[str, Any], choices: Sequence[str] | None) -> str:
        target = sample["target"]
        if self.task.OUTPUT_TYPE == "multiple_choice" and self.task.multiple_input:
            target = self.task.doc_to_text(sample["doc"])  # the contexts are the choices
        golds = target if isinstance(target, list) else [target]
        return " | ".join(
            choices[gold] if choices is not None and isinstance(gold, int) else str(gold)
            for gold in golds
        )


def load_tasks(names: Sequence[str], folder: Path | None = None) -> list[HarnessTask]:
    """Load tasks of the harness and their datasets.

    Args:
        names: ``lm-eval:arc_easy``. A group or a tag (``lm-eval:mmlu``) stands for its tasks.
        folder: The user's own task files, in the harness's YAML; they win over the harness's.

    Raises:
        UsageError: lm_eval is not installed; an unknown name; a dataset that cannot be had; a task
            that has no metric of rows, or runs what the model writes.
    """
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{names[0]}: tasks of lm-evaluation-harness need its package lm_eval: install "
            "starmerge with its extra 'lm-eval'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what its own files leave out
    wanted = [name.removeprefix(PREFIX) for name in names]
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(wanted) <= {*manager.all_subtasks, *manager.all_tags}:
        manager = TaskManager(include_path=folder)  # takes seconds: it reads 13,000 files
    tasks: dict[str, HarnessTask] = {}
    for name in wanted:
        for task in _load(manager, name):
            tasks.setdefault(task.name, task)
    return list(tasks.values())


def _load(manager: Any, name: str) -> list[HarnessTask]:
    if name not in manager.all_tasks:
        others = near(name, manager.all_tasks)
        meant = f" Did you mean {PREFIX + others[0]!r}?" if others else ""
        raise UsageError(
            f"lm-evaluation-harness has no task {name!r}.{meant} `lm-eval ls tasks` lists them."
        )
    try:
        loaded = manager.load([name])["tasks"]
    except Exception as error:  # whatever datasets, the network and a task's own code raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{PREFIX}{name} cannot be loaded: {reason} If its dataset cannot be had, copy the "
            "task's YAML file into a folder of your own and let dataset_path and dataset_kwargs "
            "name local files."
        ) from error
    return [_task(task) for task in loaded.values()]


def _task(task: Any) -> HarnessTask:
    from lm_eval.api.metrics import mean  # noqa: PLC0415

    name = PREFIX + task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"{name} runs code that the model writes. Run it with the harness itself, in a sandbox."
        )
    more_is_better = task.higher_is_better()
    measures = {
        measure: aggregation is mean and more_is_better.get(measure)
        for measure, aggregation in task.aggregation().items()
    }
    if not any(measures.values()):
        raise UsageError(
            f"{name} has no metric that is a mean over the rows and better when it is more (it has "
            f"{', '.join(map(str, measures))}), so a row earns nothing of its own. Choose another "
            "task."
        )
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    return HarnessTask(name, next(filter(measures.get, measures)), task)


def _is_cut(harness: Any, prompt: str, follows: str | dict[str, Any]) -> bool:
    """Tell whether a prompt was too long for the model; the harness then cuts off its beginning.

    Args:
        harness: An HFLM.
        prompt: The prompt.
        follows: The continuation to rate, or how to generate one.
    """
    from lm_eval.models.utils import normalize_gen_kwargs  # noqa: PLC0415

    longest: int = harness.max_length
    if harness.backend == "seq2seq":
        return len(harness.tok_encode(prompt)) > longest
    if isinstance(follows, str):  # the last token is not read
        return len(harness.tok_encode(prompt + follows)) > longest + 1
    new: int = normalize_gen_kwargs(follows, harness.max_gen_toks)["max_gen_toks"]
    return len(harness.tok_encode(prompt)) > longest - new


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the harness's own progress bars off the screen; nothing else switches them off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
