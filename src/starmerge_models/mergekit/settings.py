"""The settings of mergekit's recipes: which there are, and what they come to for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.methods.method import TensorContext

BASE = "base"
"""How settings call the base where it is one of the models to merge."""

_Value = bool | int | float


@dataclass(frozen=True)
class Parameter:
    """A parameter that a merge method of mergekit has."""

    type: Any
    """Its type, with its range."""
    default: _Value | None = None
    """None: it must be given."""
    of_each_model: bool = False
    """Whether each model has its own."""

    def read(self, value: object) -> _Value | list[_Value]:
        """Return a value, or the values of a list, in the parameter's type.

        As mergekit does, numbers may be written as text, which YAML takes ``1e-3`` for.

        Raises:
            ValueError: A value is of another type or out of its range; a list is empty.
        """
        if isinstance(value, list | tuple):
            if not value:
                raise ValueError("An empty list says nothing. Leave it out.")
            # What a list of whole numbers comes to between them is seen when it is resolved.
            return [self._read_one(item) for item in value]
        return self._read_one(value)

    def at(self, value: _Value | Sequence[_Value], layer: tuple[int, int] | None) -> _Value:
        """Return what a value comes to in a layer: lists are spread over the layers.

        Of m values at depth t, from 0 in the first layer to 1 in the last, it is the one at
        t(m − 1), between two values by linear interpolation; of booleans the one before. A single
        layer is the last; a tensor outside of layers has the first value.
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


_WEIGHT = Parameter(float, of_each_model=True)
_SHARE = Annotated[float, Field(ge=0, le=1)]
_DENSITY = Parameter(_SHARE, 1.0, of_each_model=True)
_GAMMA = Parameter(_SHARE, 0.01, of_each_model=True)
_EPSILON = Parameter(_SHARE, 0.15, of_each_model=True)
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
    "passthrough": {"scale": Parameter(float, 1.0, of_each_model=True)},
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
"""The parameters of mergekit's methods, with its defaults. int8_mask changes no result."""


class Setting(BaseModel):
    """A value of a parameter, for some of the tensors and models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameter: str
    value: Any
    """A number or a truth value, or a list of them over the layers."""
    model: str | None = None
    """The model it is for; None for all."""
    filter: str | None = None
    """What a tensor's name must contain; None for all."""
    slice: Annotated[int, Field(ge=0)] | None = None
    """The number of the slice it is for; None for all."""


class Slice(BaseModel):
    """Layers that are merged of the same models, or a part of the model that is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field(min_length=1)
    """The models that are merged there, the base among them if it counts as one."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """How many layers there are; None: all."""
    part: str = ""
    """The part of the model that it is of: decoder, vision, …; empty: the whole."""


def read_settings(method: str, settings: Iterable[Setting]) -> tuple[Setting, ...]:
    """Return settings with their values in the parameters' types.

    Raises:
        ValueError: The method has no such parameter, or not of each model; a wrong value.
    """
    read = []
    for setting in settings:
        name, known = setting.parameter, PARAMETERS[method]
        if name not in known:
            raise ValueError(f"{method} does not use the parameter {name!r}.{nearest(name, known)}")
        if setting.model is not None and not known[name].of_each_model:
            raise ValueError(
                f"{name!r} of the model {setting.model!r} would be ignored: it is one for all "
                "models. Move it to the recipe's own parameters."
            )
        try:
            value = known[name].read(setting.value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        read.append(setting.model_copy(update={"value": value}))
    return tuple(read)


@dataclass(frozen=True)
class Resolved:
    """What all parameters come to for one tensor."""

    shared: dict[str, Any]
    own: list[dict[str, Any]]
    """Those that each model has its own of, by model."""


def resolve(
    method: str,
    settings: Sequence[Setting],
    models: Sequence[str],
    tensor: TensorContext,
    slice_number: int | None = None,
) -> Resolved:
    """Return what all parameters come to for one tensor.

    The first setting counts that is for the parameter, for the model or for all, for the slice or
    for all, and whose filter the tensor's name contains; without one, the default.

    Args:
        method: mergekit's name of the method.
        settings: The settings of the recipe.
        models: The models that are merged.
        tensor: The tensor; its layer is that within the slice.
        slice_number: The number of the slice; None where there are none.

    Raises:
        UsageError: A parameter without a default has no value, or an interpolated one is wrong.
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
                "and has no default. Give it, for all tensors: the last filter may be '*'."
            )
        return parameter.default

    known = PARAMETERS[method].items()
    return Resolved(
        {name: value(name, None) for name, parameter in known if not parameter.of_each_model},
        [
            {name: value(name, model) for name, parameter in known if parameter.of_each_model}
            for model in models
        ],
    )
