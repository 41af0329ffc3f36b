"""The supported formats of quantised weights, and the errors for other formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starmerge_models.checkpoints.quantised.awq import awq
from starmerge_models.checkpoints.quantised.bitsandbytes import bitsandbytes
from starmerge_models.checkpoints.quantised.entries import Entries
from starmerge_models.checkpoints.quantised.gptq import gptq
from starmerge_models.checkpoints.quantised.scaled import compressed_tensors, fbgemm_fp8, fp8
from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import UsageError

FORMATS: dict[str, Callable[[Entries], tuple[Checkpoint, str]]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fbgemm_fp8,
    "fp8": fp8,
    "gptq": gptq,
}
"""Readers of checkpoints by the ``quant_method`` of a config."""

QUANTISATION = ("quantization_config", "compression_config")
"""Config keys of the quantisation; the second is an old name."""

_INPUT_FIRST = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Types of models whose plain weights are (in, out), and quantised weights (out, in)."""

_RESCALING = ("awq", "compressed-tensors")
"""Formats of methods that move scale factors from a layer to the preceding one."""


@dataclass(frozen=True)
class Dequantised:
    """A quantised model with lazily computed plain weights."""

    checkpoint: Checkpoint
    """The weights under their own names, quantised ones in float32."""
    config: dict[str, Any]
    """The model's config without quantisation."""
    format: str
    """Description of the stored format: "GPTQ, 4 bits"."""
    note: str
    """One or two sentences on the consequences for a merge."""


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantisation settings of a model's config; None for plain weights."""
    for part in (config, config.get("text_config") or {}):
        for key in QUANTISATION:
            if part.get(key):
                settings: Mapping[str, Any] = part[key]
                return settings
    return None


def dequantised(checkpoint: Checkpoint, config: Mapping[str, Any], where: str) -> Dequantised:
    """Return a quantised model's checkpoint as one of plain weights.

    Args:
        checkpoint: The stored tensors.
        config: ``config.json``.
        where: The model, for error messages.

    Raises:
        UsageError: The format, or its variant, is not supported.
        StarmergeError: A tensor of a quantised weight is missing, or does not fit the others.
    """
    settings = settings_of(config) or {}
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # configs of its first releases lack the name
    if (
        not isinstance(method, str)
        or method not in FORMATS
        or config.get("model_type") in _INPUT_FIRST
    ):
        raise UsageError(_refusal(str(method), config, where))
    assert isinstance(method, str)
    entries = Entries(checkpoint, settings, where)
    plain, found = FORMATS[method](entries)
    note = (
        f"{where} is quantised ({found}). Its weights are computed from the codes, in float32, and "
        "differ from those it was quantised from by the rounding."
    )
    if method in _RESCALING:
        note += (
            " AWQ and SmoothQuant also move factors between layers: what was trained on the "
            "unquantised model does not fit such weights."
        )
    return Dequantised(plain, _plain(config), found, note)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its quantisation settings."""
    plain = {key: value for key, value in config.items() if key not in QUANTISATION}
    if plain.get("text_config"):
        text = plain["text_config"].items()
        plain["text_config"] = {key: value for key, value in text if key not in QUANTISATION}
    return plain


def _refusal(method: str, config: Mapping[str, Any], where: str) -> str:
    """Return the error message for an unsupported quantised model, with a remedy."""
    origin = config.get("_name_or_path")
    named = f"; its config names {origin}" if isinstance(origin, str) and origin else ""
    reason = (
        f"is quantised ({method}), which is not read: {', '.join(sorted(FORMATS))} are"
        if method not in FORMATS
        else f"is a quantised {config['model_type']}, whose weights lie the other way round then"
    )
    remedy = (
        " transformers turns it into a plain model: from_pretrained(…, quantization_config="
        "Mxfp4Config(dequantize=True)), then save_pretrained."
        if method == "mxfp4"
        else ""
    )
    return f"{where} {reason}. Give the unquantised model{named}.{remedy}"
