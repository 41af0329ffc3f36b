"""The work on the tensors of a merge, as jobs for an executor.

A job holds a plan and the results of earlier passes over the model. The number of a tensor is its
index in the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from starmerge_models.checkpoints.hashing import cached_blake3_of_tensor
from starmerge_models.checkpoints.tensors import prefetch
from starmerge_models.deltas import Delta
from starmerge_models.errors import StarmergeError
from starmerge_models.merging.checks import check_delta
from starmerge_models.merging.layout import PlannedTensor
from starmerge_models.merging.outputs import Writing
from starmerge_models.merging.plan import Plan
from starmerge_models.merging.report import tensor_record
from starmerge_models.methods.method import Deltas, TensorContext
from starmerge_models.methods.pipeline import Prepared
from starmerge_models.storage import Place, storage_of

Value = TypeVar("Value")


class _CheckedDeltas:
    """The task vectors of a tensor, which are checked when they are first read.

    Args:
        tensor: The tensor.
        base: The values of the base's tensor, if it is read.
        checked: Numbers of the models whose task vectors were checked before.
        changing: Numbers of the models with a known nonzero task vector; newly found ones are
            added.
    """

    def __init__(
        self,
        tensor: PlannedTensor,
        base: Tensor | None,
        checked: frozenset[int],
        changing: set[int],
    ) -> None:
        self._tensor, self._base, self._changing = tensor, base, changing
        self.checked = set(checked)

    def deltas(self) -> Deltas:
        """Return the lazy task vectors."""
        return Deltas({t: partial(self._load, t) for t in self._tensor.models})

    def _load(self, t: int) -> Delta:
        model, source = self._tensor.models[t], self._tensor.source
        delta = model.delta(source.name, self._base)
        if t not in self.checked:
            check_delta(delta, model, source, self._base)
            if t not in self._changing and not delta.is_zero():
                self._changing.add(t)
            self.checked.add(t)
        return delta


@dataclass(frozen=True)
class SurveyResult(Generic[Value]):
    """The result of a method's survey for one tensor."""

    value: Value
    """The result of the method's function."""
    checked: frozenset[int]
    """Numbers of the models whose task vectors of the tensor were read and are finite."""
    changing: frozenset[int]
    """Numbers of the models with a nonzero task vector."""
    seconds: float = field(compare=False)
    """Seconds of work."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class TensorResult:
    """The result of merging and writing one tensor: plain data, stored in the journal."""

    record: dict[str, Any] | None
    """The report's record of the tensor; None if no model changes it."""
    digests: list[str]
    """BLAKE3 of the content of the tensor's slots in the output."""
    inputs: list[str]
    """BLAKE3 of the inputs, in the order of :attr:`PlannedTensor.stored_inputs`; empty if not
    requested."""
    changing: list[int]
    """Numbers of the models with a nonzero task vector."""
    resumed: bool = False
    """Whether an earlier run had written the tensor."""
    seconds: float = field(default=0.0, compare=False)
    """Seconds of work."""


@dataclass(frozen=True)
class TensorJob:
    """Base class of jobs on the tensors of a plan.

    Args:
        plan: The plan.
        checked: For each tensor, by number, the models whose task vectors earlier passes have
            checked.
        mark: A file of the output and its text, by which other machines check that they reach the
            same output; None for no check.
    """

    plan: Plan
    checked: Mapping[int, frozenset[int]] = field(default_factory=dict)
    mark: tuple[Place, str] | None = field(default=None, kw_only=True)

    def memory(self, number: int) -> int:
        """Estimate the memory for the work on a tensor, in bytes."""
        return self.plan.memory_of(self.plan.tensors[number])

    def nbytes(self, number: int) -> int:
        """Return the bytes that are read for a tensor."""
        return self.plan.tensors[number].bytes_to_read

    def announce(self, number: int) -> None:
        """Prefetch the inputs of a tensor."""
        for info in self.plan.tensors[number].inputs:
            prefetch(info)

    def check(self) -> None:
        """Check, on another machine, that inputs and output are reachable.

        Inputs may be copies, so only their sizes are compared; the report contains the hashes of
        the data that was read.
        """
        for file, state in self.plan.states.items():
            check_reachable(file, size=state.size)
        if self.mark is None:
            return
        file, text = self.mark
        check_reachable(file)
        with storage_of(file).stream(file) as stream:
            is_same = text.encode() in stream.readall()
        if not is_same:
            raise StarmergeError(
                f"{file.parent} is another folder here than where the merge was begun. {_SHARE}"
            )

    def label(self, number: int) -> str:
        """Return the tensor's name."""
        return f"the tensor {self.plan.tensors[number].source.name}"

    def base_of(self, tensor: PlannedTensor) -> Tensor | None:
        """Return the values of the base's tensor; None if it is not read."""
        return self.plan.base.checkpoint.read(tensor.source.name) if tensor.reads_base else None


@dataclass(frozen=True)
class SurveyJob(TensorJob, Generic[Value]):
    """A pass of a method's survey over the tensors that some model changes.

    Args:
        visit: The method's function of a tensor's deltas and context.
    """

    visit: Callable[[Deltas, TensorContext], Value] = field(kw_only=True)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], SurveyResult[Value]]]:
        """Yield a function that surveys the tensor of a number."""
        yield partial(self._work, set())

    def _work(self, changing: set[int], number: int) -> SurveyResult[Value]:
        began = time.monotonic()
        tensor = self.plan.tensors[number]
        base = self.base_of(tensor)
        reading = _CheckedDeltas(tensor, base, self.checked.get(number, frozenset()), changing)
        seen = self.visit(reading.deltas(), self.plan.context(tensor, base))
        seconds = time.monotonic() - began
        return SurveyResult(seen, frozenset(reading.checked), frozenset(changing), seconds)


@dataclass(frozen=True)
class WriteJob(TensorJob):
    """A pass that merges and writes each tensor.

    Args:
        prepared: The chain with the surveys of its methods.
        writing: The writer of the output.
        known: Results of an earlier run, by tensor. A result is used if the tensor's bytes are in
            the output.
        hashes_inputs: Whether the inputs are hashed when they are read.
    """

    prepared: Prepared = field(kw_only=True)
    writing: Writing = field(kw_only=True)
    known: Mapping[str, TensorResult] = field(default_factory=dict, kw_only=True)
    hashes_inputs: bool = field(default=False, kw_only=True)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], TensorResult]]:
        """Yield a function that merges the tensor of a number; close the output at the end."""
        try:
            yield partial(self._work, set())
        except BaseException:
            self.writing.close(flush=False)
            raise
        self.writing.close(flush=True)

    def _work(self, changing: set[int], number: int) -> TensorResult:
        began = time.monotonic()
        done = self._merge_and_write(changing, number)
        return replace(done, seconds=time.monotonic() - began)

    def _merge_and_write(self, changing: set[int], number: int) -> TensorResult:
        tensor = self.plan.tensors[number]
        known = self.known.get(tensor.source.name)
        if (
            known is not None
            and self._matches_plan(tensor, known)
            and self._has_digests(tensor, known.digests)
        ):
            return TensorResult(
                known.record, known.digests, known.inputs, known.changing, resumed=True
            )
        if not tensor.models:
            digest = self.writing.leave(tensor)
            hashes = [digest] if tensor.source.is_stored else self._hashes(tensor)
            return self._done(tensor, None, changing, hashes if self.hashes_inputs else [])
        base = self.base_of(tensor)
        reading = _CheckedDeltas(tensor, base, self.checked.get(number, frozenset()), changing)
        merged = self.prepared.merge(
            reading.deltas(),
            self.plan.context(tensor, base),
            holds_inputs=self.plan.output.reads_inputs,
        )
        stored = self.writing.put(tensor, base, merged)
        record = tensor_record(self.plan, tensor, stored, merged)
        return self._done(tensor, record, changing, self._hashes(tensor))

    def _hashes(self, tensor: PlannedTensor) -> list[str]:
        """Return the BLAKE3 of each stored tensor that was read.

        Called after the merge of the tensor, when a remote storage has hashed the fetched data
        already, and the pages of a memory-mapped file are in the page cache.
        """
        inputs = tensor.stored_inputs if self.hashes_inputs else ()
        return [cached_blake3_of_tensor(info) for info in inputs]

    def _matches_plan(self, tensor: PlannedTensor, known: TensorResult) -> bool:
        """Return whether a journal's entry is valid for a tensor; the journal may be damaged."""
        return (
            len(known.digests) == len(self.writing.slots(tensor))
            and len(known.inputs) == len(tensor.stored_inputs) * self.hashes_inputs
            and (known.record is None) == (not tensor.models)
            and set(known.changing) <= set(range(len(self.plan.models)))
        )

    def _has_digests(self, tensor: PlannedTensor, digests: list[str]) -> bool:
        """Return whether the slots of a tensor contain bytes of these hashes."""
        slots = self.writing.slots(tensor)
        return all(
            writer.holds(name, digest)
            for (writer, name), digest in zip(slots, digests, strict=True)
        )

    def _done(
        self,
        tensor: PlannedTensor,
        record: dict[str, Any] | None,
        changing: set[int],
        inputs: list[str],
    ) -> TensorResult:
        digests = [writer.digest(name) for writer, name in self.writing.slots(tensor)]
        return TensorResult(record, digests, inputs, sorted(changing))


_SHARE = "Machines that merge together need storage that all of them reach under the same path."


def check_reachable(file: Place, *, size: int | None = None) -> None:
    """Check, on a machine other than the planner's, that a file is reachable.

    Args:
        file: The file.
        size: Expected size in bytes; None for any size.

    Raises:
        StarmergeError: The file is not reachable, or has another size.
    """
    try:
        found = storage_of(file).state(file).size
    except OSError as error:
        raise StarmergeError(f"{file} cannot be reached from here: {error}. {_SHARE}") from error
    if size is not None and found != size:
        raise StarmergeError(
            f"{file} has {found} bytes here, and {size} where the merge was begun. {_SHARE}"
        )
