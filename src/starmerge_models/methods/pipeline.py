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

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Merged:
    """The result of a chain for one tensor."""

    delta: Delta
    """The update to add to the base."""
    truncations: Mapping[int, Truncation]
    """By task, the record of the last truncation by a transform."""
    inputs: Deltas
    """The task vectors that the merge received: transformed and weighted."""


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
        """Return the chain of the given methods.

        Raises:
            UsageError: An argument is not a method, there are two merges, the order is wrong, or a
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

    def resolve_auto(
        self, models: Sequence[str] = (), *, has_dense: bool, prompts: Collection[str] | None = None
    ) -> tuple[Pipeline, str | None]:
        """Replace ``auto`` by the chain that it chooses, and return it with the reason.

        Any other chain is returned unchanged, with None.

        Args:
            models: Names of the models.
            has_dense: Whether one of them is a full fine-tune.
            prompts: Names of the models whose prompts the metric has moments of; None for a merge
                without a metric.
        """
        if not isinstance(self.merge, Auto):
            return self, None
        choice = self.merge.choose(models, has_dense=has_dense, prompts=prompts)
        return Pipeline.of(choice.steps), choice.reason

    @property
    def steps(self) -> tuple[Method, ...]:
        """The methods in order, without the implicit ``average`` at the end of other methods."""
        others = bool(self.transforms) and self.merge == Average()
        return (*self.transforms, *(() if others else (self.merge,)), *self.post_steps)

    @property
    def name(self) -> str:
        """The chain as users write it: ``star+ties``, or ``star+my.py:Mine``."""
        return "+".join(METHODS.reference(type(step)) for step in self.steps)

    @property
    def plugins(self) -> dict[str, Origin]:
        """The origin of each method that is not built in, by name."""
        origins = {step.name: METHODS.origin(type(step)) for step in self.steps}
        return {name: origin for name, origin in origins.items() if origin is not None}

    @property
    def all_steps(self) -> tuple[Method, ...]:
        """All methods in order, including an implicit ``average``."""
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
        """Return an upper bound of the memory that merging one tensor takes, in bytes.

        The stored task vectors are not counted. While a transform runs, the merge holds the task
        vectors that were transformed before, or their float32 sum. It frees them before the
        post-steps run. The whitening of a metric is held until the tensor is done.

        Args:
            tensor: Shapes and ranks of the tensor, known before its data is read.
        """
        given, transforming, kept = tensor, 0, 0
        for transform in self.transforms:
            transforming += tensor.largest_delta_nbytes + transform.memory(tensor)
            kept += transform.prepared_bytes(tensor)
            tensor = transform.transformed_shape(tensor)
        merging = self.merge.memory(tensor)
        beside = min(merging, tensor.deltas_nbytes + (4 * tensor.size if tensor.has_dense else 0))
        peak = max(transforming + beside, kept + merging)
        merged = self.merge.result(tensor)
        for step in self.post_steps:
            given = dataclasses.replace(given, merged=merged)
            peak = max(peak, merged.nbytes + step.memory(given))
            merged = step.result(given)
        return peak + tensor.whitening

    def result(self, tensor: TensorShape) -> DeltaShape:
        """Return the shape of the chain's result for one tensor.

        Args:
            tensor: Shapes and ranks of the tensor, known before its data is read.
        """
        given = tensor
        for transform in self.transforms:
            tensor = transform.transformed_shape(tensor)
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
        """Check the parameters against the models and weights; see :meth:`Method.check`.

        Raises:
            UsageError: They do not fit, or the weights of an average sum to zero.
        """
        if self.merge.averages and sums_to_zero(weights):
            raise UsageError(
                f"The weights sum to zero, and {self.merge.name} divides by their sum. Change one, "
                "or choose a merge that only adds, such as task_arithmetic."
            )
        for step in self.all_steps:
            step.check(tasks, weights, tensors)

    def check_tensors(self, merged: Sequence[TensorContext], left: Sequence[TensorContext]) -> None:
        """Check the parameters against each tensor; see :meth:`Method.check_tensors`.

        Raises:
            UsageError: They do not fit.
        """
        for step in self.all_steps:
            step.check_tensors(merged, left)

    def prepare(self, walk: Walk) -> Prepared:
        """Run the survey of each method, in order, on the output of the methods before it.

        Args:
            walk: A pass over the models' own task vectors.
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
    """A chain with the surveys of its methods, ready to merge one tensor at a time."""

    pipeline: Pipeline
    surveys: Sequence[Any]
    """The survey of each method, in the order of the chain."""

    @property
    def findings(self) -> dict[str, Any]:
        """The surveys that are not None, by method, as plain data."""
        return {
            method.name: asdict(found) if is_dataclass(found) else found  # type: ignore[arg-type]
            for method, found in zip(self.pipeline.all_steps, self.surveys, strict=True)
            if found is not None
        }

    def merge(self, deltas: Deltas, tensor: TensorContext, *, holds_inputs: bool = False) -> Merged:
        """Merge the task vectors of one tensor.

        Args:
            deltas: τ_t of the tasks that change the tensor, not transformed and not weighted.
            tensor: The tensor.
            holds_inputs: Whether to hold the inputs of the merge in memory, so that the caller can
                read them again without running the transforms again.
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
        """Return the lazy inputs of the merge: the task vectors transformed, then weighted.

        Each load puts the record of its truncation, if any, into ``truncations``.
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
            local = transform.prepare_tensor(deltas, tensor, survey)
            deltas = deltas.map(partial(apply, transform, local))
        return deltas.map(weigh)


def make_pipeline(name: str, parameters: Mapping[str, Any] | None = None) -> Pipeline:
    """Return a chain by its name, such as ``star+ties``, its parameters validated.

    Args:
        name: Names of methods, joined by ``+``; a method in a file is ``path/to/file.py:NAME``.
        parameters: Values by ``key`` where one method of the chain has it, or by ``method.key``.

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

    A folder's name may contain a ``+`` after a slash, as in ``./a+b/my.py:Mine``.
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
    """Check that each method occurs once in a chain, and that no two have the same name.

    Raises:
        UsageError: A method occurs twice, or two have the same name.
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
    """Return the chain of one method or of a text such as ``star+ties:eta=60``; chains unchanged.

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
    visit_tensor: Callable[[Deltas, TensorContext], _Result],
    *,
    weighted: bool = False,
) -> Iterator[_Result]:
    def visit(deltas: Deltas, tensor: TensorContext) -> _Result:
        return visit_tensor(chain.transformed(deltas, tensor, {}, weighted=weighted), tensor)

    return walk(visit)


def _merged_walk(
    walk: Walk, chain: Prepared, visit_tensor: Callable[[Delta, Deltas, TensorContext], _Result]
) -> Iterator[_Result]:
    def visit(deltas: Deltas, tensor: TensorContext) -> _Result:
        return visit_tensor(chain.merge(deltas, tensor).delta, deltas, tensor)

    return walk(visit)
