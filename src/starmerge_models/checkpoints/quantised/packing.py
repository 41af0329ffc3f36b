"""Small integers packed into 32-bit words, and scales of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from starmerge_models.errors import StarmergeError

PANEL = 2**18
"""Entries that are computed at once, at least a row of blocks."""


def panels(rows: int, columns: int, step: int) -> Iterator[slice]:
    """Yield slices of the rows of a matrix that are computed at once.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        step: Rows of which a slice has a multiple, but for the last.
    """
    height = max(1, PANEL // (max(columns, 1) * step)) * step
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return unsigned integers that follow each other, lowest bits first, down the columns.

    Args:
        words: (n, m), int32.
        bits: Of one integer, 1 to 8; one may begin in a word and end in the next.
        count: How many there are in a column, at most 32 n / bits.

    Returns:
        (count, m), int32.
    """
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[:, None] >> shifts[:, None]) & mask).flatten(0, 1)[:count]
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    following = unsigned[(word + 1).clamp(max=len(words) - 1)] << (32 - shift)[:, None]
    both = (unsigned[word] >> shift[:, None]) | following
    return (both & mask).to(torch.int32)


def group_numbers(stored: Tensor, count: int, weight: str) -> Tensor:
    """Return the group of each input, as int64, of those that a file holds.

    Args:
        stored: (inputs,).
        count: How many groups there are.
        weight: Its name, for errors.

    Raises:
        StarmergeError: There is no such group.
    """
    groups = stored.long()
    if not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise StarmergeError(
            f"{weight}: an input is of a group that is not there (g_idx). Fetch the files again."
        )
    return groups


def of_blocks(blocks: Tensor, rows: slice, columns: int, block: tuple[int, int]) -> Tensor:
    """Return the entry of its block for each entry of some rows of a matrix.

    Args:
        blocks: An entry a block, (⌈rows / height⌉, ⌈columns / width⌉).
        rows: Which rows of the matrix; they begin with those of a block.
        columns: Of the matrix.
        block: Height and width of one.

    Returns:
        (rows, columns); a view where a block is as wide as the matrix.
    """
    height, width = block
    own = blocks[rows.start // height : -(-rows.stop // height)]
    own = own.repeat_interleave(height, 0)[: rows.stop - rows.start] if height > 1 else own
    if width >= columns:
        return own.expand(-1, columns)
    return own.repeat_interleave(width, 1)[:, :columns]
