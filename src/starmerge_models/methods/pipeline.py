"""Chains of methods: transforms, one merge, post-steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Any, TypeVar

from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError, nearest
from starmerge_models.methods.auto import Auto
from starmerge_models.methods.average import Average
from starmerge_models.methods.memory import DeltaShape, TensorShape
from starmerge_models.methods.method import (
    METHODS,
    Deltas,
    Merge,
    Method,
    PostStep,
    TensorContext,
    Transform,
    Walk,
    find_method,
    make_method,
    sums_to_zero,
)
from starmerge_models.methods.notation import read_chain
from starmerge_models.plugins import Origin, is_file_reference
from starmerge_models.spectral import Truncation

_Seen = TypeVar("_Seen")


@dataclass(frozen=True)
class Merged:
    """What a chain made of one tensor."""

    delta: Delta
    """What is added to the base."""
    truncations: Mapping[int, Truncation]
    """By task, what a transform kept; of several, the last."""
    inputs: Deltas
    """The task vectors as the merge got them."""


@dataclass(frozen=True)
class Pipeline:
    """A chain of methods: every transform on every task vector, the merge, every post-step.

    ``star+ties`` truncates each task vector and merges the results with TIES. A chain without a
    merge averages: ``star`` is ``star+average``. The weights multiply the task vectors between the
    transforms and the merge.
    """

    transforms: tuple[Transform, ...] = ()
    merge: Merge = dataclasses.field(default_factory=Average)
    post_steps: tuple[PostStep, ...] = ()

    @classmethod
    def of(cls, steps: Sequence[Method]) -> Pipeline:
        """Return the chain of some methods.

        Raises:
            UsageError: What is given is no method, there are two merges, the order is wrong, or a
                post-step does not fit.
        """
        for step in steps:
            if not isinstance(step, Transform | Merge | PostStep):
                name = getattr(step, "__name__", None)
                hint = f"{name} is a class: write {name}()." if name else f"{step!r} is none."
                raise UsageError(f"A chain is made of methods, and {hint}")
        kinds = [step.kind for step in steps]
        names = "+".join(step.name for step in steps)
        if kinds.count("merge") > 1:
            merges = " and ".join(step.name for step in steps if step.kind == "merge")
            raise UsageError(f"{names}: a chain has one merge, and {merges} both are. Choose one.")
        if kinds != sorted(kinds, key=_ORDER.index):
            raise UsageError(
                f"{names}: the order is transforms, one merge, post-steps; here it is "
                f"{', '.join(f'{step.name} ({step.kind})' for step in steps)}."
            )
        merge = next((step for step in steps if isinstance(step, Merge)), Average())
        if isinstance(merge, Auto) and len(steps) > 1:
            raise UsageError(
                f"{names}: auto chooses a whole chain by itself. Write auto alone, or the chain."
            )
        post_steps = tuple(step for step in steps if isinstance(step, PostStep))
        for number, step in enumerate(post_steps):
            if "model" not in merge.outputs:
                raise UsageError(
                    f"{names}: {merge.name} makes a model for each task, and {step.name} follows "
                    "merges that make one for all. Leave it out."
                )
            if merge.needs_base:
                raise UsageError(
                    f"{names}: {merge.name} works on the weights themselves, so what it adds to "
                    f"the base holds parts of the base, and {step.name} follows merges of task "
                    f"vectors. Leave {step.name} out, or choose such a merge."
                )
            step.check_merge(merge)
            step.check_before(post_steps[:number])
        return cls(tuple(step for step in steps if isinstance(step, Transform)), merge, post_steps)

    def chosen(
        self, models: Sequence[str] = (), *, has_dense: bool, prompts: Collection[str] | None = None
    ) -> tuple[Pipeline, str | None]:
        """Return the chain to merge with, and the reason if it is one that ``auto`` stands for.

        Args:
            models: Names of the models.
            has_dense: Whether one of them is a full fine-tune.
            prompts: Those of whose prompts the metric has moments; None: there is no metric.
        """
        if not isinstance(self.merge, Auto):
            return self, None
        choice = self.merge.choose(models, has_dense=has_dense, prompts=prompts)
        return Pipeline.of(choice.steps), choice.reason

    @property
    def steps(self) -> tuple[Method, ...]:
        """All methods in their order; a merge by average is not told beside other methods."""
        others = bool(self.transforms) and self.merge == Average()
        return (*self.transforms, *(() if others else (self.merge,)), *self.post_steps)

    @property
    def name(self) -> str:
        """The chain as users write it: ``star+ties``, or ``star+my.py:Mine``."""
        return "+".join(METHODS.reference(type(step)) for step in self.steps)

    @property
    def plugins(self) -> dict[str, Origin]:
        """Where the methods come from that are not starmerge's own, by name."""
        origins = {step.name: METHODS.origin(type(step)) for step in self.steps}
        return {name: origin for name, origin in origins.items() if origin is not None}

    @property
    def all_steps(self) -> tuple[Method, ...]:
        """All methods in their order, a merge by average too."""
        return (*self.transforms, self.merge, *self.post_steps)

    @property
    def passes(self) -> int:
        """Passes over the model before the merge; see :attr:`Method.passes`."""
        return sum(step.passes for step in self.all_steps)

    @property
    def metric_users(self) -> tuple[Method, ...]:
        """The methods that work in whitened inputs or with moments of the tasks' own inputs."""
        return tuple(step for step in self.all_steps if step.uses_metric or step.needs_moments)

    @property
    def uses_metric(self) -> bool:
        """Whether a method works in whitened inputs where there is a metric."""
        return any(step.uses_metric for step in self.steps)

    @property
    def needs_moments(self) -> bool:
        """Whether a method needs moments of every task's own inputs."""
        return any(step.needs_moments for step in self.steps)

    def memory(self, tensor: TensorShape) -> int:
        """Tell how many bytes merging one tensor takes at most, beyond what is stored.

        While a transform works, the merge holds the task vectors that it has got before, or their
        float32 sum. Post-steps begin when it has let go of them. The whitening of a metric stays as
        long as the tensor is in work.

        Args:
            tensor: What is known of the tensor before it is read.
        """
        given, transforming, kept = tensor, 0, 0
        for transform in self.transforms:
            transforming += tensor.one_by_one + transform.memory(tensor)
            kept += transform.kept(tensor)
            tensor = transform.after(tensor)
        merging = self.merge.memory(tensor)
        beside = min(merging, tensor.held + (4 * tensor.size if tensor.has_dense else 0))
        peak = max(transforming + beside, kept + merging)
        merged = self.merge.result(tensor)
        for step in self.post_steps:
            given = dataclasses.replace(given, merged=merged)
            peak = max(peak, merged.nbytes + step.memory(given))
            merged = step.result(given)
        return peak + tensor.whitening

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Tell what is made of one tensor, before it is there.

        Args:
            tensor: What is known of the tensor before it is read.
        """
        given = tensor
        for transform in self.transforms:
            tensor = transform.after(tensor)
        merged = self.merge.result(tensor)
        for step in self.post_steps:
            merged = step.result(dataclasses.replace(given, merged=merged))
        return merged

    def parameters(self) -> dict[str, Any]:
        """Return all parameters; in a chain of several methods as ``star.eta``."""
        if len(self.steps) == 1:
            return self.steps[0].parameters()
        return {
            f"{step.name}.{key}": value
            for step in self.steps
            for key, value in step.parameters().items()
        }

    def check(self, tasks: Sequence[str], weights: Sequence[float], tensors: Sequence[str]) -> None:
        """Compare the parameters with what is to be merged; see :meth:`Method.check`.

        Raises:
            UsageError: They do not fit, or an average's weights sum to zero.
        """
        if self.merge.averages and sums_to_zero(weights):
            raise UsageError(
                f"The weights sum to zero, and {self.merge.name} divides by their sum. Change one, "
                "or choose a merge that only adds, such as task_arithmetic."
            )
        for step in self.all_steps:
            step.check(tasks, weights, tensors)

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Compare the parameters with each tensor; see :meth:`Method.check_tensors`.

        Raises:
            UsageError: They do not fit.
        """
        for step in self.all_steps:
            step.check_tensors(merged, left)

    def prepare(self, walk: Walk) -> Prepared:
        """Let each method go through the model that its predecessors leave it.

        Args:
            walk: Goes over the models' own task vectors.
        """
        surveys: list[Any] = []
        for number, transform in enumerate(self.transforms):
            before = Prepared(
                dataclasses.replace(self, transforms=self.transforms[:number]), surveys
            )
            surveys.append(transform.survey(partial(_transformed_walk, walk, before)))
        before = Prepared(self, surveys)
        inputs = partial(_transformed_walk, walk, before, weighted=self.merge.scaled_inputs)
        surveys.append(self.merge.survey(inputs))
        for number, step in enumerate(self.post_steps):
            before = Prepared(
                dataclasses.replace(self, post_steps=self.post_steps[:number]), surveys
            )
            surveys.append(step.survey(partial(_merged_walk, walk, before)))
        return Prepared(self, surveys)


@dataclass(frozen=True)
class Prepared:
    """A chain whose methods know the whole model: it merges one tensor at a time."""

    pipeline: Pipeline
    surveys: Sequence[Any]
    """What each method found, in the order of the chain."""

    @property
    def findings(self) -> dict[str, Any]:
        """What the methods that looked at the whole model found, by method, as plain data."""
        return {
            method.name: asdict(found) if is_dataclass(found) else found  # type: ignore[arg-type]
            for method, found in zip(self.pipeline.all_steps, self.surveys, strict=True)
            if found is not None
        }

    def merge(self, deltas: Deltas, tensor: TensorContext, *, holds_inputs: bool = False) -> Merged:
        """Merge the task vectors of one tensor.

        Args:
            deltas: τ_t of the tasks that change it, as the models have them.
            tensor: The tensor.
            holds_inputs: Whether what the merge gets is held in memory, so that the caller may look
                at it again without the transforms' work.
        """
        truncations: dict[int, Truncation] = {}
        chain, count = self.pipeline, len(self.pipeline.transforms)
        inputs = self.transformed(deltas, tensor, truncations, weighted=chain.merge.scaled_inputs)
        if holds_inputs:
            inputs = Deltas.of(dict(inputs.items()))
        merged = chain.merge.merge(inputs, tensor, self.surveys[count])
        surveys = self.surveys[count + 1 :]
        for step, survey in zip(chain.post_steps, surveys, strict=False):
            merged = step.apply(merged, deltas, tensor, survey)
        return Merged(merged, truncations, inputs)

    def transformed(
        self,
        deltas: Deltas,
        tensor: TensorContext,
        truncations: dict[int, Truncation],
        *,
        weighted: bool,
    ) -> Deltas:
        """Return the task vectors as the merge gets them: transformed, then weighted.

        What the transforms kept of each is put into ``truncations`` when it is read.
        """

        def apply(transform: Transform, local: Any, task: int, delta: Delta) -> Delta:
            changed, truncation = transform.apply(delta, task, tensor, local)
            if truncation is not None:
                truncations[task] = truncation
            return changed

        def weigh(task: int, delta: Delta) -> Delta:
            weight = tensor.weights[task] if weighted else 1.0
            return delta if weight == 1 else delta.scaled(weight)

        for transform, survey in zip(self.pipeline.transforms, self.surveys, strict=False):
            local = transform.look(deltas, tensor, survey)
            deltas = deltas.map(partial(apply, transform, local))
        return deltas.map(weigh)


def make_pipeline(name: str, parameters: Mapping[str, Any] | None = None) -> Pipeline:
    """Return a chain by its name, such as ``star+ties``, its parameters validated.

    Args:
        name: Names of methods, joined by ``+``; of a method in a file ``path/to/file.py:NAME``.
        parameters: Each as ``key`` where one method of the chain has it, or as ``method.key``.

    Raises:
        UsageError: No such method or parameter, a value out of its range, a wrong order.
        StarmergeError: The package or the file of a method cannot be loaded.
    """
    parts = split_chain(name)
    methods = [find_method(part) for part in parts]
    _check_distinct(name, methods)
    owners = {method.name: method.parameter_names() for method in methods}
    given: dict[str, dict[str, Any]] = {own: {} for own in owners}
    for key, value in (parameters or {}).items():
        step, dot, own = key.rpartition(".")
        having = [part for part in owners if own in owners[part] and step in ("", part)]
        if dot and step not in owners:
            raise UsageError(f"{name}: {key!r} is a parameter of no method of the chain.")
        if len(having) > 1:
            choice = " or ".join(f"{part}.{key}" for part in having)
            raise UsageError(f"{name}: {key!r} is a parameter of several methods. Say {choice}.")
        if not having:
            known = [known for part in owners for known in owners[part]]
            hint = nearest(own, known) if known else " It has none."
            raise UsageError(f"Method {name!r} has no parameter {key!r}.{hint}")
        if own in given[having[0]]:
            raise UsageError(f"{name}: the parameter {own!r} is given twice. Leave one out.")
        given[having[0]][own] = value
    return Pipeline.of(
        [make_method(part, given[own]) for part, own in zip(parts, owners, strict=True)]
    )


def split_chain(name: str) -> list[str]:
    """Return the methods of a chain: ``star+my.py:Mine`` has ``star`` and ``my.py:Mine``.

    A folder may have a ``+`` in its name if a slash stands before it, as in ``./a+b/my.py:Mine``.
    """
    parts: list[str] = []
    for piece in name.split("+"):
        if parts and "/" in parts[-1] and not is_file_reference(parts[-1].strip()):
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return [part.strip() for part in parts]


def map_chain(name: str, change: Callable[[str], str]) -> str:
    """Return a chain each of whose methods is named as ``change`` returns it."""
    return "+".join(map(change, split_chain(name)))


def _check_distinct(name: str, methods: Sequence[type[Method]]) -> None:
    """Make sure that each method stands in a chain once, and that no two have one name.

    Raises:
        UsageError: One stands there twice, or shares its name.
    """
    for number, method in enumerate(methods):
        for other in methods[:number]:
            if other is method:
                raise UsageError(f"{name}: {method.name} stands there twice. A method counts once.")
            if other.name == method.name:
                places = " and ".join(map(METHODS.reference, (other, method)))
                raise UsageError(
                    f"{name}: {places} both call themselves {method.name!r}. Rename one."
                )


def as_pipeline(method: Method | Pipeline | str) -> Pipeline:
    """Return a chain: of one method, of a text such as ``star+ties:eta=60``, or as it is.

    Raises:
        UsageError: There is no method of that name; or as for :func:`make_pipeline`.
    """
    if isinstance(method, Pipeline):
        return method
    if isinstance(method, str):
        return make_pipeline(*read_chain(method))
    return Pipeline.of([method])


_ORDER = ["transform", "merge", "post-step"]


def _transformed_walk(
    walk: Walk,
    chain: Prepared,
    look: Callable[[Deltas, TensorContext], _Seen],
    *,
    weighted: bool = False,
) -> Iterator[_Seen]:
    def see(deltas: Deltas, tensor: TensorContext) -> _Seen:
        return look(chain.transformed(deltas, tensor, {}, weighted=weighted), tensor)

    return walk(see)


def _merged_walk(
    walk: Walk, chain: Prepared, look: Callable[[Delta, Deltas, TensorContext], _Seen]
) -> Iterator[_Seen]:
    def see(deltas: Deltas, tensor: TensorContext) -> _Seen:
        return look(chain.merge(deltas, tensor).delta, deltas, tensor)

    return walk(see)
