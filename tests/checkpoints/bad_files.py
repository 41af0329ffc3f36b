"""Files as nobody should write them, and a merge of them within a bound of time."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import starmerge_models
from starmerge_models.errors import StarmergeError
from starmerge_models.recipe_file import load_recipe

PATIENCE = 30
"""Seconds; nothing here takes one, unless it hangs."""


@contextmanager
def time_limit(seconds: int = PATIENCE) -> Iterator[None]:
    """Fail if the block takes longer, also where it waits for a pipe."""

    def fail(*_: object) -> None:
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def header_of(tensors: Mapping[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


def write_safetensors(file: Path, header: bytes, body: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + body)


def split_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a file, and the bytes behind it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rezip(
    file: Path,
    change: Callable[[str, bytes], bytes] = lambda _, content: content,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write a .bin file anew, with its records changed or compressed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def repickle(file: Path, content: object) -> None:
    """Replace what a .bin file's pickle says."""
    rezip(file, lambda name, old: pickle.dumps(content, 2) if name.endswith(".pkl") else old)


class World:
    """A base, a fine-tune, and adapters of it, small and of their own, to be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        names = [f"model.layers.{i}.{m}.weight" for i in range(2) for m in ("q", "v")]
        tensors = {name: torch.randn(6, 4, generator=generator) for name in names}
        tensors["model.embed.weight"] = torch.randn(8, 4, generator=generator)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
        self.base = self._model("base", tensors, config)
        (self.base / "generation_config.json").write_text("{}")
        self.tuned = self._model("tuned", {k: t + 0.1 for k, t in tensors.items()}, config)
        self.adapter = self._adapter("adapter", names, generator)
        self.other = self._adapter("other", names[:2], generator)

    def _model(self, name: str, tensors: dict[str, torch.Tensor], config: object) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _adapter(self, name: str, names: list[str], generator: torch.Generator) -> Path:
        folder = self.folder / name
        folder.mkdir()
        tensors = {}
        for weight in names:
            module = f"base_model.model.{weight.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, 4, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def copy(self, folder: Path) -> World:
        """Return another one in a folder that does not exist yet."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return _at(folder)

    def merge(self, *models: Path, **options: Any) -> Path:
        """Merge models into the base by sm.merge; default is adapter and fine-tune."""
        output = self.folder / "merged"
        chosen = models or (self.adapter, self.other)
        starmerge_models.merge(self.base, chosen, "average", output=output, threads=1, **options)
        return output

    def to_bin(self, *, adapter: bool = False) -> Path:
        """Turn the base's or the adapter's weights into a .bin file, and return it."""
        folder, stem, name = (
            (self.adapter, "adapter_model", "adapter_model.bin")
            if adapter
            else (self.base, "model", "pytorch_model.bin")
        )
        weights = folder / f"{stem}.safetensors"
        torch.save(load_file(weights), folder / name)
        weights.unlink()
        return folder / name

    def shard(self) -> Path:
        """Split the base's weights into two files, and return the index."""
        weights = self.base / "model.safetensors"
        tensors = load_file(weights)
        weights.unlink()
        names = list(tensors)
        where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for shard in set(where.values()):
            part = {name: tensors[name] for name in names if where[name] == shard}
            save_file(part, self.base / shard)
        index = self.base / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return index

    def recipe(self, text: str | bytes) -> Path:
        """Write a recipe beside the models and return it."""
        file = self.folder / "recipe.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file


def _at(folder: Path) -> World:
    world = World.__new__(World)
    world.folder = folder
    for name in ("base", "tuned", "adapter", "other"):
        setattr(world, name, folder / name)
    return world


# What follows mutates files at random, but by their structure, and says how each outcome was.

_ODD: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63 - 1, 2**63, 2**64, 10**25, 1e308,
    float("nan"), float("inf"), "", "a", "false", "..", "/", "\0", "\ud800", "é" * 300, "LORA",
    "F32", "BF16", "../base", [], [0], [[]], {}, {"": {}}, [1, 2, 3], {"a": 1}, [True], "(a+)+$",
    "model.layers.99999999999999999999.q.weight", "x" * 5000,
)  # fmt: skip


def mutate(content: Any, rng: random.Random) -> Any:
    """Change, drop, add or repeat something, somewhere in a JSON value."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        changed = dict(content)
        action = rng.random()
        if action < 0.15:
            del changed[key]
        elif action < 0.3:
            changed[str(rng.choice(_ODD))[:2000]] = changed.pop(key)
        elif action < 0.4:
            changed[str(rng.choice(list(content)))] = rng.choice(_ODD)
        else:
            changed[key] = mutate(changed[key], rng)
        return changed
    if isinstance(content, list) and content and rng.random() < 0.7:
        place = rng.randrange(len(content))
        new = [] if rng.random() < 0.2 else [mutate(content[place], rng)]
        return content[:place] + new + content[place + (rng.random() < 0.9) :]
    if isinstance(content, int) and rng.random() < 0.5:
        return content + rng.choice([-8, -4, -1, 1, 4, 8, 2**40])
    return rng.choice(_ODD)


def garble(content: bytes, rng: random.Random) -> bytes:
    """Change bytes somewhere."""
    if not content:
        return rng.randbytes(8)
    place = rng.randrange(len(content))
    action = rng.random()
    if action < 0.3:
        return content[:place]
    if action < 0.6:
        return content[:place] + rng.randbytes(1) + content[place + 1 :]
    if action < 0.8:
        part = content[place : place + rng.randrange(1, 60)]
        return content[:place] + part + content[place:]
    return content[:place] + content[place + rng.randrange(1, 20) :]


def as_json(content: object, rng: random.Random) -> bytes:
    """Write JSON, sometimes in ways that only some readers take."""
    text = json.dumps(content, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.05:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        return text.encode("utf-16", "surrogatepass")
    data = text.encode("utf-8", "surrogatepass")
    return garble(data, rng) if rng.random() < 0.2 else data


def _edit(file: Path, rng: random.Random) -> None:
    content = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = mutate(content, rng)
    file.write_bytes(as_json(content, rng))


def _spoil_header(file: Path, rng: random.Random) -> None:
    header, body = split_safetensors(file)
    content: Any = header
    for _ in range(rng.choice([1, 1, 2])):
        content = mutate(content, rng)
    data = as_json(content, rng)
    if rng.random() < 0.1:
        body = garble(body, rng)
    write_safetensors(file, data, body)


def _spoil_bin(file: Path, rng: random.Random) -> None:
    action = rng.random()
    if action < 0.3:
        file.write_bytes(garble(file.read_bytes(), rng))
    elif action < 0.5:
        rezip(file, compression=rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
        file.write_bytes(garble(file.read_bytes(), rng))
    else:
        chosen = rng.randrange(12)
        numbers = iter(range(1000))

        def change(name: str, content: bytes) -> bytes:
            is_chosen = name.endswith(".pkl") if chosen < 9 else next(numbers) == chosen % 7
            return garble(content, rng) if is_chosen else content

        rezip(file, change)


_RECIPE = """base: base
models:
  - adapter
  - {path: other, name: b, weight: 2}
method: star+ties
parameters: {eta: {"*": 40}, k: 30}
dtype: keep
any_base: false
"""

_MERGEKIT = """merge_method: ties
base_model: base
models:
  - model: tuned
    parameters: {weight: [0.5, 1], density: {value: 0.5}}
parameters: {normalize: true}
dtype: float32
"""


def _spoil_recipe(world: World, rng: random.Random) -> None:
    import yaml

    text = rng.choice([_RECIPE, _MERGEKIT])
    if rng.random() < 0.5:
        content = mutate(yaml.safe_load(text), rng)
        data = yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    else:
        data = garble(text.encode(), rng)
    merge_recipe(world, world.recipe(data))


def merge_recipe(world: World, file: Path) -> None:
    """Merge by a recipe, as the command line does."""
    from starmerge_models.merging.engine import run
    from starmerge_models.merging.executors.threads import Threads
    from starmerge_models.merging.plan import make_plan

    run(make_plan(load_recipe(file), world.folder / "merged"), Threads(1))


KINDS = ("base header", "adapter header", "config", "adapter config", "index", "bin", "adapter bin",
         "recipe")  # fmt: skip


def spoil_and_merge(world: World, kind: str, rng: random.Random) -> str:
    """Spoil one file of a world, merge, and return "merged" or what the refusal says.

    Anything else that is raised is a fault of ours.
    """
    try:
        with time_limit():
            if kind == "base header":
                _spoil_header(world.base / "model.safetensors", rng)
            elif kind == "adapter header":
                _spoil_header(world.adapter / "adapter_model.safetensors", rng)
            elif kind == "config":
                _edit(world.base / "config.json", rng)
            elif kind == "adapter config":
                file = world.adapter / "adapter_config.json"
                patterns = {"rank_pattern": {"q": 2}, "alpha_pattern": {"layers.1.*": 3}}
                file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
                _edit(file, rng)
            elif kind == "index":
                _edit(world.shard(), rng)
            elif kind == "bin":
                _spoil_bin(world.to_bin(), rng)
            elif kind == "adapter bin":
                _spoil_bin(world.to_bin(adapter=True), rng)
            else:
                _spoil_recipe(world, rng)
                return "merged"
            world.merge()
    except StarmergeError as error:
        return str(error)
    return "merged"


def legacy_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Return what torch wrote before 1.6."""
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()
