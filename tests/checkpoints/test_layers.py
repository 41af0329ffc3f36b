"""Convolutions, embeddings and DoRA, layer by layer: what PEFT folds, and what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.dora import dora_delta
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.source import resolve
from starmerge_models.checkpoints.tensors import MERGEABLE
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import StarmergeError, UsageError
from tests.conftest import edit_json
from tests.oracles import adapters as oracle
from tests.oracles.bounds import U32, gamma
from tests.oracles.deltas import exact
from tests.oracles.rounding import unit_roundoff


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, (3, 2))
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.conv3d = nn.Conv3d(4, 6, (2, 3, 2))
        self.as_wide = nn.Conv2d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)
        self.table = nn.Embedding(9, 5)
        self.square = nn.Embedding(5, 5)


LAYERS = ["conv1d", "conv2d", "pointwise", "conv3d", "as_wide", "table", "square"]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("layers")
    save_file(_Layers().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _model(base: Path) -> _Layers:
    model = _Layers()
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


def _adapter(base: Path, path: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    settings = {"r": 4, "init_lora_weights": False} | options
    model = get_peft_model(_model(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return path


def _open(adapter: Path, base: Path) -> Adapter:
    return open_adapter("a", resolve(adapter), open_base(resolve(base)))


def _deltas(adapter: Adapter, base: Path) -> dict[str, Tensor]:
    read = open_base(resolve(base)).checkpoint.read
    return {name: adapter.delta(name, read(name)).to_dense() for name in adapter.tensors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gives_the_weight_that_peft_folds(
    layers: Path, tmp_path: Path, layer: str, use_dora: bool
) -> None:
    path = _adapter(layers, tmp_path / "a", target_modules=[layer], use_dora=use_dora)
    folded = PeftModel.from_pretrained(_model(layers), path).merge_and_unload().state_dict()
    base, adapter = open_base(resolve(layers)), _open(path, layers)
    name = f"{layer}.weight"
    assert adapter.tensors == {name}
    weight = base.checkpoint.read(name)
    dense = exact(adapter.delta(name, weight).to_dense().reshape(weight.shape))
    update = adapter.updates[name].update
    A, B = (adapter.checkpoint.read(key) for key in update.change.keys)
    transposed = layer in ("table", "square")
    if use_dora:
        assert update.magnitude
        m = adapter.checkpoint.read(update.magnitude.key)
        expected, bound = oracle.dora(weight, B, A, 2.0, m, transposed)
        ours = U32 * abs(dense)
    else:
        expected, bound = oracle.plain(weight, B, A, 2.0, transposed)
        ours = bound
    assert np.all(abs(exact(weight) + dense - expected) <= ours)
    assert np.all(abs(exact(folded[name]) - expected) <= bound + U32 * abs(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["grouped", "depthwise"])
def test_refuses_convolutions_in_groups_whose_factors_mix_them(
    layers: Path, tmp_path: Path, layer: str
) -> None:
    path = _adapter(layers, tmp_path / "a", target_modules=[layer])
    with pytest.raises(NotImplementedError):
        PeftModel.from_pretrained(_model(layers), path).merge_and_unload()
    with pytest.raises(UsageError, match=rf"adapts {layer}, a convolution in groups"):
        _open(path, layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv2d.lora_B.weight": (6, 4, 2, 1)}, "do not fit together"),
        ({"conv2d.lora_B.weight": (6, 4)}, "do not fit together"),
        ({"conv2d.lora_A.weight": (4, 4, 2, 3)}, r"\[6, 4, 2, 3\].*\[6, 4, 3, 2\]"),
        (
            {"conv2d.lora_A.weight": (4, 3, 4, 6), "conv2d.lora_B.weight": (2, 4, 1, 1)},
            r"\[2, 3, 4, 6\].*\[6, 4, 3, 2\]",
        ),
        (
            {"conv2d.lora_A.weight": (0, 4, 3, 2), "conv2d.lora_B.weight": (6, 0, 1, 1)},
            "do not fit together",
        ),
        ({"table.lora_embedding_A": (4, 8)}, r"\[8, 5\].*\[9, 5\]"),
        (
            {"table.lora_embedding_A": (4, 5), "table.lora_embedding_B": (9, 4)},
            r"\[5, 9\].*\[9, 5\]",
        ),
        (
            {"table.lora_embedding_A": (4, 9, 1), "table.lora_embedding_B": (5, 4, 1)},
            "do not fit together",
        ),
        ({"table.lora_magnitude_vector": (5,)}, "no adapter with use_dora False"),
        ({"table.lora_A.weight": (4, 9)}, "table has lora_A"),
        ({"table.weight": (9, 5)}, "save_embedding_layers=False"),
        ({"conv1d.lora_B.bias": (6,)}, r"conv1d\.lora_B\.bias is no LoRA factor"),
    ],
    ids=str,
)
def test_refuses_tensors_that_do_not_fit(
    layers: Path, tmp_path: Path, changes: dict[str, tuple[int, ...]], message: str
) -> None:
    path = _adapter(layers, tmp_path / "a", target_modules=["conv1d", "conv2d", "table"])
    file = path / "adapter_model.safetensors"
    new = {f"base_model.model.{key}": torch.ones(shape) for key, shape in changes.items()}
    save_file(load_file(file) | new, file)
    with pytest.raises(StarmergeError, match=message):
        _open(path, layers)


def test_dora_needs_its_magnitudes(layers: Path, tmp_path: Path) -> None:
    path = _adapter(layers, tmp_path / "a", target_modules=["conv2d", "table"], use_dora=True)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.table.lora_magnitude_vector"
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(StarmergeError, match="table has .* but no lora_magnitude_vector"):
        _open(path, layers)
    save_file(tensors | {key: torch.ones(9)}, file)
    with pytest.raises(StarmergeError, match="has 9 entries, and table.weight has 5 outputs"):
        _open(path, layers)
    save_file(tensors | {key: torch.ones(5).char()}, file)
    with pytest.raises(StarmergeError, match=r"lora_magnitude_vector is stored in torch\.int8"):
        _open(path, layers)
    save_file(tensors, file)
    edit_json(path / "adapter_config.json", use_dora=False)
    with pytest.raises(StarmergeError, match="lora_magnitude_vector.* use_dora False"):
        _open(path, layers)


def test_accepts_the_name_of_the_adapter_in_its_keys(layers: Path, tmp_path: Path) -> None:
    """As a training loop that saves the state dict by itself leaves them."""
    path = _adapter(layers, tmp_path / "a", target_modules=["conv2d", "table"], use_dora=True)
    expected = _deltas(_open(path, layers), layers)
    model = get_peft_model(
        _model(layers),
        LoraConfig(r=4, target_modules=["conv2d", "table"], use_dora=True),
        adapter_name="mine",
    )
    raw = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert any(key.endswith(".mine.weight") for key in raw)
    assert any(key.endswith(".mine") for key in raw)
    saved = load_file(path / "adapter_model.safetensors")
    assert len(raw) == len(saved)
    own = {key: saved[key.replace(".mine", "").replace("vector.weight", "vector")] for key in raw}
    save_file(own, path / "adapter_model.safetensors")
    found = _deltas(_open(path, layers), layers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    key = "base_model.model.conv1d.lora_A.other.weight"
    save_file(own | {key: torch.ones(4, 4, 3)}, path / "adapter_model.safetensors")
    with pytest.raises(StarmergeError, match="holds several adapters: mine, other"):
        _open(path, layers)


SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SHAPES, st.integers(0, 2**32), st.booleans())
def test_dora_with_the_weights_own_norms_is_plain_lora(
    shape: tuple[int, int, int], seed: int, transposed: bool
) -> None:
    m, n, r = shape
    W, B, A = _random(seed, m, n), _random(seed + 1, m, r), _random(seed + 2, r, n)
    update = LowRank(B, A, 0.5)
    V = exact(W) + oracle.product(B, A, 0.5)
    norms = torch.from_numpy(np.linalg.norm(V, axis=1))
    stored = W.T.contiguous() if transposed else W
    delta = dora_delta(stored, update, norms, transposed=transposed)
    dense = exact(delta.tensor)
    expected = (V - exact(W)).T if transposed else V - exact(W)
    size = abs(exact(W)) + oracle.product(abs(B), abs(A), 0.5)
    # Float64 up to the last step: only the result is rounded to float32.
    slack = gamma(n + r + 8, 2.0**-53) * (size + abs(V) + norms.numpy()[:, None])
    assert np.all(abs(dense - expected) <= U32 * abs(expected) + (slack.T if transposed else slack))


@given(SHAPES, st.integers(0, 2**32), st.booleans(), st.sampled_from(MERGEABLE))
def test_dora_gives_every_output_its_magnitude_and_its_direction(
    shape: tuple[int, int, int], seed: int, transposed: bool, dtype: torch.dtype
) -> None:
    m, n, r = shape
    W = _random(seed, m, n).double().mul(1 + 2**-30).to(dtype)
    update = LowRank(_random(seed + 1, m, r), _random(seed + 2, r, n).bfloat16(), -0.5)
    magnitude = _random(seed + 3, m)
    stored = W.T.contiguous() if transposed else W
    delta = dora_delta(stored, update, magnitude, transposed=transposed)
    assert delta.tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, bound = oracle.dora(stored, update.B, update.A, -0.5, magnitude, transposed)
    # Float64 up to the last step: only the result is rounded. Twice, for the oracle's roundings.
    slack = 2 * 2.0**-29 * bound + unit_roundoff(delta.tensor.dtype) * abs(exact(delta.tensor))
    assert np.all(abs(exact(stored) + exact(delta.tensor) - expected) <= slack)


@pytest.mark.parametrize("panel", [1, 7, 20, 2**22])
def test_dora_does_not_depend_on_the_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, B, A, m = _random(0, 9, 5), _random(1, 9, 2), _random(2, 2, 5), _random(3, 9)
    whole = dora_delta(W, LowRank(B, A), m, transposed=False).tensor
    monkeypatch.setattr("starmerge_models.checkpoints.lora.dora._PANEL", panel)
    other = dora_delta(W, LowRank(B, A), m, transposed=False).tensor
    assert np.allclose(exact(other), exact(whole), rtol=2 * U32, atol=0.0)


def test_dora_of_an_output_without_a_direction_is_not_finite() -> None:
    W = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    delta = dora_delta(
        W, LowRank(torch.zeros(2, 1), torch.ones(1, 2)), torch.ones(2), transposed=False
    )
    assert isinstance(delta, Dense)
    assert delta.tensor.isfinite().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("layer", ["as_wide", "conv2d", "table"])
def test_the_flag_of_input_first_layers_is_not_for_convolutions_and_embeddings(
    layers: Path, tmp_path: Path, layer: str
) -> None:
    path = _adapter(layers, tmp_path / "a", target_modules=[layer])
    expected = _open(path, layers).updates
    edit_json(path / "adapter_config.json", fan_in_fan_out=True)
    assert _open(path, layers).updates == expected
