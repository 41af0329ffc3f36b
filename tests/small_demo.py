"""The demo with models that are cut to their first layers and tokens, so that they answer soon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import starmerge_models_demo

LAYERS = 2
TOKENS = 1024


def write_small_demo(base: Path, folder: Path) -> None:
    """Write a cache and a package of the demo's models.

    Args:
        base: The demo's base.
        folder: A folder to be both ``XDG_CACHE_HOME`` and first on ``sys.path``.
    """
    cut = folder / "starmerge" / base.name
    shutil.copytree(base, cut, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = first_layers(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:TOKENS].clone()
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((cut / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "vocab_size": TOKENS}
    (cut / "config.json").write_text(json.dumps(config))
    shorten_tokenizer(cut / "tokenizer.json")

    package = folder / "starmerge_models_demo"
    data = Path(starmerge_models_demo.__file__).parent
    shutil.copytree(data, package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for file in data.glob("adapters/*/adapter_model.safetensors"):
        save_file(first_layers(file), package / file.relative_to(data))


def first_layers(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a model or an adapter without those of its later layers."""
    first = [f".layers.{n}." for n in range(LAYERS)]
    return {
        name: tensor
        for name, tensor in load_file(file).items()
        if ".layers." not in name or any(part in name for part in first)
    }


def shorten_tokenizer(file: Path) -> None:
    """Leave a tokenizer its first tokens: those of control, bytes, and what is joined first."""
    content = json.loads(file.read_text())
    model = content["model"]
    model["vocab"] = {token: n for token, n in model["vocab"].items() if n < TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(content))
