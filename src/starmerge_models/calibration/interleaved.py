"""Moments along a merge: layer by layer, from the outputs of the layers that are already merged.

A layer's inputs depend on the preceding layers, and a merge changes these. So for each layer in
turn, the model runs the prompts up to the layer, the moments of the layer's inputs are collected,
and its tensors are merged by ``regmean`` with these moments, before the next layer's inputs are
computed.

Source: RegMean++, arXiv 2508.03121.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from starmerge_models.calibration.moments import Group, Sum
from starmerge_models.checkpoints.layers import layer_of
from starmerge_models.checkpoints.names import match_names
from starmerge_models.deltas import Delta
from starmerge_models.merging.apply import Applied, apply
from starmerge_models.merging.layout import PlannedTensor, lay_out
from starmerge_models.merging.task_vectors import TaskVectors
from starmerge_models.methods.method import Deltas
from starmerge_models.methods.regmean import RegMean
from starmerge_models.spectral.metric import Inputs
from starmerge_models.spectral.moment import Moment


@dataclass(frozen=True)
class Stage:
    """A step of the merge: the modules of one layer, or one module outside of layers."""

    groups: tuple[Group, ...]
    until: nn.Module | None
    """The layer after which a forward pass may stop; None: it must complete."""


Read = Callable[[Stage, str], Iterator[tuple[Group, Sum]]]
"""Runs the model on a task's prompts, and yields the sums of a stage's groups."""


class InterleavedMerge:
    """A merge by ``regmean`` interleaved with a calibration.

    Args:
        model: The loaded base; its weights are restored at the end.
        vectors: The task vectors of the models, which have the names of the tasks.
        groups: The base's modules that have moments, in the model's order.
        is_read_once: Whether each module is called at most once in a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: TaskVectors,
        groups: Sequence[Group],
        *,
        is_read_once: bool,
    ) -> None:
        self._model, self._vectors = model, vectors
        self._planned = {
            tensor.source.name: tensor
            for tensor in lay_out(vectors.base, vectors.models)
            if tensor.models
        }
        parameters = dict(model.named_parameters())
        found = match_names(vectors.base.source, vectors.base, list(parameters))
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        self._names = {tensor: name for name, tensor in found.items()} | {
            member.tensor: name_of[id(member.module.weight)]
            for group in groups
            for member in group.members
        }
        # Only tensors that a model changes are merged and need moments. Modules of several layers
        # with the same input, as in cross-attention, are still merged layer by layer.
        order = {name: place for place, name in enumerate(parameters)}
        parts = [
            tuple(members)
            for group in groups
            for _, members in groupby(
                (member for member in group.members if member.tensor in self._planned),
                lambda member: layer_of(self._names[member.tensor]),
            )
        ]
        parts.sort(key=lambda members: order[self._names[members[0].tensor]])
        self.groups = [Group(members) for members in parts]
        self._sides = {member.tensor: member.side for members in parts for member in members}
        self.stages = [
            Stage(tuple(parts), self._module(layer) if is_read_once else None)
            for layer, parts in groupby(self.groups, lambda g: layer_of(self._names[g.tensors[0]]))
        ]

    def describe(self) -> str:
        """Describe the calibration in a line."""
        names = ", ".join(self._vectors.names)
        return f"Prompts are read during a merge of {names}, in {len(self.stages)} steps"

    def moments(self, tasks: Sequence[str], read: Read) -> Iterator[tuple[str, Group, Moment]]:
        """Yield the moments of the tasks' prompts, and merge each layer after its moments.

        Args:
            tasks: The tasks.
            read: Runs the model on a task's prompts.
        """
        grouped = {tensor for group in self.groups for tensor in group.tensors}
        with ExitStack() as merged:
            # Norms, embeddings, biases: regmean averages them.
            merged.enter_context(self._merged(self._planned.keys() - grouped, {}))
            for stage in self.stages:
                found: dict[tuple[str, str], Moment] = {}
                for task in tasks:
                    for group, total in read(stage, task):
                        moment = Moment(total.root(), total.tokens)
                        found |= {(tensor, task): moment for tensor in group.tensors}
                        yield task, group, moment
                # Modules that the prompts of a task do not reach keep the base's weights.
                reached = {
                    tensor
                    for group in stage.groups
                    for tensor in group.tensors
                    if all((tensor, task) in found for task in tasks)
                }
                merged.enter_context(self._merged(reached, found))

    def _module(self, layer: str) -> nn.Module:
        return self._model.get_submodule(layer.removesuffix(".weight"))

    def _merged(self, tensors: set[str], moments: Mapping[tuple[str, str], Moment]) -> Applied:
        """Add the merge of some tensors to the model; return the handle that undoes it."""
        update = {
            self._names[name]: self._merge(self._planned[name], moments)
            for name in sorted(tensors)
            if name in self._names
        }
        return apply(self._model, update)

    def _merge(self, tensor: PlannedTensor, moments: Mapping[tuple[str, str], Moment]) -> Delta:
        name, tasks = tensor.source.name, self._vectors.names
        context = tensor.context(tasks, [1.0] * len(tasks), None)
        if moments:

            def read(task: int | None) -> Moment:
                assert task is not None, "regmean reads only the moments of tasks"
                return moments[name, tasks[task]]

            context = replace(context, inputs=Inputs(self._sides[name], read))
        deltas = {t: self._vectors.deltas[m.name][name] for t, m in tensor.models.items()}
        return RegMean().merge(Deltas.of(deltas), context, None)
