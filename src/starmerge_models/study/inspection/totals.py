"""Aggregates the measures of tensors by model, pair and layer, as flat records.

A record is a JSON-serialisable dictionary; undefined values are None. Energies are summed over
tensors, and ratios are ratios of sums, so tensors are weighted by the energy of their updates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from starmerge_models.study.inspection.conflict import Matrix
from starmerge_models.study.inspection.kept import Kept
from starmerge_models.study.inspection.tensor_measures import TensorMeasures, responses

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class ModelInfo:
    """An inspected model."""

    name: str
    kind: str
    """Display name of the kind of model, such as "LoRA adapter"."""


def tensor_records(
    measures: Sequence[TensorMeasures], infos: Sequence[ModelInfo], modules: Mapping[str, str]
) -> list[Record]:
    """Return a record for each tensor and each model that changes it."""
    records = []
    for tensor in measures:
        for place, t in enumerate(tensor.tasks):
            own, entries = tensor.spectra[place], tensor.entries
            record: Record = {
                "tensor": tensor.name,
                "layer": tensor.layer,
                "module": modules[tensor.name],
                "shape": "×".join(map(str, tensor.shape)),
                "model": infos[t].name,
                "norm": math.sqrt(tensor.energies[place]),
                "relative_norm": _root(tensor.energies[place], entries.base),
                "survived": _survived(entries.lost[place], entries.updates[place]),
                "outvoted": _ratio(entries.outvoted[place], entries.sizes[place]),
            }
            keys = (
                *("nuclear", "rank", "kept", "effective_rank", "stable_rank"),
                *("top_share", "top_energy", "noise", "floor", "floor_applies"),
            )
            record |= {key: None if own is None else getattr(own, key) for key in keys}
            record["spectrum"] = [] if own is None else list(own.values)
            records.append(record)
    return records


def pair_records(
    measures: Sequence[TensorMeasures], infos: Sequence[ModelInfo], modules: Mapping[str, str]
) -> list[Record]:
    """Return a record for each tensor and each pair of models that change it."""
    records = []
    for tensor in measures:
        where: Record = {
            "tensor": tensor.name,
            "layer": tensor.layer,
            "module": modules[tensor.name],
        }
        for i, j in combinations(range(len(tensor.tasks)), 2):
            if tensor.energies[i] > 0 and tensor.energies[j] > 0:
                a, b = tensor.tasks[i], tensor.tasks[j]
                names = {"a": infos[a].name, "b": infos[b].name}
                records.append({**where, **names, **_pair_in(tensor, i, j)})
    return records


def _pair_in(tensor: TensorMeasures, i: int, j: int) -> Record:
    c, e = tensor.conflict, tensor.entries
    above = [0.0 if own is None else own.above for own in tensor.spectra]
    record: Record = {
        "cosine": _ratio(c.inner[i, j], math.sqrt(tensor.energies[i] * tensor.energies[j])),
        "sign_conflict": _conflicting(e.products[i, j], e.magnitudes[i, j]),
        "overlap_in": _known(c.overlap_in[i, j]),
        "overlap_out": _known(c.overlap_out[i, j]),
        "chance_in": _known(c.chance_in[i, j]),
        "chance_out": _known(c.chance_out[i, j]),
    }
    for one, other, x, y in ((i, j, "a", "b"), (j, i, "b", "a")):
        record |= {
            f"{x}_on_{y}": _root(c.response[one, other], c.response[other, other]),
            f"{x}_along_{y}": _ratio(c.along[one, other], c.response[other, other]),
            f"{x}_acting_on_{y}": _ratio(c.acting[one, other], above[one]),
            f"{x}_reach_on_{y}": _known(c.reach[one, other]),
            f"{x}_rms_on_{y}": _known(c.rms[one, other]),
            f"{x}_bound_on_{y}": _known(c.bound[one, other]),
            f"{x}_reach_whole_on_{y}": _known(c.reach_whole[one, other]),
            f"{x}_bound_whole_on_{y}": _known(c.bound_whole[one, other]),
        }
    return record


class Sums:
    """Sums of the measures over tensors, by the tasks' indices."""

    def __init__(self, measures: Iterable[TensorMeasures], count: int) -> None:
        T = count
        self.inner, self.response, self.along, self.acting = np.zeros((4, T, T))
        self.products, self.magnitudes = np.zeros((2, T, T))
        self.shared = np.zeros((T, T), dtype=np.int64)
        self.weights = np.zeros((T, T))
        self.overlaps = {
            key: np.zeros((T, T))
            for key in ("overlap_in", "overlap_out", "chance_in", "chance_out")
        }
        self.energy, self.above, self.apart, self.base = np.zeros((4, T))
        self.sizes, self.outvoted, self.updates, self.lost, self.noise = np.zeros((5, T))
        self.tensors = np.zeros(T, dtype=np.int64)
        self.tightness: dict[tuple[int, int], list[float]] = defaultdict(list)
        for tensor in measures:
            self._add(tensor)

    def _add(self, tensor: TensorMeasures) -> None:
        places = np.ix_(tensor.tasks, tensor.tasks)
        tasks = list(tensor.tasks)
        c, e = tensor.conflict, tensor.entries
        energies = np.array(tensor.energies)
        changed = energies > 0
        self.inner[places] += np.nan_to_num(c.inner)
        self.response[places] += responses(tensor)
        self.along[places] += np.nan_to_num(c.along)
        self.acting[places] += np.nan_to_num(c.acting)
        self.products[places] += e.products
        self.magnitudes[places] += e.magnitudes
        self.shared[places] += np.outer(changed, changed)
        weights = np.where(np.isnan(c.overlap_in), 0.0, np.sqrt(np.outer(energies, energies)))
        self.weights[places] += weights
        for key, total in self.overlaps.items():
            total[places] += weights * np.nan_to_num(getattr(c, key))
        self.energy[tasks] += energies
        self.above[tasks] += [0.0 if own is None else own.above for own in tensor.spectra]
        self.noise[tasks] += [
            0.0 if own is None else own.noise * energy
            for own, energy in zip(tensor.spectra, tensor.energies, strict=True)
        ]
        self.tensors[tasks] += changed
        self.base[tasks] += np.where(changed, e.base, 0.0)
        if 2 * changed.sum() <= len(self.energy):
            self.apart[tasks] += energies
        self.sizes[tasks] += e.sizes
        self.outvoted[tasks] += e.outvoted
        self.updates[tasks] += e.updates
        self.lost[tasks] += e.lost
        known = np.argwhere(c.bound > 0)
        for i, j in known[known[:, 0] != known[:, 1]].tolist():
            tightness = float(c.reach[i, j] / c.bound[i, j])
            self.tightness[tensor.tasks[i], tensor.tasks[j]].append(tightness)


def model_records(
    measures: Sequence[TensorMeasures], infos: Sequence[ModelInfo], sums: Sums
) -> list[Record]:
    """Return a record for each model."""
    norms = [math.sqrt(energy) for energy in sums.energy]
    means = _means_by_task(measures, len(infos))
    records = []
    for t, info in enumerate(infos):
        others = [norm for other, norm in enumerate(norms) if other != t and norm > 0]
        on_it = sums.response[:, t].sum() - sums.response[t, t]
        records.append(
            {
                "model": info.name,
                "kind": info.kind,
                "tensors": int(sums.tensors[t]),
                "norm": norms[t],
                "relative_norm": _root(sums.energy[t], sums.base[t]),
                "times_others": norms[t] / median(others) if others else None,
                **means[t],
                "noise": _ratio(sums.noise[t], sums.energy[t]),
                "apart": _ratio(sums.apart[t], sums.energy[t]),
                "survived": _survived(sums.lost[t], sums.updates[t]),
                "outvoted": _ratio(sums.outvoted[t], sums.sizes[t]),
                "others_on_it": _root(on_it, sums.response[t, t]) if others else None,
            }
        )
    return records


def _means_by_task(measures: Sequence[TensorMeasures], count: int) -> list[Record]:
    """Return unweighted means over the matrices that each task changes, and its Σσ."""
    keys = ("rank", "kept", "effective_rank", "stable_rank", "top_share", "top_energy")
    found: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(count)]
    for tensor in measures:
        for t, own in zip(tensor.tasks, tensor.spectra, strict=True):
            # The rank of a vector is always 1, so vectors are excluded.
            if own is not None and own.rank and len(tensor.shape) > 1:
                for key in ("nuclear", *keys):
                    found[t][key].append(getattr(own, key))
    return [
        {
            "nuclear": math.fsum(own["nuclear"]) if own else None,
            **{key: math.fsum(own[key]) / len(own[key]) if own else None for key in keys},
        }
        for own in found
    ]


def conflict_records(infos: Sequence[ModelInfo], sums: Sums) -> list[Record]:
    """Return a record for each pair of models, over all tensors."""
    records = []
    for i, j in combinations(range(len(infos)), 2):
        record: Record = {
            "a": infos[i].name,
            "b": infos[j].name,
            "tensors": int(sums.shared[i, j]),
            "cosine": _ratio(sums.inner[i, j], math.sqrt(sums.energy[i] * sums.energy[j])),
            "sign_conflict": _conflicting(sums.products[i, j], sums.magnitudes[i, j]),
        }
        record |= {
            key: _ratio(total[i, j], sums.weights[i, j]) for key, total in sums.overlaps.items()
        }
        for one, other, x, y in ((i, j, "a", "b"), (j, i, "b", "a")):
            tightness = sums.tightness.get((one, other))
            own = sums.response[other, other]
            record |= {
                f"{x}_on_{y}": _root(sums.response[one, other], own),
                f"{x}_along_{y}": _ratio(sums.along[one, other], own),
                f"{x}_acting_on_{y}": _ratio(sums.acting[one, other], sums.above[one]),
                f"{x}_reach_of_bound_on_{y}": median(tightness) if tightness else None,
            }
        records.append(record)
    return records


def layer_records(
    measures: Sequence[TensorMeasures], modules: Mapping[str, str], sums: Sums
) -> list[Record]:
    """Return a record for each layer and module: means over its tensors and the models."""
    groups: dict[tuple[int | None, str], list[TensorMeasures]] = defaultdict(list)
    for tensor in measures:
        groups[tensor.layer, modules[tensor.name]].append(tensor)
    return [
        {"layer": layer, "module": module, **_place(own, sums)}
        for (layer, module), own in groups.items()
    ]


def grouped_conflict(measures: Iterable[TensorMeasures]) -> float | None:
    """Return tasks' responses to each other's inputs over the own responses, in some tensors.

    √(Σ_{i≠j} ‖τ_i C_j^½‖² / Σ_j (n − 1)‖τ_j C_j^½‖²) with sums over the tensors and the n tasks
    that change each: the root mean square of ``a_on_b``, weighted by b's own response.
    """
    cross = own = 0.0
    for tensor in measures:
        found = responses(tensor)
        diagonal = np.diag(found)
        cross += float(found.sum() - diagonal.sum())
        own += float(diagonal.sum() * (np.count_nonzero(diagonal) - 1))
    return _root(cross, own)


def _place(measures: Sequence[TensorMeasures], sums: Sums) -> Record:
    shapes = [own for tensor in measures for own in tensor.spectra if own is not None and own.rank]
    keys = ("rank", "kept", "effective_rank", "stable_rank", "top_share")
    record: Record = {
        "tensors": len(measures),
        "models": len({t for k in measures for t in k.tasks}),
    }
    record |= {
        key: math.fsum(getattr(own, key) for own in shapes) / len(shapes) if shapes else None
        for key in keys
    }
    by_task = np.zeros(len(sums.energy))
    for tensor in measures:
        by_task[list(tensor.tasks)] += tensor.energies
    shares = by_task[sums.energy > 0] / sums.energy[sums.energy > 0]
    record["energy_share"] = float(shares.mean()) if len(shares) else None
    record["conflict"] = grouped_conflict(measures)
    for key in ("overlap_in", "overlap_out"):
        record[key] = _mean_off_diagonal(getattr(tensor.conflict, key) for tensor in measures)
    products = sum(_off_diagonal(tensor.entries.products).sum() for tensor in measures)
    magnitudes = sum(_off_diagonal(tensor.entries.magnitudes).sum() for tensor in measures)
    record["sign_conflict"] = _conflicting(products, magnitudes)
    return record


def kept_records(
    measures: Sequence[TensorMeasures], infos: Sequence[ModelInfo], modules: Mapping[str, str]
) -> tuple[list[Record], list[Record]]:
    """Return how much merges keep: a record for each merge and model, and for each tensor."""
    totals: dict[tuple[str, int], Kept] = defaultdict(Kept)
    by_tensor = []
    for tensor in measures:
        for merge, kept in tensor.kept.items():
            for t, own in zip(tensor.tasks, kept, strict=True):
                totals[merge, t] += own
                where: Record = {
                    "merge": merge,
                    "tensor": tensor.name,
                    "layer": tensor.layer,
                    "module": modules[tensor.name],
                    "model": infos[t].name,
                }
                if own.energy > 0:
                    by_tensor.append(where | own.record())
    merges = list(dict.fromkeys(merge for merge, _ in totals))
    whole = [
        {"merge": merge, "model": info.name, **totals[merge, t].record()}
        for merge in merges
        for t, info in enumerate(infos)
        if (merge, t) in totals
    ]
    return whole, by_tensor


def _off_diagonal(matrix: Matrix) -> Matrix:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _mean_off_diagonal(matrices: Iterator[Matrix]) -> float | None:
    values = np.concatenate([np.zeros(0), *map(_off_diagonal, matrices)])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 and not math.isnan(part) else None


def _root(part: float, whole: float) -> float | None:
    ratio = _ratio(part, whole)
    return None if ratio is None else math.sqrt(max(0.0, ratio))


def _survived(lost: float, update: float) -> float:
    return max(0.0, 1 - float(lost / update)) if update > 0 else 1.0


def _conflicting(product: float, magnitude: float) -> float | None:
    """Return the share of Σ|τ_i τ_j| over entries with different signs; ½ for independent signs."""
    ratio = _ratio(product, magnitude)
    return None if ratio is None else min(1.0, max(0.0, (1 - ratio) / 2))
