"""Two-sided shares: each task speaks where both the inputs and the outputs are its own."""

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

    C_t = τ_tᵀτ_t/‖τ_t‖² says how strongly task t uses each input direction of a tensor, and
    P_t = τ_tτ_tᵀ/‖τ_t‖² each output direction. With S_C = Σ_t w_t C_t + ρ c I, c being the mean
    eigenvalue of Σ_t w_t C_t, the task's share of the inputs is R_t = w_t C_t S_C⁻¹, and that of
    the outputs is L_t = w_t S_P⁻¹ P_t. Over the tasks both sum to almost I. The update is

        M = f · Σ_t L_tᵖ τ_t R_tᵖ,  ½ ≤ p ≤ 1,

    where R_tᵖ = W⁻¹ (W w_t C_t W)ᵖ W with W = S_C^(-½), and L_tᵖ likewise. A direction that one
    task alone uses stays whole, and one that all tasks use alike is averaged. A tensor that a
    single task changes stays that task's. The weights w_t decide how directions that several tasks
    use are divided; a common factor of them cancels.

    The factor f is the geometric mean of f_1 = Σ_t w_t‖τ_t‖²/Σ_t w_t⟨M, τ_t⟩, with which the tasks
    find all of themselves in M, and of f_2, which minimises Σ_t w_t e_t ‖(f_2 M − τ_t) C_t^½‖²: on
    the inputs of the tasks, M comes nearest to them. The sums go over all matrices of the model,
    e_t is the task's part of the ‖τ_t‖² of all tasks in a matrix, and M is the update without f.
    Both factors are 1 for tasks that are equal or share no direction; the more the tasks disagree,
    the smaller is f_2. A task vector much smaller than the others changes neither. f is T at most,
    for T tasks, and 1 where tasks oppose each other so much that f_1 or f_2 is not positive. With a
    number as ``response``, f is that of ``own_response`` with this c. With a metric, all but that
    is measured in whitened inputs.

    Source: our own; docs/results.md has the evidence. ``covariance`` uses one of the two sides, and
    ``tsv_m`` makes the directions of the tasks orthogonal but divides none of them.
    Cost: an SVD a task, of r_t triplets, for adapters from their factors, and two
    eigendecompositions a tensor, in Core Space for adapters; all of it twice, as the factor is
    found first.
    When to use: adapters of any origin and number. Full fine-tunes: ``denoise+shares``.
    """

    power: Annotated[
        float, Field(ge=0.5, le=1, description="p, the power of the shares, from 0.5 to 1")
    ] = 0.5
    ridge: Annotated[
        float, Field(ge=0, description="ρ, as a share of the mean eigenvalue; 0: pseudo-inverse")
    ] = 0.1
    response: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="mean own response of the tasks; auto: by how much they disagree"),
    ] = "auto"

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Refuse negative weights; see :meth:`Method.check`."""
        refuse_negative(self, weights, "a share of a direction is none")

    @property
    def passes(self) -> int:
        """See :attr:`Method.passes`."""
        return 1

    def survey(self, walk: Walk) -> Response:
        """Find the factor; see :meth:`Merge.survey`."""

        def look_at(deltas: Deltas, tensor: TensorContext) -> tuple[OwnProducts, Tensor]:
            held = dict(deltas.items())
            nothing = OwnProducts.of(_NOTHING, (), tensor), torch.zeros(4, dtype=torch.float64)

            def look(space: CoreSpace, tau: dict[int, Coordinates]) -> tuple[OwnProducts, Tensor]:
                if not tau:
                    return nothing
                weights = [tensor.weights[t] for t in tau]
                svds = _svds(tau.values(), space)
                M = self._merged(list(tau.values()), weights, svds)
                own = [(t, held[t].scaled(1 / tensor.weights[t])) for t in tau]
                return OwnProducts.of(space.delta(M), own, tensor), _sums(M, weights, svds)

            if is_averaged(list(held.values()), tensor, embeddings=self.embeddings):
                return nothing
            return self.in_space(held, tensor, look)

        found = list(walk(look_at))
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
        held = Deltas.of(dict(deltas.items()))  # read, and transformed, once
        merged = super().merge(held, tensor, None)
        averaged = is_averaged(list(held), tensor, embeddings=self.embeddings)
        return merged if averaged else merged.scaled(survey.factor)

    def memory(self, tensor: TensorShape) -> int:
        """Tell the bytes needed, to find the factor too; see :meth:`Method.memory`."""
        merging = super().memory(tensor)
        if will_average(tensor, embeddings=self.embeddings):
            return merging
        # The task vectors without their weights, and their products with the merge.
        result = self.result(tensor)
        products = max(inner_bytes(tensor, [result, delta]) for delta in tensor.deltas)
        return merging + tensor.held + products

    def matrix_memory(self, space: CoreShape) -> int:
        """Tell the bytes needed; see :meth:`CoreSpaceMerge.matrix_memory`."""
        # The SVD of each task, while the last is made, or beside the eigenvectors of both sides: at
        # the second eigendecomposition, LAPACK's and a copy; or while the triplets of a block are
        # weighed on both sides, and added up to the merge, which is then brought back.
        p, q, r = space.p, space.q, max(space.ranks)
        bases = 8 * (p * p + q * q)
        eigen = 8 * 4 * max(p, q) ** 2
        columns = min(sum(space.ranks), _COLUMNS + r)
        block = 8 * 4 * columns * (p + q) + svd_bytes(r, max(p, q))
        return space.svds + max(space.svd_making, bases + max(eigen, block) + 2 * space.size)

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
        """Return M, of w_t · τ_t and their SVDs."""
        if len(tau) == 1:
            return tau[0].matrix / weights[0]
        # √w_t σ_k/‖τ_t‖, the roots of the eigenvalues of w_t C_t and of w_t P_t.
        roots = [w**0.5 * svd.S / svd.S.norm() for w, svd in zip(weights, svds, strict=True)]
        rows = self._eigenbasis([svd.V for svd in svds], roots)
        columns = self._eigenbasis([svd.U for svd in svds], roots)
        merged = roots[0].new_zeros(columns.Q.shape[1], rows.Q.shape[1])
        for block in _blocks(roots):
            right = self._weigh([svd.V for svd in svds[block]], roots[block], rows)
            left = self._weigh([svd.U for svd in svds[block]], roots[block], columns)
            triples = zip(weights[block], svds[block], roots[block], strict=True)
            # L_tᵖ τ_t R_tᵖ, of which U_t and V_t have cancelled.
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
        # Directions that no task has have no share, also when there is no ridge.
        known = values > 1e-12 * values.max()
        return _Eigenbasis(Q[:, known], (values[known] + ridge).rsqrt())

    def _weigh(self, vectors: list[Tensor], roots: list[Tensor], basis: _Eigenbasis) -> Tensor:
        """Return (X Xᵀ)^(p−1) X W of each task, in the eigenbasis, (Σr_t, k) one below the other.

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
            for X_t in torch.split(X, [len(root) for root in roots]):  # views, to write to
                P, s, Qh = torch.linalg.svd(X_t, full_matrices=False)
                torch.mm(P * s ** (2 * self.power - 1), Qh, out=X_t)
        X *= basis.W
        return X


@dataclass(frozen=True, eq=False)
class _Eigenbasis:
    """The eigenvectors of S that tasks have, for one side of a tensor."""

    Q: Tensor
    """(q, k) float64, orthonormal columns."""
    W: Tensor
    """(k,) float64, the diagonal of S^(-½) in this basis."""


_COLUMNS = 512
"""Triplets of several tasks are multiplied together until they are so many."""


def _blocks(values: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of tasks of :data:`_COLUMNS` triplets, or by some of the last task more.

    Args:
        values: One for each triplet, (r_t,) of each task.
    """
    start = columns = 0
    for end, own in enumerate(values, 1):
        columns += len(own)
        if columns >= _COLUMNS or end == len(values):
            yield slice(start, end)
            start, columns = end, 0


def _scaled(vectors: list[Tensor], factors: list[Tensor]) -> Tensor:
    """Return singular vectors (q, r_t) side by side, each with its factor, (q, Σr_t)."""
    return torch.cat(vectors, dim=1) * torch.cat(factors)


def _svds(tau: Iterable[Coordinates], space: CoreSpace) -> list[SVD]:
    return [C.svd(space.noise * C.norm) for C in tau]


def _sums(M: Tensor, weights: Sequence[float], svds: Sequence[SVD]) -> Tensor:
    """Return what one tensor adds to the sums of f_1 and f_2, (4,) float64 on the CPU.

    Σ w_t‖τ_t‖², Σ w_t⟨M, τ_t⟩, Σ w_t e_t tr(M C_t τ_tᵀ) and Σ w_t e_t tr(M C_t Mᵀ).

    Args:
        M: The merge, without f.
        weights: w_t.
        svds: Of w_t · τ_t.
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
    """Return f = √(f_1 f_2) of :func:`_sums` over all tensors, for so many tasks."""
    energy, agreement, agreeing, of_merged = sums.tolist()
    if min(agreement, agreeing) <= 0:  # tasks oppose each other, or none changes a matrix
        return 1.0
    return min(float(tasks), math.sqrt(energy / agreement * agreeing / of_merged))


_NOTHING = LowRank(torch.zeros(1, 0), torch.zeros(0, 1))
"""Stands for the merge of a tensor that has no task vectors to respond."""
