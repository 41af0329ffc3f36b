"""The recipe of a merge: models, method, parameters, dtype and output."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
)

from starmerge_models.checkpoints.references import name_of
from starmerge_models.demo_names import path_text
from starmerge_models.errors import UsageError, explain, nearest
from starmerge_models.methods.pipeline import Pipeline, make_pipeline
from starmerge_models.storage import exists, is_url

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
OutputKind = Literal["model", "adapter", "gguf", "unified"]


class ModelEntry(BaseModel):
    """One model of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str = Field(
        min_length=1,
        description="a folder or a Hub id org/name[@rev]; MODEL+ADAPTER; layers: A[0:8],B[4:12]",
    )
    name: str = Field(min_length=1, description="its name in tables and reports")
    weight: float = Field(
        default=1.0, allow_inf_nan=False, description="factor of its task vector, w_t"
    )


_Models = Annotated[list[str | ModelEntry], Field(min_length=1)]
"""How a file may write models."""


class OutputEntry(BaseModel):
    """The kind of output that a merge writes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: OutputKind | None = Field(
        default=None,
        description="model, adapter, gguf or unified; by default the kind that the method makes",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="an adapter's rank; by default as high as its updates need",
    )
    max_error: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="refuse an adapter whose update is farther from the merge's, relative to it",
    )

    @model_serializer
    def _without_unset(self) -> dict[str, Any]:
        """Leave out fields that are not set; a model has no rank, for example."""
        return {key: value for key, value in vars(self).items() if value is not None}


class Recipe(BaseModel):
    """A merge, fully specified and validated.

    In YAML::

        base: HuggingFaceTB/SmolLM2-135M-Instruct
        models:
          - adapters/digits
          - {path: adapters/language, name: language, weight: 2}
        method: star
        parameters: {eta: 40}
        metric: metric.safetensors
        tokenizer: union
        chat_template: digits
        dtype: keep

    Methods that are not built in are plug-ins: those of an installed package are given by name,
    those of a file as ``path/to/file.py:NAME``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base: str | None = Field(
        default=None,
        description="the base model: a folder or a Hub id, or layers of several, A[0:8],B[4:12]; "
        "adapters make an adapter without it",
    )
    models: list[ModelEntry] = Field(min_length=1, description="the fine-tunes to merge")
    method: str = Field(
        default="star",
        description="a method of `starmerge methods`, or a chain: star+ties, star+my.py:Mine",
    )
    parameters: dict[str, Any] = Field(
        default={}, description="the method's parameters: eta, or star.eta where several have it"
    )
    plugins: dict[str, dict[str, str]] = Field(
        default={},
        description="origins of the methods that are not built in, by name: package and version, "
        "or file and BLAKE3; a merge refuses methods of another origin",
    )
    metric: str | None = Field(
        default=None,
        min_length=1,
        description="a file of `starmerge calibrate`: spectral methods merge in whitened inputs",
    )
    tokenizer: str = Field(
        default="base",
        min_length=1,
        description="the output's: base; union, which adds the tokens of all models; the name of a "
        "model, or a folder or Hub id with a tokenizer",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="the output's: base, the name of a model, a Jinja file, a folder or Hub id "
        "with a tokenizer; by default the tokenizer's",
    )
    dtype: Dtype = Field(default="keep", description="dtype of the merged floating-point tensors")
    output: OutputEntry = Field(
        default=OutputEntry(), description="what is written: {kind: adapter, rank: 16}"
    )
    any_base: bool = Field(
        default=False,
        description="accept models whose config names another base, or differs from the base's",
    )
    common: bool = Field(
        default=False,
        description="merge what the models share with the base; heads and towers that one side "
        "lacks are the base's",
    )

    @field_validator("models", mode="before", json_schema_input_type=_Models)
    @classmethod
    def _name_models(cls, models: Any) -> Any:
        """Convert bare paths to models, and name each model after the last part of its path."""
        if not isinstance(models, list | tuple):
            return models
        return [
            {"name": name_of(entry["path"]), **entry}
            if isinstance(entry, dict) and isinstance(entry.get("path"), str)
            else entry
            for entry in ({"path": m} if isinstance(m, str) else m for m in models)
        ]

    @field_validator("models")
    @classmethod
    def _check_unique_names(cls, models: list[ModelEntry]) -> list[ModelEntry]:
        names = Counter(entry.name for entry in models)
        for entry in models:
            if names[entry.name] > 1:
                raise ValueError(
                    f"two models are called {entry.name!r}. Give each a name of its own "
                    "(NAME=PATH, a mapping {name: path}, or name: in YAML); a model counts once"
                )
        return models

    def make_pipeline(self) -> Pipeline:
        """Return the methods with their parameters.

        Raises:
            UsageError: An unknown method or parameter, or a value out of its range.
        """
        return make_pipeline(self.method, self.parameters)

    def to_yaml(self) -> str:
        """Return the recipe in YAML; reading it as a recipe file gives an equal recipe."""
        content = self.model_dump()
        for key in ("base", "plugins"):
            if not content[key]:
                del content[key]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def make_recipe(content: Mapping[str, Any], *, where: str = "The recipe") -> Recipe:
    """Validate a recipe, its method and its parameters.

    Args:
        content: The keys of :class:`Recipe`.
        where: Name of the recipe in error messages.

    Raises:
        UsageError: A key is unknown or missing, a value is wrong, or a plug-in is not of the origin
            that the recipe gives.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    for key in content:
        if key not in Recipe.model_fields:
            raise UsageError(f"{where} has the unknown key {key!r}.{nearest(str(key), _KEYS)}")
    try:
        recipe = Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error)}") from error
    pipeline = recipe.make_pipeline()
    output = recipe.output
    output = output.model_copy(update={"kind": output.kind or pipeline.merge.outputs[0]})
    if recipe.base is None and output.kind not in ("adapter", "gguf"):
        raise UsageError(
            f"{where} lacks the base. Only an adapter is made of adapters alone, without it "
            "(--as adapter; output: {kind: adapter} in a recipe)."
        )
    if output.kind != "model" and (recipe.tokenizer != "base" or recipe.chat_template is not None):
        raise UsageError(
            f"{where} chooses a tokenizer or a chat template, and the output, of the kind "
            f"{output.kind}, has neither. Leave the choice out, or write a model."
        )
    origins = {name: origin.record() for name, origin in pipeline.plugins.items()}
    for name, given in recipe.plugins.items():
        if name not in origins:
            raise UsageError(
                f"{where}: 'plugins' speaks of {name!r}, which is no plug-in of {recipe.method}. "
                "Delete it."
            )
        if given != origins[name]:
            raise UsageError(
                f"{where}: the plug-in {name!r} was {_in_words(given)} when the recipe was made, "
                f"and is {_in_words(origins[name])} now. Restore it, or delete 'plugins' from the "
                "recipe to take it as it is."
            )
    # Fill in the defaults, so that the recipe has the same meaning in later versions.
    filled = {"parameters": pipeline.parameters(), "output": output, "plugins": origins}
    return recipe.model_copy(update=filled)


def model_entries(
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
) -> list[dict[str, str]]:
    """Return the model entries of a recipe, from paths, ``NAME=PATH`` texts, or paths by name.

    Raises:
        UsageError: A model is given in another form.
    """
    if isinstance(models, Mapping):
        return [{"name": name, "path": reference(path)} for name, path in models.items()]
    if isinstance(models, str | Path) or not isinstance(models, Iterable):
        return parse_models([reference(models)])
    return parse_models([reference(model) for model in models])


def reference(model: str | Path) -> str:
    """Return the folder or Hub id of a base or a model as text, for a recipe.

    Raises:
        UsageError: The argument is something else, such as a loaded model.
    """
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"A {type(model).__name__} stands where a model's folder or Hub id is wanted. Give the "
            "path that it was loaded from, or save it and give that folder."
        )
    return model if isinstance(model, str) else path_text(model)


def parse_models(arguments: Sequence[str]) -> list[dict[str, str]]:
    """Parse the models of a command line, each ``PATH`` or ``NAME=PATH``."""
    entries = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if equals and not is_url(argument) and not exists(Path(argument)):
            entries.append({"name": name, "path": path})
        else:
            entries.append({"name": name_of(argument), "path": argument})
    return entries


def paths_by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the paths of models by their names.

    Args:
        entries: As :func:`parse_models` returns them.

    Raises:
        UsageError: Two have the same name.
    """
    named = {entry["name"]: entry["path"] for entry in entries}
    if len(named) < len(entries):
        raise UsageError("Two models have the same name. Give each its own with NAME=PATH.")
    return named


_KEYS = list(Recipe.model_fields)


def _in_words(origin: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in origin.items()) or "of no origin"
