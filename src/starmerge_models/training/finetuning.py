"""Fine-tuning on one task: of a LoRA adapter, with PEFT, or of the whole model.

The implementation is for small models on small machines: the base of an adapter keeps its stored
dtype, trained weights are float32, and the LM head and the loss are computed only at the answer's
positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from starmerge_models.checkpoints.side_files import side_files
from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.models.loading import load_model
from starmerge_models.evaluation.models.scorers import (
    LocalModel,
    prompter_of,
    run_scorer,
    score_answers,
)
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.progress import progress_bar
from starmerge_models.storage import copy_file
from starmerge_models.storage.publishing import output_folder

StoredDtype = Literal["float32", "bfloat16", "float16"]

WARMUP = 0.06
"""Share of the steps with learning-rate warm-up."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The settings of one fine-tuning run; the defaults suit short tasks in one epoch."""

    full: bool = False
    """Whether to train all weights; otherwise an adapter."""
    rank: int = 16
    alpha: float = 32
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the modules to adapt. Rank, alpha and targets are ignored with ``full``."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-3 for an adapter, 5e-5 for all weights."""
    epochs: int = 1
    batch_size: int = 8
    rows: int = 1000
    """Most training rows."""
    test_rows: int = 200
    """Most held-out rows to score at the end."""
    seed: int = 0
    """Seed of the adapter's initial A and of the order of the rows."""
    dtype: StoredDtype = "float32"
    """Dtype of the stored trained weights."""

    @property
    def highest_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-5 if self.full else 1e-3


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tuning run."""

    losses: tuple[float, ...]
    """Mean cross-entropy (nats per answer token), step by step."""
    score: Score
    """Score of the stored weights, by greedy generation on held-out rows."""


def finetune(
    base: Path,
    task: Task,
    output: Path,
    recipe: TrainingRecipe,
    *,
    base_name: str | None = None,
    command: str | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train on a task's training rows; save an adapter in PEFT's layout, or a whole model.

    Args:
        base: Folder of a causal language model.
        task: The task; its test rows are never trained on.
        output: Folder to create.
        recipe: The settings.
        base_name: Name of the base for the adapter's config and the card; by default the folder.
        command: The command that repeats the run, for the card.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: The base cannot be loaded, it has none of the target modules, or the task has
            too few rows.
        StarmergeError: The loss became NaN or infinite.
    """
    examples = task.examples("test", recipe.test_rows)
    # The CPU's flash attention has a slow backward pass.
    model, tokenizer = load_model(
        base, dtype="float32" if recipe.full else "auto", attn_implementation="eager"
    )
    # PEFT stores this name in the adapter's config.
    model.name_or_path = base_name or str(base)
    torch.manual_seed(recipe.seed)
    adapted = model if recipe.full else _adapted(model, recipe)
    losses = _train(model, tokenizer, task, recipe, progress=progress)

    stored = getattr(torch, recipe.dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            rounded = parameter.data.to(stored)
            # A whole model is scored in float32, with the stored values.
            parameter.data = rounded.float() if recipe.full else rounded
    with progress_bar(f"scoring {task.name}", len(examples), show=progress) as advance:
        answers = run_scorer(LocalModel(adapted.eval(), tokenizer), task, examples, advance=advance)
    score = score_answers(task, examples, answers)
    result = Finetuned(tuple(losses), score)
    with output_folder(output) as made:
        folder = made.path
        if recipe.full:
            model.to(stored).save_pretrained(folder)
            # The base's tokenizer and generation config; load_model has changed the model's.
            for name, file in side_files(resolve_local(base).path).items():
                copy_file(file, made, name)
        else:
            # Only the adapter: "auto" would request the base's vocabulary from the Hub.
            adapted.save_pretrained(folder, save_embedding_layers=False)
        _write_card(folder, task, recipe, result, model.name_or_path, command)
    return result


def _adapted(model: Any, recipe: TrainingRecipe) -> Any:
    """Freeze a model's weights, add an adapter, and return the adapted model."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"{model.name_or_path} cannot be adapted: {error}") from error


def _train(
    model: Any, tokenizer: Any, task: Task, recipe: TrainingRecipe, *, progress: bool
) -> list[float]:
    """Run the training loop; return the loss of each step."""
    from transformers import get_linear_schedule_with_warmup  # noqa: PLC0415

    prompter = prompter_of(LocalModel(model, tokenizer))
    examples = task.examples("train", recipe.rows)
    rows = [(list(prompter.prompt(task, row).ids), prompter.answer(row.label)) for row in examples]
    steps = recipe.epochs * -(-len(rows) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=recipe.highest_rate,
        weight_decay=0.0,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    shuffle = random.Random(recipe.seed)
    losses: list[float] = []
    model.train()
    with progress_bar(f"training {task.name}", steps, show=progress) as advance:
        for _ in range(recipe.epochs):
            shuffle.shuffle(rows)
            for start in range(0, len(rows), recipe.batch_size):
                loss = _loss(model, rows[start : start + recipe.batch_size], tokenizer.pad_token_id)
                if not torch.isfinite(loss):
                    raise StarmergeError(
                        f"The loss is {loss.item()} at step {len(losses) + 1} of {task.name}. "
                        "Lower the learning rate (--lr)."
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                advance(1)
    return losses


def _loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Tensor:
    """Return the mean cross-entropy (nats) over the answer tokens of a batch."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, answers = (
        torch.full((len(rows), width), fill, device=model.device) for fill in (pad, 0, 0)
    )
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        answers[row, len(prompt) : end] = 1
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    # The hidden state before each answer token predicts the token.
    logits = model.get_output_embeddings()(hidden[:, :-1][answers[:, 1:].bool()])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][answers[:, 1:].bool()])


def _write_card(
    output: Path,
    task: Task,
    recipe: TrainingRecipe,
    result: Finetuned,
    base_name: str,
    command: str | None,
) -> None:
    """Write a model card with the training settings, in place of PEFT's template."""
    from huggingface_hub import ModelCard, ModelCardData  # noqa: PLC0415

    library, tags = ("transformers", []) if recipe.full else ("peft", ["lora"])
    data = ModelCardData(base_model=base_name, library_name=library, tags=[*tags, "starmerge"])
    score, tail = result.score, result.losses[-20:]
    targets = ", ".join(recipe.targets)
    adapter = f"LoRA r {recipe.rank}, alpha {recipe.alpha:g}, on {targets}"
    settings = "All weights" if recipe.full else adapter
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {task.name}",
        f"{settings}; {recipe.epochs} epoch(s), at most {recipe.rows} rows, batch "
        f"{recipe.batch_size}, learning rate {recipe.highest_rate:g}, seed {recipe.seed}, "
        f"stored in {recipe.dtype}.",
        f"- Task: {task.description or task.name} (rows from {task.where})",
        f"- Training loss over the last {len(tail)} steps: {sum(tail) / len(tail):.3f} "
        "nats per answer token",
        f"- Held-out {score.metric} (greedy, {task.max_new_tokens} tokens): {score.value:.3f} "
        f"[{score.low:.3f}, {score.high:.3f}], n = {score.n}",
    ]
    if command is not None:
        lines.append(f"Made with:\n\n    {command}")
    ModelCard("\n\n".join(lines) + "\n").save(output / "README.md")
