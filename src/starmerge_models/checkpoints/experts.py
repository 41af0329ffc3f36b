"""Joined experts: tensors that hold one matrix for each expert of a layer, one after the other.

A mixture of experts may be stored with a tensor for each expert, ``experts.3.gate_proj.weight``, or
with one tensor for all, ``experts.gate_up_proj`` (experts, rows, columns), as transformers 5 holds
them in memory. Each expert is a weight matrix of its own, so a checkpoint presents joined experts
one by one: ``experts.gate_up_proj[3]``. They lie in the file one behind the other, and so they are
written.
"""

from __future__ import annotations

import re

_STACKED = re.compile(r"(?P<stack>.+)\[(?P<expert>\d+)\]")

_MOST = 4096
"""Experts of one tensor that are presented one by one."""


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor holds a matrix, or a bias, for each of several experts.

    Such has "experts" in its name, with no number of an expert behind it, or "moe".

    Args:
        name: Its name.
        shape: Its shape.
    """
    parts = name.split(".")
    if "experts" in parts:
        inner = parts[len(parts) - parts[::-1].index("experts") :]
        is_meant = not any(part.isdecimal() for part in inner)
    else:
        is_meant = any("moe" in part for part in parts) and "bias" not in parts[-1]
    dimensions = 2 if "bias" in parts[-1] else 3
    return is_meant and len(shape) == dimensions and 0 < shape[0] <= _MOST and 0 not in shape


def expert_name(stack: str, expert: int) -> str:
    """Return how one expert of a joined tensor is called."""
    return f"{stack}[{expert}]"


def beside(name: str, suffix: str) -> str:
    """Return the name of a tensor that belongs to a weight, such as its scale.

    That of one of joined experts is one of joined tensors, too: ``NAMEsuffix[3]``.

    Args:
        name: The weight's.
        suffix: What is put behind the name that the weight has in its file.
    """
    joined = stack_of(name)
    return expert_name(joined[0] + suffix, joined[1]) if joined else name + suffix


def name_in_file(name: str) -> str:
    """Return a tensor's name in its file: of one of joined experts, that of all."""
    joined = stack_of(name)
    return joined[0] if joined else name


def stack_of(name: str) -> tuple[str, int] | None:
    """Return the joined tensor that an expert belongs to, and its number; None if to none."""
    match = _STACKED.fullmatch(name)
    return (match["stack"], int(match["expert"])) if match else None
