"""Tasks of EleutherAI's lm-evaluation-harness, run by the harness and scored row by row.

``lm-eval:arc_easy`` names one. The harness makes the prompts (with the few-shot examples of its
task file, without a chat template), runs the model and gives each row a credit; the credits are
then scored like those of any other task.
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
"""Prefix of the names of the harness's tasks."""

SEED = 1234
"""The harness's default seed, which draws few-shot examples."""

BATCH_SIZE = 16
"""Default batch size, in rows."""

_RIGHT_OR_WRONG = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics whose value for a row is 0 or 1 in the harness."""

_NOTHING_FOUND = "[invalid]"
"""Placeholder of the harness's filters for a response without an answer."""


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, with its dataset; made by :func:`load_tasks`."""

    name: str
    """The task's name, including :data:`PREFIX`."""
    measure: str
    """The harness's name of the metric: the first of the task's metrics that is a mean over the
    rows and for which higher is better."""
    task: Any
    """An ``lm_eval.api.task.Task``."""

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether the harness gives each row 0 or 1, so that the score is an accuracy."""
        return self.task.config.process_results is None and self.measure in _RIGHT_OR_WRONG

    def fingerprint(self, rows: int | None, skipped: int = 0) -> str:
        """Return a hash of everything that determines the prompts and the credits.

        Args:
            rows: Number of rows, from the first; None for all.
            skipped: How many of these to skip at the beginning.
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
        """Return how many rows there are among the first ``rows``."""
        return sum(1 for _ in self.task.doc_iterator(limit=rows))

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        rows: int | None = None,
        skipped: int = 0,
        batch_size: int | None = None,
    ) -> list[Prediction]:
        """Run a model on the task.

        The response of a multiple-choice row is the choice with the highest log-likelihood,
        whatever the measure. In a task with several filters, the first filter's result counts.

        Args:
            model: A causal or encoder-decoder model of transformers, on its device.
            tokenizer: The model's tokenizer.
            rows: Number of rows, from the first; None for all. The harness takes the same rows
                with ``--limit``.
            skipped: How many of these to skip at the beginning. Few-shot examples are drawn as if
                the rows began after them.
            batch_size: Rows of a batch.

        Raises:
            StarmergeError: The harness cannot run the task, or the model computes NaN.
            UsageError: The harness gives a row a credit that is not from 0 to 1.
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
        """Score a model's predictions: the share of right rows, or the mean credit."""
        if self.is_right_or_wrong:
            return score(predictions, "accuracy")
        return replace(score(predictions, "f1"), metric=self.measure)  # the mean of the credits

    def _which(self, rows: int | None, skipped: int) -> dict[str, Any]:
        """Return the rows as arguments of the harness's functions."""
        if not skipped:
            return {"limit": rows}
        return {"samples": list(range(skipped, self.size(rows)))}

    def _seed(self) -> None:
        """Seed every generator that the harness uses, so that each model gets the same prompts."""
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
        """Return the model's response to a row, and the answer that the harness parsed."""
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
        if choices is None:  # whether greedy decoding would produce the given text
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
        names: Names such as ``lm-eval:arc_easy``. A group or a tag (``lm-eval:mmlu``) expands to
            its tasks.
        folder: Folder of the user's own task files, in the harness's YAML format; they take
            precedence over the harness's.

    Raises:
        UsageError: lm_eval is not installed, a name is unknown, a dataset cannot be downloaded, or
            a task has no metric of single rows, or executes code that the model writes.
    """
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{names[0]}: tasks of lm-evaluation-harness need its package lm_eval. Install "
            "it: pip install 'starmerge-models[lm-eval]'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its own task files cause warnings
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
            f"{PREFIX}{name} cannot be loaded: {reason} If its dataset cannot be downloaded, copy "
            "the task's YAML file into a folder of your own and let dataset_path and "
            "dataset_kwargs name local files."
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
            f"{name} has no metric that is a mean over the rows with higher values better (it has "
            f"{', '.join(map(str, measures))}), so single rows have no credit. Choose another "
            "task."
        )
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    return HarnessTask(name, next(filter(measures.get, measures)), task)


def _is_cut(harness: Any, prompt: str, follows: str | dict[str, Any]) -> bool:
    """Return whether a prompt was too long, so that the harness cut off its beginning.

    Args:
        harness: An HFLM.
        prompt: The prompt.
        follows: The continuation to score, or the arguments of the generation.
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
    """Hide the harness's progress bars, which no option switches off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
