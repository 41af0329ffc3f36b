"""The schema of mergekit 0.1.5's recipes, and its unsupported keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.mergekit.settings import PARAMETERS

_MIXTURE = "Mixtures of experts are made by mergekit-moe, not here."
_SEARCH = "Merges are searched by mergekit-evolve, not here."

REFUSED = {
    "experts": _MIXTURE,
    "gate_mode": _MIXTURE,
    "source_model": _MIXTURE,
    "experts_per_token": _MIXTURE,
    "shared_experts": _MIXTURE,
    "architecture": _MIXTURE,
    "genome": _SEARCH,
    "tasks": _SEARCH,
}
"""Unsupported keys of mergekit's tools, with advice."""


class Keys(BaseModel):
    """A mapping of a recipe; unknown keys are reported before validation."""

    model_config = ConfigDict(extra="ignore")


class Model(Keys):
    """A model, with its own parameters."""

    model: str | dict[str, Any]
    parameters: dict[str, Any] | None = None


class Source(Model):
    """A range of layers of a model; the end is exclusive."""

    layer_range: tuple[int, int]


class Slice(Keys):
    """Layers of the output, and their sources."""

    sources: list[Source] = Field(min_length=1)
    base_model: str | dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


class Module(Keys):
    """A part of a model with several stacks of layers, and its sources."""

    models: list[Model] | None = None
    slices: list[Slice] | None = None
    parameters: dict[str, Any] | None = None


class Tokenizer(Keys):
    """The output's tokenizer."""

    source: str | dict[str, Any] = "union"


class Recipe(Keys):
    """A merge."""

    merge_method: str
    models: list[Model] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    base_model: str | dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None


@dataclass
class Problems:
    """Collects all problems of a recipe."""

    found: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect a raised error, and continue after the block."""
        try:
            yield
        except UsageError as error:
            self.found.append(str(error))
        except ValidationError as error:
            self.found.append(explain(error))

    def raise_if_any(self, where: str) -> None:
        """Raise an error with all problems, if there are any.

        Raises:
            UsageError: There is a problem.
        """
        found = list(dict.fromkeys(self.found))
        if len(found) == 1:
            raise UsageError(f"{where}: {found[0]}")
        if found:
            raise UsageError("\n- ".join([f"{where}: {len(found)} things do not run:", *found]))


def read_recipe(content: Mapping[str, Any]) -> tuple[Recipe | None, Problems]:
    """Validate a mergekit recipe.

    Args:
        content: Its keys.

    Returns:
        The recipe, None if values have wrong types; and the problems: unsupported keys, and keys
        that mergekit ignores.
    """
    problems = Problems()
    _check_keys(content, problems)
    recipe = None
    with problems.collecting():
        recipe = Recipe.model_validate(dict(content))
    method = content.get("merge_method")
    if isinstance(method, str) and method not in PARAMETERS:
        problems.found.append(f"no merge_method is called {method!r}.{nearest(method, PARAMETERS)}")
    problems.found += _of_tokenizer(content)
    for model in _references(content):
        with problems.collecting():
            reference_of(model)
    for key in ("dtype", "out_dtype"):
        with problems.collecting():
            _check_dtype(key, content.get(key))
    return recipe, problems


def _check_keys(content: Mapping[str, Any], problems: Problems) -> None:
    """Collect unsupported keys, and keys that mergekit ignores."""
    refused = dict[str, list[str]]()
    for key in (key for key in content if key in REFUSED):
        refused.setdefault(REFUSED[key], []).append(repr(key))
    for advice, keys in refused.items():
        which = f"the key {keys[0]} is" if len(keys) == 1 else f"the keys {', '.join(keys)} are"
        problems.found.append(f"{which} not supported. {advice}")

    def check(mapping: Mapping[str, Any], model: type[BaseModel], what: str) -> None:
        for key in mapping:
            if key not in model.model_fields and (model is not Recipe or key not in REFUSED):
                hint = nearest(str(key), model.model_fields)
                problems.found.append(
                    f"{what} has the unknown key {key!r}, which mergekit ignores.{hint}"
                )

    check(content, Recipe, "the recipe")
    if isinstance(content.get("tokenizer"), dict):
        known = {k: v for k, v in content["tokenizer"].items() if k not in _TOKENIZER_KEYS}
        check(known, Tokenizer, "'tokenizer'")
    modules = content.get("modules")
    groups = [content, *_dicts(list(modules.values()) if isinstance(modules, dict) else None)]
    for module in groups[1:]:
        check(module, Module, "a module")
    for group in groups:
        for entry in _dicts(group.get("models")):
            check(entry, Model, "an entry of 'models'")
        for entry in _dicts(group.get("slices")):
            check(entry, Slice, "an entry of 'slices'")
            for source in _dicts(entry.get("sources")):
                check(source, Source, "a source")


_TOKENIZER_KEYS = {
    "tokens": "each new token has the row of the model that has it, or the mean of several",
    "pad_to_multiple_of": "the tables are as long as the tokens need, or as the base's",
}
"""Unsupported keys of mergekit's tokenizer, and the behaviour instead."""


def _of_tokenizer(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems with a recipe's tokenizer and chat template."""
    tokenizer, template = content.get("tokenizer"), content.get("chat_template")
    if tokenizer is not None and content.get("tokenizer_source") is not None:
        yield "'tokenizer' and 'tokenizer_source' both choose the tokenizer. Leave one out."
    if isinstance(tokenizer, dict):
        for key, instead in _TOKENIZER_KEYS.items():
            if tokenizer.get(key):
                yield f"the key {key!r} of 'tokenizer' is not supported: {instead}. Leave it out."
    if template == "auto":
        yield (
            "chat_template is 'auto', which counts the models' templates. Leave the key out, and "
            "the merge says which models have another one than the base."
        )
    elif isinstance(template, str) and "{" not in template:
        yield (
            f"chat_template is {template!r}, a template that only mergekit includes. Give its "
            "Jinja text."
        )


def _references(content: Any) -> Iterator[str | dict[str, Any]]:
    """Yield all model references of a recipe."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("model", "base_model") or (
                key == "tokenizer_source" and value not in _SOURCES
            ):
                if isinstance(value, str | dict):
                    yield value
            elif key not in ("parameters", "tokenizer"):
                yield from _references(value)
    elif isinstance(content, list):
        for item in content:
            yield from _references(item)


_SOURCES = ("base", "union")
"""Values of the tokenizer source that are not models."""


def reference_of(model: str | dict[str, Any]) -> str:
    """Return a model's path or Hub id with its revision, and its adapter's after a ``+``.

    Raises:
        UsageError: It is not a model reference, or overrides the architecture.
    """
    if isinstance(model, str):
        if model.count("+") > 1 or not all(model.split("+")):
            raise UsageError(f"{model!r} is no model: one adapter may follow it, MODEL+ADAPTER.")
        return model
    if model.get("override_architecture") is not None:
        raise UsageError(
            "the key 'override_architecture' of a model is not supported. Leave it out."
        )
    for key in model:
        if key not in _MODEL_KEYS:
            raise UsageError(
                f"a model has the unknown key {key!r}.{nearest(str(key), _MODEL_KEYS)}"
            )
    own = _path(model.get("model"), model)
    return own if model.get("lora") is None else f"{own}+{_path(model['lora'], model)}"


def _path(place: Any, model: Mapping[str, Any]) -> str:
    """Return a path or Hub id with its revision, from a model's mapping."""
    if isinstance(place, str):
        return place
    if not isinstance(place, dict) or not isinstance(place.get("path"), str):
        raise UsageError(f"{model!r} is no model: give its path or Hub id.")
    for key in place:
        if key not in _PATH_KEYS:
            raise UsageError(f"a model has the unknown key {key!r}.{nearest(str(key), _PATH_KEYS)}")
    revision = place.get("revision")
    return str(place["path"] if revision is None else f"{place['path']}@{revision}")


_MODEL_KEYS = ("model", "lora", "override_architecture")
_PATH_KEYS = ("path", "revision")


def _check_dtype(key: str, given: Any) -> None:
    if isinstance(given, str) and given.removeprefix("torch.") not in _DTYPES:
        raise UsageError(f"{key} is {given!r}.{nearest(given, _DTYPES)}")


_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _dicts(content: object) -> list[dict[str, Any]]:
    """Return the mappings in a list; validation reports other entries."""
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
