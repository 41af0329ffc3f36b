"""Adapters of other tools: the deltas that their formulas give, and a refusal of all else."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.lora.adapter import Adapter
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.deltas import LowRank
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.engine import merge
from tests.oracles import formats as oracle
from tests.oracles.bounds import U32
from tests.oracles.deltas import exact

SHAPES = {
    "mid_block.attentions.0.to_q": (12, 10),
    "mid_block.resnets.0.conv1": (8, 6, 3, 3),
    "mid_block.resnets.0.conv_shortcut": (8, 6, 1, 1),
    "down_blocks.0.norm": (6,),
}

LINEAR, CONV, POINT = list(SHAPES)[:3]


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base with the names and files of diffusers."""
    folder = tmp_path_factory.mktemp("unet") / "unet"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, shape in SHAPES.items():
        tensors[f"{module}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{module}.bias"] = torch.randn(shape[0], generator=generator)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _flat(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def _write(folder: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    file = folder / "style.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, file, metadata)
    return file


def _open(path: Path, base: Path) -> Adapter:
    return open_adapter("a", resolve(path, may_be_file=True), open_base(resolve(base)))


def _check(adapter: Adapter, base: Path, name: str, expected: NDArray[np.float64]) -> None:
    """Ours may differ by the rounding of factors, or of the dense delta, to float32."""
    weight = open_base(resolve(base)).checkpoint.read(name)
    delta = adapter.delta(name, weight)
    if isinstance(delta, LowRank):
        assert adapter.rank(name) == delta.rank < min(delta.shape)
        B, A = exact(delta.B), exact(delta.A)
        ours, size = delta.scale * B @ A, abs(delta.scale) * abs(B) @ abs(A)
    else:
        assert adapter.rank(name) is None
        ours = exact(delta.matrix)
        size = abs(ours)
    matrix = expected.reshape(ours.shape)
    assert np.linalg.norm(matrix) > 0.1
    assert np.all(abs(ours - matrix) <= 3 * U32 * (size + abs(matrix)) + 1e-12)


def _lora(shape: tuple[int, ...], r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return up and down for a weight of some shape."""
    ones = (1 for _ in shape[2:])
    return _random(shape[0], r, *ones, seed=seed), _random(r, *shape[1:], seed=seed + 1)


@pytest.mark.parametrize("module", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("alpha", [None, 1.0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kohya_divides_alpha_by_the_rank(
    unet: Path, tmp_path: Path, module: str, alpha: float | None, dtype: torch.dtype
) -> None:
    up, down = (part.to(dtype) for part in _lora(SHAPES[module], 3))
    name = _flat(module)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    adapter = _open(_write(tmp_path, tensors), unet)
    assert adapter.tensors == {f"{module}.weight"}
    assert "kohya" in adapter.kind
    scale = 1.0 if alpha is None else alpha / 3
    _check(adapter, unet, f"{module}.weight", oracle.lora(up, down, scale))


def test_a_convolution_of_one_pixel_may_have_the_factors_of_a_linear_layer(
    unet: Path, tmp_path: Path
) -> None:
    up, down = _lora((8, 6), 2)
    name = _flat(POINT)
    path = _write(tmp_path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    _check(_open(path, unet), unet, f"{POINT}.weight", oracle.lora(up, down, 1.0))


_SPELLINGS: dict[str, Callable[[str], tuple[str, str]]] = {
    "peft": lambda m: (f"unet.{m}.lora_B.weight", f"unet.{m}.lora_A.weight"),
    "without a part": lambda m: (f"{m}.lora_B.weight", f"{m}.lora_A.weight"),
    "before peft": lambda m: (f"unet.{m}.lora.up.weight", f"unet.{m}.lora.down.weight"),
    "processor": lambda m: (
        f"unet.{m.replace('.to_q', '')}.processor.to_q_lora.up.weight",
        f"unet.{m.replace('.to_q', '')}.processor.to_q_lora.down.weight",
    ),
    "transformer": lambda m: (f"transformer.{m}.lora_B.weight", f"transformer.{m}.lora_A.weight"),
    "comfy": lambda m: (
        f"diffusion_model.{m}.lora_up.weight",
        f"diffusion_model.{m}.lora_down.weight",
    ),
    "comfy, peft": lambda m: (
        f"diffusion_model.{m}.lora_B.weight",
        f"diffusion_model.{m}.lora_A.weight",
    ),
}


@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_spellings_of_diffusers_and_comfy(unet: Path, tmp_path: Path, spelling: str) -> None:
    up, down = _lora(SHAPES[LINEAR], 3)
    keys = _SPELLINGS[spelling](LINEAR)
    adapter = _open(_write(tmp_path, dict(zip(keys, (up, down), strict=True))), unet)
    assert adapter.tensors == {f"{LINEAR}.weight"}
    _check(adapter, unet, f"{LINEAR}.weight", oracle.lora(up, down, 1.0))


def test_the_attention_output_of_a_processor_is_a_list_of_diffusers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"attn.to_out.0.weight": torch.ones(4, 4)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    up, down = _lora((4, 4), 2)
    stem = "unet.attn.processor.to_out_lora"
    path = _write(tmp_path, {f"{stem}.up.weight": up, f"{stem}.down.weight": down})
    _check(_open(path, base), base, "attn.to_out.0.weight", oracle.lora(up, down, 1.0))


@pytest.mark.parametrize("key", ["alpha", "metadata"])
def test_diffusers_scale_stands_in_the_file_or_in_the_header(
    unet: Path, tmp_path: Path, key: str
) -> None:
    tensors: dict[str, Tensor] = {}
    expected = {}
    for n, (module, alpha) in enumerate({LINEAR: 6.0, CONV: 1.5}.items()):
        up, down = _lora(SHAPES[module], 3, seed=n)
        tensors[f"unet.{module}.lora_B.weight"] = up
        tensors[f"unet.{module}.lora_A.weight"] = down
        if key == "alpha":
            tensors[f"unet.{module}.alpha"] = torch.tensor(alpha)
        expected[f"{module}.weight"] = oracle.lora(up, down, alpha / 3)
    settings = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"resnets.0.conv1": 1.5}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if key == "metadata" else {}
    adapter = _open(_write(tmp_path, tensors, **metadata), unet)
    for name, update in expected.items():
        _check(adapter, unet, name, update)


def test_locon_with_a_core(unet: Path, tmp_path: Path) -> None:
    up, mid, down = _random(8, 2, 1, 1), _random(2, 2, 3, 3, seed=1), _random(2, 6, 1, 1, seed=2)
    name = _flat(CONV)
    tensors = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(5.0),
    }
    adapter = _open(_write(tmp_path, tensors), unet)
    _check(adapter, unet, f"{CONV}.weight", oracle.locon(up, mid, down, 2.5))


@pytest.mark.parametrize(
    ("module", "rank", "has_cores"),
    [(LINEAR, 2, False), (LINEAR, 4, False), (CONV, 2, False), (CONV, 2, True), (CONV, 3, True)],
)
def test_loha(unet: Path, tmp_path: Path, module: str, rank: int, has_cores: bool) -> None:
    """In factors while r² is less than the sides of the matrix, dense from there on."""
    shape = SHAPES[module]
    name, tensors, halves = _flat(module), {}, []
    for n in (1, 2):
        if has_cores:
            a, b = _random(rank, shape[0], seed=n), _random(rank, shape[1], seed=n + 2)
            core = _random(rank, rank, *shape[2:], seed=n + 4)
            tensors[f"{name}.hada_t{n}"] = core
        else:
            columns = int(np.prod(shape[1:]))
            a, b = _random(shape[0], rank, seed=n), _random(rank, columns, seed=n + 2)
            core = None
        tensors |= {f"{name}.hada_w{n}_a": a, f"{name}.hada_w{n}_b": b}
        halves.append(oracle.half(a, b, core).reshape(shape))
    tensors[f"{name}.alpha"] = torch.tensor(0.5)
    adapter = _open(_write(tmp_path, tensors), unet)
    assert adapter.rank(f"{module}.weight") == (rank**2 if rank == 2 else None)
    _check(adapter, unet, f"{module}.weight", oracle.loha(*halves, 0.5 / rank))


_LOKR: dict[str, tuple[str, dict[str, tuple[int, ...]], int | None]] = {
    "both whole": (LINEAR, {"w1": (3, 2), "w2": (4, 5)}, 8),
    "both whole, dense": (LINEAR, {"w1": (3, 5), "w2": (4, 2)}, 6),
    "second split": (LINEAR, {"w1": (3, 5), "w2_a": (4, 1), "w2_b": (1, 2)}, 3),
    "both split": (LINEAR, {"w1_a": (3, 1), "w1_b": (1, 2), "w2_a": (4, 1), "w2_b": (1, 5)}, 1),
    "kernel whole": (CONV, {"w1": (2, 1), "w2": (4, 6, 3, 3)}, 4),
    "kernel whole, dense": (CONV, {"w1": (2, 3), "w2": (4, 2, 3, 3)}, None),
    "kernel split": (CONV, {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 18)}, 4),
    "kernel with a core": (
        CONV,
        {"w1": (2, 3), "w2_a": (2, 4), "w2_b": (2, 2), "t2": (2, 2, 3, 3)},
        4,
    ),
    "rank above the sides": (LINEAR, {"w1": (3, 2), "w2_a": (4, 6), "w2_b": (6, 5)}, 8),
}


@pytest.mark.parametrize("case", _LOKR)
def test_lokr(unet: Path, tmp_path: Path, case: str) -> None:
    module, shapes, rank = _LOKR[case]
    name = _flat(module)
    parts = {part: _random(*shape, seed=n) for n, (part, shape) in enumerate(shapes.items())}
    tensors = {f"{name}.lokr_{part}": tensor for part, tensor in parts.items()}
    tensors[f"{name}.alpha"] = torch.tensor(3.0)
    sides = [
        exact(parts[w]) if w in parts else oracle.half(parts[f"{w}_a"], parts[f"{w}_b"], core)
        for w, core in (("w1", None), ("w2", parts.get("t2")))
    ]
    if module == CONV:
        sides[1] = sides[1].reshape(4, -1, 3, 3)
    ranks = [shape[0] for part, shape in shapes.items() if part.endswith("_b")]
    scale = 3.0 / ranks[0] if ranks else 1.0
    adapter = _open(_write(tmp_path, tensors), unet)
    assert adapter.rank(f"{module}.weight") == rank
    _check(adapter, unet, f"{module}.weight", oracle.lokr(*sides, scale))


def test_differences_of_weights_biases_and_norms(unet: Path, tmp_path: Path) -> None:
    weight, bias = _random(8, 6, 3, 3), _random(8, seed=1)
    gain, shift = _random(6, seed=2), _random(6, seed=3)
    tensors = {
        f"{_flat(CONV)}.diff": weight,
        f"{_flat(CONV)}.diff_b": bias,
        f"{_flat('down_blocks.0.norm')}.w_norm": gain,
        f"{_flat('down_blocks.0.norm')}.b_norm": shift,
    }
    adapter = _open(_write(tmp_path, tensors), unet)
    expected = {
        f"{CONV}.weight": weight,
        f"{CONV}.bias": bias,
        "down_blocks.0.norm.weight": gain,
        "down_blocks.0.norm.bias": shift,
    }
    assert adapter.tensors == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(adapter.delta(name, None).to_dense().reshape(tensor.shape), tensor)


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_dora_with_norms_of_outputs_or_inputs(
    unet: Path, tmp_path: Path, module: str, axis: int, algorithm: str
) -> None:
    shape, name = SHAPES[module], _flat(module)
    columns = int(np.prod(shape[1:]))
    if algorithm == "lora":
        up, down = _lora(shape, 3)
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        change = oracle.lora(up, down, 1.0)
    else:
        a, b = _random(shape[0], 4), _random(4, columns, seed=1)
        tensors = {f"{name}.hada_w{n}_a": a for n in (1, 2)}
        tensors |= {f"{name}.hada_w{n}_b": b for n in (1, 2)}
        change = oracle.loha(*[oracle.half(a, b).reshape(shape)] * 2, 1.0)
    sizes = [length if n == axis else 1 for n, length in enumerate(shape)]
    tensors[f"{name}.dora_scale"] = magnitude = _random(*sizes, seed=5).abs() + 1
    adapter = _open(_write(tmp_path, tensors), unet)
    weight = open_base(resolve(unet)).checkpoint.read(f"{module}.weight")
    assert adapter.needs_base(f"{module}.weight")
    delta = exact(adapter.delta(f"{module}.weight", weight).matrix)
    expected = oracle.dora(weight, change, magnitude, axis)
    # The tool adds 1.2e-7 to norms that are above 1 here; the result is rounded once.
    limit = 2.0**-23 * abs(expected + exact(weight)) + U32 * abs(expected)
    assert np.all(abs(delta - expected.reshape(delta.shape)) <= limit.reshape(delta.shape))


# MLX-LM and torchtune, on the tiny Llama.


def _mlx(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 20.0}} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_mlx_stores_transposes_and_does_not_divide_the_scale(
    tiny_base: Path, tmp_path: Path
) -> None:
    a, b = _random(32, 3), _random(3, 16, seed=1)
    table_a, table_b = _random(96, 3, seed=2), _random(3, 32, seed=3)
    tensors = {
        "model.layers.0.self_attn.v_proj.lora_a": a,
        "model.layers.0.self_attn.v_proj.lora_b": b,
        "model.embed_tokens.lora_a": table_a,
        "model.embed_tokens.lora_b": table_b,
    }
    adapter = _open(_mlx(tmp_path / "mlx", tensors), tiny_base)
    assert "MLX" in adapter.kind
    expected = 20 * (exact(a) @ exact(b)).T
    _check(adapter, tiny_base, "model.layers.0.self_attn.v_proj.weight", expected)
    table = 20 * exact(table_a) @ exact(table_b)
    _check(adapter, tiny_base, "model.embed_tokens.weight", table)


def test_mlx_dora(tiny_base: Path, tmp_path: Path) -> None:
    a, b, m = _random(32, 3), _random(3, 16, seed=1), _random(16, seed=2).abs()
    module = "model.layers.0.self_attn.v_proj"
    tensors = {f"{module}.lora_a": a, f"{module}.lora_b": b, f"{module}.m": m}
    adapter = _open(_mlx(tmp_path / "mlx", tensors, fine_tune_type="dora"), tiny_base)
    weight = open_base(resolve(tiny_base)).checkpoint.read(f"{module}.weight")
    expected = oracle.dora(weight, 20 * (exact(a) @ exact(b)).T, m, 0)
    delta = exact(adapter.delta(f"{module}.weight", weight).matrix)
    assert np.all(abs(delta - expected) <= U32 * abs(expected))


def _torchtune(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(dict(tensors), folder / "adapter_model.pt")
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("tune", "ours", "outputs", "inputs", "heads"),
    [
        ("attn.q_proj", "self_attn.q_proj", 32, 32, 4),
        ("attn.k_proj", "self_attn.k_proj", 16, 32, 2),
        ("attn.v_proj", "self_attn.v_proj", 16, 32, None),
        ("attn.output_proj", "self_attn.o_proj", 32, 32, None),
        ("mlp.w1", "mlp.gate_proj", 48, 32, None),
        ("mlp.w2", "mlp.down_proj", 32, 48, None),
        ("mlp.w3", "mlp.up_proj", 48, 32, None),
    ],
)
def test_torchtune_orders_the_rows_of_queries_and_keys_as_meta_does(
    tiny_base: Path, tmp_path: Path, tune: str, ours: str, outputs: int, inputs: int, heads: int
) -> None:
    a, b = _random(3, inputs), _random(outputs, 3, seed=1)
    tensors = {f"layers.1.{tune}.lora_a.weight": a, f"layers.1.{tune}.lora_b.weight": b}
    adapter = _open(_torchtune(tmp_path / "tune", tensors), tiny_base)
    update = 4 * exact(b) @ exact(a)
    expected = update if heads is None else oracle.from_interleaved(update, heads)
    assert adapter.tensors == {f"model.layers.1.{ours}.weight"}
    _check(adapter, tiny_base, f"model.layers.1.{ours}.weight", expected)


def test_mlx_adapters_become_one_of_peft_without_their_base(
    tiny_base: Path, tmp_path: Path
) -> None:
    """PEFT loads what two adapters of MLX-LM are merged to, and adds what MLX-LM would."""
    modules = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    folders, expected = [], {module: np.zeros((16, 32)) for module in modules}
    for n in range(2):
        tensors = {}
        for layer, module in enumerate(modules):
            a, b = _random(32, 3, seed=4 * n + layer), _random(3, 16, seed=4 * n + layer + 2)
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
            expected[module] += 20 * (exact(a) @ exact(b)).T / 2
        folders.append(_mlx(tmp_path / str(n), tensors))
    made = merge(None, folders, "average", output=tmp_path / "one", output_kind="adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = {module: exact(model.state_dict()[f"{module}.weight"]) for module in modules}
    folded = PeftModel.from_pretrained(model, made.path).merge_and_unload().state_dict()
    for module in modules:
        # Entries of some 50 are added in float32.
        np.testing.assert_allclose(
            exact(folded[f"{module}.weight"]),
            before[module] + expected[module],
            rtol=1e-6,
            atol=1e-5,
        )


# Bad input: a message that names the key, and what to do.

_UP, _DOWN = _lora(SHAPES[LINEAR], 3)
_NAME = _flat(LINEAR)
_GOOD = {f"{_NAME}.lora_up.weight": _UP, f"{_NAME}.lora_down.weight": _DOWN}
_HADA = {
    f"{_NAME}.hada_w1_a": _random(12, 2),
    f"{_NAME}.hada_w1_b": _random(2, 10),
    f"{_NAME}.hada_w2_a": _random(12, 2),
    f"{_NAME}.hada_w2_b": _random(2, 10),
}
_CORE = {
    f"{_NAME}.hada_w1_a": _random(2, 12),
    f"{_NAME}.hada_w1_b": _random(2, 10),
    f"{_NAME}.hada_t1": _random(2, 2, 1),
}
_DOTTED = {f"unet.{LINEAR}.lora_B.weight": _UP, f"unet.{LINEAR}.lora_A.weight": _DOWN}


def _without(tensors: Mapping[str, Tensor], end: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(end)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (_without(_GOOD, "up.weight"), r"to_q has .*lora_down\.weight but no lora_up"),
        (_without(_GOOD, "down.weight"), r"has .*lora_up\.weight but no lora_down"),
        (_without(_HADA, "w2_b"), r"but no hada_w2_b"),
        (_HADA | _CORE, r"but no hada_t2"),
        ({f"{_NAME}.lokr_w1": _random(3, 2)}, r"but no lokr_w2_a"),
        (_GOOD | {f"{_NAME}.alpha": torch.ones(3)}, r"alpha has the shape \[3\]"),
        (_GOOD | {f"{_NAME}.alpha": torch.tensor(torch.nan)}, "alpha is nan"),
        (_GOOD | {f"{_NAME}.alpha": torch.tensor(0.0)}, "alpha is 0.*take for the rank"),
        ({f"{_NAME}.alpha": torch.tensor(1.0)}, "alpha stands alone"),
        (_GOOD | {"lora_unet_x.dora_scale": torch.ones(4, 1)}, "dora_scale stands alone"),
        (
            {
                f"{_NAME}.lora_up.weight": _random(12, 0),
                f"{_NAME}.lora_down.weight": _random(0, 10),
            },
            "do not fit together",
        ),
        (_GOOD | {f"{_NAME}.lora_up.weight": _random(12, 4)}, "do not fit together"),
        (_GOOD | {f"{_NAME}.lora_up.weight": _random(10, 3)}, r"\[10, 10\].*\[12, 10\]"),
        (_GOOD | _HADA, "several changes .* LoRA and LoHa"),
        (_GOOD | _DOTTED, r"mixes layouts: lora_unet.* and unet\."),
        (_GOOD | {"lora_unet_x.oft_blocks": _random(2, 4, 4)}, "is of OFT.*merge_lora.py"),
        (_GOOD | {"emb_params": _random(2, 4)}, "emb_params is no part.*merge_lora.py"),
        (_GOOD | {f"{_NAME}.dora_scale": torch.ones(3, 4)}, r"dora_scale has the shape \[3, 4\]"),
        (_GOOD | {f"{_NAME}.dora_scale": torch.ones(1, 4)}, "has 4 entries, .* 10 inputs"),
        (_GOOD | {"lora_unet_other.diff": _random(2, 2)}, "lora_unet_other.*has no tensor"),
        (_GOOD | {f"{_NAME}.lora_up.weight": _UP.to(torch.int8)}, "int8"),
        (_DOTTED | {f"unet.{LINEAR}.lora.up.weight": _UP}, "say the same of"),
        (_DOTTED | {f"unet.{LINEAR}.lora_B.bias": _random(12)}, "trained biases.*fuse_lora"),
        ({"first_stage_model.decoder.conv_in.weight": _UP}, "no adapter of a layout"),
        ({f"base_model.model.{LINEAR}.lora_A.weight": _DOWN}, "no config beside it"),
        ({"model.layers.0.q_proj.lora_a": _DOWN}, "MLX-LM's layout, and no adapter_config.json"),
        (
            {"layers.0.attn.q_proj.lora_a.weight": _DOWN},
            "torchtune's layout, and no adapter_config",
        ),
    ],
)
def test_refuses_what_is_more_or_less_than_an_adapter(
    unet: Path, tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    path = _write(tmp_path, tensors)
    with pytest.raises(StarmergeError, match=rf"(?s)style.*{words}"):
        _open(path, unet)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "no object of LoRA configs"),
        ({"unet.r": 3}, "lora_alpha is missing"),
        ({"unet.r": 4, "unet.lora_alpha": 4}, "is 4 here and 3 in the tensors"),
        ({"text_encoder.r": 3, "text_encoder.lora_alpha": 3}, "no config for unet"),
        ({"unet.r": 3, "unet.lora_alpha": 3, "unet.lora_bias": True}, "lora_bias"),
        ({"../\0.r": 3}, "lora_alpha is missing"),
    ],
)
def test_refuses_configs_in_the_header_that_do_not_fit(
    unet: Path, tmp_path: Path, header: object, words: str
) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    path = _write(tmp_path, _DOTTED, lora_adapter_metadata=text)
    with pytest.raises(StarmergeError, match=words):
        _open(path, unet)


@pytest.mark.parametrize(
    ("config", "drop", "words"),
    [
        ({"lora_parameters": {"rank": 3}}, "", "scale under lora_parameters is missing"),
        ({"lora_parameters": {"rank": 2, "scale": 1.0}}, "", "rank under lora_parameters is 2"),
        ({"fine_tune_type": "full"}, "", "mlx_lm.fuse"),
        ({"fine_tune_type": "dora"}, "", "but no m"),
        ({}, "lora_a", "but no lora_a"),
    ],
)
def test_refuses_mlx_configs_that_do_not_fit(
    tiny_base: Path, tmp_path: Path, config: dict[str, Any], drop: str, words: str
) -> None:
    module = "model.layers.0.self_attn.v_proj"
    tensors = {f"{module}.lora_a": _random(32, 3), f"{module}.lora_b": _random(3, 16)}
    tensors.pop(f"{module}.{drop}", None)
    with pytest.raises(StarmergeError, match=words):
        _open(_mlx(tmp_path / "mlx", tensors, **config), tiny_base)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("layers.0.attn.q_proj", {"r": 4}, "r is 4, and the rank of .* 3"),
        ("layers.0.attn.q_proj", {"lora_alpha": None}, "lora_alpha is missing"),
        ("layers.0.moe.experts", {}, "under no name that is known"),
    ],
)
def test_refuses_torchtune_adapters_that_do_not_fit(
    tiny_base: Path, tmp_path: Path, name: str, config: dict[str, Any], words: str
) -> None:
    tensors = {f"{name}.lora_a.weight": _random(3, 32), f"{name}.lora_b.weight": _random(32, 3)}
    with pytest.raises(StarmergeError, match=words):
        _open(_torchtune(tmp_path / "tune", tensors, **config), tiny_base)


def test_refuses_truncated_files_and_folders_of_several(unet: Path, tmp_path: Path) -> None:
    path = _write(tmp_path, _GOOD)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StarmergeError, match="not a complete safetensors file"):
        _open(path, unet)
    save_file(_GOOD, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="neither an adapter"):
        open_model("a", resolve(tmp_path), open_base(resolve(unet)))


def test_the_only_file_of_a_folder_is_the_adapter(unet: Path, tmp_path: Path) -> None:
    _write(tmp_path, _GOOD)
    model = open_model("a", resolve(tmp_path), open_base(resolve(unet)))
    assert model.tensors == {f"{LINEAR}.weight"}


def test_names_without_dots_that_mean_two_tensors_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {"a.b_c.weight": _random(12, 10), "a_b.c.weight": _random(12, 10)},
        base / "model.safetensors",
    )
    (base / "config.json").write_text("{}")
    tensors = {
        f"lora_unet_a_b_c.{part}": t
        for part, t in zip(("lora_up.weight", "lora_down.weight"), (_UP, _DOWN), strict=True)
    }
    with pytest.raises(StarmergeError, match="a.b_c.weight and a_b.c.weight"):
        _open(_write(tmp_path, tensors), base)


# The table of the manual: each row's tensors are read, with the scale that it says.

_PAGE = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in _PAGE.splitlines()
    if re.match(r"\| [A-Za-z-]+[^|]* \| `", line)
]
_MODULES = {
    "PEFT": ("base_model.model.model.layers.0.mlp.up_proj", "LoRA adapter"),
    "kohya": (_flat(LINEAR), "kohya"),
    "diffusers": (f"unet.{LINEAR}", "diffusers"),
    "diffusers before PEFT": (f"unet.{LINEAR}", "diffusers"),
    "ComfyUI": (f"diffusion_model.{LINEAR}", "diffusers"),
    "LoCon with a core": (_flat(CONV), "kohya"),
    "LoHa": (_flat(LINEAR), "kohya"),
    "LoKr": (_flat(LINEAR), "kohya"),
    "LoKr of whole matrices": (_flat(LINEAR), "kohya"),
    "full difference": (_flat(LINEAR), "kohya"),
    "MLX-LM": ("model.layers.0.mlp.up_proj", "MLX-LM"),
    "torchtune": ("layers.0.mlp.w3", "torchtune"),
}
_PART_SHAPES = {
    ("LoCon with a core", "lora_down.weight"): (2, 6, 1, 1),
    ("LoCon with a core", "lora_up.weight"): (8, 2, 1, 1),
    ("MLX-LM", "lora_a"): (32, 2),
    ("MLX-LM", "lora_b"): (2, 48),
    ("torchtune", "lora_a.weight"): (2, 32),
    ("torchtune", "lora_b.weight"): (48, 2),
    ("PEFT", "lora_A.weight"): (2, 32),
    ("PEFT", "lora_B.weight"): (48, 2),
}
_SHAPES_OF_PARTS = {
    "lora_A.weight": (2, 10),
    "lora_B.weight": (12, 2),
    "lora_down.weight": (2, 10),
    "lora_up.weight": (12, 2),
    "lora.down.weight": (2, 10),
    "lora.up.weight": (12, 2),
    "lora_mid.weight": (2, 2, 3, 3),
    "hada_w1_a": (12, 2),
    "hada_w1_b": (2, 10),
    "hada_w2_a": (12, 2),
    "hada_w2_b": (2, 10),
    "lokr_w1": (3, 2),
    "lokr_w2": (4, 5),
    "lokr_w2_a": (4, 2),
    "lokr_w2_b": (2, 5),
    "diff": (12, 10),
    "diff_b": (12,),
    "alpha": (),
}


def test_the_manual_has_a_row_for_each_layout() -> None:
    assert [row[0] for row in _ROWS] == [*_MODULES, "GGUF"]


@pytest.mark.parametrize("row", _ROWS[:-1], ids=lambda row: row[0])
def test_every_row_of_the_manual(
    unet: Path, tiny_base: Path, tmp_path: Path, row: list[str]
) -> None:
    """With alpha = 7, r = 2, and a scale of 5 where a config says one."""
    name, parts, formula = row[:3]
    module, kind = _MODULES[name]
    tensors = {}
    for n, part in enumerate(re.findall(r"`([^`]+)`", parts)):
        shape = _PART_SHAPES.get((name, part), _SHAPES_OF_PARTS.get(part))
        assert shape is not None
        tensor = torch.tensor(7.0) if part == "alpha" else _random(*shape, seed=n)
        tensors[f"{module}.{part}"] = tensor
    base = unet
    if name in ("PEFT", "MLX-LM", "torchtune"):
        base, path = tiny_base, tmp_path / "adapter"
        if name == "MLX-LM":
            _mlx(path, tensors, lora_parameters={"rank": 2, "scale": 5.0})
        elif name == "torchtune":
            _torchtune(path, tensors, r=2, lora_alpha=7)
        else:
            path.mkdir()
            save_file(tensors, path / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "target_modules": ["up_proj"]}
            (path / "adapter_config.json").write_text(json.dumps(config))
    else:
        path = _write(tmp_path, tensors)
    adapter = _open(path, base)
    assert kind in adapter.kind
    update = next(p.update for t, p in adapter.updates.items() if t.endswith(".weight"))
    scale = {"alpha/r": 3.5, "1": 1.0, "scale": 5.0}[formula]
    assert getattr(update.change, "scale", 1.0) == scale
    assert (update.rank is None) == (row[3] == "no")
