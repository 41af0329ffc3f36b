"""What tools make of the tensors in their adapters' files, as float64 arrays (out, in, ...)."""

import numpy as np

from tests.oracles.deltas import exact


def lora(up, down, scale):
    """Entry (o, i, ...) = scale * sum over r of up[o, r] * down[r, i, ...]."""
    up = exact(up)
    return scale * np.tensordot(up.reshape(up.shape[0], up.shape[1]), exact(down), axes=1)


def locon(up, mid, down, scale):
    """LyCORIS: a convolution down of one pixel, a core of k x k, a convolution up of one pixel."""
    up, down = (exact(t).reshape(t.shape[0], t.shape[1]) for t in (up, down))
    out = np.zeros((up.shape[0], down.shape[1], *mid.shape[2:]))
    core = exact(mid)
    for m in range(core.shape[0]):
        for n in range(core.shape[1]):
            pixel = np.outer(up[:, m], down[n])
            out += pixel.reshape(*pixel.shape, *[1] * (core.ndim - 2)) * core[m, n]
    return scale * out


def half(a, b, core=None):
    """A x B; with a core t the sum over i, j of a[i, o] * b[j, n] * t[i, j, ...]."""
    if core is None:
        return exact(a) @ exact(b)
    return np.einsum("io,jn,ij...->on...", exact(a), exact(b), exact(core))


def loha(first, second, scale):
    """FedPara, eq. 3: the entrywise product of two matrices."""
    return scale * first * second


def lokr(first, second, scale):
    """The Kronecker product of a matrix and a kernel: every entry of one times all the other."""
    (a, b), (c, d), kernel = first.shape, second.shape[:2], second.shape[2:]
    out = np.zeros((a, c, b, d, *kernel))
    for i in range(a):
        for j in range(b):
            out[i, :, j] = first[i, j] * second
    return scale * out.reshape(a * c, b * d, *kernel)


def dora(weight, delta, magnitude, axis):
    """W' = m V / |V| with V = W + delta and a norm over all axes but one; returns W' - W."""
    changed = exact(weight) + delta
    others = tuple(n for n in range(changed.ndim) if n != axis)
    norms = np.sqrt(np.sum(changed**2, axis=others, keepdims=True))
    shape = [-1 if n == axis else 1 for n in range(changed.ndim)]
    return exact(magnitude).reshape(shape) * changed / norms - exact(weight)


def from_interleaved(rows, heads):
    """Rotary embedding: Meta rotates numbers 2i and 2i+1 of a head, Hugging Face i and i + d/2."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out
