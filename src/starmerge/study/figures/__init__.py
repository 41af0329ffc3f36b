"""Figures in PNG, PDF and SVG, all in one style: scores, methods, and the curves of studies."""

from starmerge.study.figures.curves import (
    plot_against_number,
    plot_against_parameter,
    plot_best_parameter,
    plot_grid,
    plot_heat_map,
)
from starmerge.study.figures.methods import plot_methods
from starmerge.study.figures.scores import plot_scores

__all__ = [
    "plot_against_number",
    "plot_against_parameter",
    "plot_best_parameter",
    "plot_grid",
    "plot_heat_map",
    "plot_methods",
    "plot_scores",
]
