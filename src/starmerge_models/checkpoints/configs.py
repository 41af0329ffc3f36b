"""Comparison of two models' configs: whether both compute the same function of their weights.

Weights of the same shape may be used with other numbers of heads, other rotary embeddings or
another activation; averages of such models are meaningless. A key may be missing in one config, or
have the name of another version of transformers. Then transformers fills both configs with all
defaults. If transformers does not know the model, the keys that both configs have are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from starmerge_models.checkpoints import filling
from starmerge_models.checkpoints.isolated import call_isolated

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
    "do_stable_layer_norm",
    "apply_residual_connection_post_layernorm",
    "feat_extract_norm",
    "*norm_num_groups",
    "num_groups",
    "*rope*",
    "rotary*",
    "*rotary_*",
    "position_embedding_type",
    "position_buckets",
    "pos_att_type",
    "max_relative_positions",
    "sinusoidal_pos_embds",
    "alibi*",
    "relative_attention_*",
    "layer_types",
    "attention_types",
    "attention_type",
    "*sliding_window_pattern",
    "use_qk_norm",
    "clip_qkv",
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
    "is_causal",
    "add_cross_attention",
    "use_bidirectional_attention",
    "patch_size",
    "*stride*",
    "spatial_merge_size",
    "downsample_*",
    "vision_feature_*",
    "pooling_type",
)
"""Patterns of the keys that change the function that a model computes."""

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
    "is_encoder_decoder",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Keys that do not change the function, or only for long texts, and are reported in a note. A model
that is only an encoder is recognised by its missing tensors."""


_SAME = (
    ("silu", "swish"),
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"),
    ("longrope", "su"),
    ("default", "mrope"),
)
"""Synonymous values of activations and of kinds of rotary embeddings."""

_ASIDE = ("architectures", "id2label", "label2id", "auto_map", "task_specific_params")
"""Keys that do not affect the function of a model in transformers."""


_MISSING = object()
"""The value of a key that a config lacks."""


@dataclass(frozen=True)
class _Difference:
    """A key whose value differs between a fine-tune's config and the base's."""

    key: str
    before: object
    """The base's value; :data:`_MISSING` if it lacks the key."""
    after: object
    """The fine-tune's value; :data:`_MISSING` if it lacks the key."""

    @property
    def is_on_both_sides(self) -> bool:
        """Whether both configs have the key."""
        return self.before is not _MISSING and self.after is not _MISSING

    @property
    def is_said(self) -> bool:
        """Whether both configs have a value other than null for the key."""
        return self.is_on_both_sides and self.before is not None and self.after is not None

    def __str__(self) -> str:
        """Return the difference as text."""
        return f"{self.key}: {_shown(self.after)}, in the base {_shown(self.before)}"


@dataclass(frozen=True)
class Comparison:
    """The differences between a fine-tune's config and the base's."""

    is_part: bool
    """Whether the fine-tune is a part of the base, such as the text model of a multimodal one."""
    function: tuple[str, ...]
    """Differences that change the function of the weights, as "key: 8, in the base 4"."""
    noted: tuple[str, ...]
    """Other differences to report in a note."""


def compare_configs(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Comparison:
    """Compare the content of two ``config.json``, or of their parts of the same kind.

    If the function may differ, transformers is called, which takes seconds.

    Args:
        base: The base's config.
        tuned: The fine-tune's config.
    """
    ours, theirs, is_part = _counterparts(base, tuned)
    differences = _differences(_normal(ours), _normal(theirs))
    said = [each for each in differences if each.is_said]
    noted = tuple(map(str, filter(_is_noted, said)))
    if any(map(_is_of_function, differences)):
        filled = _filled(_as_text(base), _as_text(tuned))
        if filled is not None:
            ours, theirs, is_part = _counterparts(*filled)
            differences = _differences(_normal(ours), _normal(theirs))
            # Both are filled with all keys of their class, so a key of only one of them is unused.
            said = [each for each in differences if each.is_on_both_sides]
    return Comparison(is_part, tuple(map(str, filter(_is_of_function, said))), noted)


@lru_cache(maxsize=64)
def _filled(*configs: str) -> list[dict[str, Any]] | None:
    """Return configs filled by transformers; None if it does not know all of them."""
    answer = call_isolated(filling, [[json.loads(config) for config in configs]])
    return None if answer is None or None in answer else answer


def _as_text(config: Mapping[str, Any]) -> str:
    own = {k: v for k, v in config.items() if k not in _ASIDE and not k.startswith("_")}
    return json.dumps(own, sort_keys=True)


def _counterparts(
    base: Mapping[str, Any], tuned: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], bool]:
    """Return the configs to compare: whole configs, or the part of one that matches the other.

    Returns:
        The base's config, the fine-tune's, and whether the fine-tune is a part of the base.
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
    """Return a config with its rotary embeddings in a single notation.

    transformers 4 wrote ``rope_theta`` and ``rope_scaling``, transformers 5 writes
    ``rope_parameters``. If a config has several, the precedence is that of transformers.
    """
    normal = dict(config)
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = normal.pop(key, None)
        if isinstance(value, dict):
            own = {"rope_type": value["type"]} if "type" in value else {}
            rope |= own | {k: v for k, v in value.items() if k != "type"}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in normal:
            value = normal.pop(key)
            rope.setdefault(key, value)
    if rope:
        if not any(isinstance(value, dict) for value in rope.values()):
            rope.setdefault("rope_type", "default")
        normal["rope_parameters"] = rope
    width, heads = (normal.get(key) for key in ("hidden_size", "num_attention_heads"))
    if type(heads) is int and heads > 0:
        if "num_key_value_heads" in normal and normal["num_key_value_heads"] is None:
            normal["num_key_value_heads"] = heads
        if "head_dim" in normal and normal["head_dim"] is None and type(width) is int:
            normal["head_dim"] = width // heads
    return normal


def _differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], prefix: str = ""
) -> list[_Difference]:
    """Return the keys whose values differ, including keys of only one config.

    Args:
        base: The base's config, or a part of it, normalised by :func:`_normal`.
        tuned: The fine-tune's config or part, normalised too.
        prefix: Name of the part with a dot, which precedes the keys.
    """
    found: list[_Difference] = []
    for key in {**base, **tuned}:
        before, after = base.get(key, _MISSING), tuned.get(key, _MISSING)
        path = f"{prefix}{key}"
        is_part = key.endswith("_config") or "rope_parameters" in path.split(".")
        if is_part and (isinstance(before, dict) or isinstance(after, dict)):
            parts = [value if isinstance(value, dict) else {} for value in (before, after)]
            ours, theirs = map(_normal, parts) if key.endswith("_config") else parts
            found += _differences(ours, theirs, f"{path}.")
        elif not _are_same(before, after):
            found.append(_Difference(path, before, after))
    return found


def _are_same(before: object, after: object) -> bool:
    """Return whether two values of a key are equivalent; null is equivalent to every value."""
    if before == after or {id(before), id(after)} <= {id(None), id(_MISSING)}:
        return True
    return any(before in group and after in group for group in _SAME)


def _is_of_function(difference: _Difference) -> bool:
    parts = difference.key.split(".")
    return not _is_noted(difference) and any(
        fnmatchcase(p, own) for p in parts for own in _FUNCTION
    )


def _is_noted(difference: _Difference) -> bool:
    name = difference.key.rpartition(".")[2]
    return any(fnmatchcase(name, pattern) for pattern in _NOTED)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
