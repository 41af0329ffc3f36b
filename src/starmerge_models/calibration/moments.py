"""Second moments of what a model's linear modules read, summed up while it reads.

Hooks before the modules see their inputs. Modules that read the same tensor (queries, keys and
values; the two halves of a gated MLP) share a sum: a short pass over a few tokens tells which. In
every pass after it that is checked, and where it was wrong, it is told and they are summed apart.
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
from starmerge_models.calibration.text import READ_AT_ONCE, Advance, Reading, batches
from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.models.forward import arguments_of, last_logits
from starmerge_models.spectral import lapack
from starmerge_models.spectral.cholesky import pivoted_root
from starmerge_models.spectral.moment import Side


@dataclass(frozen=True)
class Group:
    """Modules that read the same tensors, of the same side."""

    members: tuple[Linear, ...]

    @property
    def tensors(self) -> list[str]:
        """Names of their matrices in the base's files."""
        return [member.tensor for member in self.members]

    @property
    def side(self) -> Side:
        """Where their input lies."""
        return self.members[0].side

    @property
    def size(self) -> int:
        """n, the length of an input."""
        return self.members[0].size

    def sum_bytes(self, tokens: int) -> int:
        """Return the memory that the sum over some inputs takes at the end, in bytes."""
        return 4 * tokens * self.size if tokens < self.size else 8 * self.size**2

    def root_bytes(self, tokens: int) -> int:
        """Return the greatest size of the root, in bytes."""
        return 4 * min(tokens, self.size) * self.size


class Sum:
    """The sum Σ x xᵀ over inputs, or the inputs themselves while they are fewer than long.

    Args:
        size: n, the length of an input.
    """

    def __init__(self, size: int) -> None:
        self.tokens = 0
        """How many inputs there were."""
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
        """Return R (k, n) float32 on the CPU with RᵀR = Σ x xᵀ / tokens; the sum is used up.

        Of fewer inputs than n they are R's rows, else k is the numerical rank.
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
        # The upper triangle by rows is the lower one by columns, as Fortran sees it.
        lapack.call("dsyrk", "L", "N", n, len(rows), 1.0, rows, n, 1.0, gram, n)
    else:
        gram.addmm_(rows.T, rows)


@dataclass
class _Seen:
    """What a module has read so far."""

    calls: list[int] = field(default_factory=list)
    """The number of each tensor, in the order in which they first occurred."""
    tokens: int = 0


class _Watch:
    """Hooks before modules, as a context manager, that see what they read.

    Args:
        linears: The modules.
        saw: Called with a module and an input.
    """

    def __init__(self, linears: Sequence[Linear], saw: Callable[[Linear, Tensor], None]) -> None:
        self.seen = {linear.tensor: _Seen() for linear in linears}
        self._linears, self._saw = linears, saw
        self._numbers: dict[tuple[int, int], tuple[int, weakref.ref[Tensor]]] = {}
        self._count = 0

    def __enter__(self) -> _Watch:
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
            self._saw(linear, inputs)

        return look

    def _number(self, linear: Linear, inputs: Tensor) -> int:
        """Return a tensor's number: the same as before only if it is the same and unchanged."""
        key = id(inputs), inputs._version
        number, known = self._numbers.get(key, (0, None))
        if known is None or known() is not inputs:
            if not inputs.isfinite().all():
                raise StarmergeError(
                    f"The input of {linear.tensor.removesuffix('.weight')} has a NaN or an "
                    "infinity. The base's weights are broken, or too large for their dtype: look "
                    "at them, or try --dtype float32."
                )
            self._count = number = self._count + 1
            self._numbers[key] = number, weakref.ref(inputs)
        return number

    def forget(self) -> None:
        """Take what comes for other tensors than those before."""
        self._numbers.clear()


def find_groups(model: Any, linears: Sequence[Linear], probe: Reading) -> tuple[list[Group], int]:
    """Tell which modules read the same tensors, by having the model read a few tokens.

    Args:
        model: The model.
        linears: Its modules.
        probe: The tokens.

    Returns:
        The groups in the order of the modules, where a module that was not reached is alone; and
        how many inputs a module gets for each token, at most.

    Raises:
        StarmergeError: An input is not finite.
    """
    with _Watch(linears, lambda *_: None) as watch:
        _read(model, [probe], all_logits=True)
    longest = max(len(probe.ids), len(probe.decoder))
    most = max((seen.tokens for seen in watch.seen.values()), default=0)
    return _grouped(linears, watch), max(1, -(-most // longest))


def _grouped(linears: Sequence[Linear], watch: _Watch) -> list[Group]:
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
    """Have the model read, and sum up what modules get.

    Args:
        model: The model.
        groups: The modules; each group takes one sum.
        readings: What is read.
        advance: Called with a number of tokens that have been read.
        until: A part of the model after which nothing needs to be computed.

    Returns:
        The sums of the groups that were reached, and the groups that must be summed again, being
        parts of those whose modules have not all read the same.

    Raises:
        StarmergeError: An input is not finite.
    """
    sums = {group: Sum(group.size) for group in groups}
    linears = [member for group in groups for member in group.members]
    first = {group.members[0].tensor: sums[group] for group in groups}

    def saw(linear: Linear, inputs: Tensor) -> None:
        if linear.tensor in first:
            first[linear.tensor].add(inputs)

    head = model.get_output_embeddings()
    all_logits = any(linear.module is head for linear in linears)
    with _Watch(linears, saw) as watch:
        lengths = [(len(each.ids), len(each.decoder)) for each in readings]
        for rows in batches(lengths, READ_AT_ONCE):
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


class _Enough(Exception):  # noqa: N818  (no error: it ends a pass)
    """Raised after the last part of a model that is needed."""


@torch.no_grad()  # and not inference_mode: its tensors do not tell whether they were changed
def _read(
    model: Any, readings: Sequence[Reading], *, all_logits: bool, until: nn.Module | None = None
) -> None:
    """Have a model read sequences of one length."""
    ids = torch.tensor([reading.ids for reading in readings], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if readings[0].decoder:
        decoder = torch.tensor([reading.decoder for reading in readings], device=model.device)
        inputs["decoder_input_ids"] = decoder
    options: dict[str, int] = {} if all_logits else last_logits(model, 1)
    if "use_cache" in arguments_of(model):
        options["use_cache"] = False

    def end(*_: object) -> None:
        raise _Enough

    hook = until.register_forward_hook(end) if until is not None else None
    try:
        model(**inputs, **options)
    except _Enough:
        pass
    finally:
        if hook is not None:
            hook.remove()
