"""Quantised weights from their formats' definitions: packing, and reading with float64.

Sources: GPTQ, arXiv 2210.17323, and AWQ, arXiv 2306.00978, for w = s (q − z) with a scale and a
zero point a group; QLoRA, arXiv 2305.14314, section 3, for code books and double quantisation;
DeepSeek-V3, arXiv 2412.19437, section 3.3, for scales of blocks. Where the bits lie is a fact of
the files, stated here on integers of any length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in the lowest four bits of a word, in the next, and so on."""


def packed(numbers: Integers, bits: int) -> npt.NDArray[np.int32]:
    """Pack each column into one integer, the first number lowest, and cut it into 32-bit words."""
    count, columns = numbers.shape
    words = np.zeros((-(-count * bits // 32), columns), dtype=np.uint32)
    for column in range(columns):
        whole = sum(int(number) << (bits * i) for i, number in enumerate(numbers[:, column]))
        for i in range(len(words)):
            words[i, column] = (whole >> (32 * i)) & 0xFFFFFFFF
    return words.view(np.int32)


def packed_awq(numbers: Integers) -> npt.NDArray[np.int32]:
    """Pack eight neighbours of each row into a word, in AWQ's order."""
    rows, columns = numbers.shape
    ordered = numbers.reshape(rows, columns // 8, 8)[:, :, AWQ_ORDER]
    words = sum(ordered[:, :, i].astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    return np.asarray(words, dtype=np.uint32).view(np.int32)


def grouped(q: Integers, z: Integers, s: Array, group_of: Integers) -> Array:
    """Return (outputs, inputs) weights of (inputs, outputs) codes and a group for each input."""
    W = np.empty(q.shape[::-1])
    for i, g in enumerate(group_of):
        W[:, i] = s[g] * (q[i] - z[g])
    return W


def of_blocks(q: Array, s: Array, height: int, width: int) -> Array:
    """Return codes times the scale of their block."""
    W = np.empty(q.shape)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            W[i, j] = q[i, j] * s[i // height, j // width]
    return W


def code_book(q: Integers, code: Array, absmax: Array, block: int) -> Array:
    """Return the entries of a code book times the greatest magnitude of their block."""
    return np.array([code[one] * absmax[k // block] for k, one in enumerate(q)])
