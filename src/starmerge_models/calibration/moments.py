"""Second moments of the inputs of a model's linear modules, summed during forward passes.

Forward pre-hooks see the inputs of the modules. Modules with the same input tensor (queries, keys
and values; the two halves of a gated MLP) share a sum: a short pass over a few tokens finds these
groups. Every later pass checks them; the modules of a wrong group are summed again, separately.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from starmerge_models.calibration.modules import Linear
from starmerge_models.calibration.text import READ_BATCH_TOKENS, Advance, Reading, batches
from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.models.forward import arguments_of, last_logits
from starmerge_models.spectral import lapack
from starmerge_models.spectral.cholesky import pivoted_root
from starmerge_models.spectral.moment import Side


@dataclass(frozen=True)
class Group:
    """Modules with the same input tensors, on the same side of their matrices."""

    members: tuple[Linear, ...]

    @property
    def tensors(self) -> list[str]:
        """Names of the modules' matrices in the base's files."""
        return [member.tensor for member in self.members]

    @property
    def side(self) -> Side:
        """The side of the matrices that multiplies the input."""
        return self.members[0].side

    @property
    def size(self) -> int:
        """n, the length of an input."""
        return self.members[0].size

    def sum_bytes(self, tokens: int) -> int:
        """Return the final memory of the sum over a number of inputs, in bytes."""
        return 4 * tokens * self.size if tokens < self.size else 8 * self.size**2

    def root_bytes(self, tokens: int) -> int:
        """Return the largest size of the root, in bytes."""
        return 4 * min(tokens, self.size) * self.size


class Sum:
    """The sum Σ x xᵀ over inputs, or the inputs themselves while there are fewer than n.

    Args:
        size: n, the length of an input.
    """

    def __init__(self, size: int) -> None:
        self.tokens = 0
        """Number of inputs so far."""
        self._size = size
        self._kept: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add some inputs (…, n), of any floating dtype, on any device."""
        rows = inputs.reshape(-1, self._size)
        self.tokens += len(rows)
        if self._gram is None and self.tokens < self._size:
            self._kept.append(rows.to(torch.float32, copy=True))
            return
        if self._gram is None:
            shape = (self._size, self._size)
            self._gram = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        for part in (*self._kept, rows):
            _add_products(self._gram, part.double())
        self._kept.clear()

    def root(self) -> Tensor:
        """Return R (k, n) float32 on the CPU with RᵀR = Σ x xᵀ / tokens; this destroys the sum.

        With fewer than n inputs, R's rows are the scaled inputs; otherwise k is the numerical rank.
        """
        if self._gram is None:
            inputs = torch.cat(self._kept).cpu()
            self._kept.clear()
            return inputs / math.sqrt(self.tokens)
        mean = self._gram.div_(self.tokens).cpu()
        self._gram = None
        return pivoted_root(mean).float()


def _add_products(gram: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ over rows (tokens, n), float64, to the upper triangle of a matrix (n, n)."""
    if gram.device.type == "cpu":
        n, rows = len(gram), rows.contiguous()
        # The row-major upper triangle is Fortran's column-major lower triangle.
        lapack.call("dsyrk", "L", "N", n, len(rows), 1.0, rows, n, 1.0, gram, n)
    else:
        gram.addmm_(rows.T, rows)


@dataclass
class _ModuleInputs:
    """The inputs of a module so far."""

    calls: list[int] = field(default_factory=list)
    """The id of the input tensor of each call; ids are in the order of first occurrence."""
    tokens: int = 0


class _InputObserver:
    """Forward pre-hooks that observe modules' inputs, as a context manager.

    Args:
        linears: The modules.
        observe: Called with a module and an input.
    """

    def __init__(
        self, linears: Sequence[Linear], observe: Callable[[Linear, Tensor], None]
    ) -> None:
        self.seen = {linear.tensor: _ModuleInputs() for linear in linears}
        self._linears, self._observe = linears, observe
        self._numbers: dict[tuple[int, int], tuple[int, weakref.ref[Tensor]]] = {}
        self._count = 0

    def __enter__(self) -> _InputObserver:
        self._hooks = [
            linear.module.register_forward_pre_hook(self._hook(linear), with_kwargs=True)
            for linear in self._linears
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, linear: Linear) -> Callable[..., None]:
        def look(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            inputs: Tensor = next(iter((*arguments, *named.values())))
            seen = self.seen[linear.tensor]
            seen.calls.append(self._number(linear, inputs))
            seen.tokens += inputs.numel() // linear.size
            self._observe(linear, inputs)

        return look

    def _number(self, linear: Linear, inputs: Tensor) -> int:
        """Return a tensor's id: the same as before only for the same, unmodified tensor."""
        key = id(inputs), inputs._version
        number, known = self._numbers.get(key, (0, None))
        if known is None or known() is not inputs:
            if not inputs.isfinite().all():
                raise StarmergeError(
                    f"The input of {linear.tensor.removesuffix('.weight')} has a NaN or an "
                    "infinity. The base's weights are broken, or too large for their dtype: "
                    "check them, or try --dtype float32."
                )
            self._count = number = self._count + 1
            self._numbers[key] = number, weakref.ref(inputs)
        return number

    def forget(self) -> None:
        """Treat all further inputs as new tensors."""
        self._numbers.clear()


def find_groups(model: Any, linears: Sequence[Linear], probe: Reading) -> tuple[list[Group], int]:
    """Find the modules with the same input tensors, by running the model on a few tokens.

    Args:
        model: The model.
        linears: Its modules.
        probe: The tokens.

    Returns:
        The groups in the order of the modules, with unreached modules in groups of one; and the
        largest number of inputs of a module for each token.

    Raises:
        StarmergeError: An input is not finite.
    """
    with _InputObserver(linears, lambda *_: None) as watch:
        _read(model, [probe], all_logits=True)
    longest = max(len(probe.ids), len(probe.decoder))
    most = max((seen.tokens for seen in watch.seen.values()), default=0)
    return _grouped(linears, watch), max(1, -(-most // longest))


def _grouped(linears: Sequence[Linear], watch: _InputObserver) -> list[Group]:
    together: dict[object, list[Linear]] = defaultdict(list)
    for linear in linears:
        calls = tuple(watch.seen[linear.tensor].calls)
        together[(calls, linear.side) if calls else linear.tensor].append(linear)
    return [Group(tuple(members)) for members in together.values()]


def collect(
    model: Any,
    groups: Sequence[Group],
    readings: Sequence[Reading],
    advance: Advance,
    until: nn.Module | None = None,
) -> tuple[list[tuple[Group, Sum]], list[Group]]:
    """Run the model, and sum the inputs of modules.

    Args:
        model: The model.
        groups: The modules; each group has one sum.
        readings: The sequences to run the model on.
        advance: Called with the number of tokens that were just processed.
        until: The submodule after which a forward pass may stop.

    Returns:
        The sums of the groups that were reached; and the groups to sum again, which are the parts
        of groups whose modules had different inputs.

    Raises:
        StarmergeError: An input is not finite.
    """
    sums = {group: Sum(group.size) for group in groups}
    linears = [member for group in groups for member in group.members]
    first = {group.members[0].tensor: sums[group] for group in groups}

    def observe(linear: Linear, inputs: Tensor) -> None:
        if linear.tensor in first:
            first[linear.tensor].add(inputs)

    head = model.get_output_embeddings()
    all_logits = any(linear.module is head for linear in linears)
    with _InputObserver(linears, observe) as watch:
        lengths = [(len(each.ids), len(each.decoder)) for each in readings]
        for rows in batches(lengths, READ_BATCH_TOKENS):
            batch = [readings[row] for row in rows]
            _read(model, batch, all_logits=all_logits, until=until)
            watch.forget()
            advance(sum(len(each.ids) + len(each.decoder) for each in batch))
    done: list[tuple[Group, Sum]] = []
    again: list[Group] = []
    for group in groups:
        parts = _grouped(group.members, watch)
        reached = [part for part in parts if watch.seen[part.members[0].tensor].tokens]
        if len(parts) == 1 and reached:
            done.append((group, sums[group]))
        elif len(parts) > 1:
            again += reached
    return done, again


class _StopForward(Exception):  # noqa: N818  (no error: it ends a pass)
    """Raised after the last submodule that is needed."""


@torch.no_grad()  # not inference_mode, whose tensors have no version counter
def _read(
    model: Any, readings: Sequence[Reading], *, all_logits: bool, until: nn.Module | None = None
) -> None:
    """Run a model on sequences of one length."""
    ids = torch.tensor([reading.ids for reading in readings], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if readings[0].decoder:
        decoder = torch.tensor([reading.decoder for reading in readings], device=model.device)
        inputs["decoder_input_ids"] = decoder
    options: dict[str, int] = {} if all_logits else last_logits(model, 1)
    if "use_cache" in arguments_of(model):
        options["use_cache"] = False

    def end(*_: object) -> None:
        raise _StopForward

    hook = until.register_forward_hook(end) if until is not None else None
    try:
        model(**inputs, **options)
    except _StopForward:
        pass
    finally:
        if hook is not None:
            hook.remove()
