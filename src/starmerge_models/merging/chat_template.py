"""The chat template of a merge: that of the base, of one of the models, or of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.source import resolve
from starmerge_models.checkpoints.tokenizer import Tokenizer, open_tokenizer, with_templates
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.reading import read_text
from starmerge_models.recipe import Recipe
from starmerge_models.storage import Place, is_file, place_of

_MOST_BYTES = 2**20
"""Longest file of a template."""


def with_chat_template(
    recipe: Recipe, base: Base, models: Sequence[FineTune], chosen: Tokenizer | None
) -> Base:
    """Return the base with the chat template of a recipe, and notes on models with other templates.

    Args:
        recipe: The recipe.
        base: The base, with the side files of the output.
        models: The models.
        chosen: The output's tokenizer, if it is neither the base's nor a union.

    Raises:
        UsageError: The chat template is not found.
        StarmergeError: A file with a chat template is broken.
    """
    wanted = recipe.chat_template
    if wanted is None or (wanted == "base" and chosen is None):
        if wanted is None and recipe.output.kind == "model":
            return replace(base, notes=(*base.notes, *_notes(base, models, chosen)))
        return base
    templates, files = _found(wanted, base, models)
    changed = with_templates(base.side_files, templates)
    made_of = tuple(dict.fromkeys((*base.made_of, *files)))
    return replace(base, replaced_files={**base.replaced_files, **changed}, made_of=made_of)


def folder_named(reference: str, what: str, models: Sequence[FineTune]) -> Place:
    """Return the folder of a model of the merge by its name, or of a path or Hub id.

    Args:
        reference: The name, path or id.
        what: Purpose of the folder, for error messages.
        models: The models of the merge.

    Raises:
        UsageError: The reference is none of these.
    """
    known = {model.name: model.source.path for model in models}
    if reference in known:
        return known[reference]
    try:
        return resolve(reference).path
    except UsageError as error:
        names = ", ".join(known)
        raise UsageError(
            f"{what} {reference!r} is neither base nor a model of the merge ({names}): {error}"
        ) from error


def _found(
    wanted: str, base: Base, models: Sequence[FineTune]
) -> tuple[Mapping[str, str], list[Place]]:
    """Return chat templates by name, and the files that contain them."""
    if "{%" in wanted or "{{" in wanted:
        return {"default": wanted}, []
    is_model = wanted == "base" or wanted in {model.name for model in models}
    if not is_model and is_file(place_of(wanted)):
        return {"default": read_text(place_of(wanted), _MOST_BYTES)}, [place_of(wanted)]
    is_base = wanted == "base"
    place = base.source.path if is_base else folder_named(wanted, "chat_template", models)
    found = open_tokenizer(place)
    if found is None or not found.templates:
        raise UsageError(
            f"chat_template {wanted!r}: {place} has no chat template. Name a model that has one, "
            "or a Jinja file."
        )
    return found.templates, found.template_files


def _notes(base: Base, models: Sequence[FineTune], chosen: Tokenizer | None) -> list[str]:
    """Return notes on the models whose chat template differs from the output's."""
    output = chosen or open_tokenizer(base.source.path)
    try:
        ours = output.templates if output is not None else {}
    except StarmergeError as error:
        return [f"The chat template of the output was not compared: {error}"]
    notes: list[str] = []
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for model in models:
        theirs = open_tokenizer(model.source.path)
        try:
            own = theirs.templates if theirs is not None else {}
        except StarmergeError as error:
            notes.append(f"The chat template of {model.name} was not compared: {error}")
            continue
        if own and _stripped(own) != _stripped(ours):
            groups.setdefault(_stripped(own), []).append(model.name)
    whose = "the chosen tokenizer" if chosen is not None else "the base"
    for names in groups.values():
        has = "has" if len(names) == 1 else "have"
        output_has = f"another, that of {whose}" if ours else f"none, as {whose}"
        notes.append(
            f"{' and '.join(names)} {has} a chat template. The output has {output_has}; "
            f"--chat-template {names[0]} (chat_template: {names[0]} in a recipe) takes it."
        )
    return notes


def _stripped(templates: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, template.strip()) for name, template in templates.items()))
