"""Prompts that are read along a merge (RegMean++), against a merge of our own, layer by layer."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import starmerge_models as sm
from starmerge_models import UsageError, calibrate, open_metric
from starmerge_models.calibration.sources import prompts_of_task, tasks_of
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.source import resolve
from tests.calibration.test_run import _inputs, _nothing, _readings, _write
from tests.calibration.tiny import store, texts
from tests.oracles import moments as of_moments
from tests.oracles import regmean

_TASKS = ("one", "two", "three")


def _fine_tunes(base: Path, folder: Path) -> dict[str, Path]:
    """Write fine-tunes in which every tensor differs from the base's."""
    weights = load_file(base / "model.safetensors")
    found = {}
    for seed, task in enumerate(_TASKS):
        generator = torch.Generator().manual_seed(seed)
        tuned = {
            name: tensor
            + 0.2 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()
        }
        found[task] = folder / task
        found[task].mkdir()
        for file in base.iterdir():
            (found[task] / file.name).write_bytes(file.read_bytes())
        save_file(tuned, found[task] / "model.safetensors", {"format": "pt"})
    return found


def _prompts(folder: Path) -> dict[str, Path]:
    words = {task: texts([3, 7, 5, 4], seed=20 + n) for n, task in enumerate(_TASKS)}
    return {
        task: _write(folder / f"{task}.jsonl", [json.dumps({"input": line}) for line in lines])
        for task, lines in words.items()
    }


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _merged_along(
    model: Any,
    deltas: dict[str, dict[str, NDArray[np.float64]]],
    readings: dict[str, Any],
    averaged: Callable[[str], bool],
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Merge a model in place; return the moments by which each matrix was merged."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    linear = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear | Conv1D) and f"{name}.weight" in parameters
    }
    tied = {
        id(module.weight) for module in modules.values() if isinstance(module, torch.nn.Embedding)
    }
    linear = {name: rows for name, rows in linear.items() if id(parameters[name]) not in tied}

    def add(name: str, update: NDArray[np.float64]) -> None:
        parameters[name].data += torch.from_numpy(update).reshape(parameters[name].shape).float()

    for name in parameters.keys() - linear.keys():
        if name in deltas[_TASKS[0]]:
            add(name, sum(deltas[task][name] for task in _TASKS) / len(_TASKS))
    found = {}
    for _, names in groupby(linear, _layer):
        layer = list(names)
        given = {task: _inputs(model, readings[task]) for task in _TASKS}
        for name in layer:
            sigmas = [of_moments.second_moment(given[task][name]) for task in _TASKS]
            found |= {(name, task): sigma for task, sigma in zip(_TASKS, sigmas, strict=True)}
            updates = [deltas[task][name] for task in _TASKS]
            side = "rows" if linear[name] else "columns"
            if averaged(name):
                add(name, sum(updates) / len(_TASKS))
            else:
                add(name, regmean.regmean(updates, sigmas, side=side))
    return found


@pytest.mark.parametrize("kind", ["llama", "untied gpt2", "t5", "albert"])
def test_moments_and_merge_are_those_of_a_merge_layer_by_layer(kind: str, tmp_path: Path) -> None:
    base = store(kind, tmp_path / "base")
    models = _fine_tunes(base, tmp_path)
    files = _prompts(tmp_path)
    common = _write(tmp_path / "t.txt", texts([6, 5]))
    file = tmp_path / "m.safetensors"
    calibrate(base, file, models, texts=common, prompts=files, length=6)

    model, writer = _readings(base, length=6)
    readings = {None: writer.answered(writer.texts(texts([6, 5]), 6), _nothing)}
    for task, rows in tasks_of(files).items():
        readings[task] = prompts_of_task(writer, task, rows, 16, 0).readings(_nothing)
    plain = _inputs(model, readings[None])
    weights = load_file(base / "model.safetensors")
    deltas = {
        task: {
            name: (tensor.double() - weights[name].double()).numpy()
            for name, tensor in load_file(models[task] / "model.safetensors").items()
        }
        for task in _TASKS
    }
    expected = _merged_along(model, deltas, readings, open_base(resolve(base)).is_embedding)
    metric = open_metric(file)
    assert metric.along is not None
    for (name, task), sigma in expected.items():
        root = metric.moment(name, task).root.double().numpy()
        np.testing.assert_allclose(
            root.T @ root, sigma, rtol=0, atol=2e-4 * np.trace(sigma), err_msg=f"{name} {task}"
        )
    # The text for all tasks is read by the base.
    for name in {name for name, _ in expected}:
        root = metric.moment(name).root.double().numpy()
        sigma = of_moments.second_moment(plain[name])
        scale = np.sqrt(np.outer(np.diag(sigma), np.diag(sigma)))
        assert (np.abs(root.T @ root - sigma) <= 200 * 2.0**-24 * scale).all()

    merged = sm.merge(base, models, "regmean", output=tmp_path / "out", metric=file)
    found = load_file(merged.path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in found:
            atol = 1e-3 * float(parameter.detach().abs().max())
            torch.testing.assert_close(
                found[name],
                parameter.detach(),
                rtol=0,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, dict[str, Path], dict[str, Path], Path]:
    """Return a base, its fine-tunes, their prompts and a file of texts."""
    base = store("llama", tmp_path / "base")
    texts_file = _write(tmp_path / "t.txt", texts([6, 5]))
    return base, _fine_tunes(base, tmp_path), _prompts(tmp_path), texts_file


def test_models_and_prompts_must_be_of_the_same_names(
    world: tuple[Path, dict[str, Path], dict[str, Path], Path], tmp_path: Path
) -> None:
    base, models, prompts, common = world
    file = tmp_path / "m.safetensors"
    less = {name: path for name, path in prompts.items() if name != "two"}
    for given, message in (
        ((models, less), "one, two, three, and the model two has no prompts"),
        (({"one": models["one"]}, prompts), "merge of one, and no model is called three"),
        ((models, {}), "the model one has no prompts"),
        (
            (
                [f"{name}={path}" for name, path in [*models.items(), ("one", models["two"])]],
                prompts,
            ),
            "two models are called 'one'|same name",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(base, file, given[0], texts=common, prompts=given[1])
    assert not file.exists()


def test_a_metric_along_a_merge_serves_that_merge_alone(
    world: tuple[Path, dict[str, Path], dict[str, Path], Path], tmp_path: Path
) -> None:
    base, models, prompts, common = world
    file = tmp_path / "m.safetensors"
    said: list[str] = []
    calibrate(base, file, models, texts=common, prompts=prompts, announce=said.append)
    assert "during a merge of one, two, three, in 3 steps" in said[0]
    again = {name: models[name] for name in ("three", "one", "two")}
    result = sm.merge(base, again, "auto", output=tmp_path / "out", metric=file)
    assert result.report.content["recipe"]["method"] == "regmean"
    assert "along the merge" in result.report.summary()
    swapped = {"one": models["two"], "two": models["one"], "three": models["three"]}
    with pytest.raises(UsageError, match="where one is another model"):
        sm.merge(base, swapped, "regmean", output=tmp_path / "no", metric=file)
    with pytest.raises(
        UsageError, match="along a merge of one, two, three, and this .* of one, two"
    ):
        less = {name: models[name] for name in ("one", "two")}
        sm.merge(base, less, "regmean", output=tmp_path / "no", metric=file)
    # The text for all tasks was read by the base, whatever is merged.
    sm.merge(base, less, "tsv_m", output=tmp_path / "whitened", metric=file)


def test_how_much_is_read_at_once_changes_nothing_but_rounding(
    world: tuple[Path, dict[str, Path], dict[str, Path], Path], tmp_path: Path
) -> None:
    base, models, prompts, common = world
    found = []
    for name, memory in (("a", None), ("b", 1)):
        calibrate(base, tmp_path / name, models, texts=common, prompts=prompts, memory=memory)
        found.append(open_metric(tmp_path / name))
    name = "model.layers.1.mlp.down_proj.weight"
    first, second = (metric.moment(name, "two").root.double() for metric in found)
    torch.testing.assert_close(first.T @ first, second.T @ second, rtol=1e-4, atol=1e-6)


def test_only_what_the_models_change_has_moments_of_the_tasks(
    world: tuple[Path, dict[str, Path], dict[str, Path], Path], tmp_path: Path
) -> None:
    base, _, prompts, common = world
    adapters = {}
    for seed, task in enumerate(_TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        adapters[task] = tmp_path / f"adapter-{task}"
        adapted.save_pretrained(adapters[task])
    file = tmp_path / "m.safetensors"
    result = calibrate(base, file, adapters, texts=common, prompts=prompts, any_base=True)
    assert result.notes == ()
    metric = open_metric(file)
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        assert metric.has(f"model.layers.1.{name}.weight", "two")
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert metric.has(f"model.layers.1.{name}.weight")
        assert not metric.has(f"model.layers.1.{name}.weight", "two")
    merged = sm.merge(base, adapters, "auto", output=tmp_path / "out", metric=file, any_base=True)
    assert merged.report.content["recipe"]["method"] == "regmean"
