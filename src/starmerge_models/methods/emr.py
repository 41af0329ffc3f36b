"""EMR-Merging: elect one vector for all tasks; mask and rescale it for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.entrywise import EntrywiseMerge, absolute_sum, panels, task_sum
from starmerge_models.methods.kinds.masks import masked
from starmerge_models.methods.method import Deltas, TensorContext, method


@method("emr")
class Emr(EntrywiseMerge):
    """Compute one vector for all tasks, and a mask and a factor for each task's model.

    γ_uni = sgn(Σ_t τ_t); ε_uni is the largest |τ_t| among the tasks with sgn τ_t = γ_uni;
    τ_uni = γ_uni ⊙ ε_uni. Task t has the mask M_t = [τ_t ⊙ τ_uni > 0] and the rescaler
    λ_t = Σ|τ_t| / Σ|M_t ⊙ τ_uni|, sums over the whole model; its model is base + λ_t · M_t ⊙ τ_uni,
    an update of the same L1 norm as τ_t. A task that agrees with τ_uni nowhere has λ_t = 0, so its
    model is the base.

    The output is not one model: the folder contains τ_uni in ``unified``, in float32 unless a dtype
    is chosen, and for each task a folder with its mask, one bit per entry, and its rescaler. A
    task's folder can be merged like a model; merged alone, it gives the task's model:
    ``starmerge merge BASE OUT/digits -m average -o digits``.

    Source: arXiv 2405.17461; defining repository github.com/harveyhuang18/EMR_Merging. Different
    from there, as in the paper: λ_t sums entries, where the repository sums the means of tensors;
    γ_uni = 0 where entries cancel, where the repository uses −1.
    Cost: one pass; adapters are expanded to dense panels of rows.
    When to use: the task of each request is known, and T whole models would take too much space.
    """

    outputs = ("unified",)

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse weights: λ_t restores the norm of each task; see :meth:`Method.check`."""
        for task, weight in zip(tasks, weights, strict=True):
            if weight != 1:
                raise UsageError(
                    f"emr: {task} has the weight {weight:g}, and each task gets a model of its "
                    "own, which is as large as its task vector. Leave the weights out."
                )

    def merge_entries(
        self, tau: list[Tensor], tasks: tuple[int, ...], tensor: TensorContext, local: Any
    ) -> Tensor:
        """Return some entries of τ_uni; see :meth:`EntrywiseMerge.merge_entries`."""
        gamma_uni = task_sum(tau).sign_().float()
        # Where γ_uni ≠ 0, some task has its sign, so the largest product belongs to such a task.
        epsilon_uni = reduce(torch.maximum, (gamma_uni * tau_t for tau_t in tau))
        return epsilon_uni.mul_(gamma_uni)


@dataclass(frozen=True, eq=False)
class Masked:
    """The mask of one task and tensor, with the sums for the task's rescaler."""

    M: Tensor
    """(m, n) bool."""
    norm: float
    """Σ|τ_t|."""
    masked_norm: float
    """Σ|M_t ⊙ τ_uni|."""


@dataclass(frozen=True, eq=False)
class Unified:
    """The result of EMR-Merging for deltas in memory."""

    tau_uni: dict[str, Tensor]
    """(m, n) float32 for each tensor that some task changes."""
    masks: list[dict[str, Tensor]]
    """For each task, M_t of the tensors that it changes, (m, n) bool; M_t is zero elsewhere."""
    rescalers: list[float]
    """λ_t."""


def emr(deltas: Sequence[Mapping[str, Delta]]) -> Unified:
    """Merge deltas that are in memory, as ``starmerge merge -m emr`` merges files.

    Args:
        deltas: For each task, the delta of each tensor it changes, by name.

    Returns:
        The parts of λ_t · M_t ⊙ τ_uni, which task t adds to the base.
    """
    tau_uni = {}
    masks: list[dict[str, Tensor]] = [{} for _ in deltas]
    sums = Rescalers(len(deltas))
    tasks = tuple(map(str, range(len(deltas))))
    for name in dict.fromkeys(name for model in deltas for name in model):
        members = Deltas.of({t: model[name] for t, model in enumerate(deltas) if name in model})
        shape = next(iter(members)).shape
        context = TensorContext(name, shape, False, tasks=tasks, weights=(1.0,) * len(tasks))
        tau_uni[name] = Emr().merge(members, context, None).to_dense()
        for t, own in masks_of(members, tau_uni[name]):
            masks[t][name] = own.M
            sums.add(t, own.norm, own.masked_norm)
    return Unified(tau_uni, masks, sums.result())


def masks_of(deltas: Deltas, tau_uni: Tensor) -> Iterator[tuple[int, Masked]]:
    """Compute the mask of each task for one tensor, lazily, one task at a time.

    Args:
        deltas: τ_t of the tasks that change the tensor.
        tau_uni: (m, n), rounded to its stored dtype.

    Yields:
        Each task's number and its mask.
    """
    for t, tau_t in deltas.items():
        M = torch.empty(tau_t.shape, dtype=torch.bool)
        norm = masked_norm = 0.0
        for rows in panels(tau_t.shape, len(deltas)):
            mine, unified = tau_t.entries(rows), tau_uni[rows].float()
            # Compare signs, because the product of two small entries may underflow to zero.
            x, y = mine.numpy(), unified.numpy()
            M[rows] = torch.from_numpy((x > 0) & (y > 0) | (x < 0) & (y < 0))
            norm += absolute_sum(mine)
            masked_norm += absolute_sum(masked(unified, M[rows]))
        yield t, Masked(M, norm, masked_norm)


class Rescalers:
    """Accumulators of the sums over the whole model that determine the rescalers.

    Args:
        tasks: Number of tasks.
    """

    def __init__(self, tasks: int) -> None:
        self._norms = [0.0] * tasks
        self._masked_norms = [0.0] * tasks

    def add(self, task: int, norm: float, masked_norm: float) -> None:
        """Add Σ|τ_t| and Σ|M_t ⊙ τ_uni| of one tensor to a task's sums."""
        self._norms[task] += norm
        self._masked_norms[task] += masked_norm

    def result(self) -> list[float]:
        """Return λ_t for all tasks; 0 for a task that agrees with τ_uni nowhere."""
        pairs = zip(self._norms, self._masked_norms, strict=True)
        return [norm / masked_norm if masked_norm else 0.0 for norm, masked_norm in pairs]
