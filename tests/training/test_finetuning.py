"""Fine-tuning: it learns, repeats itself, and leaves what can be merged."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import starmerge_models as sm
from starmerge_models.evaluation.tasks.sources import GeneratorSource
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.training.finetuning import TrainingRecipe, finetune

_COLOURS = ("red", "green", "blue", "black")


def _rows(_: random.Random) -> Iterator[dict[str, str]]:
    words = ("door", "car", "shoe", "bird", "lamp", "boat", "hat", "cup", "tree", "fish")
    for colour in _COLOURS:
        for first in words:
            for second in words:
                yield {"input": f"{colour} {first} {second}", "label": colour}


def _task() -> Task:
    """Return a task that a rank-4 adapter learns in a few steps: the first word is the answer."""
    return Task(
        name="first",
        source=GeneratorSource(generator=_rows),
        prompt="Repeat the colour.\n{input}",
        labels=_COLOURS,
    )


_RECIPE = TrainingRecipe(
    rank=4, alpha=16, learning_rate=5e-3, rows=12, test_rows=4, batch_size=2, dtype="bfloat16"
)


def test_learns_and_can_be_merged(smollm2: Path, tmp_path: Path) -> None:
    result = finetune(
        smollm2,
        _task(),
        tmp_path / "first",
        _RECIPE,
        base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        command="starmerge finetune BASE",
    )
    assert len(result.losses) == 6
    assert result.losses[-1] < result.losses[0] / 2
    assert result.score.n == 4
    assert result.score.value >= 0.75

    weights = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = ModelCard.load(tmp_path / "first" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "starmerge finetune BASE" in card.text
    merged = sm.merge(smollm2, [tmp_path / "first"], output=tmp_path / "merged")
    assert len(merged.report.tensors) == 60


def test_a_seed_gives_the_same_adapter_and_another_seed_another(
    shallow: Path, tmp_path: Path
) -> None:
    """Two steps, so that the order of the rows and what the optimiser keeps count too."""
    seeds = {"first": 1, "again": 1, "other": 2}
    losses, files = {}, {}
    for name, seed in seeds.items():
        recipe = replace(_RECIPE, rows=4, test_rows=1, seed=seed)
        losses[name] = finetune(shallow, _task(), tmp_path / name, recipe).losses
        files[name] = tmp_path / name / "adapter_model.safetensors"
    assert len(losses["first"]) == 2
    assert losses["first"] == losses["again"] != losses["other"]
    assert files["first"].read_bytes() == files["again"].read_bytes()
    first, second = load_file(files["first"]), load_file(files["other"])
    assert all(not torch.equal(first[key], second[key]) for key in first if "lora_A" in key)


def test_all_weights_are_trained_and_stored(shallow: Path, tmp_path: Path) -> None:
    recipe = TrainingRecipe(full=True, rows=4, batch_size=2, test_rows=1, dtype="bfloat16")
    result = finetune(shallow, _task(), tmp_path / "full", recipe, base_name="the/base")
    assert result.losses[-1] < result.losses[0]
    card = ModelCard.load(tmp_path / "full" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("the/base", "transformers")
    assert "All weights; 1 epoch(s)" in card.text
    assert "learning rate 5e-05" in card.text
    weights = load_file(tmp_path / "full" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "full" / name).read_bytes() == (shallow / name).read_bytes()
    vectors = sm.load_task_vectors(shallow, [tmp_path / "full"])
    merged = vectors.merge("average")
    assert len(merged) == len(weights)
    assert not any(delta.is_zero() for name, delta in merged.items() if "proj" in name)
