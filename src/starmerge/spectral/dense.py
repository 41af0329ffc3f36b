"""The SVD of a dense delta."""

from __future__ import annotations

import torch

from starmerge.deltas import Dense
from starmerge.spectral.svd import SVD


def svd_dense(delta: Dense) -> SVD:
    """Return the SVD of a full matrix, by LAPACK in float64.

    When to use: for deltas of full fine-tunes. Cost: O(mn·min(m, n)) and about five times the
    matrix in float64.

    Raises:
        torch.linalg.LinAlgError: LAPACK did not converge (a NaN or infinity in the matrix).
    """
    U, S, Vh = torch.linalg.svd(delta.matrix.double(), full_matrices=False)
    return SVD(U, S, Vh.T)
