"""Adapters for llama.cpp: what its loader makes of the file is the merged update."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from starmerge_models.errors import UsageError
from starmerge_models.merging.engine import merge
from tests.conftest import MakeAdapter, MakeFinetune
from tests.oracles import formats as oracle
from tests.oracles.deltas import exact, low_rank

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""llama.cpp's names of the layers of a Llama."""

_HEADS = {"q_proj": 4, "k_proj": 2}


def _loaded(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Return the fields of a file, and its updates alpha/r B A by llama.cpp's names."""
    reader = GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    updates = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if name == "token_embd.weight":  # A is (rows, r), as rows are looked up
            updates[name] = (fields["adapter.lora.alpha"] / a.shape[1]) * a @ b.T
        else:
            updates[name] = (fields["adapter.lora.alpha"] / a.shape[0]) * b @ a
    return fields, updates


def _mean_by_peft(folders: list[Path], module: str) -> NDArray[np.float64]:
    """Return the mean of alpha/r B A of a module, with alpha = 8 and r = 4."""
    total: Any = 0.0
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        stem = f"base_model.model.{module}"
        total = total + low_rank(
            tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_A.weight"], 2.0
        )
    return np.asarray(total / len(folders))


@pytest.mark.parametrize(
    ("dtype", "limit"), [("keep", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("output", ["merged.gguf", "folder"])
def test_llama_has_its_names_and_its_order_of_rows(
    make_adapter: MakeAdapter,
    tiny_base: Path,
    tmp_path: Path,
    output: str,
    dtype: Any,
    limit: float,
) -> None:
    folders = [make_adapter(str(n), seed=n, target_modules=list(_NAMES)) for n in range(2)]
    made = merge(
        tiny_base, folders, "average", output=tmp_path / output, output_kind="gguf", dtype=dtype
    )
    file = made.path if made.path.is_file() else made.path / "adapter.gguf"
    fields, updates = _loaded(file)
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8
    assert len(updates) == 2 * len(_NAMES)
    for layer in range(2):
        for ours, theirs in _NAMES.items():
            part = "self_attn" if theirs.startswith("attn") else "mlp"
            expected = _mean_by_peft(folders, f"model.layers.{layer}.{part}.{ours}")
            update = updates[f"blk.{layer}.{theirs}.weight"]
            if ours in _HEADS:
                assert abs(update - expected).max() > 0.1
                update = oracle.from_interleaved(update, _HEADS[ours])
            np.testing.assert_allclose(update, expected, rtol=0, atol=limit)
    if made.path.is_dir():
        report = json.loads((made.path / "merge_report.json").read_text())
        assert report["output"]["kind"] == "gguf"
        assert "adapter.gguf" in report["blake3"]
        assert not (made.path / "factors").exists()


def test_embeddings_are_stored_by_rows(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    folder = make_adapter("a", target_modules=["embed_tokens"])
    made = merge(tiny_base, [folder], "average", output=tmp_path / "a.gguf", output_kind="gguf")
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens"
    A, B = (exact(tensors[f"{stem}.lora_embedding_{end}"]) for end in "AB")
    _, updates = _loaded(made.path)
    np.testing.assert_allclose(updates["token_embd.weight"], 2 * (B @ A).T, rtol=0, atol=1e-6)


def test_other_models_keep_the_order_of_rows(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    folder = make_adapter("a", base=tmp_path / "qwen", target_modules=["q_proj"])
    made = merge(
        tmp_path / "qwen", [folder], "average", output=tmp_path / "a.gguf", output_kind="gguf"
    )
    fields, updates = _loaded(made.path)
    assert fields["general.architecture"] == "qwen2"
    expected = _mean_by_peft([folder], "model.layers.0.self_attn.q_proj")
    np.testing.assert_allclose(updates["blk.0.attn_q.weight"], expected, rtol=0, atol=1e-6)


def test_refusals(
    make_adapter: MakeAdapter, make_finetune: MakeFinetune, tiny_base: Path, tmp_path: Path
) -> None:
    folder = make_adapter("a")
    saved = make_adapter("saved", modules_to_save=["lm_head"])

    def refuses(words: str, *models: Path, base: Path | None = tiny_base, name: str = "o") -> None:
        with pytest.raises(UsageError, match=words):
            merge(base, list(models), "average", output=tmp_path / name, output_kind="gguf")
        assert not (tmp_path / name).exists()

    refuses("model_type is not known: give the base", folder, base=None)
    refuses("stored whole", saved)
    refuses("Choose a rank", make_finetune("full"))
    refuses("is the name of a file", folder, name="o.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    for key, value, said in (
        ("model_type", "mamba", "is 'mamba'.*convert_lora_to_gguf.py"),
        ("model_type", ["llama"], r"is \['llama'\]"),
        ("num_hidden_layers", "two", "'two' of num_hidden_layers"),
        ("num_hidden_layers", 10**9, "1000000000 of num_hidden_layers"),
        ("num_attention_heads", 3, "3 of the heads of .*q_proj, which do not divide its 32 rows"),
        ("num_attention_heads", True, "True of the heads"),
    ):
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        refuses(said, folder, base=other)
