"""Recipes of mergekit, translated into recipes of our own.

Read as mergekit 0.1.5 reads them, with one difference: what it ignores is an error here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from starmerge.errors import UsageError, explain, nearest
from starmerge.mergekit.settings import BASE, PARAMETERS, Setting, read_settings

_WHOLE = "Only whole models are merged here"
_TOKENS = "No tokenizer is changed here: all models must have the base's"

_REFUSED = {
    "modules": f"{_WHOLE}, as 'models'.",
    "tokenizer": f"{_TOKENS}. Leave the key out.",
    "chat_template": "The base's chat template is copied. Leave the key out.",
    "name": "Several recipes in one are for mergekit-multi: run them one after the other.",
    "experts": "Mixtures of experts are made by mergekit-moe, not here.",
    "gate_mode": "Mixtures of experts are made by mergekit-moe, not here.",
    "source_model": "Mixtures of experts are made by mergekit-moe, not here.",
    "experts_per_token": "Mixtures of experts are made by mergekit-moe, not here.",
    "shared_experts": "Mixtures of experts are made by mergekit-moe, not here.",
    "architecture": "Mixtures of experts are made by mergekit-moe, not here.",
    "genome": "Merges are searched by mergekit-evolve, not here.",
    "tasks": "Merges are searched by mergekit-evolve, not here.",
}
"""Keys that mergekit's tools know, and what to do about them."""

_MARKS = {"merge_method", "base_model", "slices", *_REFUSED} - {"name", "tasks", "tokenizer"}
"""Keys that no recipe of our own has."""

_NO_BASE = {"linear", "nuslerp", "karcher"}
"""Methods that need no base model."""

_BASE_JOINS = {"linear", "karcher"}
"""Methods for which a base model that is given is one of the models to merge."""

_OTHER_METHODS = {
    "passthrough": "it copies layers instead of merging them.",
    "multislerp": "for several models there is karcher.",
    "arcee_fusion": "its choice of entries is decided by rounding.",
    "nearswap": "slerp with a small t also keeps near to the base.",
    "ram": "sce and ties also keep what single models changed.",
    "ramplus_tl": "sce and ties also keep what single models changed.",
}
"""Merge methods of mergekit that do not run here."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(_Strict):
    model: str | dict[str, Any]
    parameters: dict[str, Any] | None = None


class _Source(_Model):
    layer_range: tuple[int, int]


class _Slice(_Strict):
    sources: list[_Source] = Field(min_length=1)
    parameters: dict[str, Any] | None = None


class _Recipe(_Strict):
    merge_method: str
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    base_model: str | dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | dict[str, Any] | None = None


def is_mergekit_recipe(content: Mapping[str, Any]) -> bool:
    """Tell whether a recipe is one for mergekit or its sister tools."""
    return not _MARKS.isdisjoint(content) and "method" not in content


def translate(content: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return the keys of a :class:`starmerge.recipe.Recipe` that does what mergekit's would.

    Args:
        content: The keys of mergekit's recipe.
        where: How error messages call it.

    Raises:
        UsageError: It asks for what does not run here, or for what mergekit would ignore.
    """
    try:
        return _translated(content)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error)}") from error


def _translated(content: Mapping[str, Any]) -> dict[str, Any]:
    _check_keys(content, _Recipe, "the recipe", _REFUSED)
    for kind, members in (("models", _Model), ("slices", _Slice)):
        for member in _dicts(content.get(kind)):
            _check_keys(member, members, f"an entry of {kind!r}", {})
            for source in _dicts(member.get("sources")):
                _check_keys(source, _Source, "a source", {})
    recipe = _Recipe.model_validate(dict(content))
    method = recipe.merge_method
    _check_method(method)
    if recipe.tokenizer_source not in (None, "base"):
        raise UsageError(f"tokenizer_source is {recipe.tokenizer_source!r}. {_TOKENS}.")
    models, of_slice, layers = _models(recipe)
    base = None if recipe.base_model is None else _reference(recipe.base_model)
    if base is None and method not in _NO_BASE:
        raise UsageError(f"{method} needs the key 'base_model'.")

    references = [_reference(entry.model) for entry in models]
    for reference, times in Counter(references).items():
        if times > 1:
            raise UsageError(f"the model {reference!r} is listed twice. A model counts once.")
    if layers is not None and base is not None and base not in references:
        raise UsageError(
            f"base_model {base!r} is none of the sources of the slice. List it there, or write "
            "'models' instead of 'slices'."
        )
    with_base = base is None or method in _BASE_JOINS
    # Without a base, the differences from the first model are as good as any: it is one of them.
    base = references[0] if base is None else base
    others = [reference for reference in references if reference != base]
    if not others:
        raise UsageError(f"{base!r} is the only model. Give another one to merge.")
    names = {**dict(zip(others, _names(others), strict=True)), base: BASE}
    settings = []
    for entry, reference in zip(models, references, strict=True):
        if reference == base and not with_base and entry.parameters:
            raise UsageError(
                f"the base {base!r} has parameters ({', '.join(entry.parameters)}), which "
                f"{method} would ignore. Leave them out."
            )
        settings += _settings(method, entry.parameters, names[reference])
    settings += _settings(method, of_slice, None) + _settings(method, recipe.parameters, None)
    return {
        "base": base,
        "models": [{"path": reference, "name": names[reference]} for reference in others],
        "method": "mergekit",
        "parameters": {
            "merge_method": method,
            "settings": settings,
            "with_base": with_base,
            "layers": layers,
        },
        "dtype": _dtype(recipe),
    }


def _check_keys(
    content: Mapping[str, Any], model: type[BaseModel], what: str, refused: Mapping[str, str]
) -> None:
    for key in content:
        if key in refused:
            raise UsageError(f"the key {key!r} is not supported. {refused[key]}")
        if key not in model.model_fields:
            hint = nearest(str(key), model.model_fields)
            raise UsageError(f"{what} has the unknown key {key!r}, which mergekit ignores.{hint}")


def _check_method(method: str) -> None:
    if method in _OTHER_METHODS:
        raise UsageError(f"the merge_method {method!r} is not supported: {_OTHER_METHODS[method]}")
    if method not in PARAMETERS:
        raise UsageError(f"no merge_method is called {method!r}.{nearest(method, PARAMETERS)}")


def _models(recipe: _Recipe) -> tuple[Sequence[_Model], dict[str, Any] | None, int | None]:
    """Return the models, the parameters of the slice they are in, and how many layers it has."""
    if (recipe.models is None) == (recipe.slices is None):
        raise UsageError("one of the keys 'models' and 'slices' says what is merged. Give one.")
    if recipe.slices is None:
        if not recipe.models:
            raise UsageError("'models' is empty. List the models to merge.")
        return recipe.models, None, None
    if len(recipe.slices) != 1:
        raise UsageError(
            f"there are {len(recipe.slices)} 'slices'. {_WHOLE}: one slice of all layers, or "
            "'models'."
        )
    (whole,) = recipe.slices
    ranges = {source.layer_range for source in whole.sources}
    if len(ranges) > 1:
        raise UsageError(f"the 'layer_range' of the sources differ. {_WHOLE}.")
    (first,) = ranges
    if first[0] != 0 or first[1] < 1:
        raise UsageError(f"'layer_range' is {list(first)}. {_WHOLE}: from 0 to the last layer.")
    return whole.sources, whole.parameters, first[1]


def _reference(model: str | dict[str, Any]) -> str:
    """Return a model's path or Hub id, with its revision."""
    if isinstance(model, str):
        if "+" in model:
            raise UsageError(
                f"the model {model!r} is a model and an adapter. List the adapter itself: its "
                "update is merged without rounding it first."
            )
        return model
    for key in ("lora", "override_architecture"):
        if model.get(key) is not None:
            advice = "List the adapter itself as a model." if key == "lora" else "Leave it out."
            raise UsageError(f"the key {key!r} of a model is not supported. {advice}")
    inner = model.get("model")
    if isinstance(inner, str):
        return _reference(inner)
    if not isinstance(inner, dict) or not isinstance(inner.get("path"), str):
        raise UsageError(f"{model!r} is no model: give its path or Hub id.")
    for part, known in ((model, ("model", "lora", "override_architecture")), (inner, _PATH)):
        for key in part:
            if key not in known:
                raise UsageError(f"a model has the unknown key {key!r}.{nearest(str(key), known)}")
    revision = inner.get("revision")
    return inner["path"] if revision is None else f"{inner['path']}@{revision}"


_PATH = ("path", "revision")


def _names(references: Sequence[str]) -> list[str]:
    """Name models after the last part of their paths, or after the path where that is taken."""
    names: dict[str, None] = {}
    for reference in references:
        last = reference.rstrip("/").rpartition("/")[2].partition("@")[0]
        choices = chain((last, reference), (f"{last}-{number}" for number in count(2)))
        names[next(name for name in choices if name not in ("", BASE) and name not in names)] = None
    return list(names)


def _settings(
    method: str, parameters: Mapping[str, Any] | None, model: str | None
) -> list[dict[str, Any]]:
    """Return the parameters of one level of a recipe as settings, in their order."""
    settings = list[Setting]()
    for name, value in (parameters or {}).items():
        conditional = [value] if isinstance(value, dict) else value
        if not isinstance(conditional, list) or not any(isinstance(v, dict) for v in conditional):
            conditional = [{"value": value}]
        for choice in conditional:
            if not isinstance(choice, dict):
                raise UsageError(
                    f"{name!r} mixes values with filters. For the tensors that no filter matches, "
                    f"write '- value: {choice}'."
                )
            if "value" not in choice or not choice.keys() <= {"filter", "value"}:
                raise UsageError(f"{name!r}: a choice has a 'value', and may have a 'filter'.")
            matching = None if choice.get("filter") == "*" else choice.get("filter")
            settings.append(
                Setting(parameter=name, value=choice["value"], model=model, filter=matching)
            )
    try:
        read = read_settings(method, settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return [setting.model_dump(exclude_none=True) for setting in read]


def _dtype(recipe: _Recipe) -> str:
    """Return the output's dtype. What mergekit computes in, ``dtype``, decides it by itself."""
    for key in ("dtype", "out_dtype"):
        given = getattr(recipe, key)
        if given is not None and given.removeprefix("torch.") not in _DTYPES:
            raise UsageError(f"{key} is {given!r}.{nearest(given, _DTYPES)}")
    chosen = recipe.out_dtype or recipe.dtype
    if chosen is None:
        return "keep"
    if chosen.removeprefix("torch.") == "float64":
        raise UsageError(
            "the output would be float64, which is not written. Choose an out_dtype: everything "
            "is computed in float64 anyway."
        )
    return chosen.removeprefix("torch.")


_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _dicts(content: object) -> list[dict[str, Any]]:
    """Return the mappings of a list; what is wrong with the others, validation says."""
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
