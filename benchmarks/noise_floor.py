"""What the noise floor changes: real adapters stored as full checkpoints.

The adapters of SmolLM2-135M that come with the package are added to the base and rounded to
bfloat16 and to float16, as a full fine-tune would be stored. STAR then gets the difference to the
base, a full-rank matrix that the rounding noise is part of, once as it is ("off") and once with
what lies below the noise floor left out ("auto"). The truth is STAR of the adapter itself, whose
factors have no such noise.

For each module and dtype: how many singular values there are to start from, and the nuclear norm
that STAR restores, both before η; the rank kept at η; how often that is the true one; the distance
of the merged delta from that of the adapters, relative to its norm (Frobenius; median and greatest
over the layers). ``--scale`` makes the adapters smaller, to show updates of less than an ulp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import torch
from common import add_models, find_models, parser_of
from torch import Tensor

from starmerge_models.checkpoints.base import Base, open_base
from starmerge_models.checkpoints.models import FineTune, open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.spectral import Decomposition, kept_rank, svd
from starmerge_models.spectral.noise import noise_floor, rounding_noise

STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Row:
    """What is seen of one module, dtype and setting, delta by delta."""

    values: list[int] = field(default_factory=list)
    nuclear: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Layer by layer, the distance of the merged delta from the true one."""
    kept_whole: int = 0
    """Deltas that the floor was not applied to."""


@dataclass(frozen=True)
class Star:
    """STAR of one delta."""

    values: int
    nuclear: float
    rank: int
    delta: Tensor


def star(decomposed: Decomposition, values: int, eta: float) -> Star:
    """Truncate and rescale what a delta's first singular triplets are."""
    S = decomposed.S[:values]
    rank = kept_rank(S, eta)
    rescaled = S[:rank] * (S.sum() / S[:rank].sum())
    kept = decomposed.first(rank)
    delta = (kept.U.double() * rescaled) @ kept.V.double().T
    return Star(values, float(S.sum()), rank, delta)


def observe(
    base: Base,
    models: Sequence[FineTune],
    name: str,
    eta: float,
    scale: float,
    rows: dict[tuple[str, str, str], Row],
) -> None:
    """Merge one tensor in every way, and add what is seen to the table's rows."""
    weight = base.checkpoint.read(name)
    module = name.split(".")[-2]
    merged: dict[tuple[str, str], list[Tensor]] = {}
    for model in models:
        adapter = model.delta(name, weight)
        assert isinstance(adapter, LowRank)
        exact = svd(adapter.scaled(scale))
        truth = star(exact, len(exact.S), eta)
        whole = exact.first(len(exact.S))
        update = (whole.U * whole.S) @ whole.V.T
        for stored, dtype in STORED.items():
            delta = (weight.double() + update).to(dtype).float() - weight.float()
            decomposed = svd(Dense(delta))
            floor = noise_floor(decomposed.S, rounding_noise(weight, delta, dtype))
            everything = len(decomposed.S)
            outcomes = {
                "off": star(decomposed, everything, eta),
                "auto": star(decomposed, floor.above if floor.applies else everything, eta),
                "truth": truth,
            }
            rows.setdefault((stored, module, "auto"), Row()).kept_whole += not floor.applies
            for setting, outcome in outcomes.items():
                row = rows.setdefault((stored, module, setting), Row())
                row.values.append(outcome.values)
                row.nuclear.append(outcome.nuclear / truth.nuclear)
                row.ranks.append(outcome.rank)
                row.right.append(outcome.rank == truth.rank)
                merged.setdefault((stored, setting), []).append(outcome.delta)
    for (stored, setting), deltas in merged.items():
        true = sum(merged[stored, "truth"])
        distance = torch.linalg.vector_norm(sum(deltas) - true) / torch.linalg.vector_norm(true)
        rows[stored, module, setting].errors.append(float(distance))


def table(rows: dict[tuple[str, str, str], Row]) -> str:
    """Return the Markdown table."""
    lines = [
        "| stored as | module | noise floor | singular values | nuclear norm, × truth "
        "| rank kept | rank right | error of the merge, median (max) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    order = {"off": 0, "auto": 1, "truth": 2}
    for key in sorted(rows, key=lambda key: (*key[:2], order[key[2]])):
        stored, module, setting = key
        row = rows[key]
        lines.append(
            f"| {stored} | {module} | {setting} | {mean(row.values):.1f} "
            f"| {mean(row.nuclear):.3f} ({min(row.nuclear):.3f} – {max(row.nuclear):.3f}) "
            f"| {mean(row.ranks):.2f} | {mean(row.right):.0%} "
            f"| {median(row.errors):.2%} ({max(row.errors):.2%}) |"
        )
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add_models(parser)
    parser.add_argument(
        "--layers",
        type=int,
        metavar="L",
        help="only the first L layers (default: all; some minutes on one core)",
    )
    parser.add_argument("--eta", type=float, default=40.0, help="η, in percent (default: 40)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor for the adapters (default: 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    options = parser.parse_args()
    if (options.layers or 1) < 1 or options.threads < 1:
        parser.error("--layers and --threads must be at least 1")
    return options


def main() -> int:
    """Run the experiment."""
    options = parse_options()
    base_folder, folders = find_models(options)
    torch.set_num_threads(options.threads)
    base = open_base(resolve(base_folder))
    models = [open_model(folder.name, resolve(folder), base) for folder in folders]
    shared = set.intersection(*(set(model.tensors) for model in models))
    names = [name for name in base.checkpoint if name in shared]
    names = [name for name in names if options.layers is None or layer_of(name) < options.layers]

    rows: dict[tuple[str, str, str], Row] = {}
    for name in names:
        observe(base, models, name, options.eta, options.scale, rows)
    print(
        f"{base_folder.name}: {len(names)} tensors × {len(models)} adapters × {options.scale:g}, "
        f"η = {options.eta:g} %\n"
    )
    print(table(rows))
    whole = {key[:2]: row.kept_whole for key, row in rows.items() if row.kept_whole}
    for (stored, module), count in sorted(whole.items()):
        print(f"\n{stored}, {module}: the floor did not apply to {count} deltas")
    return 0


def layer_of(name: str) -> int:
    """Return the number of a tensor's layer: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


if __name__ == "__main__":
    sys.exit(main())
