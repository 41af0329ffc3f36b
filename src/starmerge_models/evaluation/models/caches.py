"""Caches of keys and values, of ``transformers.DynamicCache``: size, rows, concatenation.

A cache has a layer for each attention of the model. A layer has two tensors, keys and values, of
the shape (rows, heads, columns, width of a head).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def holds_only_keys_and_values(cache: Any) -> bool:
    """Return whether each layer of a cache holds keys and values by column, and nothing else."""
    from transformers import cache_utils  # noqa: PLC0415  (slow to import)

    kinds = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return type(cache) is cache_utils.DynamicCache and all(
        type(layer) in kinds for layer in cache.layers
    )


def bytes_of(cache: Any) -> int:
    """Return the memory of a cache in bytes."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def narrowest_window(cache: Any) -> float:
    """Return the columns of a cache's narrowest sliding window; infinity if no layer has one."""
    return min(
        (layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf
    )


def select_rows(cache: Any, rows: Tensor) -> Any:
    """Return a new cache with some rows of another, by their numbers (a tensor of integers)."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)  # sets new tensors; `cache` is unchanged
    return selected


def concatenate_caches(caches: Sequence[Any]) -> Any:
    """Return a new cache with the rows of several; narrower caches are zero-padded on the left."""
    concatenated = copy.copy(caches[0])
    concatenated.layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        layer = copy.copy(parts[0])
        layer.keys = concatenate_rows([part.keys for part in parts], 2)
        layer.values = concatenate_rows([part.values for part in parts], 2)
        if layer.is_sliding:
            layer.cumulative_length = max(part.cumulative_length for part in parts)
        concatenated.layers.append(layer)
    return concatenated


def concatenate_rows(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the rows of tensors; narrower ones are zero-padded on the left along ``dim``."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[dim] for part in parts)
    return torch.cat(
        [pad(part, (0, 0) * (part.ndim - 1 - dim) + (width - part.shape[dim], 0)) for part in parts]
    )
