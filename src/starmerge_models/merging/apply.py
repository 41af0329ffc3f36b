"""Adding a merged update to a loaded model, and removing it again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from types import TracebackType
from weakref import WeakSet

import torch
from torch import Tensor, nn

from starmerge_models.checkpoints.experts import stack_of
from starmerge_models.checkpoints.renaming import naming_in
from starmerge_models.checkpoints.tensors import MERGEABLE
from starmerge_models.deltas import Delta, Dense, LowRank, is_finite, matrix_shape
from starmerge_models.errors import StarmergeError, UsageError, near
from starmerge_models.merging.executors.executor import FunctionJob
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.fold import fold


def apply(model: nn.Module, update: Mapping[str, Delta], *, threads: int | None = None) -> Applied:
    """Add an update to the weights of a loaded model, in place.

    The resulting weights are bit for bit those that :func:`starmerge_models.merge` writes in the
    model's dtype, if that is the dtype of the base's files or a wider one. Parameters keep their
    identity, and a tied tensor with several names is changed once. After an error no tensor is
    changed. Shapes are checked, but not whether the model has the base's weights. The original
    values of the changed tensors are kept in the CPU's memory, and the update is added on the CPU,
    for models on any device.

    Args:
        model: The base, loaded; on any device.
        update: Deltas by the names of the model's parameters and buffers, or by the names in its
            files if transformers renames them when it loads the model. In a tensor that holds all
            experts of a layer, ``NAME[3]`` refers to expert 3.
        threads: Number of tensors that are changed at the same time; by default as many as for
            :func:`starmerge_models.merge`. The result does not depend on it.

    Returns:
        A handle that removes the update: by ``restore()``, or at the end of a ``with`` block. If
        the handle is discarded, the update is permanent.

    Raises:
        UsageError: The update is not a mapping of deltas; the model lacks a tensor, or has it in
            another shape, without values, quantised, or tied to a tensor with a different update.
        StarmergeError: A tensor has a NaN or an infinity, before or after the update.

    Example:
        ``with sm.apply(model, vectors.merge(sm.Star(eta=20))): evaluate(model)``
    """
    if not isinstance(update, Mapping):
        raise UsageError(
            f"The update is a {type(update).__name__}. Give deltas by the names of tensors, as the "
            "merge() of task vectors returns them."
        )
    tensors = _tensors(model)
    update = _with_model_names(model, tensors, update)
    targets = {name: _target(name, tensors) for name in update}
    for name, delta in update.items():
        _check_target(name, targets[name], delta)
    places = _by_memory({name: target.values for name, target in targets.items()})

    def work(number: int) -> tuple[_Changed, Tensor]:
        names = places[number]
        target = targets[names[0]]
        original = target.values.to("cpu", copy=True)
        return _Changed(target, original), _folded(names, original, update)

    def memory(number: int) -> int:
        return 2 * targets[places[number][0]].values.nbytes

    changed: list[_Changed] = []
    applied = Applied(model, changed)
    with _writing():
        try:
            with (
                Threads(threads) as executor,
                closing(executor.run(FunctionJob(work, memory), range(len(places)))) as done,
            ):
                for change, weight in done:
                    changed.append(change)
                    change.target.values.copy_(weight)
        except BaseException:
            applied._restore_originals()
            raise
    for change in changed:
        change.record_version()
    return applied


@dataclass(frozen=True, eq=False)
class _Target:
    """A tensor of a model that an update names, or one expert's part of it."""

    name: str
    """The model's name of the tensor."""
    tensor: Tensor
    expert: int | None = None
    """Index in the first dimension; None for the whole tensor."""

    @property
    def values(self) -> Tensor:
        """The tensor, or a view of the expert's part."""
        own = self.tensor.detach()
        return own if self.expert is None else own[self.expert]


@dataclass(eq=False)
class _Changed:
    """A tensor that an update has changed."""

    target: _Target
    original: Tensor
    """The values before the update, on the CPU."""
    version: int | None = None
    """Torch's version counter of the tensor after our last write."""

    def record_version(self) -> None:
        """Record the tensor's version counter after our own write."""
        self.version = _version(self.target.tensor)

    @property
    def is_intact(self) -> bool:
        """Whether no other code has written to the tensor since our last write."""
        return self.version == _version(self.target.tensor)


class Applied:
    """An update that has been added to a model by :func:`apply`.

    Several updates can be added on top of each other; they must be removed in reverse order.
    """

    def __init__(self, model: nn.Module, changed: list[_Changed]) -> None:
        self._model = model
        self._changed = changed
        self._number = next(_numbers)
        _active.add(self)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the original values of all changed tensors, bit for bit; idempotent.

        Raises:
            UsageError: A later update of the same tensors has not been removed, or a tensor was
                converted, replaced or written to meanwhile. Nothing is restored.
        """
        mine = self._storages()
        for other in _active:
            if other._number > self._number and not mine.isdisjoint(other._storages()):
                raise UsageError(
                    "Another update was added to the same weights later, and still stands. Restore "
                    "that one first."
                )
        tensors = _tensors(self._model)
        for changed in self._changed:
            target, before = changed.target, changed.original
            if (
                tensors.get(target.name) is not target.tensor
                or (target.values.dtype, target.values.shape) != (before.dtype, before.shape)
                or not changed.is_intact
            ):
                raise UsageError(
                    f"{target.name} was converted, replaced or written to since the update was "
                    "added. Restore a model before you change its dtype, move it, train it or load "
                    "other weights into it."
                )
        with _writing():
            self._restore_originals()

    def _restore_originals(self) -> None:
        for changed in self._changed:
            changed.target.values.copy_(changed.original)
        self._changed.clear()

    def _storages(self) -> set[int]:
        tensors = [changed.target.tensor for changed in self._changed]
        # Skip empty tensors, whose address is 0.
        return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


_numbers = count()
_active: WeakSet[Applied] = WeakSet()
"""The updates of all models that can still be removed."""


@contextmanager
def _writing() -> Iterator[None]:
    """Exempt our own writes from the check of active updates for foreign writes."""
    intact = [changed for other in _active for changed in other._changed if changed.is_intact]
    try:
        with torch.no_grad():
            yield
    finally:
        for changed in intact:
            changed.record_version()


def _version(tensor: Tensor) -> int | None:
    """Return torch's version counter of a tensor; None if it has none."""
    return None if tensor.is_inference() else tensor._version


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers, tied ones under each of their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def _with_model_names(
    model: nn.Module, tensors: Mapping[str, Tensor], update: Mapping[str, Delta]
) -> Mapping[str, Delta]:
    """Rename an update from the names in files to those of the loaded model of transformers.

    Names that the model already has, those of tensors that transformers joins or splits, and
    unknown names are unchanged.
    """
    unknown = [name for name in update if _find(name, tensors) is None]
    if not unknown:
        return update
    try:
        from transformers import PreTrainedModel  # noqa: PLC0415  (slow to import)

        if not isinstance(model, PreTrainedModel):
            return update
        sources = naming_in(model, unknown)["sources"]
    except ImportError:
        return update
    new = {
        stored[0]: name
        for name, stored in sources.items()
        if len(stored) == 1 and name not in update and _find(name, tensors) is not None
    }
    return {new.get(name, name): delta for name, delta in update.items()}


def _target(name: str, tensors: Mapping[str, Tensor]) -> _Target:
    """Return the target in a model that an update's name refers to.

    Raises:
        UsageError: The model has no tensor of that name.
    """
    found = _find(name, tensors)
    if found is None:
        raise UsageError(f"The model has no tensor {name}. {_remedy(name, tensors)}")
    return found


def _find(name: str, tensors: Mapping[str, Tensor]) -> _Target | None:
    """Return the target that an update's name refers to; None if the model has no such tensor."""
    if name in tensors:
        return _Target(name, tensors[name])
    stack, expert = stack_of(name) or ("", 0)
    if stack in tensors and len(tensors[stack].shape) > 1 and expert < tensors[stack].shape[0]:
        return _Target(stack, tensors[stack], expert)
    return None


def _check_target(name: str, target: _Target, delta: Delta) -> None:
    """Check that a delta can be added to a tensor of a model."""
    tensor = target.tensor
    if not isinstance(delta, LowRank | Dense):
        raise UsageError(
            f"The update of {name} is a {type(delta).__name__}. Give a delta: Dense(tensor), or "
            "LowRank(B, A)."
        )
    if tensor.is_meta:
        raise UsageError(
            f"{name} has no values: it is on the device 'meta', as what is offloaded is. Load the "
            "whole model into memory."
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        raise UsageError(
            f"{name} is a {type(tensor).__name__}, which is quantised or one part of a tensor. "
            "Load the model unquantised and whole, or merge files."
        )
    if tensor.dtype not in MERGEABLE:
        raise UsageError(
            f"{name} is stored in {tensor.dtype}, so deltas cannot be added to it. Load the model "
            "unquantised."
        )
    shape = tuple(tensor.shape if target.expert is None else tensor.shape[1:])
    if matrix_shape(shape) != delta.shape:
        raise UsageError(
            f"{name} has the shape {list(shape)} in the model, and its update is "
            f"{list(delta.shape)}. Give the model that was the base of the merge; if transformers "
            "changes its tensors when it loads them, merge files and load those."
        )


def _by_memory(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names of tensors by the tensor that they refer to.

    Raises:
        UsageError: Two tensors share a part of their memory, or all of it in different shapes.
    """
    places: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        places.setdefault(place, []).append(name)
    spans = []
    for name, *_ in places.values():
        tensor = tensors[name]
        if tensor.numel():
            last = sum(
                (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, name))
    for (device, _, end, first), (other, start, _, second) in pairwise(sorted(spans)):
        if device == other and start < end:
            raise UsageError(
                f"{first} and {second} share memory in the model, and the update changes both. "
                "Untie them, or leave one out of the update."
            )
    return list(places.values())


def _folded(names: Sequence[str], original: Tensor, update: Mapping[str, Delta]) -> Tensor:
    """Return the updated values of a tensor, which may have several names."""
    name, *others = names
    weight = fold(original, update[name], original.dtype).weight
    if not is_finite(weight):
        if not is_finite(original):
            raise StarmergeError(f"{name} has a NaN or an infinity in the model.")
        raise StarmergeError(
            f"{name} gets a NaN or an infinity: the update has one, or overflows {original.dtype}. "
            "Look at the scale of the updates, or load the model in a wider dtype."
        )
    for other in others:
        if not torch.equal(weight, fold(original, update[other], original.dtype).weight):
            raise UsageError(
                f"{name} and {other} are one tensor in the model (tie_word_embeddings), and the "
                "update changes them differently. Untie them, or leave one out of the update."
            )
    return weight


def _remedy(name: str, known: Collection[str]) -> str:
    """Return advice to the user about a name that a model does not have."""
    module, _, leaf = f".{name}".rpartition(".")
    for other in known:
        if other.endswith(f".{name}"):
            inner = other.removesuffix(f".{name}")
            return f"It calls it {other}: give apply the part model.{inner}."
        if f".{other}".endswith(f"{module}.base_layer.{leaf}"):
            return "PEFT has put an adapter there: take it away first, with PeftModel.unload()."
    parts = name.split(".")
    for depth in range(1, len(parts)):
        inner = ".".join(parts[depth:])
        if inner in known:
            return (
                f"It calls it {inner}: load the model by the class that its config.json names in "
                f"'architectures', or take {name.removesuffix(inner)!r} from the update's names."
            )
    others = near(name, known)
    hint = f"The nearest it has is {others[0]}. " if others else ""
    return (
        f"{hint}If transformers joins or splits the tensors of this model when it loads them, "
        "merge files and load those."
    )
