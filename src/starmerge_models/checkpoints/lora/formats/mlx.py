"""Adapters of MLX-LM: ``adapters.safetensors`` and MLX-LM's own ``adapter_config.json``.

A linear layer's ``lora_a`` is (in, r) and ``lora_b`` (r, out), so that its weight changes by
scale·(lora_a·lora_b)ᵀ; an embedding's table by scale·lora_a·lora_b. The scale is in the config and
is not divided by the rank. DoRA's magnitudes ``m`` belong to the rows of the weight. Source:
github.com/ml-explore/mlx-lm, ``mlx_lm/tuner/{lora,dora,utils}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starmerge_models.checkpoints.base import is_embedding_name
from starmerge_models.checkpoints.lora.config import AdapterConfig, is_number
from starmerge_models.checkpoints.lora.formats.contents import AdapterContents, AdapterFile
from starmerge_models.checkpoints.lora.update import Magnitude, Product, Update
from starmerge_models.errors import StarmergeError, UsageError

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")

_FUSE = "Fuse the adapter with `mlx_lm.fuse --dequantize`, and give the full model."


class Mlx:
    """The format of MLX-LM."""

    title = "adapter of MLX-LM's layout"
    is_diffusion = False
    has_flat_names = False

    def recognises(self, file: AdapterFile) -> bool:
        """Recognise the config's ``lora_parameters`` or ``fine_tune_type``, or the keys."""
        own = "lora_parameters" in file.settings or "fine_tune_type" in file.settings
        return own or any(key.endswith((".lora_a", ".lora_b")) for key in file.checkpoint)

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Read config and keys, and interpret each change."""
        if file.config is None:
            raise StarmergeError(
                f"{file.source} has MLX-LM's layout, and no adapter_config.json beside it, which "
                "says what its updates are scaled by. Fetch it, too, and give the folder of both."
            )
        kind = file.settings.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise UsageError(
                f"{file.config}: fine_tune_type is {kind!r}, which is no LoRA. {_FUSE}"
            )
        scale, rank = _parameters(file)
        modules: dict[str, dict[str, str]] = {}
        for key in file.checkpoint:
            match = _KEY.fullmatch(key)
            if match is None:
                raise StarmergeError(
                    f"{file.source}: the tensor {key} is neither lora_a nor lora_b, so the adapter "
                    f"is more than its config says. {_FUSE}"
                )
            modules.setdefault(match["module"], {})[match["part"]] = key
        updates = [
            _update(file, module, parts, scale, rank, has_magnitudes=kind == "dora")
            for module, parts in modules.items()
        ]
        base = file.settings.get("model")
        content = {"base_model_name_or_path": base} if isinstance(base, str) else {}
        config = AdapterConfig(file.config, content)
        return AdapterContents(self, file.checkpoint, updates, config, other_files=(file.config,))


def _parameters(file: AdapterFile) -> tuple[float, int | None]:
    """Return the scale and the rank of the config."""
    parameters = file.settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or scale is None or not is_number(scale):
        raise StarmergeError(
            f"{file.config}: scale under lora_parameters is missing or no finite number, so what "
            "the updates are scaled by is unknown. Is the config that of MLX-LM?"
        )
    rank = parameters.get("rank")
    return float(scale), rank if isinstance(rank, int) else None


def _update(
    file: AdapterFile,
    module: str,
    parts: Mapping[str, str],
    scale: float,
    rank: int | None,
    *,
    has_magnitudes: bool,
) -> Update:
    wanted = ["lora_a", "lora_b", *(["m"] if has_magnitudes else [])]
    for part in wanted:
        if part not in parts:
            raise StarmergeError(
                f"{file.source}: {module} has {next(iter(parts.values()))} but no {part}. Is the "
                "file complete?"
            )
    for part in parts.keys() - set(wanted):
        raise StarmergeError(
            f"{file.source}: {parts[part]} is DoRA's, and fine_tune_type in {file.config} is not "
            "dora. Is the config that of another adapter?"
        )
    a, b = (file.checkpoint[parts[part]].shape for part in ("lora_a", "lora_b"))
    if len(a) == len(b) == 3:
        raise UsageError(
            f"{file.source} adapts {module}, the experts of a layer in one tensor, which MLX-LM "
            f"names as no other tool does. {_FUSE}"
        )
    if not (len(a) == len(b) == 2 and 0 < a[1] == b[0]):
        raise StarmergeError(
            f"{file.source}: the factors of {module} do not fit together: lora_a {list(a)}, lora_b "
            f"{list(b)}."
        )
    if rank is not None and rank != a[1]:
        raise StarmergeError(
            f"{file.config}: rank under lora_parameters is {rank}, and that of {module} {a[1]}. Is "
            "the config that of another adapter?"
        )
    is_embedding = is_embedding_name(module.rpartition(".")[2])
    magnitude = None
    if has_magnitudes:
        magnitude = Magnitude(parts["m"], axis=1 if is_embedding else 0)
    change = Product(parts["lora_a"], parts["lora_b"], scale, (b[1], a[0]), a[1], input_first=True)
    return Update(module, change, is_embedding, magnitude)
