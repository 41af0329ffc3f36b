"""Consensus task arithmetic with TALL masks (arXiv 2405.07813)."""

import numpy as np

from tests.oracles.trim import weighted


def task_mask(tau, tau_mtl, lam):
    """m_t = |tau_t| > lambda |tau_MTL - tau_t|, strictly, as the paper's repository has it."""
    return np.abs(tau) > lam * np.abs(tau_mtl - tau)


def tall_masks(models, lam=0.4, alpha=0.4, min_tasks=2, mtl="unscaled", weights=None):
    """alpha * sum(tau_t) where at least min_tasks masks are set, zeros elsewhere.

    tau_MTL is sum(tau_t) ("unscaled") or alpha * sum(tau_t) ("scaled").
    """
    models = weighted(models, weights)
    merged = {}
    for name in models[0]:
        taus = [model[name] for model in models]
        total = sum(taus)
        tau_mtl = {"unscaled": total, "scaled": alpha * total}[mtl]
        votes = sum(task_mask(tau, tau_mtl, lam).astype(int) for tau in taus)
        merged[name] = np.where(votes >= min_tasks, alpha * total, 0.0)
    return merged
