"""Names of a U-Net's layers in the code of Stable Diffusion's authors, unlike diffusers' names.

kohya's scripts train Stable Diffusion XL in the authors' code, so its adapters have these names. In
that code all layers of the downward path are in one list, ``input_blocks``, and all of the upward
path in another; diffusers groups them by resolution, each with resnets, attentions and a change of
resolution. Sources: github.com/Stability-AI/generative-models,
``sgm/modules/diffusionmodules/openaimodel.py``; github.com/huggingface/diffusers,
``models/unets/unet_2d_condition.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Layers outside of the blocks."""

_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a resnet."""

_PART = re.compile(
    r"(?P<block>down_blocks\.(?P<down>\d+)|mid_block|up_blocks\.(?P<up>\d+))\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)"
)


def makers_name(module: str, names: Collection[str], layers: int) -> str | None:
    """Return the authors' name of a module of diffusers' U-Net; None if there is none.

    Args:
        module: Name in diffusers, such as ``down_blocks.1.attentions.0.proj_in``.
        names: Names of all weights of the model, because the index depends on the attentions of a
            block.
        layers: ``layers_per_block`` of the model's config. A downward block has this number of
            layers before its change of resolution; an upward block has one layer more.
    """
    match = _PART.fullmatch(module)
    if match is None:
        return _SINGLE.get(module)
    kind, number, rest = match["kind"], int(match["number"]), match["rest"]
    inner = _IN_RESNET.get(rest) if kind == "resnets" else rest
    if inner is None:
        return None
    if match["block"] == "mid_block":  # a resnet, an attention, a resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{inner}"
    way = "input_blocks" if match["down"] else "output_blocks"
    first = int(match["down"] or match["up"]) * (layers + 1) + (1 if match["down"] else 0)
    if kind == "downsamplers":
        return f"{way}.{first + layers}.0.op"
    if kind == "upsamplers":
        has_attentions = any(name.startswith(f"{match['block']}.attentions.") for name in names)
        return f"{way}.{first + layers}.{1 + has_attentions}.{inner}"
    return f"{way}.{first + number}.{1 if kind == 'attentions' else 0}.{inner}"
