"""Recipe files: reading them in starmerge's or mergekit's format, and writing starmerge's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from starmerge_models import plugins
from starmerge_models.checkpoints.references import map_reference, parse_reference
from starmerge_models.checkpoints.source import place_named
from starmerge_models.demo_names import is_demo_name, path_text
from starmerge_models.errors import UsageError
from starmerge_models.mergekit.recipe import is_mergekit_recipe, translate
from starmerge_models.methods.pipeline import map_chain
from starmerge_models.reading import read_json, read_yaml
from starmerge_models.recipe import Recipe, make_recipe
from starmerge_models.storage import Place, exists, is_file
from starmerge_models.storage.publishing import check_output_file, output_file


@dataclass(frozen=True)
class Step:
    """A merge of a file of several recipes, with its output."""

    recipe: Recipe
    output: Place
    name: str | None
    """Name by which other recipes refer to it; None for a recipe without a name."""
    needs: tuple[Place, ...] = ()
    """The outputs of the steps that must run before it."""


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file in starmerge's format, or translate one of mergekit's.

    Paths that exist relative to the recipe's folder are resolved relative to it. Files of methods
    are always relative to this folder, and loading the recipe executes them.

    Raises:
        UsageError: The file is missing or not YAML, contains several recipes, or has an unknown
            key, a missing key, or a wrong value.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    documents = _documents(path)
    if len(documents) > 1:
        raise UsageError(
            f"{path} holds {len(documents)} recipes. `starmerge merge` runs them one after the "
            "other; here one is wanted."
        )
    return _with_resolved_paths(_recipe_of(documents[0], path, str(path)), path, {})


def load_recipes(path: Path, output: Place) -> list[Step]:
    """Read a file of one or several recipes, where recipes may use the outputs of others.

    The recipes are the documents of the file, or the items of its list, in starmerge's or
    mergekit's format. Each has a ``name``; only the last may have none. A model or base of that
    name refers to the output of the named recipe, which is written to a folder in OUTPUT-steps.

    Args:
        path: The file.
        output: Place of the last merge's output.

    Returns:
        The merges, each after those whose outputs it uses.

    Raises:
        UsageError: As for :func:`load_recipe`; two recipes have the same name, the last merge is
            not unique, or the dependencies form a cycle.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    documents = _documents(path)
    if len(documents) == 1:
        content = {key: value for key, value in documents[0].items() if key != "name"}
        return [
            Step(_with_resolved_paths(_recipe_of(content, path, str(path)), path, {}), output, None)
        ]
    made = dict[str | None, Recipe]()
    for number, document in enumerate(documents, 1):
        content = dict(document)
        name = content.pop("name", None)
        where = f"{path}, recipe {number}" + ("" if name is None else f" ({name})")
        if name is not None:
            _check_step_name(name, where)
        if name in made:
            which = "have no name" if name is None else f"are called {name!r}"
            raise UsageError(f"{where}: two recipes {which}. Each but the last has one of its own.")
        made[name] = _recipe_of(content, path, where)
    named = {name: _referenced_places(recipe, path.parent) for name, recipe in made.items()}
    needs: dict[str | None, list[str | None]] = {
        name: [other for other in made if other in named[name]] for name in made
    }
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " → ".join(str(name) for name in reversed(error.args[1]))
        raise UsageError(f"{path}: recipes are made of each other: {circle}.") from error
    last = _output_recipe(path, needs)
    whole = output.absolute() if isinstance(output, Path) else output
    folder = whole.with_name(f"{output.name}-steps")
    places = {name: folder / name for name in made if name is not None and name != last}
    steps = [
        Step(
            _with_resolved_paths(made[name], path, places),
            output if name is None or name == last else places[name],
            name,
            tuple(places[needed] for needed in needs[name] if needed is not None),
        )
        for name in order
    ]
    # Put the output last, also after merges whose outputs are not used.
    return sorted(steps, key=lambda step: step.name == last)


def _documents(path: Path) -> list[dict[str, Any]]:
    """Return the recipes of a file before validation."""
    documents = read_yaml(path)
    if len(documents) == 1 and isinstance(documents[0], list):
        documents = documents[0]
    for content in documents:
        if not isinstance(content, dict):
            raise UsageError(f"{path} holds no recipe: it needs the keys 'base' and 'models'.")
    if not documents:
        raise UsageError(f"{path} is empty.")
    return documents


def _recipe_of(content: dict[str, Any], path: Path, where: str) -> Recipe:
    """Return the recipe of a document, with its paths unresolved."""
    if is_mergekit_recipe(content):
        content = translate(content, where=where, base_of=partial(_base_of, path.parent))
    if isinstance(content.get("method"), str):
        method = map_chain(
            content["method"], lambda part: plugins.absolute_reference(part, path.parent)
        )
        content = {**content, "method": method}
    return make_recipe(content, where=where)


def _base_of(folder: Path, reference: str) -> str | None:
    """Return the base's name from the config of a local adapter; None if it has none."""
    for place in (folder / reference, place_named(reference)):
        file = place / "adapter_config.json"
        if is_file(file):
            name = read_json(file).get("base_model_name_or_path")
            return name if isinstance(name, str) and name else None
    return None


def _with_resolved_paths(recipe: Recipe, path: Path, steps: Mapping[str, Place]) -> Recipe:
    """Return a recipe with resolved models: outputs of steps, or paths relative to the file."""

    def is_there(place: str) -> bool:
        return not is_demo_name(place) and exists(path.parent / place)

    def local(place: str) -> str:
        if place in steps:
            return str(steps[place])
        return path_text(path.parent / place) if is_there(place) else place

    def beside(reference: str) -> str:
        return map_reference(reference, local, is_there)

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else local(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    found = {"base": base, "models": models, "metric": metric, **_tokenizers(recipe, local)}
    return recipe.model_copy(update=found)


def _referenced_places(recipe: Recipe, folder: Path) -> set[str]:
    """Return the names and places that a recipe of a file in some folder refers to."""
    references = [entry.path for entry in recipe.models]
    references += [] if recipe.base is None else [recipe.base]
    tokenizers = {recipe.tokenizer, recipe.chat_template or ""} - {"base", "union"}
    return tokenizers.union(
        place
        for reference in references
        for piece in parse_reference(reference, lambda place: exists(folder / place))
        for place in piece.models
    )


def _output_recipe(path: Path, needs: Mapping[str | None, list[str | None]]) -> str | None:
    """Return the name of the output's recipe: it has no name, or no other recipe uses it."""
    if None in needs:
        return None
    unused = [name for name in needs if not any(name in own for own in needs.values())]
    if len(unused) > 1:
        raise UsageError(
            f"{path}: no recipe is made of {', '.join(map(repr, unused))}, so which of them is the "
            "output? Leave the name out of that one."
        )
    return unused[0]


def _check_step_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise UsageError(
            f"{where}: the name is {name!r}. A folder is called so: letters, digits, '.', '_', '-'."
        )


def check_recipe_file(file: Path, *, overwrite: bool) -> None:
    """Check that a recipe can be written to ``file``; the caller checks this before long work.

    Raises:
        UsageError: The name is not that of a YAML file, the place is taken by something else, or by
            a file that may not be replaced.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file}: a recipe's file ends in .yaml, by which a merge knows it.")
    check_output_file(file, overwrite=overwrite)


def write_recipe(recipe: Recipe, file: Path, *, overwrite: bool = False) -> None:
    """Write a recipe in YAML, so that :func:`load_recipe` reads it from any working directory.

    Folders inside the file's folder are written as relative paths, others as absolute paths. The
    file is written atomically.

    Raises:
        UsageError: As for :func:`check_recipe_file`.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_recipe_file(file, overwrite=overwrite)
    folder = file.parent.absolute()

    def place(text: str) -> str:
        path = Path(text).expanduser().absolute()
        if is_demo_name(text) or not exists(path):
            return text
        return path_text(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def beside(reference: str) -> str:
        return map_reference(reference, place)

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else place(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    places = {
        "base": base,
        "models": models,
        "method": map_chain(recipe.method, lambda part: plugins.relative_reference(part, folder)),
        "metric": metric,
        **_tokenizers(recipe, place),
    }
    placed = recipe.model_copy(update=places)
    with output_file(file, overwrite=overwrite) as partial:
        partial.write_text(placed.to_yaml(), encoding="utf-8")


def _tokenizers(recipe: Recipe, beside: Callable[[str], str]) -> dict[str, str | None]:
    """Return a recipe's choices of tokenizer and chat template, with their paths resolved."""
    names = {"base", "union", *(entry.name for entry in recipe.models)}
    chosen = {"tokenizer": recipe.tokenizer, "chat_template": recipe.chat_template}
    return {
        key: value if value is None or value in names else beside(value)
        for key, value in chosen.items()
    }
