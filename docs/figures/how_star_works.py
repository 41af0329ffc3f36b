"""Draw how STAR works: the spectrum of a real adapter, and its merge with its neighbours.

Run as ``python docs/figures/how_star_works.py``; writes ``how_star_works.png`` beside itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.spectral import svd, truncate_and_rescale

ETA = 40
WINDOW = 24
"""Rows and columns of the part of a matrix that is shown."""

KEPT, GROWN, DROPPED, SHARE = "#2f6690", "#86aecb", "#c3cad1", "#c47d00"
TEXT, FAINT = "#222222", "#5f6b76"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#8a949e",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_truncation(axes: Axes, values: Tensor, rank: int) -> None:
    """Draw the singular values as bars, and the share of their sum reached so far as a line."""
    places = range(1, len(values) + 1)
    axes.bar(places, values, 0.74, color=[KEPT] * rank + [DROPPED] * (len(values) - rank))
    axes.set_ylabel("singular value σ")
    right = axes.twinx()
    share = (100 * values.cumsum(0) / values.sum()).tolist()
    right.axhline(ETA, color=SHARE, linestyle=(0, (4, 3)), linewidth=1)
    right.plot(places, share, color=SHARE, marker="o", markersize=2.8, linewidth=1.2)
    right.plot(rank, share[rank - 1], "o", color=SHARE, markersize=7)
    right.set_ylim(0, 106)
    right.set_yticks([0, ETA, 100], ["0", f"{ETA} %", "100 %"], color=SHARE)
    right.tick_params(length=0, pad=2)
    right.spines[:].set_visible(False)
    right.text(rank + 1, share[rank - 1], f"{rank} are enough", color=SHARE, va="center")
    right.text(16.6, 75, "share of the sum\nreached so far", color=SHARE, ha="right", va="top")


def draw_rescale(axes: Axes, values: Tensor, rank: int, factor: float) -> None:
    """Draw the kept singular values grown, the dropped ones hollow."""
    places = torch.arange(1, len(values) + 1)
    kept, dropped = places[:rank], places[rank:]
    axes.bar(kept, values[:rank], 0.74, color=KEPT)
    axes.bar(kept, values[:rank] * (factor - 1), 0.74, values[:rank], color=GROWN)
    hollow: dict[str, Any] = {
        "fill": False,
        "edgecolor": "#9aa5b1",
        "linestyle": (0, (2, 2)),
        "linewidth": 0.8,
    }
    axes.bar(dropped, values[rank:], 0.74, **hollow)
    axes.tick_params(labelleft=False)
    top = float(values[0]) * factor
    axes.text(rank + 0.8, top * 0.97, f"kept, × {factor:.2f}", color=KEPT, va="center")
    axes.text(9.5, float(values[rank]) + top * 0.04, "dropped", color=FAINT, ha="center")
    sums = {"before": values.sum(), "after": values[:rank].sum() * factor}
    axes.text(9.2, top * 0.74, "σ summed up", va="center")
    for line, (words, number) in enumerate(sums.items(), start=1):
        axes.text(9.2, top * (0.74 - 0.1 * line), words, va="center")
        axes.text(16.4, top * (0.74 - 0.1 * line), f"{number:.2f}", ha="right", va="center")


def draw_merge(axes: Axes, names: Sequence[str], deltas: Sequence[Tensor], weight: Tensor) -> None:
    """Draw truncated deltas, their mean, and the mean added to the base's weight."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    box = axes.get_window_extent()
    ratio = box.width / box.height

    def picture(matrix: Tensor, x: float, y: float, size: float, name: str, limit: float) -> None:
        inset = axes.inset_axes((x, y, size, size * ratio))
        inset.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        inset.set(xticks=[], yticks=[])
        inset.spines[:].set(visible=True, linewidth=0.6)
        inset.set_xlabel(name, color=TEXT, labelpad=2)

    mean = torch.stack(list(deltas)).mean(0)
    strong, strong_base = spread(torch.stack(list(deltas))), spread(weight)
    small, large = 0.225, 0.27
    upper, lower = 1 - small * ratio, 0.0
    for place, (name, delta) in enumerate(zip(names, deltas, strict=True)):
        gap = (1 - len(deltas) * small) / (len(deltas) - 1)
        picture(delta, place * (small + gap), upper, small, name, strong)
    for x, matrix, name, limit in (
        (0.0, weight, "base", strong_base),
        (0.365, mean, "mean", strong),
        (0.73, weight + mean, "merged", strong_base),
    ):
        picture(matrix, x, lower, large, name, limit)
    for x, sign in ((0.3175, "+"), (0.6825, "=")):
        axes.text(x, lower + large * ratio / 2, sign, fontsize=15, ha="center", va="center")
    arrow = {"arrowstyle": "->", "color": FAINT}
    axes.annotate("", (0.5, lower + large * ratio + 0.02), (0.5, upper - 0.11), arrowprops=arrow)


def spread(matrix: Tensor) -> float:
    """Return the size that most entries of a matrix stay below: the end of its colour scale."""
    return float(torch.quantile(matrix.abs().flatten(), 0.95))


def busiest(matrices: Sequence[Tensor]) -> tuple[slice, slice]:
    """Return rows and columns of a square part in which each of the matrices has much to show."""
    stack = torch.stack(list(matrices))[:, None] ** 2
    energy = torch.nn.functional.avg_pool2d(stack, WINDOW, stride=1)[:, 0].amin(0)
    row, column = divmod(int(energy.argmax()), energy.shape[1])
    return slice(row, row + WINDOW), slice(column, column + WINDOW)


def main() -> None:
    """Read the adapters and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="folder of the base (default: the demo's)")
    parser.add_argument("--adapters", type=Path, help="folder of adapters (default: the package's)")
    parser.add_argument(
        "--names",
        nargs="+",
        default=["digits", "plural", "sentiment", "country"],
        metavar="NAME",
        help="adapters to show, the first with its spectrum (default: digits plural sentiment "
        "country)",
    )
    parser.add_argument("--layer", type=int, default=5, help="which q_proj (default: 5)")
    options = parser.parse_args()
    if options.base is None:
        from starmerge_models.demo_names import prepared_base  # noqa: PLC0415  (needs the demo extra)

        options.base = prepared_base()
    if options.adapters is None:
        from starmerge_models_demo import ADAPTERS  # noqa: PLC0415  (needs the demo extra)

        options.adapters = ADAPTERS

    tensor = f"model.layers.{options.layer}.self_attn.q_proj.weight"
    base = open_base(resolve(options.base))
    weight = base.checkpoint.read(tensor).float()
    models = [open_model(name, resolve(options.adapters / name), base) for name in options.names]
    spectra = [svd(model.delta(tensor, weight)) for model in models]
    truncated = [truncate_and_rescale(spectrum, eta=ETA) for spectrum in spectra]
    values, (_, done) = spectra[0].S, truncated[0]
    dense = [delta.to_dense() for delta, _ in truncated]
    part = busiest(dense)

    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(9, 3.3))
    left, middle, right = (
        figure.add_axes((x, 0.14, width, 0.64))
        for x, width in ((0.062, 0.258), (0.39, 0.258), (0.692, 0.3))
    )
    draw_truncation(left, values, done.rank)
    draw_rescale(middle, values, done.rank, done.factor)
    for axes in (left, middle):
        axes.set_ylim(0, float(values[0]) * done.factor * 1.06)
        axes.set_xticks([1, 4, 8, 12, 16])
        axes.set_xlabel(f"k-th largest σ of one delta ({options.names[0]})", fontsize=9, labelpad=2)
        axes.tick_params(length=2)
    draw_merge(right, options.names, [matrix[part] for matrix in dense], weight[part])
    titles = (
        ("1  Truncate", f"keep the largest σ, until\nthey reach {ETA} % of the sum"),
        ("2  Rescale", "grow what was kept\nuntil the sum is the old one"),
        ("3  Merge", "take the mean over tasks,\nadd it to the base"),
    )
    for axes, (title, words) in zip((left, middle, right), titles, strict=True):
        x = axes.get_position().x0
        figure.text(x, 0.945, title, fontsize=12, fontweight="bold")
        figure.text(x, 0.925, words, color=FAINT, va="top", linespacing=1.15)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=180, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
