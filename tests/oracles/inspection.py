"""What an inspection measures, from its definitions, on dense float64 matrices."""

import numpy as np

from tests.oracles import star


def effective_rank(sigma):
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    p = sigma[sigma > 1e-12 * sigma.max()] / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(tau):
    """‖τ‖_F² / ‖τ‖_2²."""
    return float(np.linalg.norm(tau) ** 2 / np.linalg.norm(tau, 2) ** 2)


def cosine(a, b):
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def input_moment(tau):
    """C = τᵀτ/‖τ‖²."""
    return tau.T @ tau / np.linalg.norm(tau) ** 2


def output_moment(tau):
    """P = ττᵀ/‖τ‖²."""
    return tau @ tau.T / np.linalg.norm(tau) ** 2


def root(C):
    """The symmetric square root of a positive semidefinite matrix."""
    values, Q = np.linalg.eigh(C)
    return (Q * np.sqrt(np.maximum(values, 0))) @ Q.T


def response(a, b):
    """‖a C_b^½‖²: how strongly a answers to the inputs of b."""
    return float(np.linalg.norm(a @ root(input_moment(b))) ** 2)


def along(a, b):
    """⟨a C_b, b⟩: the part of it that goes along b's own answer."""
    return float(np.sum((a @ input_moment(b)) * b))


def overlap(C, D):
    """The cosine of two moments."""
    return float(np.sum(C * D) / (np.linalg.norm(C) * np.linalg.norm(D)))


def chance(C, D):
    """The mean of the overlap over random rotations of one of them."""
    return float(np.trace(C) * np.trace(D) / len(C) / (np.linalg.norm(C) * np.linalg.norm(D)))


def right_vectors(tau, r):
    return np.linalg.svd(tau, full_matrices=False)[2][:r].T


def acting(a, b, r):
    """‖a P‖² with P the projector on the first r right singular vectors of b."""
    V = right_vectors(b, r)
    return float(np.linalg.norm(a @ V @ V.T) ** 2)


def truncated(tau, r):
    """The first r triplets, without rescale."""
    U, sigma, Vt = np.linalg.svd(tau, full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vt[:r]


def bound(B, A, r_B, r_A):
    """r_B β √r_A with β = max σ_k(B) |v_k(B)ᵀ v_l(A)| (arXiv 2502.10339)."""
    sigma = np.linalg.svd(B, compute_uv=False)[:r_B]
    beta = np.abs(sigma[:, None] * (right_vectors(B, r_B).T @ right_vectors(A, r_A))).max()
    return float(r_B * beta * np.sqrt(r_A))


def reach(B, A, r_B, r_A):
    """The largest ‖B_r x‖ over unit x in the span of A's first right singular vectors."""
    return float(np.linalg.norm(truncated(B, r_B) @ right_vectors(A, r_A), 2))


def rms(B, A, r_B, r_A):
    """The root mean square of the same over the unit sphere of that span."""
    return float(np.linalg.norm(truncated(B, r_B) @ right_vectors(A, r_A)) / np.sqrt(r_A))


def sign_conflict(a, b):
    """The share of Σ|ab| of entries with different signs."""
    product = a * b
    return float(np.abs(product[product < 0]).sum() / np.abs(product).sum())


def outvoted(tau, taus):
    """The share of Σ|τ| whose sign is not that of the tasks' sum."""
    against = np.sign(tau) != np.sign(sum(taus))
    return float(np.abs(tau[against]).sum() / np.abs(tau).sum())


def survived(base, tau, dtype):
    """1 − ‖e‖²/‖τ‖², e being what the rounding of base + τ to the base's dtype changes."""
    import torch

    exact = base.double().numpy()
    rounded = (base.float() + torch.tensor(tau, dtype=torch.float32)).to(dtype)
    error = rounded.double().numpy() - exact - tau
    return float(1 - np.linalg.norm(error) ** 2 / np.linalg.norm(tau) ** 2)


def kept(M, tau):
    """What a merge does of τ on its own inputs, what else, and the relative error there."""
    half = root(input_moment(tau))
    own = np.sum((M @ half) * (tau @ half)) / np.linalg.norm(tau @ half) ** 2
    others = np.linalg.norm((M - own * tau) @ half) / np.linalg.norm(tau @ half)
    error = np.linalg.norm((M - tau) @ half) / np.linalg.norm(tau @ half)
    return float(own), float(others), float(error)


def inside(M, tau, r):
    """The share of ‖M‖² in the span of τ's first singular vectors, on both sides."""
    U, _, Vt = np.linalg.svd(tau, full_matrices=False)
    U, V = U[:, :r], Vt[:r].T
    return float(np.linalg.norm(U @ U.T @ M @ V @ V.T) ** 2 / np.linalg.norm(M) ** 2)


def kept_rank(tau, eta):
    """STAR's rank, of the singular values that are not rounding."""
    sigma = np.linalg.svd(tau, compute_uv=False)
    return star.kept_rank(sigma[: np.linalg.matrix_rank(tau)], eta)
