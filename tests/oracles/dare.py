"""DARE (arXiv 2311.03099): entries dropped at random, the rest divided by 1 - p."""

import hashlib
import math

import numpy as np


def dare(model, p, keep):
    """tau * keep / (1 - p), for given masks of the entries that are kept."""
    return {name: np.where(keep[name], x, 0.0) / (1.0 - p) for name, x in model.items()}


def deviation(ranges, chance):
    """How far a sum of independent terms is from its mean, but with probability <= chance.

    Hoeffding's inequality; `ranges` holds the width of the interval in which each term lies: 1 for
    the number of kept entries, |a| / (1 - p) for a sum of a * keep / (1 - p).
    """
    return math.sqrt(math.log(2.0 / chance) / 2.0 * float(np.sum(np.square(ranges))))


MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
WORD = 2**64


def philox(counter, key):
    """Four 64-bit words of Philox4x64-10 (Salmon et al., SC 2011), for a 256-bit counter."""
    x = [counter >> 64 * place & WORD - 1 for place in range(4)]
    k = [key >> 64 * place & WORD - 1 for place in range(2)]
    for _ in range(10):
        high, low = zip(
            *(divmod(m * x[2 * i], WORD) for i, m in enumerate(MULTIPLIERS)), strict=True
        )
        x = [high[1] ^ x[1] ^ k[0], low[1], high[0] ^ x[3] ^ k[1], low[0]]
        k = [(word + step) % WORD for word, step in zip(k, WEYL, strict=True)]
    return x


def numbers(seed, task, tensor, count):
    """The 32-bit random numbers of the entries.

    The key of the generator is the first half of SHA-256 of the seed and the two names, its counter
    starts at 1, and each 64-bit word holds the numbers of two entries, the lower half first.
    """
    digest = hashlib.sha256(f"{seed}\0{task}\0{tensor}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    words = [word for block in range(-(-count // 8)) for word in philox(1 + block, key)]
    return [half for word in words for half in (word % 2**32, word >> 32)][:count]


def kept(p, seed, task, tensor, count):
    """Which entries stay: those whose random number is at least p * 2^32."""
    found = numbers(seed, task, tensor, count)
    return np.array([number >= p * 2**32 for number in found], dtype=bool)
