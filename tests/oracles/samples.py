"""Deltas for the tests: seeded ones, strategies, and their exact values."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from starmerge_models.deltas import Dense, LowRank
from tests.oracles import deltas as oracle

SEARCH = settings(max_examples=30, deadline=None)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["low-rank", "dense", "mixed"]
SCALES = [1.0, -1.0, 0.5, -3.7, 1e-8, -1e-8, 1e6, -1e6]


def normal(*shape, seed, dtype=torch.float32):
    """Standard normal entries, stored in a dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(*shape, seed, dtype=torch.float32):
    """Entries in -2 ... 2, exact in every dtype; small matrices of them are often singular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def low_rank(m, n, r, *, seed=0, dtype=torch.float32, scale=1.0, entries=normal):
    """A low-rank delta of random factors."""
    B = entries(m, r, seed=2 * seed, dtype=dtype)
    A = entries(r, n, seed=2 * seed + 1, dtype=dtype)
    return LowRank(B, A, scale)


def dense(*shape, seed=0, dtype=torch.float32, entries=normal):
    """A dense delta of random entries."""
    return Dense(entries(*shape, seed=seed, dtype=dtype))


def task_deltas(kind, m=9, n=7, *, dtype=torch.float32, seed=0):
    """Deltas of four tasks: factored, full, or two of each."""
    factored = [
        low_rank(m, n, r, seed=seed + r, dtype=dtype, scale=scale)
        for r, scale in ((3, 0.5), (1, -2.0), (8, 0.25), (4, 1.5))
    ]
    full = [dense(m, n, seed=seed + 50 + t, dtype=dtype) for t in range(4)]
    return {
        "low-rank": factored,
        "dense": full,
        "mixed": [factored[0], full[1], full[2], factored[3]],
    }[kind]


def exact(delta):
    """The delta's values as a float64 matrix."""
    if isinstance(delta, LowRank):
        return oracle.low_rank(delta.B, delta.A, delta.scale)
    return oracle.as_matrix(oracle.exact(delta.tensor))


def values(delta):
    """What the library says the delta's entries are, as a float64 matrix."""
    return oracle.exact(delta.to_dense())


def orthogonal(n, *, seed):
    """A random orthogonal matrix, float64."""
    Q, R = np.linalg.qr(normal(n, n, seed=seed, dtype=torch.float64).numpy())
    return Q * np.sign(np.diag(R))


def transposed(delta):
    """The delta of the transposed weight."""
    if isinstance(delta, LowRank):
        return LowRank(delta.A.T, delta.B.T, delta.scale)
    return Dense(delta.matrix.T)


def rotated(delta, left, right):
    """left @ delta @ right, stored in float64."""
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    if isinstance(delta, LowRank):
        return LowRank(left @ delta.B.double(), delta.A.double() @ right, delta.scale)
    return Dense(left @ delta.matrix.double() @ right)


lengths = st.integers(1, 8)
ranks = st.integers(1, 10)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([*DTYPES, torch.float64])
scales = st.sampled_from(SCALES) | st.floats(-64, 64).filter(lambda scale: abs(scale) > 1e-3)
entries = st.sampled_from([normal, integers])


@st.composite
def low_rank_deltas(draw, m=None, n=None):
    """Low-rank deltas of any shape, rank (beyond min(m, n) too), scale and dtype."""
    return low_rank(
        m or draw(lengths),
        n or draw(lengths),
        draw(ranks),
        seed=draw(seeds),
        dtype=draw(dtypes),
        scale=draw(scales),
        entries=draw(entries),
    )


@st.composite
def dense_deltas(draw, m=None, n=None):
    """Dense deltas of any matrix shape and dtype."""
    shape = m or draw(lengths), n or draw(lengths)
    return dense(*shape, seed=draw(seeds), dtype=draw(dtypes), entries=draw(entries))


def any_deltas(m=None, n=None):
    """Deltas of either kind."""
    return low_rank_deltas(m, n) | dense_deltas(m, n)


@st.composite
def task_lists(draw):
    """One to four deltas of one matrix, in any mixture."""
    m, n = draw(lengths), draw(lengths)
    return draw(st.lists(any_deltas(m, n), min_size=1, max_size=4))
