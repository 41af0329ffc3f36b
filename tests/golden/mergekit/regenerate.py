"""Run mergekit on every recipe in `recipes/` and store what it merges.

The tests only read what this wrote; nothing runs it by itself. Make a scratch environment for it,
never the project's own, and run it from the root of the checkout:

    python3.11 -m venv /tmp/mergekit
    /tmp/mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    OMP_NUM_THREADS=1 /tmp/mergekit/bin/python -m tests.golden.mergekit.regenerate

With the names of recipes as arguments only these are run again. Every recipe runs twice, on
models stored in float32 and in bfloat16 (`inputs.py`). Beside `NAME.yaml` comes `NAME.safetensors`,
with the keys

- `float32/TENSOR`, `bfloat16/TENSOR`: the merged tensor, for the tensors in `KEPT`;
- `DTYPE/TENSOR/mask/MODEL`: which entries of the model's delta were kept (uint8), stored where the
  definition leaves that open: where it was drawn, or where entries of one magnitude fell on both
  sides of the cut (mergekit sorts without keeping the order of equals). `DTYPE/TENSOR/mask` is the
  same for SCE, which cuts once for all models;
- `DTYPE/TENSOR/chance/MODEL`: the chance of each entry to be kept, where these differ.

`resolved.json` has, for the recipes in `RESOLVED`, what mergekit takes each parameter to be, tensor
by tensor: `shared` by parameter, `input` by model and parameter.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic, sce, task_adapter
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from tests.golden.mergekit.inputs import CONFIG, DTYPES, MODELS, model_tensors

VERSION = "0.1.5"
HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
SEED = 1

KEPT = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.2.input_layernorm.weight",
    "model.norm.weight",
)
KEPT_OF_SETTINGS = (*KEPT, "lm_head.weight")
KEPT_OF_STACKS = (
    *(
        f"model.layers.{i}.self_attn.{name}.weight"
        for i in (2, 3, 4)
        for name in ("q_proj", "o_proj")
    ),
    "model.layers.3.mlp.down_proj.weight",
    "lm_head.weight",
)
"""What is kept besides where layers are stacked, as far as it is there."""
RESOLVED = ("linear_base_joins", "slerp_gradient", "slerp_filters", "gradients", "precedence")


class Recorder:
    """Notes what each tensor's merge was given, and what was drawn for it."""

    def __init__(self) -> None:
        self.resolved: dict[str, Any] = {}
        self.drawn: dict[str, torch.Tensor] = {}
        self._tensor = ""
        self._is_drawn = False
        self._models: list[str] = []

    def run(self, recipe: str, folder: Path) -> dict[str, torch.Tensor]:
        """Merge the models in the working directory and return the merged tensors."""
        execute = task_adapter.ExecuteMergeMethodTask.execute
        thin = generalized_task_arithmetic.sparsify
        draw = torch.bernoulli
        apply_mask = sparsify.rescaled_masked_tensor
        select = sce.sce_mask
        recorder = self

        def noting_the_tensor(task: Any, **arguments: Any) -> Any:
            recorder._begin(task)
            return execute(task, **arguments)

        def noting_the_model(*arguments: Any, **options: Any) -> torch.Tensor:
            thinned = thin(*arguments, **options)
            recorder._models.pop(0)
            return thinned

        def noting_the_chances(chances: torch.Tensor) -> torch.Tensor:
            recorder._draw(chances)
            return draw(chances)

        def noting_the_mask(delta: torch.Tensor, mask: torch.Tensor, *rest: Any) -> torch.Tensor:
            recorder._cut(delta.abs(), mask, f"mask/{recorder._models[0]}")
            return apply_mask(delta, mask, *rest)

        def noting_the_selection(deltas: torch.Tensor, *rest: Any) -> torch.Tensor:
            mask = select(deltas, *rest)
            recorder._cut(torch.var(deltas, dim=0, unbiased=False), mask, "mask")
            return mask

        LoaderCache.loaders.clear()
        options = MergeOptions(
            random_seed=SEED, copy_tokenizer=False, write_model_card=False, quiet=True
        )
        with (
            patch.object(task_adapter.ExecuteMergeMethodTask, "execute", noting_the_tensor),
            patch.object(generalized_task_arithmetic, "sparsify", noting_the_model),
            patch.object(sparsify.torch, "bernoulli", noting_the_chances),
            patch.object(sparsify, "rescaled_masked_tensor", noting_the_mask),
            patch.object(sce, "sce_mask", noting_the_selection),
        ):
            config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
            run_merge(config, str(folder), options)
        merged: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            merged |= load_file(file)
        return merged

    def _begin(self, task: Any) -> None:
        self._tensor = task.output_weight.name
        self._models = [str(model) for model in task.model_order if model != task.base_model]
        self.resolved[self._tensor] = {
            "shared": dict(task.parameters.items()),
            "input": {str(m): dict(own.items()) for m, own in task.input_parameters.items()},
        }

    def _draw(self, chances: torch.Tensor) -> None:
        self._is_drawn = True
        if self._tensor in KEPT and chances.unique().numel() > 1:
            self.drawn[f"{self._tensor}/chance/{self._models[0]}"] = chances.clone()

    def _cut(self, ranked: torch.Tensor, mask: torch.Tensor, key: str) -> None:
        kept = mask.bool()
        both_sides = torch.isin(ranked[kept], ranked[~kept & (ranked > 0)]).any()
        if self._tensor in KEPT and (self._is_drawn or both_sides):
            self.drawn[f"{self._tensor}/{key}"] = mask.to(torch.uint8)


def write_model(folder: Path, model: str, dtype: torch.dtype) -> None:
    """Write one of the inputs as a checkpoint."""
    folder.mkdir(parents=True)
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model_tensors(model, dtype), folder / "model.safetensors", {"format": "pt"})


def main(names: list[str]) -> None:
    """Run the recipes of these names, or all."""
    if version("mergekit") != VERSION:
        sys.exit(f"These are the results of mergekit {VERSION}, not of {version('mergekit')}.")
    torch.set_num_threads(1)
    resolved_file = HERE / "resolved.json"
    resolved = json.loads(resolved_file.read_text()) if resolved_file.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in DTYPES:
            for model in MODELS:
                write_model(Path(scratch) / str(dtype) / model, model, dtype)
        for path in sorted(RECIPES.glob("*.yaml")):
            if names and path.stem not in names:
                continue
            stored: dict[str, torch.Tensor] = {}
            for dtype in DTYPES:
                label = str(dtype).removeprefix("torch.")
                inputs = Path(scratch) / str(dtype)
                recorder = Recorder()
                # The recipes name the models by folder: relative to where mergekit runs.
                with chdir(inputs):
                    merged = recorder.run(path.read_text(), Path("merged") / path.stem)
                kept = KEPT_OF_SETTINGS if path.stem in RESOLVED else KEPT
                if "layer_range" in path.read_text():
                    kept = tuple(name for name in (*KEPT, *KEPT_OF_STACKS) if name in merged)
                stored |= {f"{label}/{name}": merged[name] for name in kept}
                stored |= {f"{label}/{name}": drawn for name, drawn in recorder.drawn.items()}
            save_file(
                {name: stored[name].contiguous() for name in sorted(stored)},
                path.with_suffix(".safetensors"),
                # One entry: the order of several in the file is left to chance.
                {"made_with": f"mergekit {VERSION}, torch {torch.__version__}"},
            )
            if path.stem in RESOLVED:
                resolved[path.stem] = recorder.resolved
            print(path.stem)
    resolved_file.write_text(json.dumps(resolved, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
