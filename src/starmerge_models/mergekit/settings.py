"""The parameters of mergekit's methods, and the resolution of settings for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.methods.method import TensorContext

BASE = "base"
"""Name of the base in settings, if it is one of the models to merge."""

_Value = bool | int | float


@dataclass(frozen=True)
class Parameter:
    """A parameter of a mergekit method."""

    type: Any
    """Type, with its range."""
    default: _Value | None = None
    """Default; None: the parameter is required."""
    per_model: bool = False
    """Whether each model has its own value."""

    def read(self, value: object) -> _Value | list[_Value]:
        """Convert a value, or the values of a list, to the parameter's type.

        As in mergekit, numbers may be strings, since YAML parses ``1e-3`` as a string.

        Raises:
            ValueError: A value has the wrong type or is out of range, or a list is empty.
        """
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("The list is empty. Leave it out.")
                # Interpolated values of a list of integers are checked when they are resolved.
            return [self._read_one(item) for item in value]
        return self._read_one(value)

    def at(self, value: _Value | Sequence[_Value], layer: tuple[int, int] | None) -> _Value:
        """Return the value for a layer: lists are interpolated over the layers.

        With m values, at depth t from 0 in the first layer to 1 in the last, it is the value at
        position t(m − 1), by linear interpolation; for booleans the preceding one. A single layer
        has the last value; a tensor outside of layers has the first.
        """
        if not isinstance(value, Sequence):
            return value
        depth = 0.0
        if layer is not None:
            index, count = layer
            depth = index / (count - 1) if count > 1 else 1.0
        place = depth * (len(value) - 1)
        i = int(place)
        if self.type is bool:
            return value[i]
        f, after = place - i, value[min(i + 1, len(value) - 1)]
        return self._read_one((1 - f) * value[i] + f * after)

    def _read_one(self, value: object) -> _Value:
        try:
            read: _Value = TypeAdapter(
                self.type, config=ConfigDict(allow_inf_nan=False)
            ).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{explain(error)}.") from error
        return read


_WEIGHT = Parameter(float, per_model=True)
_SHARE = Annotated[float, Field(ge=0, le=1)]
_DENSITY = Parameter(_SHARE, 1.0, per_model=True)
_GAMMA = Parameter(_SHARE, 0.01, per_model=True)
_EPSILON = Parameter(_SHARE, 0.15, per_model=True)
_OFF, _ON = Parameter(bool, False), Parameter(bool, True)
_POSITIVE = Annotated[float, Field(gt=0)]
_AT_LEAST_0 = Annotated[float, Field(ge=0)]
_EPSILON_OF_RAM = Parameter(_AT_LEAST_0, 1e-5)


def _arithmetic(
    *, normalize: Parameter, rescale: Parameter | None = None, **of_models: Parameter
) -> dict[str, Parameter]:
    shared = {"lambda": Parameter(float, 1.0), "normalize": normalize, "int8_mask": _OFF}
    rescaling = {} if rescale is None else {"rescale": rescale}
    return {"weight": _WEIGHT, **of_models, **shared, **rescaling}


PARAMETERS: dict[str, dict[str, Parameter]] = {
    "linear": {"weight": _WEIGHT, "normalize": _ON},
    "slerp": {"t": Parameter(_SHARE)},
    "nuslerp": {"weight": _WEIGHT, "nuslerp_row_wise": _OFF, "nuslerp_flatten": _ON},
    "karcher": {
        "max_iter": Parameter(Annotated[int, Field(ge=1)], 10),
        "tol": Parameter(_POSITIVE, 1e-5),
    },
    "multislerp": {
        "weight": _WEIGHT,
        "normalize_weights": _ON,
        "eps": Parameter(_POSITIVE, 1e-8),
    },
    "nearswap": {"t": Parameter(_AT_LEAST_0)},
    "arcee_fusion": {},
    "ram": {"epsilon": _EPSILON_OF_RAM},
    "ramplus_tl": {
        "epsilon": _EPSILON_OF_RAM,
        "r": Parameter(float, 0.1),
        "alpha": Parameter(_AT_LEAST_0, 0.2),
    },
    "passthrough": {"scale": Parameter(float, 1.0, per_model=True)},
    "model_stock": {"filter_wise": _OFF},
    "sce": {"select_topk": Parameter(_SHARE, 1.0), "int8_mask": _OFF},
    "task_arithmetic": _arithmetic(normalize=_OFF),
    "ties": _arithmetic(normalize=_ON, rescale=_OFF, density=_DENSITY),
    "dare_linear": _arithmetic(normalize=_OFF, rescale=_ON, density=_DENSITY),
    "dare_ties": _arithmetic(normalize=_OFF, rescale=_ON, density=_DENSITY),
    "breadcrumbs": _arithmetic(normalize=_OFF, rescale=_OFF, density=_DENSITY, gamma=_GAMMA),
    "breadcrumbs_ties": _arithmetic(normalize=_OFF, rescale=_OFF, density=_DENSITY, gamma=_GAMMA),
    "della": _arithmetic(normalize=_ON, rescale=_ON, density=_DENSITY, epsilon=_EPSILON),
    "della_linear": _arithmetic(normalize=_OFF, rescale=_ON, density=_DENSITY, epsilon=_EPSILON),
}
"""The parameters of mergekit's methods, with their defaults. int8_mask does not affect results."""


class Setting(BaseModel):
    """A value of a parameter, for some tensors and models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameter: str
    value: Any
    """A number or a boolean, or a list of them to interpolate over the layers."""
    model: str | None = None
    """The model; None: all."""
    filter: str | None = None
    """Substring of the tensors' names; None: all tensors."""
    slice: Annotated[int, Field(ge=0)] | None = None
    """Index of the slice; None: all."""


class Slice(BaseModel):
    """Layers, or a part of the model, that are merged from the same models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field(min_length=1)
    """The merged models, including the base if it counts as one."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Number of layers; None: all."""
    part: str = ""
    """Part of the model: decoder, vision, …; empty: the whole model."""


def read_settings(method: str, settings: Iterable[Setting]) -> tuple[Setting, ...]:
    """Convert the values of settings to the parameters' types.

    Raises:
        ValueError: The method has no such parameter, or not for each model, or a value is invalid.
    """
    read = []
    for setting in settings:
        name, known = setting.parameter, PARAMETERS[method]
        if name not in known:
            raise ValueError(f"{method} does not use the parameter {name!r}.{nearest(name, known)}")
        if setting.model is not None and not known[name].per_model:
            raise ValueError(
                f"{name!r} of the model {setting.model!r} would be ignored: all models share it. "
                "Move it to the recipe's own parameters."
            )
        try:
            value = known[name].read(setting.value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        read.append(setting.model_copy(update={"value": value}))
    return tuple(read)


@dataclass(frozen=True)
class Resolved:
    """The values of all parameters for one tensor."""

    shared: dict[str, Any]
    own: list[dict[str, Any]]
    """Parameters of each model, in the models' order."""


def resolve(
    method: str,
    settings: Sequence[Setting],
    models: Sequence[str],
    tensor: TensorContext,
    slice_number: int | None = None,
) -> Resolved:
    """Resolve all parameters for one tensor.

    The first setting applies that matches the parameter, the model, the slice, and whose filter is
    in the tensor's name; without a match, the default applies.

    Args:
        method: mergekit's name of the method.
        settings: The settings of the recipe.
        models: The models to merge.
        tensor: The tensor, with its layer index within the slice.
        slice_number: The index of the slice; None without slices.

    Raises:
        UsageError: A required parameter has no value, or an interpolated value is invalid.
    """

    def value(name: str, model: str | None) -> _Value:
        parameter = PARAMETERS[method][name]
        for setting in settings:
            if (
                setting.parameter == name
                and setting.model in (None, model)
                and setting.slice in (None, slice_number)
                and (setting.filter is None or setting.filter in tensor.name)
            ):
                try:
                    return parameter.at(setting.value, tensor.layer)
                except ValueError as error:
                    raise UsageError(f"{method}: {name} for {tensor.name}: {error}") from error
        if parameter.default is None:
            whose = "" if model is None else f" of {'the base' if model == BASE else model}"
            if not any(s.parameter == name and s.model in (None, model) for s in settings):
                raise UsageError(
                    f"{method}: the parameter {name!r}{whose} is not given, and has no default. "
                    "Give it under the 'parameters' of the model or of the recipe."
                )
            raise UsageError(
                f"{method}: the parameter {name!r}{whose} is missing for the tensor {tensor.name}, "
                "and has no default. Give it for all tensors: the last filter may be '*'."
            )
        return parameter.default

    known = PARAMETERS[method].items()
    return Resolved(
        {name: value(name, None) for name, parameter in known if not parameter.per_model},
        [
            {name: value(name, model) for name, parameter in known if parameter.per_model}
            for model in models
        ],
    )
