"""Joined experts: tensors that contain the matrices of all experts of a layer.

A mixture of experts may be stored with a tensor for each expert, ``experts.3.gate_proj.weight``, or
with one tensor for all, ``experts.gate_up_proj`` (experts, rows, columns), like the modules of
transformers 5. Each expert is a separate weight matrix, so a checkpoint lists joined experts one by
one: ``experts.gate_up_proj[3]``. They are contiguous in the file, and are written in this order.
"""

from __future__ import annotations

import re

_STACKED = re.compile(r"(?P<stack>.+)\[(?P<expert>\d+)\]")

_MOST = 4096
"""Most experts of one tensor that are listed one by one."""


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor contains a matrix or a bias for each of several experts.

    The name of such a tensor contains "experts" without a following number, or "moe".

    Args:
        name: Name of the tensor.
        shape: Shape of the tensor.
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
    """Return the name of one expert of a joined tensor."""
    return f"{stack}[{expert}]"


def companion_name(name: str, suffix: str) -> str:
    """Return the name of a tensor that belongs to a weight, such as its scale.

    For a joined expert the companion is a joined tensor too: ``NAMEsuffix[3]``.

    Args:
        name: Name of the weight.
        suffix: Suffix that is appended to the weight's name in its file.
    """
    joined = stack_of(name)
    return expert_name(joined[0] + suffix, joined[1]) if joined else name + suffix


def name_in_file(name: str) -> str:
    """Return a tensor's name in its file; for a joined expert, that of the joined tensor."""
    joined = stack_of(name)
    return joined[0] if joined else name


def stack_of(name: str) -> tuple[str, int] | None:
    """Return the joined tensor and the number of an expert; None for other tensors."""
    match = _STACKED.fullmatch(name)
    return (match["stack"], int(match["expert"])) if match else None
