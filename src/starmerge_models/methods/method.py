"""Base classes of merging methods, and the registry of all methods.

A merge is a chain (:mod:`starmerge_models.methods.pipeline`): transforms, each of which changes
every task vector; one merge, which combines them into a single update; post-steps, which change
that update. All three are methods, made by the decorator :func:`method`.
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
    """Properties of the tensor to merge, besides its deltas."""

    name: str
    shape: tuple[int, ...]
    is_embedding: bool
    """Whether each row belongs to a token of a vocabulary or to a position."""
    tasks: tuple[str, ...]
    """Names of all models of the merge, T of them, whether or not they change this tensor."""
    weights: tuple[float, ...]
    """Their weights w_t."""
    base: Tensor | None = field(default=None, repr=False)
    """The base's tensor; None where deltas in memory are merged without a base."""
    layer: tuple[int, int] | None = None
    """(layer, number of layers), the layer counted from 0; None outside of layers."""
    inputs: Inputs | None = field(default=None, repr=False)
    """The metric's moments of the tensor's inputs; None for a merge without a metric."""

    @property
    def total_weight(self) -> float:
        """Σ w_t over all T tasks, the divisor of an average."""
        return math.fsum(self.weights)


class Deltas:
    """Lazy task vectors of one tensor, one for each task that changes it, in task order.

    Each iteration loads them again, one at a time, so a loop holds a single delta in memory. Call
    ``list()`` to hold all of them at once.

    Args:
        loaders: For each task that changes the tensor, by its number t, a function that loads its
            delta.
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
        """Return task vectors that are in memory already, by task."""
        return cls({task: partial(_constant, delta) for task, delta in deltas.items()})

    @property
    def tasks(self) -> tuple[int, ...]:
        """Numbers t of the tasks that change the tensor."""
        return tuple(self._loaders)

    def items(self) -> Iterator[tuple[int, Delta]]:
        """Yield each task's number and its delta."""
        for task, load in self._loaders.items():
            yield task, load()

    def map(self, change: Callable[[int, Delta], Delta]) -> Deltas:
        """Return these deltas with ``change(task, delta)`` applied lazily, on each load."""

        def changed(task: int, load: Callable[[], Delta]) -> Callable[[], Delta]:
            return lambda: change(task, load())

        return Deltas({task: changed(task, load) for task, load in self._loaders.items()})

    def renumbered(self, numbers: Mapping[int, int]) -> Deltas:
        """Return a subset of these deltas under new task numbers.

        Args:
            numbers: The new number of each task in the subset, by its present number.
        """
        own = {t: load for t, load in self._loaders.items() if t in numbers}
        return Deltas({numbers[t]: own[t] for t in sorted(own, key=lambda t: numbers[t])})


def _constant(delta: Delta) -> Delta:
    return delta


_Result = TypeVar("_Result")


class Walk(Protocol):
    """A pass over all tensors, for methods that need statistics of the whole model first."""

    def __call__(self, visit: Callable[[Deltas, TensorContext], _Result], /) -> Iterator[_Result]:
        """Yield ``visit(deltas, tensor)`` for each tensor that some model changes."""


class Method(ABC):
    """A step of a merge. Its fields are its parameters."""

    kind: ClassVar[str]
    """"transform", "merge" or "post-step"."""
    name: ClassVar[str]
    uses_metric: ClassVar[bool] = False
    """Whether the method works in whitened inputs when the merge has a metric."""
    needs_moments: ClassVar[bool] = False
    """Whether the method needs a metric with moments of every task's own inputs."""

    @property
    def passes(self) -> int:
        """How many passes over the model its ``survey`` makes, rare repetitions aside."""
        return 0

    @classmethod
    def parameter_names(cls) -> dict[str, str]:
        """Return the field name of each parameter, by the name that users write.

        The two differ for Python keywords: ``lambda`` is the field ``lambda_``.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {field.name.rstrip("_"): field.name for field in fields}

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return {name: getattr(self, field) for name, field in self.parameter_names().items()}

    def memory(self, tensor: TensorShape) -> int:
        """Return an upper bound of the method's peak memory for one tensor, in bytes.

        The peak is taken over everything that the method does with the tensor, surveys included. It
        contains the task vectors that the method holds (:attr:`TensorShape.deltas_nbytes`) and the
        result that it returns, but not the task vectors as they are stored. The chain adds the
        whitening of a metric and the update that is passed to a post-step.

        The default counts all task vectors as dense float32 matrices (float64 where stored tensors
        are) and four matrices more: enough for most methods, and far too much for methods that keep
        the factors of adapters.

        Args:
            tensor: Shapes and ranks of the tensor, known before its data is read.
        """
        return tensor.deltas_nbytes + (len(tensor.deltas) + 4) * tensor.width * tensor.size

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:  # noqa: B027
        """Check the parameters against the models and weights, before any tensor is read.

        Args:
            tasks: Names of the models.
            weights: Their weights.
            tensors: Names of the tensors that some model changes.

        Raises:
            UsageError: The parameters do not fit.
        """

    def check_tensors(  # noqa: B027
        self, merged: Sequence[TensorContext], left: Sequence[TensorContext]
    ) -> None:
        """Check the parameters against each tensor, before any tensor is read.

        Args:
            merged: The tensors that some model changes, without their values.
            left: The base's tensors that no model changes and that are copied, of dtypes that could
                be merged. Empty where deltas in memory are merged.

        Raises:
            UsageError: The parameters do not fit.
        """


class Transform(Method):
    """A step that changes each task vector."""

    kind = "transform"

    def survey(self, walk: Walk) -> Any:
        """Compute statistics of the whole model; :meth:`prepare_tensor` receives the result."""
        return None

    def prepare_tensor(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Any:
        """Compute statistics of all task vectors of one tensor; :meth:`apply` receives the result.

        The default returns ``survey``: most transforms change each task vector independently.

        Args:
            deltas: τ_t of the tasks that change the tensor, after the previous steps of the chain.
            tensor: The tensor.
            survey: The result of :meth:`survey`.
        """
        return survey

    def prepared_bytes(self, tensor: TensorShape) -> int:
        """Return the size in bytes of the result of :meth:`prepare_tensor`.

        The chain holds it until the tensor is merged. :meth:`memory` contains it too.

        Args:
            tensor: Shapes and ranks of the tensor, known before its data is read.
        """
        return 0

    def result(self, delta: DeltaShape, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the task vector that :meth:`apply` returns; by default a matrix.

        Args:
            delta: The task vector after the previous steps of the chain.
            tensor: The tensor.
        """
        return dense_shape(tensor)

    def transformed_shape(self, tensor: TensorShape) -> TensorShape:
        """Return the shapes of a tensor after its task vectors have been transformed."""
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
            survey: The result of :meth:`prepare_tensor`; by default that of :meth:`survey`.

        Returns:
            The new task vector, of the same shape, and a record of its truncation, if any.
        """


class Merge(Method):
    """The step that combines all task vectors into one update."""

    kind = "merge"
    outputs: ClassVar[tuple[str, ...]] = ("model", "adapter")
    """Kinds of output that the update can be written as, the default first. Without "model" the
    update is a vector of which each task's model has a part, and post-steps are refused."""
    averages: ClassVar[bool] = False
    """Whether the method divides by the sum of the weights, which must then not be zero."""
    scaled_inputs: ClassVar[bool] = True
    """Whether the chain multiplies the task vectors by their weights; else the method does."""

    @property
    def needs_base(self) -> bool:
        """Whether the method merges the weights themselves, not their differences from the base.

        The update then contains parts of the base, so post-steps are refused.
        """
        return False

    def survey(self, walk: Walk) -> Any:
        """Compute statistics of the whole model before the merge; :meth:`merge` receives them."""
        return None

    def keeps_base(self, tensor: TensorContext) -> bool:
        """Return whether a tensor with the base's values in all models stays exactly unchanged.

        The planner calls this for tensors that are known to be equal before any is read. It copies
        such tensors instead of merging them. The default is False: the weights may have been
        scaled.
        """
        return False

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the update that :meth:`merge` returns; by default that of a sum."""
        return total_shape(tensor)

    @abstractmethod
    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge the task vectors of one tensor.

        Args:
            deltas: w_t · τ_t (τ_t if not :attr:`scaled_inputs`) of the tasks that change the
                tensor, at least one; the other ones of the T tasks count as zero.
            tensor: The tensor.
            survey: The result of :meth:`survey`.

        Returns:
            The update to add to the base, of the same shape.
        """


class PostStep(Method):
    """A step that changes the merged update."""

    kind = "post-step"

    def survey(self, walk: MergedWalk) -> Any:
        """Compute statistics of the merged model; :meth:`apply` receives the result."""
        return None

    def check_merge(self, merge: Merge) -> None:
        """Check that the step is defined after the merge of its chain.

        Raises:
            UsageError: It is not.
        """

    def check_before(self, steps: Sequence[PostStep]) -> None:
        """Check that the step does not undo a post-step before it in the chain.

        Raises:
            UsageError: It would undo one of them.
        """

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the update that :meth:`apply` returns; by default a scaled update."""
        return scaled_shape(tensor)

    @abstractmethod
    def apply(self, merged: Delta, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Change the merged update of one tensor.

        Args:
            merged: The update so far.
            deltas: The task vectors τ_t of the models, not transformed and not weighted.
            tensor: The tensor.
            survey: The result of :meth:`survey`.

        Returns:
            The new update, of the same shape.
        """


class MergedWalk(Protocol):
    """A pass over all tensors with the merged update so far."""

    def __call__(
        self, visit: Callable[[Delta, Deltas, TensorContext], _Result], /
    ) -> Iterator[_Result]:
        """Yield ``visit(merged, deltas, tensor)`` for each tensor that some model changes."""


def _fault(thing: Any) -> str | None:
    """Return the reason why an object is not a usable method; None for a usable one."""
    if not isinstance(thing, type):
        return f"it is of the type {type(thing).__name__}, and a method is a class"
    if not issubclass(thing, Transform | Merge | PostStep):
        return "it is a class, and a method is one of Transform, Merge or PostStep"
    if "name" not in vars(thing) or "__dataclass_fields__" not in vars(thing):
        return 'it is not decorated. Write @method("name") above it'
    missing = sorted(getattr(thing, "__abstractmethods__", ()))
    return f"it does not define {', '.join(missing)}" if missing else None


METHODS: Registry[type[Method]] = Registry("method", "starmerge_models.methods", fault=_fault)
"""All methods by name, including those of other packages and files."""

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
        _raise_usage_errors(made)
        METHODS.add(name, made)
        return made

    return register


def _raise_usage_errors(made: type[Method]) -> None:
    """Make a method's constructor raise UsageError in place of pydantic's errors."""
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
    """Return whether the sum of weights is zero up to rounding, so that no average exists.

    The test is |Σ w_t| ≤ 1e-9 · Σ |w_t|, which holds for 0.1 + 0.2 − 0.3 too.
    """
    return abs(math.fsum(weights)) <= 1e-9 * sum(map(abs, weights))


def refuse_weights(
    method: Method, tasks: Sequence[str], weights: Sequence[float], reason: str
) -> None:
    """Refuse weights other than 1, for methods in which weights have no meaning.

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
    """Refuse negative weights, for methods whose sums must be positive.

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
