"""What a merging method is, and the registry of all of them.

A merge is a chain (:mod:`starmerge_models.methods.pipeline`): transforms, each of which changes
every task vector; one merge, which makes a single update of them; post-steps, which change that
update. All three are methods, made by the decorator :func:`method`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any, ClassVar, Protocol, TypeVar, cast

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import dataclass_transform

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.methods.memory import (
    DeltaShape,
    TensorShape,
    dense_shape,
    scaled_shape,
    total_shape,
)
from starmerge_models.plugins import Registry
from starmerge_models.spectral import Truncation
from starmerge_models.spectral.metric import Inputs


@dataclass(frozen=True)
class TensorContext:
    """What a method may know of the tensor it merges, besides its deltas."""

    name: str
    shape: tuple[int, ...]
    is_embedding: bool
    """Whether each row belongs to an entry of a vocabulary or to a position."""
    tasks: tuple[str, ...]
    """Names of all models of the merge, T of them, whether or not they change this tensor."""
    weights: tuple[float, ...]
    """Their weights w_t."""
    base: Tensor | None = field(default=None, repr=False)
    """The base's tensor, where there is one: deltas in memory have none."""
    layer: tuple[int, int] | None = None
    """Which of how many layers it belongs to, counted from 0; None outside of layers."""
    inputs: Inputs | None = field(default=None, repr=False)
    """What a metric says of its inputs, where the merge has one."""

    @property
    def total_weight(self) -> float:
        """Σ w_t over all T tasks: what an average divides by."""
        return math.fsum(self.weights)


class Deltas:
    """The task vectors of one tensor: of the tasks that change it, in their order.

    They are read when they are taken, and anew each time they are gone through: who lets go of each
    holds one at a time, who needs them side by side makes a list of them.

    Args:
        loaders: For each task that changes the tensor, by its number t, what reads its delta.
    """

    def __init__(self, loaders: Mapping[int, Callable[[], Delta]]) -> None:
        self._loaders = dict(loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __iter__(self) -> Iterator[Delta]:
        for load in self._loaders.values():
            yield load()

    @classmethod
    def of(cls, deltas: Mapping[int, Delta]) -> Deltas:
        """Return the task vectors that are in memory, by task."""
        return cls({task: partial(_given, delta) for task, delta in deltas.items()})

    @property
    def tasks(self) -> tuple[int, ...]:
        """Numbers t of the tasks that change the tensor."""
        return tuple(self._loaders)

    def items(self) -> Iterator[tuple[int, Delta]]:
        """Yield each task's number and its delta."""
        for task, load in self._loaders.items():
            yield task, load()

    def map(self, change: Callable[[int, Delta], Delta]) -> Deltas:
        """Return these deltas, each changed when it is read."""

        def changed(task: int, load: Callable[[], Delta]) -> Callable[[], Delta]:
            return lambda: change(task, load())

        return Deltas({task: changed(task, load) for task, load in self._loaders.items()})

    def chosen(self, numbers: Mapping[int, int]) -> Deltas:
        """Return some of these deltas under other numbers.

        Args:
            numbers: The new number of each task that stays, by its number here.
        """
        own = {t: load for t, load in self._loaders.items() if t in numbers}
        return Deltas({numbers[t]: own[t] for t in sorted(own, key=lambda t: numbers[t])})


def _given(delta: Delta) -> Delta:
    return delta


_Seen = TypeVar("_Seen")


class Walk(Protocol):
    """A walk over the model, for a method that must know all of it before it can begin."""

    def __call__(self, look: Callable[[Deltas, TensorContext], _Seen]) -> Iterator[_Seen]:
        """Yield what ``look`` returns for each tensor that some model changes."""


class Method(ABC):
    """A step of a merge. Its fields are its parameters."""

    kind: ClassVar[str]
    """"transform", "merge" or "post-step"."""
    name: ClassVar[str]
    uses_metric: ClassVar[bool] = False
    """Whether it works in whitened inputs where the merge has a metric."""
    needs_moments: ClassVar[bool] = False
    """Whether it needs a metric with moments of every task's own inputs."""

    @property
    def passes(self) -> int:
        """How many passes over the model its ``survey`` makes, rare repetitions aside."""
        return 0

    @classmethod
    def parameter_names(cls) -> dict[str, str]:
        """Return the parameters' names as users write them, with those of the fields.

        They differ where Python has the word for itself: ``lambda`` is the field ``lambda_``.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {field.name.rstrip("_"): field.name for field in fields}

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return {name: getattr(self, field) for name, field in self.parameter_names().items()}

    def memory(self, tensor: TensorShape) -> int:
        """Tell how many bytes the method needs at most for one tensor.

        At the peak of all that it does with the tensor, surveys included, beyond the task vectors
        as they are stored; those that it holds are part of it (:attr:`TensorShape.held`), and so is
        what it returns. The chain counts a metric's whitening, and the update that a post-step is
        given.

        By default as if it held all task vectors as matrices in float32 (float64 where stored
        tensors are), and four more: enough for most methods, and far too much for those that stay
        in factors.

        Args:
            tensor: What is known of the tensor before it is read.
        """
        return tensor.held + (len(tensor.deltas) + 4) * tensor.width * tensor.size

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:  # noqa: B027
        """Compare the parameters with what is to be merged, before anything is read.

        Args:
            tasks: Names of the models.
            weights: Their weights.
            tensors: Names of the tensors that some model changes.

        Raises:
            UsageError: They do not fit.
        """

    def check_tensors(  # noqa: B027
        self, merged: Sequence[TensorContext], left: Sequence[TensorContext]
    ) -> None:
        """Compare the parameters with each tensor, before anything is read.

        Args:
            merged: The tensors that some model changes, without their values.
            left: Those of the base, of a dtype that could be merged, which no model changes: they
                stay as they are. None of them is known where deltas in memory are merged.

        Raises:
            UsageError: They do not fit.
        """


class Transform(Method):
    """A step that changes each task vector."""

    kind = "transform"

    def survey(self, walk: Walk) -> Any:
        """Go through the model before the merge; what is returned comes back in :meth:`look`."""
        return None

    def look(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Any:
        """Look at all task vectors of one tensor; what is returned comes back in :meth:`apply`.

        By default what the survey found: most transforms change each task vector by itself.

        Args:
            deltas: τ_t of the tasks that change the tensor, as the steps before leave them.
            tensor: The tensor.
            survey: What :meth:`survey` found.
        """
        return survey

    def kept(self, tensor: TensorShape) -> int:
        """Tell how many bytes what :meth:`look` returns takes as long as the tensor is in work.

        They are a part of :meth:`memory`, too.

        Args:
            tensor: What is known of the tensor before it is read.
        """
        return 0

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Tell what :meth:`apply` makes of a task vector, before it is there; by default a matrix.

        Args:
            delta: The task vector, as the steps before leave it.
            tensor: The tensor.
        """
        return dense_shape(tensor)

    def after(self, tensor: TensorShape) -> TensorShape:
        """Return what is known of a tensor whose task vectors have been transformed."""
        deltas = tuple(self.result(delta, tensor) for delta in tensor.deltas)
        return dataclasses.replace(tensor, deltas=deltas)

    @abstractmethod
    def apply(
        self, delta: Delta, task: int, tensor: TensorContext, survey: Any
    ) -> tuple[Delta, Truncation | None]:
        """Transform one task's delta of one tensor.

        Args:
            delta: The task vector.
            task: The task's number t.
            tensor: The tensor.
            survey: What :meth:`look` found in it, by default what :meth:`survey` did.

        Returns:
            The new task vector, of the same shape, and what was done where it was truncated.
        """


class Merge(Method):
    """The step that makes one update of all task vectors."""

    kind = "merge"
    outputs: ClassVar[tuple[str, ...]] = ("model", "adapter")
    """Kinds of output that its update can be written as, the usual one first. Without "model" the
    update is a vector of which each task's model has a part, and no post-step follows."""
    averages: ClassVar[bool] = False
    """Whether it divides by the sum of the weights, which then must not be zero."""
    scaled_inputs: ClassVar[bool] = True
    """Whether the task vectors come multiplied by their weights; else the method reads those."""

    @property
    def needs_base(self) -> bool:
        """Whether it works on the weights themselves, not on their differences from the base.

        What it adds to the base holds parts of the base then, and no post-step follows.
        """
        return False

    def survey(self, walk: Walk) -> Any:
        """Go through the model before the merge; what is returned comes back in :meth:`merge`."""
        return None

    def leaves(self, tensor: TensorContext) -> bool:
        """Tell whether it adds nothing to a tensor of which all models have the base's values.

        It is asked where that is known before anything is read: the tensor is copied then, and not
        merged. By default no: the weights may have been scaled.
        """
        return False

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what :meth:`merge` returns, before it is there; by default what a sum is."""
        return total_shape(tensor)

    @abstractmethod
    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge the task vectors of one tensor.

        Args:
            deltas: w_t · τ_t (τ_t if not :attr:`scaled_inputs`) of the tasks that change the
                tensor, at least one; the other ones of the T tasks count as zero.
            tensor: The tensor.
            survey: What :meth:`survey` found.

        Returns:
            What to add to the base, of the same shape.
        """


class PostStep(Method):
    """A step that changes the merged update."""

    kind = "post-step"

    def survey(self, walk: MergedWalk) -> Any:
        """Go through the merged model; what is returned comes back in :meth:`apply`."""
        return None

    def check_merge(self, merge: Merge) -> None:
        """Compare the step with the merge of its chain.

        Raises:
            UsageError: After that merge it is not defined.
        """

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Compare the step with the post-steps before it in its chain.

        Raises:
            UsageError: It takes away what one of them does.
        """

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what :meth:`apply` returns, before it is there; by default a scaled update."""
        return scaled_shape(tensor)

    @abstractmethod
    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Change what was merged of one tensor.

        Args:
            merged: The merged update so far.
            deltas: The task vectors τ_t as the models have them.
            tensor: The tensor.
            survey: What :meth:`survey` found.

        Returns:
            The new update, of the same shape.
        """


class MergedWalk(Protocol):
    """A walk over the model as it is merged so far."""

    def __call__(self, look: Callable[[Delta, Deltas, TensorContext], _Seen]) -> Iterator[_Seen]:
        """Yield what ``look`` returns for the merged update and the deltas of each tensor."""


def _fault(thing: Any) -> str | None:
    """Return why something is no method that can be used."""
    if not isinstance(thing, type):
        return f"it is of the type {type(thing).__name__}, and a method is a class"
    if not issubclass(thing, Transform | Merge | PostStep):
        return "it is a class, and a method is one of Transform, Merge or PostStep"
    if "name" not in vars(thing) or "__dataclass_fields__" not in vars(thing):
        return 'it is not decorated. Write @method("name") above it'
    missing = sorted(getattr(thing, "__abstractmethods__", ()))
    return f"it does not define {', '.join(missing)}" if missing else None


METHODS: Registry[type[Method]] = Registry("method", "starmerge_models.methods", fault=_fault)
"""Every method by name; other packages and files have more."""

_Method = TypeVar("_Method", bound=Method)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(name: str) -> Callable[[type[_Method]], type[_Method]]:
    """Make the decorated class a method called ``name``.

    The class becomes a frozen dataclass whose fields are validated parameters, and goes into the
    registry. Unknown parameters, NaN and infinities are refused.

    Raises:
        UsageError: Another method has the name.
    """

    def register(cls: type[_Method]) -> type[_Method]:
        made = cast(
            "type[_Method]",
            pydantic.dataclasses.dataclass(
                cls,
                frozen=True,
                kw_only=True,
                config=ConfigDict(extra="forbid", allow_inf_nan=False),
            ),
        )
        made.name = name
        _refuse_plainly(made)
        METHODS.add(name, made)
        return made

    return register


def _refuse_plainly(made: type[Method]) -> None:
    """Let a method's constructor raise a UsageError for whatever it refuses."""
    construct: Callable[..., None] = made.__init__

    @wraps(construct)
    def checked(self: Method, *args: Any, **fields: Any) -> None:
        names = made.parameter_names()
        for own, value in fields.items():
            if own not in names.values():
                hint = nearest(own, names) if names else " It has none."
                raise UsageError(f"Method {made.name!r} has no parameter {own!r}.{hint}")
            if isinstance(value, bool) and "boolean" not in str(_schema(made)[own]):
                key = own.rstrip("_")
                raise UsageError(f"Method {made.name!r}: {key}: {value} is no number.")
        try:
            construct(self, *args, **fields)
        except ValidationError as error:
            raise UsageError(f"Method {made.name!r}: {explain(error)}") from error

    made.__init__ = checked  # type: ignore[method-assign,assignment]


@cache
def _schema(made: type[Method]) -> dict[str, Any]:
    """Return the JSON schemas of a method's fields."""
    properties: dict[str, Any] = TypeAdapter(made).json_schema().get("properties", {})
    return properties


def sums_to_zero(weights: Sequence[float]) -> bool:
    """Tell whether weights sum to zero but for rounding: what is divided by the sum means nothing.

    |Σ w_t| ≤ 1e-9 · Σ |w_t|: 0.1 + 0.2 − 0.3 is zero too.
    """
    return abs(math.fsum(weights)) <= 1e-9 * sum(map(abs, weights))


def refuse_weights(
    method: Method, tasks: Sequence[str], weights: Sequence[float], reason: str
) -> None:
    """Refuse weights other than 1, for methods that they mean nothing to.

    Raises:
        UsageError: A model has a weight.
    """
    for task, weight in zip(tasks, weights, strict=True):
        if weight != 1:
            raise UsageError(
                f"{method.name}: {task} has the weight {weight:g}, but {reason}. Leave the weights "
                "out."
            )


def refuse_negative(method: Method, weights: Sequence[float], reason: str) -> None:
    """Refuse negative weights, for methods whose sums they would break.

    Raises:
        UsageError: A weight is negative.
    """
    if min(weights) < 0:
        raise UsageError(
            f"{method.name}: a weight is negative, and {reason}. Give weights from 0 up."
        )


def find_method(name: str) -> type[Method]:
    """Return a method's class by its name, or from a file: ``path/to/file.py:NAME``.

    Raises:
        UsageError: There is no such method.
        StarmergeError: The package or the file that has it cannot be loaded.
    """
    # Other tools write chains as one word: dare_ties.
    parts = re.split(r"[+_, -]+", name.casefold())
    if name not in METHODS and len(parts) > 1 and all(part in METHODS for part in parts):
        raise UsageError(
            f"No method is called {name!r}. Did you mean the chain {'+'.join(parts)!r}?"
        )
    return METHODS.find(name)


def make_method(name: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """Return a method by name, its parameters validated.

    Raises:
        UsageError: No such method, no such parameter, or a value out of its range.
    """
    chosen = find_method(name)
    names = chosen.parameter_names()
    return chosen(**{names.get(key, key): value for key, value in (parameters or {}).items()})
