"""Whether two models compute the same function of their weights, as far as their configs tell.

Weights of one shape may be read with other numbers of heads, other rotary embeddings or another
activation: such models have nothing to average. What decides is what both configs say; a key that
only one of them has is left to its library's default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

_FUNCTION = (
    "model_type",
    "*activation*",
    "*_act",
    "*_act_fn",
    "act_fn",
    "feed_forward_proj",
    "*head*_dim",
    "head_dim*",
    "d_kv",
    "kv_channels",
    "*num*_heads*",
    "n_head*",
    "n_kv_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "multi_query*",
    "*num_query_groups",
    "*norm*eps*",
    "normalize_before",
    "do_layer_norm_before",
    "*rope*",
    "rotary*",
    "*rotary_*",
    "position_embedding_type",
    "alibi*",
    "relative_attention_*",
    "layer_types",
    "*softcap*",
    "query_pre_attn_scalar",
    "*multiplier",
    "*_scaling",
    "scale_*",
    "*_scaling_factor",
    "logit_scale",
    "num_experts_per_tok",
    "*top_k",
    "*topk*",
    "norm_topk_prob",
    "n_group",
    "scoring_func",
    "*parallel_attn",
    "use_parallel_residual",
    "*decoder_architecture",
    "is_decoder",
    "is_encoder_decoder",
    "is_causal",
    "add_cross_attention",
    "use_bidirectional_attention",
    "patch_size",
    "spatial_merge_size",
    "downsample_*",
    "pooling_type",
)
"""Patterns of the keys that change what a model makes of its weights."""

_NOTED = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len*",
    "model_max_length",
    "seq_length",
    "sliding_window",
    "max_window_layers",
    "use_sliding_window",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Keys that do not, or only for long texts, and are worth a note."""


@dataclass(frozen=True)
class Comparison:
    """How a fine-tune's config differs from the base's."""

    is_part: bool
    """Whether the fine-tune is a part of the base, as the text model of one for images and text."""
    function: tuple[str, ...]
    """What makes it another function of the same weights, as "key: 8, in the base 4"."""
    noted: tuple[str, ...]
    """Other differences that are worth a note."""


def compare_configs(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Comparison:
    """Compare the content of two ``config.json``, or of those parts that are of one kind.

    Args:
        base: The base's.
        tuned: The fine-tune's.
    """
    ours, theirs, is_part = _counterparts(base, tuned)
    function, noted = [], []
    for key, before, after in _differences(_normal(ours), _normal(theirs)):
        said = f"{key}: {_shown(after)}, in the base {_shown(before)}"
        name = key.rpartition(".")[2]
        if any(fnmatchcase(name, pattern) for pattern in _NOTED):
            noted.append(said)
        elif any(fnmatchcase(part, p) for part in key.split(".") for p in _FUNCTION):
            function.append(said)
    return Comparison(is_part, tuple(function), tuple(noted))


def _counterparts(
    base: Mapping[str, Any], tuned: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], bool]:
    """Return the configs to compare: the whole ones, or a part of one that is of the other's kind.

    Returns:
        The base's, the fine-tune's, and whether the fine-tune is a part of the base.
    """
    kind, other = base.get("model_type"), tuned.get("model_type")
    if kind == other or None in (kind, other):
        return base, tuned, False
    for part in _parts(base):
        if part.get("model_type") == other:
            return part, tuned, True
    for part in _parts(tuned):
        if part.get("model_type") == kind:
            return base, part, False
    return base, tuned, False


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield value


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its rotary embeddings in one spelling.

    transformers 4 wrote ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters``; where
    several stand, it takes them as here.
    """
    normal = dict(config)
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = normal.pop(key, None)
        if isinstance(value, dict):
            rope |= {"rope_type" if k == "type" else k: own for k, own in value.items()}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in normal:
            value = normal.pop(key)
            rope.setdefault(key, value)
    if rope:
        rope.setdefault("rope_type", "default")
        normal["rope_parameters"] = rope
    return normal


def _differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys whose values differ, with both; keys of parts behind a dot."""
    for key in base.keys() & tuned.keys():
        before, after = base[key], tuned[key]
        if key.endswith(("_config", "rope_parameters")) and isinstance(before, dict):
            if isinstance(after, dict):
                own = before if key == "rope_parameters" else _normal(before)
                other = after if key == "rope_parameters" else _normal(after)
                yield from _differences(own, other, f"{prefix}{key}.")
        elif before is not None and after is not None and before != after:
            yield f"{prefix}{key}", before, after


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
