"""Translates mergekit's recipes into starmerge's.

Recipes have the semantics of mergekit 0.1.5, except that keys which mergekit ignores are errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from starmerge_models.checkpoints.references import Cut, Piece, spell
from starmerge_models.errors import UsageError, nearest
from starmerge_models.mergekit.schema import (
    REFUSED,
    Model,
    Module,
    Problems,
    Recipe,
    Source,
    read_recipe,
    reference_of,
)
from starmerge_models.mergekit.settings import BASE, Setting, read_settings

_MARKS = {"merge_method", "base_model", "slices", "modules", *REFUSED} - {"tasks"}
"""Keys that occur only in mergekit's recipes."""

_NO_BASE = {"linear", "nuslerp", "karcher", "multislerp", "passthrough"}
"""Methods that need no base model."""

_BASE_JOINS = {"linear", "karcher"}
"""Methods for which a given base model is also one of the models to merge."""

_PARTS = {
    "default": "",
    "encoder": "encoder",
    "decoder": "decoder",
    "shared": "text",
    "text_decoder": "text",
    "vision_tower": "vision",
    "vision_model": "vision",
    "multi_modal_projector": "projector",
}
"""Parts of a model, by mergekit's module names."""


def is_mergekit_recipe(content: Mapping[str, Any]) -> bool:
    """Return whether a recipe is for mergekit or its sister tools."""
    return not _MARKS.isdisjoint(content) and "method" not in content


def translate(
    content: Mapping[str, Any],
    *,
    where: str,
    base_of: Callable[[str], str | None] = lambda reference: None,
) -> dict[str, Any]:
    """Return the keys of an equivalent :class:`starmerge_models.recipe.Recipe`.

    Args:
        content: The keys of mergekit's recipe.
        where: Name of the recipe in error messages.
        base_of: Returns the base's name in an adapter's config; None if the reference is not a
            local adapter.

    Raises:
        UsageError: The recipe has unsupported keys, or keys that mergekit ignores. The message
            lists all problems.
    """
    recipe, problems = read_recipe(content)
    problems.raise_if_any(where)
    assert recipe is not None, "otherwise there was a problem"
    translation = _Translation(recipe, problems, base_of)
    translated: dict[str, Any] = {}
    with problems.collecting():
        translated = translation.keys()
    problems.raise_if_any(where)
    return translated


@dataclass(frozen=True)
class _Group:
    """Models that are merged with each other: in a slice, a module, or the whole model."""

    entries: Sequence[Model]
    base: str | None
    """The group's base model in the recipe."""
    part: str
    parameters: Sequence[Mapping[str, Any] | None]
    """Parameters of the slice and of the module, the inner level first."""
    is_slice: bool


@dataclass(frozen=True)
class _Merged:
    """The translation of a group."""

    base: Piece
    others: Mapping[str, Piece]
    """The models besides the base, by their reference in the recipe."""
    joins: bool
    """Whether the base is one of the models to merge."""


class _Translation:
    """The translation of one recipe.

    Args:
        recipe: mergekit's recipe.
        problems: Collects the problems.
        base_of: As for :func:`translate`.
    """

    def __init__(
        self, recipe: Recipe, problems: Problems, base_of: Callable[[str], str | None]
    ) -> None:
        self._recipe, self._problems, self._base_of = recipe, problems, base_of
        self._method = recipe.merge_method
        self._base = None if recipe.base_model is None else reference_of(recipe.base_model)

    def keys(self) -> dict[str, Any]:
        """Return the keys of starmerge's recipe."""
        groups = self._groups()
        merged = [self._merged(group) for group in groups]
        called = list(dict.fromkeys(name for own in merged for name in own.others))
        names = dict(zip(called, _names(called), strict=True))
        is_whole = len(groups) == 1 and not groups[0].is_slice and not groups[0].part
        settings, slices = [], []
        for number, (group, own) in enumerate(zip(groups, merged, strict=True)):
            of_slice = None if is_whole else number
            settings += self._settings_of(group, own, names, of_slice)
            cut = own.base.cut
            slices.append(
                {
                    "models": [*(names[name] for name in own.others), *[BASE] * own.joins],
                    **({} if cut is None else {"layers": cut.size}),
                    **({"part": group.part} if group.part else {}),
                }
            )
        settings += self._settings(self._recipe.parameters, None, None)
        is_cut = any(group.is_slice for group in groups)
        if is_cut:
            # In slices where a model is not merged, its stack has the base's layers.
            paths = {name: spell([m.others.get(name, m.base) for m in merged]) for name in called}
            base = spell([own.base for own in merged])
        else:
            paths = {name: str(piece) for m in merged for name, piece in m.others.items()}
            base = str(merged[0].base)
        return {
            "base": base,
            "models": [{"path": paths[name], "name": names[name]} for name in called],
            "method": "mergekit",
            "parameters": {
                "merge_method": self._method,
                "settings": settings,
                "with_base": is_whole and merged[0].joins,
                "of_weights": self._base is None and not merged[0].joins,
                "slices": [] if is_whole else slices,
            },
            **self._tokenizer(names, merged[0].base),
            "dtype": _dtype(self._recipe),
        }

    def _tokenizer(self, names: Mapping[str, str], base: Piece) -> dict[str, str]:
        """Return starmerge's keys for tokenizer and chat template.

        Args:
            names: The names of the models besides the base, by their reference in the recipe.
            base: The base of the first layers, whose tokenizer is the base's.
        """
        chosen, template = self._recipe.tokenizer_source, self._recipe.chat_template
        if self._recipe.tokenizer is not None:
            chosen = self._recipe.tokenizer.source
        keys = {} if template is None else {"chat_template": template}
        if chosen is None or chosen == "base":
            return keys
        reference = chosen if chosen == "union" else reference_of(chosen)
        if reference == base.models[0]:
            return keys
        return {"tokenizer": names.get(reference, reference.partition("+")[0]), **keys}

    def _groups(self) -> list[_Group]:
        """Return the groups of models to merge, in the order of the output."""
        recipe = self._recipe
        given = [key for key in ("models", "slices", "modules") if getattr(recipe, key) is not None]
        if len(given) != 1:
            raise UsageError(
                "the models to merge must be in exactly one of 'models', 'slices' and 'modules'."
            )
        if recipe.modules is None:
            modules = {"default": Module(models=recipe.models, slices=recipe.slices)}
        else:
            modules = recipe.modules
        groups = list[_Group]()
        for name, module in modules.items():
            if name not in _PARTS:
                raise UsageError(f"no module is called {name!r}.{nearest(name, _PARTS)}")
            if (module.models is None) == (module.slices is None):
                raise UsageError(f"the module {name!r} has 'models' or 'slices'. Give one of them.")
            for key in ("models", "slices"):
                if getattr(module, key) == []:
                    raise UsageError(f"{key!r} is empty. List the models to merge.")
            part = _PARTS[name]
            if module.models is not None:
                own = (module.parameters,)
                groups.append(_Group(module.models, self._base, part, own, is_slice=False))
            for slice_ in module.slices or ():
                base = self._base if slice_.base_model is None else reference_of(slice_.base_model)
                parameters = (slice_.parameters, module.parameters)
                groups.append(_Group(slice_.sources, base, part, parameters, is_slice=True))
        if len({group.is_slice for group in groups}) > 1:
            raise UsageError(
                "some modules have 'slices' and others 'models'. Give all of them slices: "
                "'models' mean the layer_range from 0 to the last layer."
            )
        return groups

    def _merged(self, group: _Group) -> _Merged:
        """Find the base of a group, and its other models."""
        method, place = self._method, "the slice" if group.is_slice else "the recipe"
        called = [reference_of(entry.model) for entry in group.entries]
        for reference, times in Counter(called).items():
            if times > 1:
                raise UsageError(f"the model {reference!r} is listed twice. A model counts once.")
        ranges = [entry.layer_range for entry in group.entries if isinstance(entry, Source)]
        cuts = [self._cut(range_, group.part) for range_ in ranges]
        if len({cut.size for cut in cuts}) > 1:
            raise UsageError(
                f"the 'layer_range's of the sources of a slice, {', '.join(map(str, ranges))}, "
                "have different lengths."
            )
        if group.base is None and method not in _NO_BASE:
            raise UsageError(f"{method} needs the key 'base_model'.")
        if method == "passthrough":
            return self._passed(group, called, cuts)
        base = group.base
        if base is not None and "+" in base:
            raise UsageError(
                f"base_model {base!r} has an adapter. Merge the two first, with passthrough."
            )
        is_listed = base in called
        if group.is_slice and base is not None and not is_listed and method not in _NO_BASE:
            raise UsageError(
                f"base_model {base!r} is not a source of {place}. List it there, or write "
                "'models' instead of 'slices'."
            )
        if base is None or (group.is_slice and not is_listed):
            # Any model may be the reference of the differences: the first is taken. It is one of
            # the models, unless it has an adapter or is an adapter.
            base = self._base_of(called[0]) or called[0].partition("+")[0]
            joins = base in called
        elif method in _BASE_JOINS:
            # mergekit fails if a base that is not listed has no weight.
            levels = (*group.parameters, self._recipe.parameters)
            joins = is_listed or method != "linear" or any("weight" in (p or {}) for p in levels)
        else:
            joins = False
        others = [reference for reference in called if reference != base]
        if not others:
            raise UsageError(f"{base!r} is the only model. Give another one to merge.")
        cut_of = dict(zip(called, cuts, strict=True)) if cuts else {}
        own_cut = cut_of.get(base, cuts[0] if cuts else None)
        pieces = {r: _piece(r, cut_of.get(r), base, own_cut) for r in others}
        return _Merged(Piece((base,), own_cut), pieces, joins)

    def _passed(self, group: _Group, called: Sequence[str], cuts: Sequence[Cut]) -> _Merged:
        """Find the model that a group passes through, which is both base and model."""
        if len(called) != 1:
            raise UsageError(
                f"passthrough: there are {len(called)} models in a slice ({', '.join(called)}). "
                "It copies one."
            )
        model, *adapters = called[0].split("+")
        if group.base not in (None, model):
            raise UsageError(
                f"passthrough: the base_model {group.base!r} is not one of the models. Leave it "
                "out: config and tokenizer are those of the first slice."
            )
        cut = cuts[0] if cuts else None
        piece = Piece(tuple(adapters) or (model,), cut)
        return _Merged(
            Piece((model,), cut), {_PASSED if group.is_slice else called[0]: piece}, False
        )

    def _cut(self, given: tuple[int, int], part: str) -> Cut:
        if not 0 <= given[0] < given[1]:
            raise UsageError(
                f"'layer_range' is {list(given)}: it goes from the first layer, counted from 0, to "
                "the one after the last."
            )
        return Cut(*given, part)

    def _settings_of(
        self, group: _Group, own: _Merged, names: Mapping[str, str], number: int | None
    ) -> list[dict[str, Any]]:
        """Return the settings of a group's models and of its levels."""
        settings = list[dict[str, Any]]()
        for entry in group.entries:
            reference = reference_of(entry.model)
            is_base = reference not in own.others and self._method != "passthrough"
            if is_base and not own.joins and entry.parameters:
                self._problems.found.append(
                    f"the base {reference!r} has parameters ({', '.join(entry.parameters)}), which "
                    f"{self._method} would ignore. Leave them out."
                )
                continue
            name = BASE if is_base else names.get(reference, next(iter(names.values())))
            settings += self._settings(entry.parameters, name, number)
        for level in group.parameters:
            settings += self._settings(level, None, number)
        return settings

    def _settings(
        self, parameters: Mapping[str, Any] | None, model: str | None, number: int | None
    ) -> list[dict[str, Any]]:
        """Return the parameters of one level of a recipe as settings, in order."""
        settings = list[dict[str, Any]]()
        for name, value in (parameters or {}).items():
            with self._problems.collecting():
                settings += _read(self._method, name, value, model, number)
        return settings


_PASSED = "layers"
"""Name of the model of a stack of passed-through layers."""


def _piece(reference: str, cut: Cut | None, base: str, base_cut: Cut | None) -> Piece:
    """Return a model besides the base; for an adapter on this base, the adapter alone."""
    model, *adapters = reference.split("+")
    is_adapter = bool(adapters) and model == base and cut == base_cut
    return Piece(tuple(adapters) if is_adapter else (model, *adapters), cut)


def _read(
    method: str, name: str, value: Any, model: str | None, number: int | None
) -> list[dict[str, Any]]:
    """Return a parameter as settings, one for each choice of its value."""
    conditional = [value] if isinstance(value, dict) else value
    if not isinstance(conditional, list) or not any(isinstance(v, dict) for v in conditional):
        conditional = [{"value": value}]
    settings = list[Setting]()
    for choice in conditional:
        if not isinstance(choice, dict):
            raise UsageError(
                f"{name!r} mixes plain values with filters. For the tensors that no filter "
                f"matches, write '- value: {choice}'."
            )
        if "value" not in choice or not choice.keys() <= {"filter", "value"}:
            raise UsageError(f"{name!r}: each entry needs a 'value', and may have a 'filter'.")
        matching = None if choice.get("filter") == "*" else choice.get("filter")
        settings.append(
            Setting(
                parameter=name, value=choice["value"], model=model, filter=matching, slice=number
            )
        )
    try:
        read = read_settings(method, settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return [setting.model_dump(exclude_none=True) for setting in read]


def _names(references: Sequence[str]) -> list[str]:
    """Name models after the last part of their paths, or after the full path if that is taken."""
    names: dict[str, None] = {}
    for reference in references:
        last = reference.rstrip("/").rpartition("/")[2].partition("@")[0]
        choices = chain((last, reference), (f"{last}-{number}" for number in count(2)))
        names[next(name for name in choices if name not in ("", BASE) and name not in names)] = None
    return list(names)


def _dtype(recipe: Recipe) -> str:
    """Return the output's dtype; ``dtype``, mergekit's compute dtype, is the default."""
    chosen = recipe.out_dtype or recipe.dtype
    if chosen is None:
        return "keep"
    if chosen.removeprefix("torch.") == "float64":
        raise UsageError(
            "the output would be float64, which is not written. Choose an out_dtype: everything "
            "is computed in float64 anyway."
        )
    return chosen.removeprefix("torch.")
