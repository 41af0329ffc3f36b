"""Adapters in torchtune's own names: ``adapter_model.pt`` and an ``adapter_config.json``.

For most models torchtune also writes PEFT's format to the same folder, which is read instead. The
names of its modules are like ``layers.0.attn.q_proj``. In Llama, Mistral and Gemma the outputs of
q_proj and k_proj are in the order of Meta's rotary embedding, in which the two rows of a rotated
pair are adjacent, not half a head apart as in Hugging Face's order. Source:
github.com/pytorch/torchtune, ``torchtune/models/convert_weights.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starmerge_models.checkpoints.base import known_config
from starmerge_models.checkpoints.lora.config import AdapterConfig, is_number
from starmerge_models.checkpoints.lora.formats.contents import AdapterContents, AdapterFile
from starmerge_models.checkpoints.lora.update import Magnitude, Product, Update
from starmerge_models.errors import StarmergeError, UsageError

_KEY = re.compile(
    r"(?P<module>(?:layers\.(?P<layer>\d+)\.)?(?P<name>[\w.]+))\.(?P<part>lora_a|lora_b)\.weight"
    r"|(?P<dora>(?:layers\.\d+\.)?[\w.]+)\.magnitude"
)

_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "output": "lm_head",
}
"""Hugging Face's names of torchtune's modules, within a layer or the model."""

_ROTATED = ("gemma", "gemma2", "llama", "mistral")
"""Types of models for which torchtune stores the outputs of q_proj and k_proj in Meta's order."""

_PLAIN = ("qwen2", "qwen3")
"""Types of models for which torchtune stores them in Hugging Face's order."""

_CONVERT = (
    "Save it with torchtune's FullModelHFCheckpointer, which writes PEFT's layout, and give its "
    "folder."
)


class Torchtune:
    """The format of torchtune."""

    title = "adapter of torchtune's layout"
    is_diffusion = False
    has_flat_names = False

    def recognises(self, file: AdapterFile) -> bool:
        """Recognise the keys."""
        return any(_KEY.fullmatch(key) for key in file.checkpoint)

    def read(self, file: AdapterFile, model: Mapping[str, Any]) -> AdapterContents:
        """Read config and keys, and convert names and order of rows to Hugging Face's."""
        if file.config is None:
            raise StarmergeError(
                f"{file.source} has torchtune's layout, and no adapter_config.json beside it, "
                f"which says alpha and rank. {_CONVERT}"
            )
        for key in ("r", "lora_alpha"):
            if not is_number(file.settings.get(key)):
                raise StarmergeError(f"{file.config}: {key} is missing or is not a finite number.")
        base = file.settings.get("base_model_name_or_path")
        base = base if isinstance(base, str) and base else None
        model = model or known_config(base)
        kind = model.get("model_type")
        if kind not in (*_ROTATED, *_PLAIN):
            known = "unknown: give the base before the models" if kind is None else repr(kind)
            raise UsageError(
                f"{file.source} has torchtune's layout, and the type of its model is {known}. Its "
                f"names, and the order of its heads, are known for {', '.join(_ROTATED + _PLAIN)}. "
                f"{_CONVERT}"
            )
        modules: dict[str, dict[str, str]] = {}
        for key in file.checkpoint:
            match = _KEY.fullmatch(key)
            if match is None:
                raise StarmergeError(
                    f"{file.source}: the tensor {key} is neither lora_a, lora_b nor magnitude. "
                    f"{_CONVERT}"
                )
            part = match["part"] or "magnitude"
            modules.setdefault(match["module"] or match["dora"], {})[part] = key
        updates = [_update(file, model, name, parts) for name, parts in modules.items()]
        config = AdapterConfig(file.config, {"base_model_name_or_path": base})
        return AdapterContents(self, file.checkpoint, updates, config, other_files=(file.config,))


def _update(
    file: AdapterFile, model: Mapping[str, Any], name: str, parts: Mapping[str, str]
) -> Update:
    for part in ("lora_a", "lora_b"):
        if part not in parts:
            raise StarmergeError(
                f"{file.source}: {name} has {next(iter(parts.values()))} but no {part}. Is the "
                "file complete?"
            )
    a, b = (file.checkpoint[parts[part]].shape for part in ("lora_a", "lora_b"))
    if not (len(a) == len(b) == 2 and 0 < a[0] == b[1]):
        raise StarmergeError(
            f"{file.source}: the factors of {name} do not fit together: lora_b {list(b)}, lora_a "
            f"{list(a)}."
        )
    if file.settings["r"] != a[0]:
        raise StarmergeError(
            f"{file.config}: r is {file.settings['r']}, and the rank of {name} {a[0]}. Is the "
            "config that of another adapter?"
        )
    own = re.sub(r"^layers\.\d+\.", "", name)
    if own not in _NAMES:
        raise UsageError(
            f"{file.source} adapts {name}, which Hugging Face's models have under no name that is "
            f"known. {_CONVERT}"
        )
    layer = name.removesuffix(own)
    rows = None
    if own in ("attn.q_proj", "attn.k_proj") and model["model_type"] in _ROTATED:
        rows = _rows(file, model, b[0], is_key=own == "attn.k_proj")
        if "magnitude" in parts:
            raise UsageError(
                f"{file.source}: {parts['magnitude']} is DoRA's, of rows in another order than "
                f"Hugging Face's, which torchtune itself does not convert. {_CONVERT}"
            )
    scale = float(file.settings["lora_alpha"]) / a[0]
    change = Product(parts["lora_a"], parts["lora_b"], scale, (b[0], a[1]), a[0], rows=rows)
    magnitude = Magnitude(parts["magnitude"]) if "magnitude" in parts else None
    module = f"model.{layer}{_NAMES[own]}" if layer else _NAMES[own]
    return Update(module, change, magnitude=magnitude)


def _rows(
    file: AdapterFile, model: Mapping[str, Any], outputs: int, *, is_key: bool
) -> tuple[int, ...]:
    """Return the torchtune row for each row of Hugging Face's order.

    In a head of d rows, torchtune's rows 2i and 2i + 1 are Hugging Face's i and i + d/2.
    """
    heads = model.get("num_attention_heads")
    if is_key:
        heads = model.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads < 1 or outputs % (2 * heads):
        raise StarmergeError(
            f"{file.source} has {outputs} outputs of q_proj or k_proj, and the base's config.json "
            f"says {heads!r} heads. The adapter was trained on another model."
        )
    size = outputs // heads
    return tuple(
        head * size + 2 * i + half
        for head in range(heads)
        for half in (0, 1)
        for i in range(size // 2)
    )
