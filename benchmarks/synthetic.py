"""Synthetic models with the layouts of real ones: Llama-shaped bases, adapters, full fine-tunes.

They are written tensor by tensor, so that a base of 16 GB needs the memory of its largest tensor.
Their numbers come from a block of random ones that is read around and around: cheap to make, and
no copy of each other that a disk could share.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from starmerge_models.checkpoints.tensors import DTYPE_CODES, raw_bytes

SHARD_BYTES = 5 * 10**9
"""Largest shard, as transformers writes them."""

QUERY_VALUE = ("self_attn.q_proj", "self_attn.v_proj")
ALL_LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The modules that adapters are commonly trained on."""

RANK = 16
DECAY = 0.7
"""Ratio of neighbouring singular values; in the demo's adapters the first has half of the sum."""
WEIGHT = 0.02
"""Standard deviation of the base's entries."""
FACTOR = 1e-2
"""Standard deviation of the first column of an adapter's B."""
UPDATE = 1e-3
"""Standard deviation of the entries that the first direction gives a full fine-tune's update."""
NOISE = 1e-4
"""Standard deviation of what is full-rank in the update of a full fine-tune."""

_BLOCK = 2**24 + 43
"""Random numbers made; more than an entry for each of a 4096 × 4096 matrix, and an odd number."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    key_value: int
    """Width of the keys, and of the values: the number of their heads times that of a head."""
    head: int = 128
    """Width of a head."""

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The shapes (out, in) of the linear modules in a layer."""
        hidden, inner, key_value = self.hidden, self.intermediate, self.key_value
        shapes = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        return dict(zip(ALL_LINEAR, shapes, strict=True))

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by name."""
        tensors: dict[str, tuple[int, ...]] = {}
        tensors["model.embed_tokens.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for module, shape in self.linear.items():
                tensors[f"{prefix}.{module}.weight"] = shape
            tensors[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
        tensors["model.norm.weight"] = (self.hidden,)
        tensors["lm_head.weight"] = (self.vocabulary, self.hidden)
        return tensors

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(_size, self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes in bfloat16."""
        return 2 * self.parameters

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor in bfloat16."""
        return 2 * max(map(_size, self.tensors.values()))

    def adapter_bytes(self, targets: Sequence[str], dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of an adapter of these modules."""
        entries = sum(RANK * sum(self.linear[target]) for target in targets)
        return self.layers * entries * dtype.itemsize

    @property
    def config(self) -> dict[str, object]:
        """``config.json``, as far as it says something."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.key_value // self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def llama_of(nbytes: float) -> Llama:
    """Return a Llama of about ``nbytes`` in bfloat16, as wide as models of its size are."""
    widths = (
        (0.2e9, (512, 1408, 128)),
        (1.2e9, (1024, 2816, 256)),
        (3e9, (2048, 5632, 512)),
        (8e9, (3072, 8192, 1024)),
    )
    default = (4096, 14336, 1024)
    hidden, inner, key_value = next((found for limit, found in widths if nbytes < limit), default)
    vocabulary = 8192 if nbytes < 0.6e9 else 32000
    head = 64 if hidden < 2048 else 128
    empty = Llama(hidden, inner, 0, vocabulary, key_value, head)
    layer = Llama(hidden, inner, 1, vocabulary, key_value, head).nbytes - empty.nbytes
    layers = max(1, round((nbytes - empty.nbytes) / layer))
    return Llama(hidden, inner, layers, vocabulary, key_value, head)


def make_base(folder: Path, model: Llama, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a random base in bfloat16, in shards as transformers would."""
    _write(folder, "model", model.tensors, torch.bfloat16, base_tensor, shard_bytes)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return folder


def make_sparse_base(folder: Path, model: Llama) -> Path:
    """Write a base of zeros whose files take no room on the disk, where the file system allows."""
    _write(folder, "model", model.tensors, torch.bfloat16, None, SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return folder


def make_adapters(
    folder: Path,
    model: Llama,
    count: int,
    *,
    targets: Sequence[str] = ALL_LINEAR,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Path]:
    """Write LoRA adapters in PEFT's layout, each of its own numbers; return them by name."""
    names = [f"adapter-{number:03d}" for number in range(count)]
    return {
        name: make_adapter(folder / name, model, targets=targets, dtype=dtype) for name in names
    }


def make_adapter(folder: Path, model: Llama, *, targets: Sequence[str], dtype: torch.dtype) -> Path:
    """Write an adapter of rank RANK: A as PEFT initialises it, B small, with a decaying spectrum.

    Its numbers depend on the folder's name.
    """
    layout: dict[str, tuple[int, ...]] = {}
    for layer in range(model.layers):
        for target in targets:
            rows, columns = model.linear[target]
            prefix = f"base_model.model.model.layers.{layer}.{target}"
            layout[f"{prefix}.lora_A.weight"] = (RANK, columns)
            layout[f"{prefix}.lora_B.weight"] = (rows, RANK)
    seed = folder.name

    def factor(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = random_tensor(f"{seed}/{name}", shape)
        if ".lora_A." in name:
            return drawn / (3 * shape[1]) ** 0.5
        return drawn * (FACTOR * _spectrum())

    _write(folder, "adapter_model", layout, dtype, factor, SHARD_BYTES)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(target.rpartition(".")[2] for target in targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_finetunes(folder: Path, model: Llama, count: int) -> dict[str, Path]:
    """Write full fine-tunes of a base of ``make_base`` in bfloat16; return them by name."""
    names = [f"finetune-{number}" for number in range(count)]
    return {name: make_finetune(folder / name, model) for name in names}


def make_finetune(folder: Path, model: Llama) -> Path:
    """Write a full fine-tune: the base, an update of rank RANK, and noise, rounded to bfloat16."""
    seed = folder.name

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        tuned = base_tensor(name, shape).float()
        tuned.add_(random_tensor(f"{seed}/{name}/noise", shape), alpha=NOISE)
        if len(shape) == 2:
            left = random_tensor(f"{seed}/{name}/left", (shape[0], RANK)) * _spectrum()
            tuned.addmm_(
                left, random_tensor(f"{seed}/{name}/right", (RANK, shape[1])), alpha=UPDATE
            )
        return tuned

    _write(folder, "model", model.tensors, torch.bfloat16, tensor, SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return folder


def base_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of the base, in bfloat16."""
    return _around(_weights(), name, shape)


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return normally distributed float32 numbers of variance 1 that depend on the name alone."""
    return _around(_normal(), name, shape)


def _around(block: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of as many numbers as a shape has, from a place that depends on the name."""
    size = _size(shape)
    start = zlib.crc32(name.encode()) % len(block)
    parts = [block[start : start + size]]
    missing = size - len(parts[0])
    parts += [block] * (missing // len(block)) + [block[: missing % len(block)]]
    return torch.cat(parts).view(shape)


@cache
def _normal() -> Tensor:
    return torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))


@cache
def _weights() -> Tensor:
    return (WEIGHT * _normal()).bfloat16()


@cache
def _spectrum() -> Tensor:
    return DECAY ** torch.arange(RANK)


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _write(
    folder: Path,
    stem: str,
    layout: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str, tuple[int, ...]], Tensor] | None,
    shard_bytes: int,
) -> None:
    """Write safetensors files of one dtype, and an index if there are several.

    Without ``make`` the tensors are zeros, and the files are sparse.
    """
    folder.mkdir(parents=True)
    shards = list(_split(layout, dtype, shard_bytes))
    places = {}
    for number, shard in enumerate(shards):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard, dtype))
            for name, shape in shard.items():
                if make is None:
                    stream.seek(_size(shape) * dtype.itemsize, os.SEEK_CUR)
                else:
                    stream.write(raw_bytes(make(name, shape).to(dtype)))
            stream.truncate()
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(map(_size, layout.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _split(
    layout: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    filled = 0
    for name, shape in layout.items():
        nbytes = _size(shape) * dtype.itemsize
        if shard and filled + nbytes > limit:
            yield shard
            shard, filled = {}, 0
        shard[name] = shape
        filled += nbytes
    yield shard


def _header(shard: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + _size(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
