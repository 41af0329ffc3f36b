"""Batches of token ids: which prompts go into a batch, and their padding."""

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
            raise StarmergeError(f"Prompt {row} has no tokens. A prompt needs at least one.")


def by_length(prompts: Prompts) -> list[int]:
    """Return the indices of the prompts, the longest prompt first."""
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)


def batches(
    prompts: Prompts, batch_size: int | None, *, equal_lengths: bool = False
) -> Iterator[list[int]]:
    """Yield the indices of the prompts of each batch, the longest prompts first.

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
    """Return token ids and the attention mask (booleans), both (rows, longest).

    Args:
        rows: Token ids, at least one row.
        pad: Token id of padding.
        device: The device of the results.
        left: Whether to pad on the left, instead of on the right.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = True
    return ids.to(device), mask.to(device)
