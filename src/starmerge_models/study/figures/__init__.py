"""Figures in PNG, PDF and SVG, one style: scores, methods, curves of studies, inspections."""

from starmerge_models.study.figures.curves import (
    plot_against_number,
    plot_against_parameter,
    plot_best_parameter,
    plot_grid,
    plot_heat_map,
)
from starmerge_models.study.figures.inspection import (
    plot_conflicts,
    plot_kept,
    plot_ranks,
    plot_spectra,
)
from starmerge_models.study.figures.methods import plot_methods
from starmerge_models.study.figures.scores import plot_scores

__all__ = [
    "plot_against_number",
    "plot_against_parameter",
    "plot_best_parameter",
    "plot_conflicts",
    "plot_grid",
    "plot_heat_map",
    "plot_kept",
    "plot_methods",
    "plot_ranks",
    "plot_scores",
    "plot_spectra",
]
