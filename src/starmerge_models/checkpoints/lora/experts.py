"""Updates of a mixture's experts, for all combinations of joined and single storage.

PEFT adapts experts that transformers joins in one tensor by joined factors
(``target_parameters``); older adapters have factors for each expert's layers. The base's files
contain the experts joined or one by one. This module splits or joins the updates to match the
tensors of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.experts import expert_name, stack_of
from starmerge_models.checkpoints.lora.formats import AdapterContents, Factors
from starmerge_models.checkpoints.lora.update import Blocks, ExpertProduct, Update
from starmerge_models.checkpoints.names import made_of, match_stored, naming_of
from starmerge_models.checkpoints.source import Source
from starmerge_models.errors import StarmergeError, UsageError

_SWAPPED = (0, 19, 1)
"""The first version of PEFT that assumes parameters of (experts, out, in) unless their module is
marked as transposed; earlier versions assume (experts, in, out)."""

Stack = tuple[tuple[str, ...], ...]
"""For each expert the base's tensors whose rows, concatenated, are its matrix."""


def joined_updates(source: Source, base: Base, contents: AdapterContents) -> dict[str, Update]:
    """Split the factors of joined experts.

    Args:
        source: The adapter.
        base: The base.
        contents: The content of the adapter.

    Returns:
        An update of each expert's matrix, by the base's names.

    Raises:
        UsageError: The orientation of a square matrix is unknown.
        StarmergeError: The factors do not fit any of the base's parameters.
    """
    if not contents.parameters:
        return {}
    names = [f"{f.module}.{name}" for f in contents.parameters for name in f.parameters]
    stacks = _stacks(source, base, sorted(set(names)))
    meant = {
        factors.a: (factors, name)
        for group in _by_module(contents.parameters)
        for factors, name in _assigned(source, base, contents, group, stacks)
    }
    turns = {
        transposed
        for factors, name in meant.values()
        if (transposed := _is_transposed(contents, factors, _shape(base, stacks[name]))) is not None
    }
    updates: dict[str, Update] = {}
    for factors, name in meant.values():
        stack = stacks[name]
        shape = _shape(base, stack)
        transposed = _is_transposed(contents, factors, shape)
        if transposed is None:
            transposed = (
                turns.pop() if len(turns) == 1 else _by_version(source, base, contents, stack)
            )
            turns = {transposed}
        rank = contents.checkpoint[factors.a].shape[0] // len(stack)
        scale = contents.config.scale(name, rank)
        for expert, tensors in enumerate(stack):
            start = 0
            for tensor in tensors:
                own = base.checkpoint[tensor].shape
                change = ExpertProduct(
                    factors.a, factors.b, scale, own, rank, expert, len(stack), transposed, start
                )
                updates[tensor] = Update(name.rpartition(".")[0], change, parameter=tensor)
                start += own[0]
    return updates


def single_updates(
    source: Source, base: Base, contents: AdapterContents, left: Sequence[Update]
) -> dict[str, Update]:
    """Join the updates of single experts' layers for a base with joined experts.

    Args:
        source: The adapter.
        base: The base.
        contents: The content of the adapter.
        left: The updates of weights whose names the base lacks.

    Returns:
        An update of each expert's matrix, by the base's names.
    """
    stacked = {name: name for name in base.checkpoint if stack_of(name)}
    if not (left and stacked):
        return {}
    by_weight = {update.weight: update for update in left}
    parts = {name: own for name, own in made_of(base, list(by_weight)).items() if stack_of(name)}
    updates: dict[str, Update] = {}
    for name, tensor in match_stored(source, list(parts), stacked).items():
        own = [by_weight[part] for part in parts[name]]
        shape = base.checkpoint[tensor].shape
        if any(update.magnitude for update in own):
            raise UsageError(
                f"{source}: the update of {own[0].module} is DoRA's, and the base {base.source} "
                "holds several such weights in one. Fold the adapter with PEFT's "
                "merge_and_unload and give the full model."
            )
        starts = [sum(u.change.shape[0] for u in own[:number]) for number in range(len(own))]
        rows = sum(update.change.shape[0] for update in own)
        if rows != shape[0] or any(update.change.shape[1] != shape[1] for update in own):
            raise StarmergeError(
                f"{source}: the updates of {' and '.join(u.module for u in own)} make a matrix of "
                f"{rows} rows, and {tensor} of the base {base.source} has the shape {list(shape)}."
            )
        blocks = zip(starts, (update.change for update in own), strict=True)
        updates[tensor] = Update(own[0].module, Blocks(tuple(blocks), shape), parameter=tensor)
    return updates


def _stacks(source: Source, base: Base, names: Sequence[str]) -> dict[str, Stack]:
    """Return the experts of the base's joined tensors, by the adapter's names for these."""
    stored: dict[str, list[tuple[str, ...]]] = {}
    for name in base.checkpoint:
        if joined := stack_of(name):
            stored.setdefault(joined[0], []).append((name,))
    found = match_stored(source, names, {name: name for name in stored})
    if len(found) < len(names):
        sources, in_model = naming_of(base).sources, dict[str, list[tuple[str, ...]]]()
        for name in sources:
            if (joined := stack_of(name)) and joined[1] == 0:
                own = [expert_name(joined[0], number) for number in range(len(sources))]
                in_model[joined[0]] = [sources[each] for each in own if each in sources]
        others = match_stored(source, names, {name: name for name in in_model})
        if len(others) > len(found):
            found, stored = others, in_model
    return {name: tuple(stored[other]) for name, other in found.items()}


def _by_module(parameters: Sequence[Factors]) -> list[list[Factors]]:
    groups: dict[str, list[Factors]] = {}
    for factors in parameters:
        groups.setdefault(factors.module, []).append(factors)
    return list(groups.values())


def _assigned(
    source: Source,
    base: Base,
    contents: AdapterContents,
    group: Sequence[Factors],
    stacks: Mapping[str, Stack],
) -> Iterator[tuple[Factors, str]]:
    """Assign a module's factors to its parameters, by shapes and ranks.

    Raises:
        StarmergeError: There is no assignment, or there are several.
    """
    module, known = group[0].module, group[0].parameters
    names = [name for p in known if (name := f"{module}.{p}") in stacks]
    ways = [
        way
        for way in permutations(names, len(group))
        if all(
            _fits(base, contents, factors, name, stacks[name])
            for factors, name in zip(group, way, strict=True)
        )
    ]
    if len(ways) != 1:
        raise StarmergeError(
            f"{source}: the factors of {module}, of target_parameters in adapter_config.json, fit "
            f"{'several' if ways else 'none'} of the parameters {', '.join(known)} of the base "
            f"{base.source}. The adapter was trained on another model, or transformers 5 or later, "
            "which knows how the base's experts are joined, is not installed."
        )
    yield from zip(group, ways[0], strict=True)


def _fits(base: Base, contents: AdapterContents, factors: Factors, name: str, stack: Stack) -> bool:
    a, b = (contents.checkpoint[key].shape for key in (factors.a, factors.b))
    rank, rest = divmod(a[0], len(stack))
    declared = contents.config.rank(name)
    is_shape = sorted((b[0], a[1])) == sorted(_shape(base, stack))
    return not rest and rank == declared and is_shape


def _shape(base: Base, stack: Stack) -> tuple[int, int]:
    """Return the shape of an expert's matrix."""
    shapes = [base.checkpoint[tensor].shape for tensor in stack[0]]
    return sum(shape[0] for shape in shapes), math.prod(shapes[0][1:])


def _is_transposed(
    contents: AdapterContents, factors: Factors, shape: tuple[int, int]
) -> bool | None:
    """Return whether a weight's change is (B·A)ᵀ; None if the weight is square."""
    if shape[0] == shape[1]:
        return None
    return contents.checkpoint[factors.b].shape[0] != shape[0]


def _by_version(source: Source, base: Base, contents: AdapterContents, stack: Stack) -> bool:
    """Return whether the change of a square weight is (B·A)ᵀ, by the version of PEFT."""
    version = contents.config.peft_version
    is_input_first = _is_input_first(base, stack)
    if version is None or is_input_first is None:
        raise UsageError(
            f"{source}: {stack[0][0]} of the base {base.source} is square, and nothing tells which "
            "of its sides are the inputs (peft_version in adapter_config.json does). Fold the "
            "adapter with PEFT's merge_and_unload and give the full model."
        )
    if version[:2] == _SWAPPED[:2] and version < _SWAPPED:
        return not is_input_first
    return is_input_first or version < _SWAPPED


def _is_input_first(base: Base, stack: Stack) -> bool | None:
    """Return whether the base stores experts as (in, out); None if it is unknown.

    The inner dimension of joined experts is twice as large in gate_up_proj as in down_proj.
    """
    joined = stack_of(stack[0][0])
    if joined is None:
        return False  # each is the weight of a linear layer
    module = joined[0].rpartition(".")[0]
    pair = [f"{module}.{name}[0]" for name in ("gate_up_proj", "down_proj")]
    if not all(name in base.checkpoint for name in pair):
        return None
    gate_up, down = (base.checkpoint[name].shape for name in pair)
    if (gate_up[0], gate_up[1]) == (2 * down[1], down[0]):
        return False
    return True if (gate_up[1], gate_up[0]) == (2 * down[0], down[1]) else None
