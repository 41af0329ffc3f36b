"""The leading singular triplets of a low-rank delta of so many factors that its core is large."""

from __future__ import annotations

import torch
from torch import Tensor

from starmerge.deltas import LowRank
from starmerge.device import ready
from starmerge.spectral.factored import svd_factored
from starmerge.spectral.svd import SVD

MANY = 16
"""Factors for each triplet that is wanted, from which on iterating costs less than the core."""

_MORE = 8
_SETTLED = 1e-6
_STEPS = 12
_PANEL = 2**22


def leading(delta: LowRank, k: int) -> SVD:
    """Return the first k singular triplets of a low-rank delta, the best approximation of rank k.

    Of r factors. Where r < 16k the SVD is made from the core of the factors, at O((m + n)r² + r³).
    Else by block Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2) in the factors,
    at O((m + n)rk) a step, where neither the product nor a matrix (r, r) is formed: a random block
    of k + 8 columns is multiplied by δᵀδ, all blocks so far are made orthonormal, and the triplets
    are those of δ on their span. It ends when a step raises the energy Σ_{i≤k} σ_i² by less than
    1e-6 of it. The products are made in float32. The block is the same for the same shape.

    Args:
        delta: The delta, r factors.
        k: How many triplets.

    Returns:
        At most k triplets, float64.
    """
    m, n = delta.shape
    k = min(k, m, n, delta.rank)
    if delta.rank < MANY * (k + _MORE):
        return svd_factored(delta).first(k)
    B, A = delta.B.float() * delta.scale, delta.A.float()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(n, min(n, k + _MORE), generator=generator, device="cpu").to(B.device)
    basis = torch.empty(n, 0, dtype=torch.float64, device=B.device)
    images = torch.empty(m, 0, dtype=torch.float64, device=B.device)
    energy = 0.0
    for _ in range(_STEPS):
        fresh = _against(basis, block.double())
        image = B @ (A @ fresh.float())
        basis, images = torch.cat([basis, fresh], 1), torch.cat([images, image.double()], 1)
        # Of images = Q R only R is decomposed: its singular values are those of δ on the basis.
        Q, R = torch.linalg.qr(ready(images))
        left, S, right = torch.linalg.svd(R, full_matrices=False)
        before, energy = energy, float(S[:k].square().sum())
        if energy - before <= _SETTLED * energy or basis.shape[1] >= n:
            break
        block = A.T @ (B.T @ image)
    return SVD(Q @ left[:, :k], S[:k], basis @ right[:k].T)


def energy_of(delta: LowRank) -> float:
    """Return ‖δ‖², to float32's precision, without forming the product or a matrix (r, r).

    By panels of rows of the product where that has fewer entries than the factors' Gram matrices.
    """
    m, n = delta.shape
    if delta.rank <= min(m, n):
        return delta.frobenius() ** 2
    B, A = delta.B.float() * delta.scale, delta.A.float()
    height = max(1, _PANEL // n)
    panels = (B[start : start + height] @ A for start in range(0, m, height))
    return sum(float(panel.square().sum(dtype=torch.float64)) for panel in panels)


def _against(basis: Tensor, block: Tensor) -> Tensor:
    """Return an orthonormal basis of what a block adds to the span of a basis, float64."""
    for _ in range(2):  # the second time takes away what rounding left of the first
        block = block - basis @ (basis.T @ block)
        block, triangle = torch.linalg.qr(ready(block))
        scale = triangle.diagonal().abs()
        block = block[:, scale > 1e-10 * scale.max()] if len(scale) else block
    return block
