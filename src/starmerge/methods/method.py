"""What a merging method is, and the registry of all of them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from starmerge.deltas import Delta
from starmerge.errors import UsageError, nearest
from starmerge.spectral import Truncation


@dataclass(frozen=True)
class TensorContext:
    """What a method may know of the tensor it merges, besides its deltas."""

    name: str
    shape: tuple[int, ...]
    is_embedding: bool
    """Whether each row belongs to an entry of a vocabulary or to a position."""
    tasks: int
    """Number of models in the merge, T."""


@dataclass(frozen=True)
class Merged:
    """What a method made of one tensor."""

    delta: Delta
    """What is added to the base."""
    truncations: tuple[Truncation | None, ...] = ()
    """Delta by delta, what was kept; empty for methods that keep everything."""


class Method(ABC):
    """A merging method: a small pure function over the deltas of one tensor.

    Subclasses are made by the decorator :func:`method`; their fields are the parameters.
    """

    name: ClassVar[str]
    svd_of_dense: ClassVar[bool] = False
    """Whether dense deltas are decomposed, which takes memory for their factors."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @abstractmethod
    def merge(self, deltas: Iterable[Delta], context: TensorContext) -> Merged:
        """Merge the deltas of one tensor.

        Args:
            deltas: Of the models that change the tensor, at least one, in the order of the models;
                the others of the T models count as zero. May be a generator: deltas are read
                when they are taken, so a method that lets go of each holds one at a time.
            context: The tensor.

        Returns:
            What to add to the base, of the same shape.
        """


METHODS: dict[str, type[Method]] = {}
"""Every method by name."""

_Method = TypeVar("_Method", bound=Method)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(name: str) -> Callable[[type[_Method]], type[_Method]]:
    """Make the decorated class a method called ``name``.

    The class becomes a frozen dataclass whose fields are validated parameters, and goes into the
    registry. Unknown parameters, NaN and infinities are refused.
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
        METHODS[name] = made
        return made

    return register


def make_method(name: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """Return a method by name, its parameters validated.

    Raises:
        UsageError: No such method, no such parameter, or a value out of its range.
    """
    if name not in METHODS:
        raise UsageError(f"No method is called {name!r}.{nearest(name, METHODS)}")
    chosen = METHODS[name]
    known = [field.name for field in dataclasses.fields(chosen)]  # type: ignore[arg-type]
    for key in parameters or {}:
        if key not in known:
            hint = nearest(key, known) if known else " It has none."
            raise UsageError(f"Method {name!r} has no parameter {key!r}.{hint}")
    try:
        return TypeAdapter(chosen).validate_python(dict(parameters or {}))
    except ValidationError as error:
        raise UsageError(f"Method {name!r}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Return pydantic's findings as one line: ``eta: Input should be greater than 0 (got -1)``."""
    findings = []
    for finding in error.errors():
        place = ".".join(str(part) for part in finding["loc"])
        given = "" if finding["type"] == "missing" else f" (got {finding['input']!r})"
        findings.append(f"{place + ': ' if place else ''}{finding['msg']}{given}")
    return "; ".join(findings)
