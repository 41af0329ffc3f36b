"""Checkpoints of quantised weights, made on the spot from the formats' definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.checkpoints.quantised import Dequantised, dequantised
from tests.conftest import edit_json
from tests.oracles import quantised as oracle

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}


def read(tensors: dict[str, Tensor], settings: dict[str, Any], folder: Path) -> Dequantised:
    """Save tensors and open them as a quantised model's."""
    file = folder / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return dequantised(open_safetensors(file), {"quantization_config": settings}, "the model")


def gptq_layer(
    name: str, W: np.ndarray, *, bits: int = 4, group: int = 16
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Quantise a weight (outputs, inputs), rounding to the nearest; return what is stored and W."""
    group_of = np.arange(W.shape[1]) // group
    groups = group_of.max() + 1
    low = np.stack([W[:, group_of == g].min(1) for g in range(groups)])
    high = np.stack([W[:, group_of == g].max(1) for g in range(groups)])
    s = np.maximum((high - low) / (2**bits - 1), 1e-3).astype(np.float16).astype(float)
    z = np.clip(np.round(-low / s), 1, 2**bits - 1).astype(np.int64)
    q = np.clip(np.round(W.T / s[group_of] + z[group_of]), 0, 2**bits - 1).astype(np.int64)
    stored = {
        f"{name}.qweight": torch.from_numpy(oracle.packed(q, bits)),
        f"{name}.qzeros": torch.from_numpy(oracle.packed((z - 1).T, bits).T.copy()),
        f"{name}.scales": torch.from_numpy(s).half(),
        f"{name}.g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return stored, oracle.grouped(q, z, s, group_of)


def gptq_model(base: Path, folder: Path) -> dict[str, np.ndarray]:
    """Quantise the linear layers of a tiny model by GPTQ's format; return the weights in float64.

    The embedding, the head and the norms stay as they are.
    """
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    weights = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stored, W = gptq_layer(name.removesuffix(".weight"), tensor.double().numpy())
            tensors |= stored
            weights[name] = W
        else:
            tensors[name] = tensor
            weights[name] = tensor.double().numpy()
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    edit_json(folder / "config.json", quantization_config=GPTQ)
    return weights
