"""All measures of one tensor, which do not hold its task vectors."""

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
"""Number of listed singular values of a dense delta; those of factors are all listed."""


@dataclass(frozen=True)
class SpectrumSummary:
    """Numbers of the spectrum of one task vector of one tensor.

    Defined as in :class:`starmerge_models.study.inspection.spectrum.Spectrum`.
    """

    values: tuple[float, ...]
    """Singular values, descending; the first :data:`LISTED` of a dense delta."""
    nuclear: float
    """Σσ, above the noise floor where it applies."""
    rank: int
    kept: int
    effective_rank: float
    stable_rank: float
    top_share: float
    top_energy: float
    above: float
    """Σσ² over the same singular values as ``nuclear``."""
    noise: float
    """Share of ‖τ‖² below the noise floor."""
    floor: float | None
    """The noise floor; None if there is none, as for adapters."""
    floor_applies: bool

    @classmethod
    def of(cls, spectrum: Spectrum) -> SpectrumSummary:
        """Summarise a spectrum."""
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
class TensorMeasures:
    """The measures of one tensor that at least one task changes."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """The layer's index; None outside of layers."""
    tasks: tuple[int, ...]
    """Indices of the tasks that change the tensor; the fields below are in this order."""
    energies: tuple[float, ...]
    """‖τ‖² of each task."""
    spectra: tuple[SpectrumSummary | None, ...]
    """The spectrum of each task; None for tensors that spectral methods average."""
    conflict: Conflict
    entries: Entries
    kept: Mapping[str, tuple[Kept, ...]]
    """For each merge, by name: the comparison with each task."""


def measure_tensor(
    deltas: Mapping[int, Delta],
    merges: Mapping[str, Delta],
    tensor: TensorContext,
    eta: float,
) -> TensorMeasures:
    """Measure one tensor.

    Args:
        deltas: τ by the task's index; at least one.
        merges: The updates of merges, by the merge's name.
        tensor: The tensor, with its base weights.
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
    return TensorMeasures(
        tensor.name,
        tensor.shape,
        None if tensor.layer is None else tensor.layer[0],
        tuple(deltas),
        tuple(delta.frobenius() ** 2 for delta in held),
        tuple(None if own is None else SpectrumSummary.of(own) for own in spectra),
        conflict,
        entries_of(held, tensor.base),
        kept,
    )


def responses(tensor: TensorMeasures) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return ‖τ_i C_j^½‖² of a tensor, (T, T); 0 if undefined."""
    return np.nan_to_num(tensor.conflict.response)
