"""Merging the adapters of a loaded model into one more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from starmerge_models.checkpoints.layers import layers
from starmerge_models.deltas import Delta, is_finite
from starmerge_models.errors import StarmergeError, UsageError, near
from starmerge_models.merging.checks import check_weights
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.fold import Folded, fold, fold_bytes
from starmerge_models.merging.in_memory import check_one_update, merge_each
from starmerge_models.merging.loaded_layers import (
    AdaptedLayer,
    Component,
    SavedTensor,
    components_of,
)
from starmerge_models.merging.outputs.adapter import factors_made, overall_error
from starmerge_models.merging.outputs.approximation import (
    Approximation,
    approximate,
    approximation_bytes,
    distance_bytes,
    rounded,
)
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, as_pipeline


@dataclass(frozen=True)
class MergedModule:
    """What a merged adapter adds to one layer, or to a tensor that it replaces whole."""

    rank: int | None
    """Factors that are not only zeros; None: the tensor is replaced."""
    norm: float
    """‖Δ‖ of the merged update in the Frobenius norm."""
    error: float
    """‖Δ − BA‖ / ‖Δ‖ of the factors as they are stored. 0 for a tensor that is replaced: it is
    rounded to the base's dtype as a merged model's is, which does not count."""


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged in a loaded model; :func:`merge_adapters` makes it."""

    name: str
    adapters: tuple[str, ...]
    """Names of those that were merged."""
    method: str
    """The chain of methods, such as ``star+ties``."""
    reason: str | None
    """Why it is this one, where it was left to ``auto``."""
    rank: int
    error: float
    """‖Δ − BA‖ / ‖Δ‖ over the whole model, Δ being the merged update: what the rank and the dtype
    of the factors cost. 0: exact."""
    modules: Mapping[str, MergedModule]
    """By the names of the layers, and of the tensors of modules that are replaced whole; in a
    pipeline behind the names of the components."""

    @property
    def kept(self) -> float:
        """Share of the update's energy that is kept, 1 − error²."""
        return max(0.0, 1 - self.error**2)

    def __repr__(self) -> str:
        size = "exact" if not self.error else f"keeps {self.kept:.2%} (error {self.error:.3g})"
        return (
            f"<MergedAdapter {self.name!r}: {self.method} of {', '.join(self.adapters)}; "
            f"rank {self.rank}, {size}, {len(self.modules)} layers>"
        )


def merge_adapters(
    model: object,
    adapters: Iterable[str],
    method: Method | Pipeline | str = "auto",
    *,
    name: str = "merged",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    threads: int | None = None,
) -> MergedAdapter:
    """Merge adapters that are loaded into a model, and add the result as one more adapter.

    The new adapter is a plain LoRA with the scale 1, whatever the merged ones are: rsLoRA, DoRA,
    several ranks and alphas. Modules that they replace whole (``modules_to_save``) are merged by
    their differences from the base's. Its B·A is what :func:`starmerge_models.merge` writes of the
    same adapters with ``output_kind="adapter"``: exact where the merged update has factors and
    ``rank`` allows for all of them, else the best approximation of the rank. The factors are
    computed on the CPU in float32, and get the dtype and the device of those of the merged
    adapters.

    The active adapter stays as it is: ``model.set_adapter(name)`` of a PeftModel, or
    ``pipe.set_adapters(name)`` of a pipeline, makes it the merged one. If something is wrong, the
    model is left as it was.

    Args:
        model: A PeftModel; a model of transformers or diffusers that adapters were loaded into; or
            a diffusers pipeline, all of whose components with such adapters get the new one.
        adapters: Names of the adapters.
        method: A method, a chain of some, or a text such as "star+ties:eta=60".
        name: The new adapter's name.
        weights: Factors of the task vectors, one for each adapter; by default all are 1.
        rank: The highest rank; by default as high as the updates need. Updates without factors,
            such as those of DoRA and of TIES, need one.
        threads: How many layers are merged at once; by default as many as for
            :func:`starmerge_models.merge`. The result does not depend on it.

    Returns:
        The rank, and what it and the factors' dtype cost, in all and by layer.

    Raises:
        UsageError: The model holds no adapters; a name is unknown, or taken; an adapter is of a
            kind that is not merged, merged into the weights, or scaled; the method, its parameters
            or the weights do not fit; the updates have no factors, and no rank is given.
        StarmergeError: No adapter changes anything; one has a NaN or an infinity; the factors
            overflow their dtype.

    Example:
        ``sm.merge_adapters(model, ["a", "b"], "star+ties:eta=60", rank=16)``
    """
    components = components_of(model)
    names = _checked_names(components, adapters, name)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank is {rank!r}. Give a whole number, 1 or more.")
    factors = check_weights(weights, len(names))
    planned = _planned(components, names, factors)
    if not planned:
        raise StarmergeError("None of the adapters changes any layer of the model.")
    dense = any(None in merging.ranks for merging in planned.values())
    pipeline, reason = as_pipeline(method).resolve_auto(names, has_dense=dense)
    check_one_update(pipeline)
    contexts = [merging.context for merging in planned.values()]
    pipeline.check(names, factors, list(planned))
    pipeline.check_tensors(contexts, [])
    bounds = {key: merging.bound(pipeline, rank) for key, merging in planned.items()}

    def inputs(key: str) -> tuple[Deltas, TensorContext]:
        return planned[key].inputs(needs_base=pipeline.merge.needs_base)

    def finish(key: str, delta: Delta) -> Approximation | Folded:
        return planned[key].finished(delta, bounds[key])

    def memory(key: str) -> int:
        return planned[key].memory(pipeline, bounds[key])

    with Threads(threads) as executor:
        made = merge_each(pipeline, planned, inputs, finish, executor, memory)
    r = max([1, *(own.left.shape[1] for own in made.values() if isinstance(own, Approximation))])
    _add(components, planned, made, names, name, r)
    modules = {planned[key].place.name: _told(own) for key, own in made.items()}
    error = overall_error([{"update_norm": m.norm, "error": m.error} for m in modules.values()])
    return MergedAdapter(name, names, pipeline.name, reason, r, error, modules)


@dataclass(frozen=True, eq=False)
class _Merging:
    """One weight, and the adapters that change it."""

    component: Component
    place: AdaptedLayer | SavedTensor
    adapters: Mapping[int, str]
    """By their numbers in the merge."""
    context: TensorContext
    dtype: torch.dtype
    """Of the merged factors, or of the whole tensor."""

    @property
    def ranks(self) -> list[int | None]:
        """Those of the adapters' changes; None for one that is dense."""
        return [self.place.rank(adapter) for adapter in self.adapters.values()]

    @property
    def shape(self) -> TensorShape:
        """What methods may know before anything is read."""
        width = torch.float32.itemsize
        size = math.prod(self.place.shape)
        deltas = tuple(DeltaShape(r, width * size * (r is None)) for r in self.ranks)
        context = self.context
        return TensorShape(context.shape, context.is_embedding, deltas, tasks=len(context.tasks))

    def bound(self, pipeline: Pipeline, rank: int | None) -> int:
        """Return the highest rank that the merged factors may have; 0 of what is replaced whole.

        Raises:
            UsageError: The merged update has no factors, and no rank is given.
        """
        if isinstance(self.place, SavedTensor):
            return 0
        full = min(self.shape.matrix)
        made = factors_made(pipeline, self.shape)
        if made is None and rank is None:
            raise UsageError(
                f"The merged update of {self.place.name} has no factors, so an exact adapter would "
                f"have the rank {full}. Choose a rank, such as rank=16; what is returned tells its "
                "error."
            )
        return max(1, min(x for x in (rank, made, full) if x is not None))

    def inputs(self, *, needs_base: bool) -> tuple[Deltas, TensorContext]:
        """Return the deltas, which are made when they are looked at, and what methods are told."""
        context = self.context
        if needs_base:
            self.place.check_base(f"The method works on the weight of {self.place.name}")
            context = replace(context, base=self.place.base())
        return Deltas({t: partial(self._delta, a) for t, a in self.adapters.items()}), context

    def memory(self, pipeline: Pipeline, bound: int) -> int:
        """Estimate the bytes in memory while the layer is merged."""
        known = self.shape
        m, n = known.matrix
        finishing = fold_bytes(m, n) + self.dtype.itemsize * known.size
        if bound:
            r = pipeline.result(known).rank
            finishing = approximation_bytes(m, n, r, bound, known.width)
            finishing += distance_bytes(m, n, bound)
        computing = 16 * known.size if known.has_dense else 0  # W and W' of DoRA in float64
        return known.factors(known.total_rank) + computing + pipeline.memory(known) + finishing

    def finished(self, delta: Delta, bound: int) -> Approximation | Folded:
        """Return what the merged adapter holds of an update: its factors, or the whole tensor.

        Raises:
            StarmergeError: They overflow their dtype.
        """
        made: Approximation | Folded
        if isinstance(self.place, SavedTensor):
            made = fold(self.place.base(), delta, self.dtype)
            fits = is_finite(made.weight)
        else:
            made = rounded(approximate(delta, bound), self.dtype)
            fits = math.isfinite(made.error)
        if not fits:
            raise StarmergeError(
                f"What is merged for {self.place.name} overflows {self.dtype}. Load the model and "
                "the adapters in a wider dtype, such as float32."
            )
        return made

    def _delta(self, adapter: str) -> Delta:
        delta = self.place.delta(adapter)
        if not delta.is_finite():
            raise StarmergeError(
                f"The adapter {adapter!r} has a NaN or an infinity in its update of "
                f"{self.place.name}, or the base has one there. The training diverged, or a file "
                "is damaged."
            )
        return delta


def _checked_names(
    components: Sequence[Component], adapters: Iterable[str], name: str
) -> tuple[str, ...]:
    """Compare the names of the adapters, and of the new one, with those that are loaded."""
    loaded = list(dict.fromkeys(own for component in components for own in component.configs))
    is_list = isinstance(adapters, Iterable) and not isinstance(adapters, str)
    names = tuple(adapters) if is_list else ()
    if not is_list or not all(isinstance(adapter, str) for adapter in names):
        raise UsageError(f"The adapters are {adapters!r}. Give a list of their names.")
    for adapter in names:
        if adapter not in loaded:
            meant = "".join(f" Did you mean {n!r}?" for n in near(adapter, loaded)[:1])
            raise UsageError(
                f"No adapter is called {adapter!r}.{meant} Loaded: {', '.join(loaded)}."
            )
    if not names or len(set(names)) < len(names):
        raise UsageError(
            f"The adapters are {list(names)}. Give each once, and at least one; a weight lets "
            "one count more."
        )
    dicts = (nn.ModuleDict(), nn.ParameterDict())
    is_text = isinstance(name, str) and bool(name) and "." not in name
    if not is_text or any(hasattr(kept, name) for kept in dicts):
        raise UsageError(
            f"{name!r} cannot be the name of an adapter, which PEFT keeps in a ModuleDict or a "
            "ParameterDict. Give a text without a dot that is none of their attributes."
        )
    if name in loaded:
        raise UsageError(
            f"An adapter called {name!r} is loaded already. Choose another name, or delete that "
            "one first: model.delete_adapter, or delete_adapters of a pipeline."
        )
    return names


def _planned(
    components: Sequence[Component], adapters: tuple[str, ...], weights: tuple[float, ...]
) -> dict[str, _Merging]:
    """Check the adapters and lay out what they change, by the names of the weights."""
    planned: dict[str, _Merging] = {}
    places = layers(
        name
        for component in components
        for name in (
            *map(component.named, component.modules),
            *(place.weight for place in component.places),
        )
    )
    for component in components:
        own = {t: a for t, a in enumerate(adapters) if a in component.configs}
        if not own:
            continue
        component.check()
        for adapter in own.values():
            _check_kind(component, adapter)
        for place in component.places:
            changing = {t: adapter for t, adapter in own.items() if place.has(adapter)}
            if not changing:
                continue
            for adapter in changing.values():
                place.check(adapter)
            context = TensorContext(
                place.weight,
                place.shape,
                place.is_embedding,
                tasks=adapters,
                weights=weights,
                layer=places.get(place.weight),
            )
            dtype = place.dtype(list(changing.values()))
            planned[place.weight] = _Merging(component, place, changing, context, dtype)
    return planned


def _check_kind(component: Component, adapter: str) -> None:
    """Make sure that an adapter is of a kind that is merged, by its config."""
    config = component.config(adapter)
    tables = (layer for layer in component.layers.values() if layer.module.is_embedding)
    if config.ties and (config.modules_to_save or any(layer.has(adapter) for layer in tables)):
        raise UsageError(
            f"The adapter {adapter!r} changes both ends of tied weights as one "
            "(ensure_weight_tying), which would come apart in memory. Merge the saved adapters: "
            "sm.merge(base, [...], output_kind='adapter')."
        )


def _told(made: Approximation | Folded) -> MergedModule:
    if isinstance(made, Folded):
        return MergedModule(None, made.update_norm, 0.0)
    return MergedModule(made.left.shape[1], made.norm, made.error / made.norm if made.norm else 0.0)


def _add(
    components: Sequence[Component],
    planned: Mapping[str, _Merging],
    made: Mapping[str, Approximation | Folded],
    adapters: Sequence[str],
    name: str,
    r: int,
) -> None:
    """Add the merged adapter to all components, or to none."""
    added: list[Component] = []
    try:
        for component in components:
            factors: dict[str, tuple[Tensor, Tensor]] = {}
            whole: dict[str, dict[str, Tensor]] = {}
            for key, merging in planned.items():
                place, own = merging.place, made[key]
                if merging.component is not component:
                    continue
                if isinstance(place, SavedTensor):
                    assert isinstance(own, Folded)
                    whole.setdefault(place.path, {})[place.key] = own.weight
                else:
                    assert isinstance(own, Approximation)
                    factors[place.module.name] = place.module.factors(own.left, own.right)
            if factors or whole:
                component.add(name, r, factors, whole, adapters)
                added.append(component)
    except BaseException:
        for component in added:
            component.remove(name)
        raise
