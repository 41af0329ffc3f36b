"""Two-sided shares: each task counts by its share of the input and output directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from starmerge_models.deltas import Delta, LowRank
from starmerge_models.methods.kinds.spectral import CoreSpaceMerge, is_averaged, will_average
from starmerge_models.methods.memory import TensorShape, inner_bytes
from starmerge_models.methods.method import Deltas, TensorContext, Walk, method, refuse_negative
from starmerge_models.methods.own_response import OwnProducts, Response, total_products
from starmerge_models.spectral import SVD, CoreSpace
from starmerge_models.spectral.coordinates import Coordinates
from starmerge_models.spectral.core_space import CoreShape
from starmerge_models.spectral.dense import svd_bytes


@method("shares")
class Shares(CoreSpaceMerge):
    """Give each task its share of every input direction and of every output direction.

    C_t = τ_tᵀτ_t/‖τ_t‖² measures how strongly task t uses each input direction of a tensor, and
    P_t = τ_tτ_tᵀ/‖τ_t‖² each output direction. With S_C = Σ_t w_t C_t + ρ c I, c being the mean
    eigenvalue of Σ_t w_t C_t, the task's share of the inputs is R_t = w_t C_t S_C⁻¹, and that of
    the outputs is L_t = w_t S_P⁻¹ P_t. Over the tasks both sum to almost I. The update is

        M = f · Σ_t L_tᵖ τ_t R_tᵖ,  ½ ≤ p ≤ 1,

    where R_tᵖ = W⁻¹ (W w_t C_t W)ᵖ W with W = S_C^(-½), and L_tᵖ likewise. A direction that a
    single task uses is kept unchanged, and a direction that all tasks use equally is averaged. A
    tensor that a single task changes gets that task's update. The weights w_t decide how directions
    that several tasks use are divided; a common factor of all weights cancels.

    The factor f is the geometric mean of f_1 and f_2. With
    f_1 = Σ_t w_t‖τ_t‖²/Σ_t w_t⟨M, τ_t⟩ the mean response of the tasks to the merge is 1. f_2
    minimises Σ_t w_t e_t ‖(f_2 M − τ_t) C_t^½‖², the error of the merge on the tasks' inputs. The
    sums go over all matrices of the model, e_t is the task's part of the ‖τ_t‖² of all tasks in a
    matrix, and M is the update without f. Both factors are 1 for tasks that are equal or share no
    direction; the more the tasks disagree, the smaller is f_2. A task vector much smaller than the
    others changes neither. f is at most T, for T tasks, and 1 where tasks oppose each other so much
    that f_1 or f_2 is not positive. With a number as ``response``, f is that of ``own_response``
    with this c. With a metric, everything except that ``response`` is measured in whitened inputs.

    Source: our own; docs/results.md has the evidence. ``covariance`` uses one of the two sides, and
    ``tsv_m`` makes the directions of the tasks orthogonal but divides none of them.
    Cost: one SVD per task, of r_t triplets, from the factors for adapters, and two
    eigendecompositions per tensor, in Core Space for adapters; all of it twice, because the factor
    is computed first.
    When to use: adapters of any origin and number. For full fine-tunes: ``denoise+shares``.
    """

    power: Annotated[
        float, Field(ge=0.5, le=1, description="p, the power of the shares, from 0.5 to 1")
    ] = 0.5
    ridge: Annotated[
        float,
        Field(ge=0, description="ρ, as a share of the mean eigenvalue; 0 takes the pseudo-inverse"),
    ] = 0.1
    response: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="mean own response of the tasks; auto computes f from the task vectors"),
    ] = "auto"

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        refuse_negative(self, weights, "a share of a direction is none")

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1

    def survey(self, walk: Walk) -> Response:
        """Compute the factor f; see :meth:`Merge.survey`."""

        def visit(deltas: Deltas, tensor: TensorContext) -> tuple[OwnProducts, Tensor]:
            held = dict(deltas.items())
            zero = OwnProducts.of(_ZERO, (), tensor), torch.zeros(4, dtype=torch.float64)

            def measure(
                space: CoreSpace, tau: dict[int, Coordinates]
            ) -> tuple[OwnProducts, Tensor]:
                if not tau:
                    return zero
                weights = [tensor.weights[t] for t in tau]
                svds = _svds(tau.values(), space)
                M = self._merged(list(tau.values()), weights, svds)
                own = [(t, held[t].scaled(1 / tensor.weights[t])) for t in tau]
                return OwnProducts.of(space.delta(M), own, tensor), _sums(M, weights, svds)

            if is_averaged(list(held.values()), tensor, embeddings=self.embeddings):
                return zero
            return self.in_space(held, tensor, measure)

        found = list(walk(visit))
        own = total_products(products for products, _ in found)
        if self.response == "auto":
            factor = _factor(torch.stack([sums for _, sums in found]).sum(0), int(own.counts.sum()))
        elif own.counts.any():
            factor = own.factor_to(self.response, self.name, "Leave response out")
        else:  # no matrix is changed
            factor = 1.0
        return Response(own.responses, factor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Response) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        held = Deltas.of(dict(deltas.items()))  # load and transform each delta once
        merged = super().merge(held, tensor, None)
        averaged = is_averaged(list(held), tensor, embeddings=self.embeddings)
        return merged if averaged else merged.scaled(survey.factor)

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes, survey included; see :meth:`Method.memory`."""
        merging = super().memory(tensor)
        if will_average(tensor, embeddings=self.embeddings):
            return merging
        # The task vectors without their weights, and their products with the merge.
        result = self.result(tensor)
        products = max(inner_bytes(tensor, [result, delta]) for delta in tensor.deltas)
        return merging + tensor.deltas_nbytes + products

    def matrix_memory(self, space: CoreShape) -> int:
        """Return the peak memory in bytes; see :meth:`CoreSpaceMerge.matrix_memory`."""
        # The peak is one of three moments. All SVDs are in memory in each: while the last SVD is
        # computed; at the second eigendecomposition, with LAPACK's work space and a copy; while
        # the triplets of a block are weighted on both sides and added to the merge, which is then
        # transformed back.
        p, q, r = space.p, space.q, max(space.ranks)
        bases = 8 * (p * p + q * q)
        eigen = 8 * 4 * max(p, q) ** 2
        columns = min(sum(space.ranks), _COLUMNS + r)
        block = 8 * 4 * columns * (p + q) + svd_bytes(r, max(p, q))
        return space.svds + max(space.svd_peak_bytes, bases + max(eigen, block) + 2 * space.size)

    def merge_coordinates(
        self,
        tau: list[Coordinates],
        weights: list[float],
        space: CoreSpace,
        tensor: TensorContext,
    ) -> Tensor:
        """Merge one tensor; see :meth:`CoreSpaceMerge.merge_coordinates`."""
        return self._merged(tau, weights, _svds(tau, space))

    def _merged(self, tau: list[Coordinates], weights: list[float], svds: list[SVD]) -> Tensor:
        """Return M, given w_t · τ_t and their SVDs."""
        if len(tau) == 1:
            return tau[0].matrix / weights[0]
        # √w_t σ_k/‖τ_t‖, the roots of the eigenvalues of w_t C_t and of w_t P_t.
        roots = [w**0.5 * svd.S / svd.S.norm() for w, svd in zip(weights, svds, strict=True)]
        rows = self._eigenbasis([svd.V for svd in svds], roots)
        columns = self._eigenbasis([svd.U for svd in svds], roots)
        merged = roots[0].new_zeros(columns.Q.shape[1], rows.Q.shape[1])
        for block in _blocks(roots):
            right = self._weighted_vectors([svd.V for svd in svds[block]], roots[block], rows)
            left = self._weighted_vectors([svd.U for svd in svds[block]], roots[block], columns)
            triples = zip(weights[block], svds[block], roots[block], strict=True)
            # The middle factor of L_tᵖ τ_t R_tᵖ, after U_t and V_t have cancelled.
            inner = torch.cat([root * svd.S / w * root for w, svd, root in triples])
            merged.addmm_(left.T * inner, right)
        brought_back: Tensor = columns.Q @ merged @ rows.Q.T
        return brought_back

    def _eigenbasis(self, vectors: list[Tensor], roots: list[Tensor]) -> _Eigenbasis:
        """Return the eigenbasis of S = Σ_t w_t C_t + ρ c I, for one side of the tensor.

        Args:
            vectors: V_t (q, r_t) of each task, or U_t for the output side.
            roots: The roots of the eigenvalues of w_t C_t (r_t,) of each task.
        """
        size, count = len(vectors[0]), sum(map(len, roots))
        summed = vectors[0].new_zeros(size, size)
        for block in _blocks(roots):
            factor = _scaled(vectors[block], roots[block])
            summed.addmm_(factor, factor.T)
        values, Q = torch.linalg.eigh(summed)
        ridge = self.ridge * float(values.sum()) / min(count, size)
        # Drop directions that no task uses, also without a ridge.
        known = values > 1e-12 * values.max()
        return _Eigenbasis(Q[:, known], (values[known] + ridge).rsqrt())

    def _weighted_vectors(
        self, vectors: list[Tensor], roots: list[Tensor], basis: _Eigenbasis
    ) -> Tensor:
        """Return (X Xᵀ)^(p−1) X W of each task in the eigenbasis, stacked to (Σr_t, k).

        With X = D V_tᵀ W, where D² holds the nonzero eigenvalues of w_t C_t and V_t their vectors,
        R_tᵖ = W⁻¹ Xᵀ (X Xᵀ)^(p−1) X W: a root of r_t × r_t in place of one of q × q.

        Args:
            vectors: V_t (q, r_t) of each task, or U_t for the output side.
            roots: The diagonal of D (r_t,) of each task.
            basis: That of the side, in which W is diagonal.
        """
        X = _scaled(vectors, roots).T @ basis.Q
        X *= basis.W
        if self.power != 1:
            for X_t in torch.split(X, [len(root) for root in roots]):  # views, written in place
                P, s, Qh = torch.linalg.svd(X_t, full_matrices=False)
                torch.mm(P * s ** (2 * self.power - 1), Qh, out=X_t)
        X *= basis.W
        return X


@dataclass(frozen=True, eq=False)
class _Eigenbasis:
    """The eigenvectors of S with nonzero eigenvalues, for one side of a tensor."""

    Q: Tensor
    """(q, k) float64, orthonormal columns."""
    W: Tensor
    """(k,) float64, the diagonal of S^(-½) in this basis."""


_COLUMNS = 512
"""Number of triplets from which a block of tasks is multiplied in one product."""


def _blocks(values: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of tasks that together have :data:`_COLUMNS` triplets or slightly more.

    Args:
        values: (r_t,) of each task.
    """
    start = columns = 0
    for end, own in enumerate(values, 1):
        columns += len(own)
        if columns >= _COLUMNS or end == len(values):
            yield slice(start, end)
            start, columns = end, 0


def _scaled(vectors: list[Tensor], factors: list[Tensor]) -> Tensor:
    """Return singular vectors (q, r_t) times their factors, concatenated to (q, Σr_t)."""
    return torch.cat(vectors, dim=1) * torch.cat(factors)


def _svds(tau: Iterable[Coordinates], space: CoreSpace) -> list[SVD]:
    return [C.svd(space.noise * C.norm) for C in tau]


def _sums(M: Tensor, weights: Sequence[float], svds: Sequence[SVD]) -> Tensor:
    """Return one tensor's terms of the sums in f_1 and f_2, (4,) float64 on the CPU.

    They are Σ w_t‖τ_t‖², Σ w_t⟨M, τ_t⟩, Σ w_t e_t tr(M C_t τ_tᵀ) and Σ w_t e_t tr(M C_t Mᵀ).

    Args:
        M: The merge, without f.
        weights: w_t.
        svds: The SVDs of w_t · τ_t.
    """
    energies = [float((svd.S / w).square().sum()) for w, svd in zip(weights, svds, strict=True)]
    sums = M.new_zeros(4)
    for block in _blocks([svd.S for svd in svds]):
        own = svds[block]
        pairs = zip(weights[block], own, strict=True)
        w = torch.cat([torch.full_like(svd.S, w_t) for w_t, svd in pairs])
        S = torch.cat([svd.S for svd in own])
        MV = M @ torch.cat([svd.V for svd in own], dim=1)
        products = S * (torch.cat([svd.U for svd in own], dim=1) * MV).sum(0)  # w σ_k u_kᵀ M v_k
        squares = (S / w).square()
        share = squares / sum(energies)  # e_t times the eigenvalues of C_t
        of_merged = w * share * MV.square().sum(0)
        terms = torch.stack([w * squares, products, share * products, of_merged])
        sums += terms.sum(1)
    return sums.cpu()


def _factor(sums: Tensor, tasks: int) -> float:
    """Return f = √(f_1 f_2) from the totals of :func:`_sums` over all tensors."""
    energy, agreement, agreeing, of_merged = sums.tolist()
    if min(agreement, agreeing) <= 0:  # tasks oppose each other, or none changes a matrix
        return 1.0
    return min(float(tasks), math.sqrt(energy / agreement * agreeing / of_merged))


_ZERO = LowRank(torch.zeros(1, 0), torch.zeros(0, 1))
"""A zero merge, used for tensors without task vectors in Core Space."""
