"""The rounding noise in a dense delta, and the noise floor of its singular values.

A fine-tune stored in bfloat16 gives δ = W_finetuned − W_base with an error of up to half an ulp in
every entry: a full-rank matrix is added to an update that may have few directions. This module
predicts the singular values of the error and counts the singular values of the delta above them.

**Variance of an entry** (:func:`rounding_noise`). If the base's entry is not representable in the
dtype that the fine-tune is stored in, the error is uniform, of variance ulp²/12, for updates of any
size. If it is representable, as when base and fine-tune have the same dtype, the stored δ is the
update rounded to a whole number of ulps, q. An update of at least an ulp again has an error of
variance ulp²/12; a smaller one is mostly lost, and its error depends on the update. With q = aδ + e
and e uncorrelated with δ (Bussgang's decomposition) only e is noise, and for δ ~ N(0, s²),
x = s/ulp:

    E[q²]/ulp² = Σ_{k≥1} (2k − 1) erfc((k − ½)/(x√2))       → x² + 1/12 for x ≥ 1
    a = E[qδ]/s² = (2/x) Σ_{k≥1} φ((k − ½)/x)                → 1
    E[e²] = E[q²] − a²s²                                     → ulp²/12

E[e²] falls from 0.083 ulp² at x = ½ to 0.056 at 0.3 and 0.011 at 0.2. The s of a row is the value
for which E[q²] equals the observed energy of the row.

**Edge** (:func:`noise_edge`). The variances differ with the binades of the weights, so the
Marchenko–Pastur edge √v̄(√m + √n) does not hold: on real weights the noise reached three times this
edge. The bound √(max_i Σ_j v_ij) + √(max_j Σ_i v_ij) (Bandeira and van Handel, arXiv 1408.6185)
holds, but is loose. This module uses the limit for v_ij = r_i c_j / Σr, which lies between the two
and equals both if all variances are the same. For the 210 matrices of SmolLM2-135M in bfloat16 the
first was 0.26 to 1.0 of the limit and the second 1.12 to 1.52; the largest singular value of
sampled noise was 0.88 to 1.0 of it in the mean, and exceeded the floor in none of 450 samples.

**Floor** (:func:`noise_floor`). A direction just above the edge is mostly noise. The floor is the
edge times the factor of Gavish and Donoho (arXiv 1305.5870; 1.15 for a square matrix): below the
floor, keeping a direction of a low-rank update adds more error than dropping it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PANEL_ENTRIES = 2**19
"""Entries of a weight in one panel; about ten float64 copies of a panel are allocated.

A panel takes some thousand calls of torch, for every size, and threads with small calls wait for
each other to release Python's global lock."""

_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
"""For each dtype the integer dtype of the same width."""

_HALVINGS = 24
_TERMS = 6


@dataclass(frozen=True, eq=False)
class Rounding:
    """Row and column sums of the variances v_ij of the rounding noise in a delta."""

    rows: Tensor
    """(m,) float64, Σ_j v_ij."""
    columns: Tensor
    """(n,) float64, Σ_i v_ij."""

    @cached_property
    def edge(self) -> float:
        """The largest singular value of the noise; see :func:`noise_edge`."""
        return noise_edge(self.rows, self.columns)


@dataclass(frozen=True)
class Floor:
    """The noise floor of one delta."""

    value: float
    """Singular values up to this value may be noise."""
    above: int
    """Number of singular values above the floor."""
    share: float
    """Energy Σσ² below the floor, divided by the energy expected from rounding; 0 if either is
    zero."""
    applies: bool = field(init=False)
    """Whether singular values below the floor should be dropped.

    They should not if no singular value is above the floor. A scattered update of less than an ulp
    has the spectrum of noise, but every nonzero entry of it was trained: an update rounded to the
    base's grid is never farther from the true update than zero is, so it must be kept. They should
    not be dropped either if rounding explains less than half of the energy below the floor, because
    then most of that energy is update.
    """

    def __post_init__(self) -> None:
        applies = self.value > 0 and self.above > 0 and self.share <= 2.0
        object.__setattr__(self, "applies", applies)


def rounding_noise(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Rounding:
    """Return the variances of the rounding noise in the delta of a fine-tune stored in a dtype.

    Processes panels of :data:`PANEL_ENTRIES` entries, or one row. The delta must be the stored
    difference, not scaled or trimmed. Cost: O(mn), and for each row the work of some thousand
    entries.

    Args:
        base: (m, n) the stored base, any floating dtype.
        delta: (m, n) the stored fine-tune minus the base, float32 or float64.
        dtype: Floating dtype of the stored fine-tune.
    """
    rows = torch.zeros(delta.shape[0], dtype=torch.float64)
    columns = torch.zeros(delta.shape[1], dtype=torch.float64)
    height = max(1, PANEL_ENTRIES // max(1, delta.shape[1]))
    for start in range(0, len(delta) if delta.numel() else 0, height):
        panel = slice(start, start + height)
        variances = _variances(base[panel], delta[panel].double(), dtype)
        rows[panel] = variances.sum(1)
        columns += variances.sum(0)
    return Rounding(rows, columns)


def noise_bytes(m: int, n: int) -> int:
    """Return the peak bytes of :func:`rounding_noise`, without the delta.

    They are ten float64 numbers for each entry of a panel.
    """
    return 8 * 10 * min(m * n, max(PANEL_ENTRIES, n))


def noise_edge(rows: Tensor, columns: Tensor) -> float:
    """Return the largest singular value of a large random matrix with given sums of variances.

    The entries are independent, of mean 0 and variances v_ij = r_i c_j / Σr, in the limit of many
    rows and columns. By Lehner's formula for the norm of a matrix of free semicircular elements
    (Amer. J. Math. 121, 1999) the value is

        inf over p, q > 0 of max over i, j of (1/p_i + Σ_j v_ij q_j, 1/q_j + Σ_i v_ij p_i).

    All these terms equal some λ for p_i = 1/(λ − r_i X), q_j = 1/(λ − c_j Y). With x = X r_max/λ
    and y = Y c_max/λ one parameter t is left to minimise over:

        edge² = min over t > 0 of t r_max c_max / (x y Σr),
        Σ_i ρ_i x/(1 − ρ_i x) = Σ_j γ_j y/(1 − γ_j y) = t,  ρ = r/r_max, γ = c/c_max.

    The minimum is where the derivative of the logarithm by log t is zero. With the terms a of the
    first sum, d log x / d log t is Σa/(Σa + Σa²). It decreases, and lies between 1/(1 + t) and
    1/(1 + t/m); so there is one minimum, with 1 ≤ t ≤ √(mn).

    Equal variances give √v(√m + √n), the edge of Marchenko and Pastur. Variances beyond float64's
    range, of weights above 1e150, give infinity. Cost: O(m + n) for each of some hundred steps.

    Args:
        rows: (m,) float64, r_i = Σ_j v_ij.
        columns: (n,) float64, c_j = Σ_i v_ij; of the same total.
    """
    total = float(rows.sum())
    if total == 0:
        return 0.0
    if not math.isfinite(total):
        return math.inf
    top_row, top_column = float(rows.max()), float(columns.max())
    # Of short vectors NumPy's calls take a third of the time of torch's.
    rho, gamma = rows.numpy() / top_row, columns.numpy() / top_column

    def slope(log_t: float) -> float:
        t = math.exp(log_t)
        return 1 - _solve(rho, t)[1] - _solve(gamma, t)[1]

    t = math.exp(_root(slope, -0.01, math.log(len(rows) * len(columns)) / 2 + 0.01))
    square = t / (_solve(rho, t)[0] * _solve(gamma, t)[0])
    return math.sqrt(square * top_row * (top_column / total))


def noise_floor(S: Tensor, rounding: Rounding) -> Floor:
    """Return the noise floor of a delta, with the number of its singular values above the floor.

    Args:
        S: (min(m, n),) all singular values of the delta, descending.
        rounding: The rounding noise in the delta.
    """
    S = S.double()
    edge = rounding.edge
    if edge == 0:
        return Floor(0.0, int(S.gt(0).sum()), 0.0)
    m, n = len(rounding.rows), len(rounding.columns)
    value = edge * _threshold(min(m, n) / max(m, n))
    above = int(S.gt(value).sum())
    # The directions above the floor contain their share of the noise, by rows and columns.
    expected = float(rounding.rows.sum()) * (1 - above / m) * (1 - above / n)
    return Floor(value, above, float(S[above:].square().sum()) / expected if expected else 0.0)


def _variances(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return v_ij (m, n) of some rows, float64."""
    limits = torch.finfo(dtype)
    code = _exponents(base.double() + delta, dtype)
    codes = int(code.max()) + 1
    steps = torch.arange(codes).double() - 1
    # One power of two, because the factors of float64's smallest ulp, 2⁻¹⁰⁷⁴, are out of range.
    ulps = (steps.clamp(min=0) + math.log2(limits.smallest_normal * limits.eps)).exp2()
    uniform = ulps.square()[code] / 12
    on_grid = base == base.to(dtype)
    uniform_energy = uniform.masked_fill(on_grid, 0.0).sum(1)

    # Number of entries of each row on the dtype's grid, by binade.
    place = code + codes * torch.arange(len(code))[:, None]
    counts = torch.bincount(place[on_grid], minlength=codes * len(code)).view(-1, codes).double()
    used = counts.any(0).nonzero().flatten()
    counts, ulp = counts[:, used], ulps[used]

    # Bisection in log₂ s. As |q| ≤ 2|δ|, s is at least half the root mean square; the upper bound
    # is twice the root mean square or four of the row's largest ulps.
    energy = delta.square().sum(1)
    outside = (~on_grid).sum(1)
    mean_square = (energy - uniform_energy).clamp(min=0) / delta.shape[1]
    high = torch.maximum(2 * mean_square.sqrt(), 4 * ulps[code.amax(1)]).log2()
    low = torch.maximum((mean_square.sqrt() / 2).log2(), high - 60)
    weights, width = counts * ulp.square(), (high - low).nan_to_num(0.0)  # both may be infinite
    for _ in range(_HALVINGS):
        width = width / 2
        middle = low + width
        s = middle.exp2()
        expected = (weights * _second_moment(s[:, None] / ulp)).sum(1)
        above = expected + outside * s.square() + uniform_energy > energy
        low = torch.where(above, low, middle)

    x = (low + width).exp2()[:, None] / ulp
    noise = torch.zeros(len(code), codes, dtype=torch.float64)
    # For x above 1e8 the difference of x² + 1/12 and x² is lost to rounding.
    residual = torch.where(x >= 1, 1 / 12, _second_moment(x) - (_gain(x) * x).square())
    noise[:, used] = residual.clamp(min=0) * ulp.square()
    return torch.where(on_grid, noise.gather(1, code), uniform)


def _second_moment(x: Tensor) -> Tensor:
    """Return E[q²] for q = δ rounded to an integer, δ ~ N(0, x²).

    For x ≥ 1 it differs from x² + 1/12 by less than 1e-6.
    """
    wide = x.square() + 1 / 12
    is_wide = x >= 1
    if is_wide.all():
        return wide
    inverse = (x.clamp(1e-30, 1.0) * math.sqrt(2)).reciprocal()
    series = torch.zeros_like(x)
    for k in range(1, _TERMS + 1):
        series.add_(torch.special.erfc(inverse * (k - 0.5)), alpha=2 * k - 1)
    return torch.where(is_wide, wide, series)


def _gain(x: Tensor) -> Tensor:
    """Return a = E[qδ]/E[δ²] for the same q and δ; for x ≥ 1 it is 1 to 1e-6."""
    small = x.clamp(1e-30, 1.0)
    series = torch.zeros_like(x)
    for k in range(1, _TERMS + 1):
        series += torch.exp(-((k - 0.5) / small).square() / 2)
    return torch.where(x >= 1, 1.0, series * 2 / (small * math.sqrt(2 * math.pi)))


def _exponents(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the biased exponents of values stored in a dtype, int64; 0 for subnormal values."""
    limits = torch.finfo(dtype)
    mantissa = round(-math.log2(limits.eps))
    bits = values.to(dtype).contiguous().view(_INTEGERS[dtype]).long() >> mantissa
    exponents: Tensor = bits & (2 ** (limits.bits - 1 - mantissa) - 1)
    return exponents


def _solve(weights: NDArray[np.float64], t: float) -> tuple[float, float]:
    """Return the x in (0, 1) with Σ w x/(1 − w x) = t, for weights whose largest is 1.

    The sum is increasing and convex in x, so Newton steps from above never pass the solution.

    Returns:
        x, and its derivative d log x / d log t.
    """
    # The sum is at least its largest term, x/(1 − x), and at least Σ w x.
    x = min(t / (1 + t), t / float(np.add.reduce(weights)))
    while True:
        part = weights / (1 - weights * x)
        total = float(np.add.reduce(part))
        growth = total + x * float(part @ part)  # the derivative of the sum, x total, by x
        step = (x * total - t) / growth
        if not step > 1e-12 * x:  # also ends at a NaN
            return x, t / (x * growth)
        x -= step


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function is zero that is below zero at ``low`` and above it at ``high``.

    By the Illinois method of false position. It ends where the function is within 1e-6 of zero, or
    the zero is known within 1e-4.
    """
    at_low, at_high = function(low), function(high)
    side = 0
    while high - low > 1e-4:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at_middle = function(middle)
        if abs(at_middle) < 1e-6:
            return middle
        if at_middle < 0:
            low, at_low = middle, at_middle
            if side < 0:
                at_high /= 2
            side = -1
        else:
            high, at_high = middle, at_middle
            if side > 0:
                at_low /= 2
            side = 1
    return (low + high) / 2


def _threshold(aspect: float) -> float:
    """Return λ*(β)/(1 + √β), the optimal hard threshold relative to the edge, for β ≤ 1."""
    root = math.sqrt(aspect**2 + 14 * aspect + 1)
    return math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + root)) / (1 + math.sqrt(aspect))
