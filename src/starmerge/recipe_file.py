"""Files of recipes: reading them, in whichever dialect they are, and writing ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starmerge import plugins
from starmerge.errors import UsageError
from starmerge.mergekit.recipe import is_mergekit_recipe, translate
from starmerge.methods.pipeline import map_chain
from starmerge.reading import read_yaml
from starmerge.recipe import Recipe, make_recipe
from starmerge.storage import exists
from starmerge.storage.publishing import check_output_file, output_file


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file, in our keys or in mergekit's, which are translated.

    Paths that exist relative to the recipe's own folder are meant so. Files of methods always begin
    at that folder; loading the recipe executes them.

    Raises:
        UsageError: The file is missing or not YAML; an unknown key, a missing one, a wrong value.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    documents = read_yaml(path)
    if len(documents) > 1:
        raise UsageError(
            f"{path} holds {len(documents)} documents, as mergekit-multi reads them. Put each into "
            "a file of its own, and run them one after the other."
        )
    (content,) = documents
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no recipe: it needs the keys 'base' and 'models'.")
    if is_mergekit_recipe(content):
        content = translate(content, where=str(path))
    if isinstance(content.get("method"), str):
        method = map_chain(content["method"], lambda part: plugins.beside(part, path.parent))
        content = {**content, "method": method}
    recipe = make_recipe(content, where=str(path))

    def beside(reference: str) -> str:
        local = path.parent / reference
        return str(local) if exists(local) else reference

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else beside(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    found = {"base": base, "models": models, "metric": metric, **_tokenizers(recipe, beside)}
    return recipe.model_copy(update=found)


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

    def beside(reference: str) -> str:
        path = Path(reference).expanduser().absolute()
        if not exists(path):
            return reference
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    models = [entry.model_copy(update={"path": beside(entry.path)}) for entry in recipe.models]
    metric = None if recipe.metric is None else beside(recipe.metric)
    base = None if recipe.base is None else beside(recipe.base)
    places = {
        "base": base,
        "models": models,
        "method": map_chain(recipe.method, lambda part: plugins.placed(part, folder)),
        "metric": metric,
        **_tokenizers(recipe, beside),
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
