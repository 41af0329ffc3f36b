"""Merges of each kind of output, as command lines, of tiny models that are made here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.checkpoints.quantised.stored import gptq_model

OUTPUTS = ("sharded", "unified", "file", "gguf", "fine-tunes", "adapter", "model", "quantised",
           "experts")  # fmt: skip
"""All kinds of :func:`make_merge`."""


@dataclass(frozen=True)
class Merge:
    """A merge, as a command line without its output."""

    kind: str
    inputs: list[str]
    method: str
    options: tuple[str, ...] = ()
    ending: str = ""
    """Of the output's name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of :class:`tests.forks.Run`."""

    def argv(self, output: Path, *more: str, threads: int | None = 1) -> list[str]:
        """Return the command that makes an output."""
        return [
            *("merge", *self.inputs, "-m", self.method, "-o", str(output)),
            *(*self.options, *([] if threads is None else ["--threads", str(threads)]), *more),
        ]

    def other(self) -> Merge:
        """Return a merge of fewer models, which makes other bytes of the same kind."""
        return Merge(
            self.kind, self.inputs[:-1], self.method, self.options, self.ending, self.settings
        )


def make_merge(kind: str, folder: Path) -> Merge:
    """Make the models of a merge in a folder, unless they are there, and return the merge."""
    if kind == "file":
        files = [_single_file(folder / f"{name}.safetensors", n) for n, name in enumerate("abc")]
        return Merge(kind, files, "average", ("--as", "adapter"), ".safetensors")
    if kind == "experts":
        base = _once(folder / "mixtral", _mixtral)
        models = [_once(folder / f"mixtral-{n}", _experts, base, n) for n in range(3)]
        return Merge(kind, [base, *models], "star")
    llama = _once(folder / "llama", _llama)
    if kind == "fine-tunes":
        tuned = [_once(folder / f"tuned-{n}", _tuned, llama, n) for n in range(3)]
        return Merge(kind, [llama, *tuned], "ties")
    adapters = [_once(folder / f"adapter-{n}", _adapter, llama, n) for n in range(3)]
    if kind == "quantised":
        base = _once(folder / "gptq", lambda place: gptq_model(Path(llama), place))
        return Merge(kind, [base, *adapters], "average", ("--dtype", "bfloat16"))
    models = [llama, *adapters]
    return {
        "model": Merge(kind, models, "star"),
        "sharded": Merge(kind, models, "average", settings={"shard_bytes": 100_000}),
        "adapter": Merge(kind, adapters, "star", ("--as", "adapter")),
        "gguf": Merge(kind, models, "star", ("--as", "gguf"), ".gguf"),
        "unified": Merge(kind, models, "emr"),
    }[kind]


def _once(place: Path, make: Any, *arguments: Any) -> str:
    if not place.exists():
        make(place, *arguments)
    return str(place)


def _llama(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(
        folder
    )


def _mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder, save_original_format=False)


def _experts(folder: Path, base: str, seed: int) -> None:
    torch.manual_seed(seed)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    model.name_or_path = "tests/tiny"
    get_peft_model(model, settings).save_pretrained(folder, save_embedding_layers=False)


def _adapter(folder: Path, base: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(Path(base) / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            n, m = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, m, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(n, 4, generator=generator) / 10
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "tests/tiny",
        "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _tuned(folder: Path, base: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(Path(base) / "model.safetensors").items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((Path(base) / "config.json").read_text())


def _single_file(file: Path, seed: int) -> str:
    """Make an adapter in kohya's layout, unless it is there."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(6):
        stem = f"lora_unet_mid_block_attentions_{number}_proj_in"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, 96, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(128, 2, generator=generator)
    if not file.exists():
        save_file(tensors, file)
    return str(file)
