"""Files of recipes: reading them, in whichever dialect they are, and writing ours."""

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
from starmerge_models.errors import UsageError
from starmerge_models.mergekit.recipe import is_mergekit_recipe, translate
from starmerge_models.methods.pipeline import map_chain
from starmerge_models.reading import read_json, read_yaml
from starmerge_models.recipe import Recipe, make_recipe
from starmerge_models.storage import Place, exists, is_file
from starmerge_models.storage.publishing import check_output_file, output_file


@dataclass(frozen=True)
class Step:
    """A merge of a file of recipes, and where it goes."""

    recipe: Recipe
    output: Place
    name: str | None
    """What the recipes call it; None where it has no name."""
    needs: tuple[Place, ...] = ()
    """The outputs of other steps that it is made of."""


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file, in our keys or in mergekit's, which are translated.

    Paths that exist relative to the recipe's own folder are meant so. Files of methods always begin
    at that folder; loading the recipe executes them.

    Raises:
        UsageError: The file is missing or not YAML; an unknown key, a missing one, a wrong value;
            there are several recipes in it.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    documents = _documents(path)
    if len(documents) > 1:
        raise UsageError(
            f"{path} holds {len(documents)} recipes. `starmerge merge` runs them one after the "
            "other; here one is wanted."
        )
    return _placed(_made(documents[0], path, str(path)), path, {})


def load_recipes(path: Path, output: Place) -> list[Step]:
    """Read a file of one recipe, or of several of which some are made of others.

    The recipes are the documents of the file, or the items of its list, in our keys or in
    mergekit's. Each has a ``name``, but for the last one, which may have none. A model or base of
    that name is the merge of it, which goes into a folder of its own, in OUTPUT-steps.

    Args:
        path: The file.
        output: Where the last merge goes.

    Returns:
        The merges, such that each stands behind those that it is made of.

    Raises:
        UsageError: As for :func:`load_recipe`; two recipes have one name, none or several may be
            the last, or they are made of each other in a circle.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    documents = _documents(path)
    if len(documents) == 1:
        content = {key: value for key, value in documents[0].items() if key != "name"}
        return [Step(_placed(_made(content, path, str(path)), path, {}), output, None)]
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
        made[name] = _made(content, path, where)
    named = {name: _named(recipe, path.parent) for name, recipe in made.items()}
    needs: dict[str | None, list[str | None]] = {
        name: [other for other in made if other in named[name]] for name in made
    }
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " → ".join(str(name) for name in reversed(error.args[1]))
        raise UsageError(f"{path}: recipes are made of each other: {circle}.") from error
    last = _last(path, needs)
    whole = output.absolute() if isinstance(output, Path) else output
    folder = whole.with_name(f"{output.name}-steps")
    places = {name: folder / name for name in made if name is not None and name != last}
    steps = [
        Step(
            _placed(made[name], path, places),
            output if name is None or name == last else places[name],
            name,
            tuple(places[needed] for needed in needs[name] if needed is not None),
        )
        for name in order
    ]
    # The output may stand before merges that nothing needs.
    return sorted(steps, key=lambda step: step.name == last)


def _documents(path: Path) -> list[dict[str, Any]]:
    """Return the recipes of a file, not yet validated."""
    documents = read_yaml(path)
    if len(documents) == 1 and isinstance(documents[0], list):
        documents = documents[0]
    for content in documents:
        if not isinstance(content, dict):
            raise UsageError(f"{path} holds no recipe: it needs the keys 'base' and 'models'.")
    if not documents:
        raise UsageError(f"{path} is empty.")
    return documents


def _made(content: dict[str, Any], path: Path, where: str) -> Recipe:
    """Make a recipe of the keys of a document, with its paths as they stand there."""
    if is_mergekit_recipe(content):
        content = translate(content, where=where, base_of=partial(_base_of, path.parent))
    if isinstance(content.get("method"), str):
        method = map_chain(content["method"], lambda part: plugins.beside(part, path.parent))
        content = {**content, "method": method}
    return make_recipe(content, where=where)


def _base_of(folder: Path, reference: str) -> str | None:
    """Return the name of the base in the config of an adapter, if that is one and is at hand."""
    for place in (folder / reference, place_named(reference)):
        file = place / "adapter_config.json"
        if is_file(file):
            name = read_json(file).get("base_model_name_or_path")
            return name if isinstance(name, str) and name else None
    return None


def _placed(recipe: Recipe, path: Path, steps: Mapping[str, Place]) -> Recipe:
    """Return a recipe with its models where they lie: steps, or relative to the recipe's file."""

    def is_there(place: str) -> bool:
        return exists(path.parent / place)

    def local(place: str) -> str:
        if place in steps:
            return str(steps[place])
        return str(path.parent / place) if is_there(place) else place

    def beside(reference: str) -> str:
        return map_reference(reference, local, is_there)

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else local(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    found = {"base": base, "models": models, "metric": metric, **_tokenizers(recipe, local)}
    return recipe.model_copy(update=found)


def _named(recipe: Recipe, folder: Path) -> set[str]:
    """Return the places that a recipe names, as a file in some folder has them."""
    references = [entry.path for entry in recipe.models]
    references += [] if recipe.base is None else [recipe.base]
    tokenizers = {recipe.tokenizer, recipe.chat_template or ""} - {"base", "union"}
    return tokenizers.union(
        place
        for reference in references
        for piece in parse_reference(reference, lambda place: exists(folder / place))
        for place in piece.models
    )


def _last(path: Path, needs: Mapping[str | None, list[str | None]]) -> str | None:
    """Return the recipe that is the output: the one without a name, or that none is made of."""
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
    """Make sure that a recipe may be written to ``file``: to be called before long work.

    Raises:
        UsageError: It is no YAML file by its name, something else stands there, or a file that may
            not be replaced.
    """
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file}: a recipe's file ends in .yaml, by which a merge knows it.")
    check_output_file(file, overwrite=overwrite)


def write_recipe(recipe: Recipe, file: Path, *, overwrite: bool = False) -> None:
    """Write a recipe in YAML, such that :func:`load_recipe` reads it back from anywhere.

    Folders within the file's own are written relative to it, others in full. The file appears
    whole or not at all.

    Raises:
        UsageError: As for :func:`check_recipe_file`.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_recipe_file(file, overwrite=overwrite)
    folder = file.parent.absolute()

    def place(text: str) -> str:
        path = Path(text).expanduser().absolute()
        if not exists(path):
            return text
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def beside(reference: str) -> str:
        return map_reference(reference, place)

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else place(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    places = {
        "base": base,
        "models": models,
        "method": map_chain(recipe.method, lambda part: plugins.placed(part, folder)),
        "metric": metric,
        **_tokenizers(recipe, place),
    }
    placed = recipe.model_copy(update=places)
    with output_file(file, overwrite=overwrite) as partial:
        partial.write_text(placed.to_yaml(), encoding="utf-8")


def _tokenizers(recipe: Recipe, beside: Callable[[str], str]) -> dict[str, str | None]:
    """Return a recipe's choices of tokenizer and chat template, paths among them as placed."""
    names = {"base", "union", *(entry.name for entry in recipe.models)}
    chosen = {"tokenizer": recipe.tokenizer, "chat_template": recipe.chat_template}
    return {
        key: value if value is None or value in names else beside(value)
        for key, value in chosen.items()
    }
