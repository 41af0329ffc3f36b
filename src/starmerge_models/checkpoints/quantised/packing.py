"""Small integers packed into 32-bit words, and scales of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from starmerge_models.errors import StarmergeError

PANEL = 2**18
"""Entries in one panel, which has at least a row of blocks."""


def panels(rows: int, columns: int, step: int) -> Iterator[slice]:
    """Yield the panels of a matrix as slices of rows.

    Args:
        rows: Number of rows of the matrix.
        columns: Number of columns of the matrix.
        step: Each slice but the last has a multiple of this number of rows.
    """
    height = max(1, PANEL // (max(columns, 1) * step)) * step
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack unsigned integers that are packed down the columns, lowest bits first.

    Args:
        words: (n, m), int32.
        bits: Number of bits of an integer, 1 to 8; integers may span two words.
        count: Number of integers in a column, at most 32 n / bits.

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
    """Return the stored group of each input, as int64, after a check.

    Args:
        stored: (inputs,).
        count: Number of groups.
        weight: Name of the weight, for error messages.

    Raises:
        StarmergeError: A group does not exist.
    """
    groups = stored.long()
    if not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise StarmergeError(
            f"{weight}: an input is of a group that is not there (g_idx). Fetch the files again."
        )
    return groups


def of_blocks(blocks: Tensor, rows: slice, columns: int, block: tuple[int, int]) -> Tensor:
    """Expand one entry per block to all entries of some rows of a matrix.

    Args:
        blocks: One entry per block, (⌈rows / height⌉, ⌈columns / width⌉).
        rows: The rows of the matrix, which start at the first row of a block.
        columns: Number of columns of the matrix.
        block: Height and width of a block.

    Returns:
        (rows, columns); a view if a block is as wide as the matrix.
    """
    height, width = block
    own = blocks[rows.start // height : -(-rows.stop // height)]
    own = own.repeat_interleave(height, 0)[: rows.stop - rows.start] if height > 1 else own
    if width >= columns:
        return own.expand(-1, columns)
    return own.repeat_interleave(width, 1)[:, :columns]
