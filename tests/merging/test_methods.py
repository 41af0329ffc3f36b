"""Every method from files to files: what it writes is what it does in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import UsageError
from starmerge_models.merging.fold import fold
from starmerge_models.methods import METHODS, Merge, as_pipeline, make_method
from tests.conftest import MakeAdapter, MakeFinetune

_IN_MEMORY = sorted(
    name
    for name, method in METHODS.items()
    if name not in ("emr", "mergekit", "lines")
    and not method.needs_moments  # which deltas in memory do not have: see test_metric.py
    and not (issubclass(method, Merge) and make_method(name).needs_base)
)
_EMBEDDINGS_COUNT = {"auto", "knots", "shares", "star+ties"}
"""Global thresholds and factors that depend on what embeddings are, which only files tell."""
_CHAINS = ["star+ties", "dare+average", "dare+ties", "star+task_arithmetic+svc", "tsv_m+scale"]


@pytest.fixture
def models(make_adapter: MakeAdapter, make_finetune: MakeFinetune) -> dict[str, Path]:
    """Return two adapters of different ranks and targets, and a full fine-tune."""
    return {
        "0": make_adapter("one", seed=1),
        "1": make_adapter("two", seed=2, r=2, target_modules=["v_proj", "down_proj"]),
        "2": make_finetune("three", seed=3),
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("adapters", "mixed")
        for name in (*_IN_MEMORY, *_CHAINS)
        if kind == "adapters" or name not in _EMBEDDINGS_COUNT
    ],
)
def test_files_and_memory_agree(
    kind: str, name: str, tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {key: path for key, path in models.items() if kind == "mixed" or key != "2"}
    if name == "nuslerp" and kind == "mixed":
        del chosen["0"]  # it merges two models
    weights = [1.0, 2.0, 0.5][: len(chosen)]
    try:
        as_pipeline(name).check(list(chosen), weights, ["model.layers.0.self_attn.v_proj.weight"])
    except UsageError:
        weights = [1.0] * len(chosen)
    result = sm.merge(tiny_base, chosen, name, output=tmp_path / "out", weights=weights)
    merged = load_file(result.path / "model.safetensors")

    base = open_base(resolve(tiny_base))
    tensors = {tensor: base.checkpoint.read(tensor) for tensor in base.checkpoint}
    opened = [open_model(key, resolve(path), base) for key, path in chosen.items()]
    # Embeddings are known as such in files alone.
    compared = [tensor for tensor in tensors if not base.is_embedding(tensor)]
    deltas = [
        {tensor: model.delta(tensor, tensors[tensor]) for tensor in model.tensors}
        for model in opened
    ]
    in_memory = sm.merge_state(deltas, name, weights=weights)
    for tensor in compared:
        expected = tensors[tensor]
        if tensor in in_memory:
            expected = fold(tensors[tensor], in_memory[tensor], torch.float32).weight
        difference = (merged[tensor] - expected).abs().max()
        assert float(difference) <= 1e-5 * float(tensors[tensor].abs().max()), tensor
    assert any(not torch.equal(merged[tensor], tensors[tensor]) for tensor in compared)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["ties", "star+ties", "covariance+own_response", "metagpt"])
def test_a_merge_is_the_same_whenever_it_is_made(
    name: str, threads: int, tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    first = sm.merge(tiny_base, models, name, output=tmp_path / "first")
    torch.set_num_threads(threads)
    try:
        second = sm.merge(tiny_base, models, name, output=tmp_path / "second")
    finally:
        torch.set_num_threads(before)
    files = [result.path / "model.safetensors" for result in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_report_says_what_the_methods_found(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    sm.merge(tiny_base, models, "trim+metagpt+own_response", output=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    findings = report["findings"]
    assert set(findings) == {"trim", "metagpt", "own_response"}
    assert sum(findings["metagpt"]["lambdas"]) == pytest.approx(1)
    assert len(findings["own_response"]["responses"]) == 3
    assert report["recipe"]["method"] == "trim+metagpt+own_response"
    assert report["recipe"]["parameters"]["own_response.c"] == "auto"


def test_own_response_is_what_it_says_over_the_whole_model(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    adapters = {key: models[key] for key in ("0", "1")}
    result = sm.merge(tiny_base, adapters, "iso_c+own_response", output=tmp_path / "out")
    base = load_file(tiny_base / "model.safetensors")
    merged = load_file(result.path / "model.safetensors")
    opened = open_base(resolve(tiny_base))
    inner = energy = 0.0
    for key, path in adapters.items():
        model = open_model(key, resolve(path), opened)
        for tensor in model.tensors:
            tau = model.delta(tensor, base[tensor]).to_dense().double().numpy()
            update = (merged[tensor].double() - base[tensor].double()).numpy()
            inner, energy = inner + np.sum(update * tau), energy + np.sum(tau * tau)
    assert inner / energy == pytest.approx(2 ** (-1 / 8), rel=1e-3)


def test_a_model_that_changes_nothing_is_named(
    tiny_base: Path, models: dict[str, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    fresh = make_adapter("fresh", init_lora_weights=True)
    for method in ("star", "average", "ties"):
        both = {"digits": models["0"], "fresh": fresh}
        report = sm.merge(tiny_base, both, method, output=tmp_path / method).report
        assert report.content["unchanged"] == ["fresh"]
        assert "fresh changes nothing: all its deltas are zero" in report.summary()
    alone = sm.merge(tiny_base, {"fresh": fresh}, "star", output=tmp_path / "alone").report
    assert "the update is zero" in alone.summary()
    assert "survives" not in alone.summary()
