"""Random adapters of a tiny base, to be inspected."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from starmerge_models.study.inspection.inspection import Inspection
from tests.oracles import samples

QV = ("self_attn.q_proj", "self_attn.v_proj")
MLP = ("mlp.up_proj", "mlp.down_proj")


def write_adapter(
    folder: Path, base: Path, rank: int, modules: Sequence[str] = QV, *, seed: int
) -> Path:
    """Write a random adapter of a base, of Frobenius norm 1."""
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in load_file(base / "model.safetensors").items()
        if name.removesuffix(".weight").endswith(tuple(modules))
    }
    factors = {
        name: (samples.normal(m, rank, seed=2 * seed), samples.normal(rank, n, seed=2 * seed + 1))
        for name, (m, n) in shapes.items()
    }
    size = math.sqrt(sum(float((B @ A).square().sum()) for B, A in factors.values()))
    folder.mkdir()
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = B / size
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tests/tiny",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [module.rpartition(".")[2] for module in modules],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_adapters(folder: Path, base: Path) -> dict[str, Path]:
    """Write three adapters of different ranks; the last changes more modules than the others."""
    return {
        "one": write_adapter(folder / "one", base, 3, seed=1),
        "two": write_adapter(folder / "two", base, 4, seed=2),
        "three": write_adapter(folder / "three", base, 2, QV + MLP, seed=3),
    }


def scaled(adapter: Path, factor: float) -> Path:
    """Multiply an adapter's update."""
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name: tensor * factor if "lora_B" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    return adapter


def renamed(found: Inspection, names: Mapping[str, str]) -> Inspection:
    """Return an inspection in which models, merges, modules and the base have other names."""

    def other(record: dict) -> dict:
        keys = ("model", "a", "b", "merge", "module")
        return record | {key: names.get(record[key], record[key]) for key in keys if key in record}

    tables = ("models", "conflicts", "layers", "tensors", "kept", "kept_tensors")
    changed = {table: [other(record) for record in getattr(found, table)] for table in tables}
    findings = [
        replace(finding, text=f"{names.get('one')} {finding.text}") for finding in found.findings
    ]
    return replace(
        found, **changed, base=names.get(found.base, found.base), findings=tuple(findings)
    )
