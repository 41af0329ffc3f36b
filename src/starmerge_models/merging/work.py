"""The work on the tensors of a merge, as jobs for an executor.

A job is a plan and what earlier passes over the model found. The number of a tensor is its place in
the plan.
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

from starmerge_models.checkpoints.hashing import remembered_blake3_of_tensor
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

Seen = TypeVar("Seen")


class _Reading:
    """The task vectors of a tensor, which are checked when they are read for the first time.

    Args:
        tensor: The tensor.
        base: The base's, where it is read.
        checked: Numbers of the models whose task vectors need no check.
        changing: Numbers of models of which some task vector is known not to be zero; others that
            are found are added.
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
        """Return the task vectors, which are read when they are asked for."""
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
class Looked(Generic[Seen]):
    """What came of looking at one tensor."""

    seen: Seen
    """What the method found."""
    checked: frozenset[int]
    """Numbers of the models whose task vectors of the tensor were read, and are finite."""
    changing: frozenset[int]
    """Numbers of models of which some task vector was found not to be zero."""
    seconds: float = field(compare=False)
    """How long that took."""


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class Done:
    """What a merge says of one tensor that it has written: plain data, as the journal keeps it."""

    record: dict[str, Any] | None
    """What the report says of it; None if no model changes it."""
    digests: list[str]
    """BLAKE3 of what lies in its slots of the output."""
    inputs: list[str]
    """BLAKE3 of what it was made of, in the order of :attr:`PlannedTensor.stored_inputs`; none
    where they are not wanted."""
    changing: list[int]
    """Numbers of models of which some task vector was found not to be zero."""
    taken_up: bool = False
    """Whether an earlier run had written it."""
    seconds: float = field(default=0.0, compare=False)
    """How long it was worked on."""


@dataclass(frozen=True)
class TensorJob:
    """Work on the tensors of a plan.

    Args:
        plan: The plan.
        checked: For each tensor, by its number, the models whose task vectors earlier passes have
            checked.
        mark: A file in the output, and a text in it, by which other machines know that they see the
            same output; None: it is not looked for.
    """

    plan: Plan
    checked: Mapping[int, frozenset[int]] = field(default_factory=dict)
    mark: tuple[Place, str] | None = field(default=None, kw_only=True)

    def memory(self, number: int) -> int:
        """Estimate the bytes in memory while a tensor is worked on."""
        return self.plan.memory_of(self.plan.tensors[number])

    def nbytes(self, number: int) -> int:
        """Return how many bytes are read for a tensor."""
        return self.plan.tensors[number].bytes_to_read

    def announce(self, number: int) -> None:
        """Read ahead what a tensor is made of."""
        for info in self.plan.tensors[number].inputs:
            prefetch(info)

    def check(self) -> None:
        """Make sure, on another machine, that inputs and output are there.

        Inputs may be copies: their sizes are compared, and the report has the hashes of what was
        read.
        """
        for file, state in self.plan.states.items():
            check_reached(file, size=state.size)
        if self.mark is None:
            return
        file, text = self.mark
        check_reached(file)
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
        """Return the base's tensor, where it is read."""
        return self.plan.base.checkpoint.read(tensor.source.name) if tensor.reads_base else None


@dataclass(frozen=True)
class LookJob(TensorJob, Generic[Seen]):
    """A method's look at each tensor that some model changes.

    Args:
        look: The method's function.
    """

    look: Callable[[Deltas, TensorContext], Seen] = field(kw_only=True)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], Looked[Seen]]]:
        """Yield the look at a tensor."""
        yield partial(self._work, set())

    def _work(self, changing: set[int], number: int) -> Looked[Seen]:
        began = time.monotonic()
        tensor = self.plan.tensors[number]
        base = self.base_of(tensor)
        reading = _Reading(tensor, base, self.checked.get(number, frozenset()), changing)
        seen = self.look(reading.deltas(), self.plan.context(tensor, base))
        seconds = time.monotonic() - began
        return Looked(seen, frozenset(reading.checked), frozenset(changing), seconds)


@dataclass(frozen=True)
class WriteJob(TensorJob):
    """Merging and writing each tensor.

    Args:
        prepared: The chain, whose methods have looked at the model.
        writing: The output.
        known: What an earlier run said of tensors that it had written, by their names. It counts
            if their bytes lie in the output.
        hashes_inputs: Whether the inputs are hashed as they are read.
    """

    prepared: Prepared = field(kw_only=True)
    writing: Writing = field(kw_only=True)
    known: Mapping[str, Done] = field(default_factory=dict, kw_only=True)
    hashes_inputs: bool = field(default=False, kw_only=True)

    @contextmanager
    def open(self) -> Iterator[Callable[[int], Done]]:
        """Yield the merge of a tensor; close the output at the end."""
        try:
            yield partial(self._work, set())
        except BaseException:
            self.writing.close(flush=False)
            raise
        self.writing.close(flush=True)

    def _work(self, changing: set[int], number: int) -> Done:
        began = time.monotonic()
        done = self._written(changing, number)
        return replace(done, seconds=time.monotonic() - began)

    def _written(self, changing: set[int], number: int) -> Done:
        tensor = self.plan.tensors[number]
        known = self.known.get(tensor.source.name)
        if known is not None and self._fits(tensor, known) and self._holds(tensor, known.digests):
            return Done(known.record, known.digests, known.inputs, known.changing, taken_up=True)
        if not tensor.models:
            digest = self.writing.leave(tensor)
            hashes = [digest] if tensor.source.is_stored else self._hashes(tensor)
            return self._done(tensor, None, changing, hashes if self.hashes_inputs else [])
        base = self.base_of(tensor)
        reading = _Reading(tensor, base, self.checked.get(number, frozenset()), changing)
        merged = self.prepared.merge(
            reading.deltas(),
            self.plan.context(tensor, base),
            holds_inputs=self.plan.output.reads_inputs,
        )
        stored = self.writing.put(tensor, base, merged)
        record = tensor_record(self.plan, tensor, stored, merged)
        return self._done(tensor, record, changing, self._hashes(tensor))

    def _hashes(self, tensor: PlannedTensor) -> list[str]:
        """Return the BLAKE3 of each tensor of a file that was read.

        It is asked for after the merge: a storage that fetches tensors hashes them as they come,
        and the pages of a mapped file are in memory by then.
        """
        inputs = tensor.stored_inputs if self.hashes_inputs else ()
        return [remembered_blake3_of_tensor(info) for info in inputs]

    def _fits(self, tensor: PlannedTensor, known: Done) -> bool:
        """Tell whether something can have been said of a tensor: a journal may be damaged."""
        return (
            len(known.digests) == len(self.writing.slots(tensor))
            and len(known.inputs) == len(tensor.stored_inputs) * self.hashes_inputs
            and (known.record is None) == (not tensor.models)
            and set(known.changing) <= set(range(len(self.plan.models)))
        )

    def _holds(self, tensor: PlannedTensor, digests: list[str]) -> bool:
        """Tell whether the bytes of these hashes lie in the slots of a tensor."""
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
    ) -> Done:
        digests = [writer.digest(name) for writer, name in self.writing.slots(tensor)]
        return Done(record, digests, inputs, sorted(changing))


_SHARE = "Machines that merge together need storage that all of them reach under the same path."


def check_reached(file: Place, *, size: int | None = None) -> None:
    """Make sure, on another machine than the one that planned, that a file is there.

    Args:
        file: The file.
        size: Its bytes; None: any number.

    Raises:
        StarmergeError: It is not, or has another size.
    """
    try:
        found = storage_of(file).state(file).size
    except OSError as error:
        raise StarmergeError(f"{file} cannot be reached from here: {error}. {_SHARE}") from error
    if size is not None and found != size:
        raise StarmergeError(
            f"{file} has {found} bytes here, and {size} where the merge was begun. {_SHARE}"
        )
