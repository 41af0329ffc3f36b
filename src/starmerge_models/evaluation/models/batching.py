"""Prompts as batches of token ids: which of them are computed together, and their padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from starmerge_models.errors import StarmergeError

PASS_TOKENS = 4096
"""Most tokens of one forward pass, padding included."""

BATCH_ROWS = 256
"""Most rows of a batch."""

Prompts = Sequence[Sequence[int]]
"""Token ids, a sequence for each prompt."""


def check_prompts(prompts: Prompts) -> None:
    """Make sure that every prompt has tokens.

    Raises:
        StarmergeError: A prompt is empty.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise StarmergeError(f"Prompt {row} has no tokens. A model must be asked something.")


def by_length(prompts: Prompts) -> list[int]:
    """Return the numbers of prompts, the longest first."""
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)


def batches(
    prompts: Prompts, batch_size: int | None, *, equal_lengths: bool = False
) -> Iterator[list[int]]:
    """Yield the numbers of the prompts of a batch, the longest first.

    Args:
        prompts: Token ids.
        batch_size: Most prompts in a batch; None: as many as :data:`PASS_TOKENS` allow.
        equal_lengths: Whether all prompts of a batch must be equally long, so that none is padded.
    """
    order = by_length(prompts)
    while order:
        longest = len(prompts[order[0]])
        size = min(max(1, PASS_TOKENS // longest), batch_size or BATCH_ROWS)
        rows = order[:size]
        if equal_lengths:
            rows = [row for row in rows if len(prompts[row]) == longest]
        yield rows
        order = order[len(rows) :]


def padded(
    rows: Prompts, pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return token ids and which of them are not padding (booleans), both (rows, longest).

    Args:
        rows: Token ids, at least one row.
        pad: Token id of padding.
        device: The device of the results.
        left: Whether padding stands before a row's tokens, instead of behind them.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        real[row, place] = True
    return ids.to(device), real.to(device)
