"""The merges that are a weighted sum of deltas."""


def average(deltas):
    """sum(delta_t) / T."""
    return sum(deltas) / len(deltas)


def task_arithmetic(deltas, alpha):
    """alpha * sum(delta_t)."""
    return alpha * sum(deltas)
