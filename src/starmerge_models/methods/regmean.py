"""RegMean: regression mean, computed from the moments of inputs on each task's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, Dense, LowRank, total
from starmerge_models.errors import UsageError
from starmerge_models.methods.kinds.spectral import is_averaged, will_average
from starmerge_models.methods.memory import TensorShape, total_bytes
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method, refuse_negative
from starmerge_models.spectral import on_best_device
from starmerge_models.spectral.moment import Moment, Side


@method("regmean")
class RegMean(Merge):
    """Fit the outputs of every task on its own inputs, by least squares.

    M minimises Σ_t w_t E‖(M − τ_t) x_t‖² over the inputs x_t of each task's prompts:

        M = (Σ_t w_t τ_t Σ_t')(Σ_t w_t Σ_t')⁻¹,

    where Σ_t' is E[x_t x_tᵀ], divided by its trace, its off-diagonal entries multiplied by
    ``off_diagonal``, with ``ridge`` times its mean eigenvalue added to the diagonal. All T tasks
    count: a task that does not change a tensor has τ_t = 0, so the fit penalises any change of the
    outputs on its inputs.

    The method needs a metric with prompts of every task (``starmerge calibrate --prompts``) under
    the names of the models; labels are not needed. Vectors, kernels, and embeddings of full
    fine-tunes unless ``embeddings`` is "merge", are averaged.

    Source: arXiv 2212.09849, section 3; defining repository github.com/bloomberg/
    dataless-model-merging. Differences: the inputs are those of the base on the task's prompts, not
    of each fine-tune on its training data; each Σ_t is divided by its trace, so that tasks with
    large inputs do not count more; and the ridge makes M unique in directions that no prompt has.
    Cost: for prompts of k tokens together and inputs of n entries, O(n k²) per tensor for k < n,
    else O(n³); an adapter's update stays low-rank. The moments of all tasks are held in memory.
    When to use: whenever a handful of prompts of each task is available. With a metric computed
    along the merge (``starmerge calibrate BASE MODELS``) this is RegMean++ (arXiv 2508.03121),
    which takes a layer's inputs from the model merged up to that layer, and keeps more.
    """

    off_diagonal: Annotated[
        float, Field(ge=0, le=1, description="factor of the moments' off-diagonal entries")
    ] = 0.9
    ridge: Annotated[
        float, Field(gt=0, description="ridge of each moment, as a share of its mean eigenvalue")
    ] = 1e-6
    embeddings: Annotated[
        Literal["average", "merge"],
        Field(description="how embeddings of full fine-tunes are merged: averaged, or as matrices"),
    ] = "average"

    averages = True
    needs_moments = True

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        refuse_negative(self, weights, "the method minimises a weighted sum of squares")

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Refuse a merge without moments; see :meth:`Method.check_tensors`."""
        if all(tensor.inputs is None for tensor in merged):
            raise UsageError(
                "regmean: it needs the moments of each task's inputs, and the merge has none. Make "
                "a metric with prompts of every task (starmerge calibrate BASE -o FILE --prompts "
                "NAME=ROWS …) and merge with it (--metric FILE)."
            )

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        if tensor.inputs is None or will_average(tensor, embeddings=self.embeddings):
            return tensor.deltas_nbytes + total_bytes(tensor)
        n, rows = tensor.inputs.size, tensor.inputs.own
        k = sum(rows)
        # Each root in float32 and float64, and for one root a copy with the ridge. The solver holds
        # the concatenated roots, C, its copy and P; or three squares if there are more rows than
        # columns.
        roots = 12 * k * n + 16 * max(rows) * n
        solving = 8 * (3 * k * n + 3 * k * k) if k < n else 8 * (3 * n * n + max(rows) * n)
        # Right-hand sides: a matrix, its product with a moment, their sum, and the solution.
        right = 40 * tensor.size + tensor.difference_nbytes if tensor.has_dense else 0
        return (
            tensor.deltas_nbytes + roots + solving + right + 6 * tensor.factors(tensor.total_rank)
        )

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held, inputs = dict(deltas.items()), tensor.inputs
        averaged = is_averaged(list(held.values()), tensor, embeddings=self.embeddings)
        if inputs is None or averaged:
            return total(held.values()).scaled(1 / tensor.total_weight)
        moments = [inputs.read(task) for task in range(len(tensor.tasks))]

        def merge_on(device: torch.device) -> Delta:
            softened = [self._soften(moment, device) for moment in moments]
            return _merged(held, softened, tensor.weights, inputs.side)

        n, k = moments[0].size, sum(len(moment.root) for moment in moments)
        return on_best_device(list(held.values()), merge_on, beside=8 * n * (4 * k + 3 * n))

    def _soften(self, moment: Moment, device: torch.device) -> _Softened:
        R = moment.root.to(device).double()
        n, diagonal = moment.size, R.square().sum(0)
        trace = float(diagonal.sum())
        if trace == 0:  # all inputs are zero: use the identity
            return _Softened(R, torch.full_like(diagonal, 1 / n))
        a = self.off_diagonal
        return _Softened(R * (a / trace) ** 0.5, diagonal * ((1 - a) / trace) + self.ridge / n)


@dataclass(frozen=True, eq=False)
class _Softened:
    """Σ' = RᵀR + diag(d)."""

    R: Tensor
    """(k, n) float64."""
    d: Tensor
    """(n,) float64, positive."""

    def times(self, X: Tensor) -> Tensor:
        """Return Σ' X for X (n, r)."""
        return (self.R.T @ (self.R @ X)).addcmul_(self.d[:, None], X)


def _merged(
    deltas: Mapping[int, Delta],
    moments: Sequence[_Softened],
    weights: Sequence[float],
    side: Side,
) -> Delta:
    """Return M in float32 on the device of the deltas, which are multiplied by their weights."""
    home, device = next(iter(deltas.values())).device, moments[0].d.device
    # Transpose if necessary, so that the inputs are on the rows: Σ_t' τ_tᵀ is N_t Y_tᵀ for an
    # adapter, N_t for a dense delta.
    factors: list[tuple[Tensor, Tensor]] = []
    dense: Tensor | None = None
    for t, delta in deltas.items():
        if isinstance(delta, LowRank):
            B, A = delta.B.to(device).double(), delta.A.to(device).double()
            X, Y = (A.T, B) if side == "columns" else (B, A.T)
            factors.append((moments[t].times(delta.scale * X), Y))
        else:
            matrix = delta.matrix.to(device).double()
            N = moments[t].times(matrix.T if side == "columns" else matrix)
            dense = N if dense is None else dense.add_(N)
    if dense is not None:
        for N, Y in factors:
            dense.addmm_(N, Y.T)
        dense = _solve(moments, weights, dense).float().to(home)
        return Dense(dense.T if side == "columns" else dense)
    X = _solve(moments, weights, torch.cat([N for N, _ in factors], dim=1)).float().to(home)
    Y = torch.cat([Y for _, Y in factors], dim=1).float().to(home)
    return LowRank(Y, X.T) if side == "columns" else LowRank(X, Y.T)


def _solve(moments: Sequence[_Softened], weights: Sequence[float], X: Tensor) -> Tensor:
    """Return G⁻¹ X for G = Σ_t w_t Σ_t', with X (n, r).

    G = KᵀK + diag(g), where K (k, n) has the rows of all √w_t R_t. With D = diag(g)^(-½),
    G⁻¹ = D (I + DKᵀKD)⁻¹ D. For k < n the inverse is I − PᵀP with P = C⁻¹KD and C Cᵀ = I + KD²Kᵀ
    (Woodbury), else it is computed by a Cholesky decomposition.
    """
    weighted = list(zip(weights, moments, strict=True))
    D = torch.stack([w * moment.d for w, moment in weighted]).sum(0).rsqrt()
    X = D[:, None] * X
    k, n = sum(len(moment.R) for moment in moments), len(D)
    rows = (moment.R * (w**0.5 * D) for w, moment in weighted)
    if k < n:
        KD = torch.cat(list(rows))
        C = torch.linalg.cholesky(_identity(k, D) + KD @ KD.T)
        P = torch.linalg.solve_triangular(C, KD, upper=False)
        return X.sub_(P.T @ (P @ X)).mul_(D[:, None])
    inner = _identity(n, D)
    for block in rows:
        inner.addmm_(block.T, block)
    C = torch.linalg.cholesky(inner)
    X = torch.linalg.solve_triangular(C, X, upper=False)
    X = torch.linalg.solve_triangular(C.T, X, upper=True)
    return X.mul_(D[:, None])


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
