"""The merges that are a weighted sum of deltas."""


def average(deltas):
    """sum(delta_t) / T."""
    return sum(deltas) / len(deltas)


def task_arithmetic(deltas, alpha):
    """alpha * sum(delta_t)."""
    return alpha * sum(deltas)


def linear(base, deltas, weights, normalize=True, base_weight=0.0):
    """sum(w_i * W_i) [/ sum(w_i)], with the base as one of the W_i where it has a weight."""
    merged = base_weight * base
    for weight, delta in zip(weights, deltas, strict=True):
        merged = merged + weight * (base + delta)
    return merged / (sum(weights) + base_weight) if normalize else merged
