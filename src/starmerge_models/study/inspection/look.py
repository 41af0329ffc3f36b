"""All that is measured of one tensor, without its task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from starmerge_models.deltas import Delta
from starmerge_models.methods.method import TensorContext
from starmerge_models.study.inspection.conflict import Conflict, conflict_of
from starmerge_models.study.inspection.entries import Entries, entries_of
from starmerge_models.study.inspection.kept import Kept, kept_of
from starmerge_models.study.inspection.spectrum import Spectrum, spectrum_of

LISTED = 128
"""Singular values of a dense delta that are listed; of factors all are."""


@dataclass(frozen=True)
class Shape:
    """The spectrum of one task vector of one tensor, in numbers.

    As :class:`starmerge_models.study.inspection.spectrum.Spectrum` has them.
    """

    values: tuple[float, ...]
    """Singular values, descending; of a dense delta the first :data:`LISTED`."""
    nuclear: float
    """Σσ; of what stands above the noise floor where it applies."""
    rank: int
    kept: int
    effective_rank: float
    stable_rank: float
    top_share: float
    top_energy: float
    above: float
    """Σσ² of the same as ``nuclear``."""
    noise: float
    """Share of ‖τ‖² below the noise floor."""
    floor: float | None
    """The noise floor; None for what has none, as adapters."""
    floor_applies: bool

    @classmethod
    def of(cls, spectrum: Spectrum) -> Shape:
        """Return the numbers of a spectrum."""
        floor = spectrum.truncation.noise
        return cls(
            values=tuple(spectrum.values[: max(LISTED, len(spectrum.svd.S))].tolist()),
            nuclear=spectrum.truncation.nuclear_before,
            rank=spectrum.rank,
            kept=spectrum.kept,
            effective_rank=spectrum.effective_rank,
            stable_rank=spectrum.stable_rank,
            top_share=spectrum.top_share,
            top_energy=spectrum.top_energy,
            above=spectrum.above,
            noise=spectrum.noise,
            floor=None if floor is None else floor.value,
            floor_applies=floor is not None and floor.applies,
        )


@dataclass(frozen=True, eq=False)
class TensorLook:
    """One tensor that some task changes, and what its tasks do to each other in it."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """The layer's index; None outside of layers."""
    tasks: tuple[int, ...]
    """Numbers of the tasks that change it: the places in what follows."""
    energies: tuple[float, ...]
    """‖τ‖² of each."""
    spectra: tuple[Shape | None, ...]
    """Of each; None for what spectral methods average."""
    conflict: Conflict
    entries: Entries
    kept: Mapping[str, tuple[Kept, ...]]
    """By the name of a merge, of each task."""


def look_at(
    deltas: Mapping[int, Delta],
    merges: Mapping[str, Delta],
    tensor: TensorContext,
    eta: float,
) -> TensorLook:
    """Measure one tensor.

    Args:
        deltas: τ by the number of the task; one or more.
        merges: What merges add to the tensor, by the merge's name.
        tensor: The tensor; its base has been read.
        eta: STAR's η, in percent.
    """
    assert tensor.base is not None, "an inspection has a base"
    held = list(deltas.values())
    spectra = [spectrum_of(delta, tensor, eta) for delta in held]
    conflict = conflict_of(held, spectra)
    kept = {
        name: tuple(kept_of(M, delta, own) for delta, own in zip(held, spectra, strict=True))
        for name, M in merges.items()
    }
    return TensorLook(
        tensor.name,
        tensor.shape,
        None if tensor.layer is None else tensor.layer[0],
        tuple(deltas),
        tuple(delta.frobenius() ** 2 for delta in held),
        tuple(None if own is None else Shape.of(own) for own in spectra),
        conflict,
        entries_of(held, tensor.base),
        kept,
    )


def responses(look: TensorLook) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return ‖τ_i C_j^½‖² of a tensor with zeros where it is not defined, (T, T)."""
    return np.nan_to_num(look.conflict.response)
