"""Moments along a merge: the prompts are read by the model as far as it is merged.

A layer's inputs depend on the layers before it, and a merge changes those. So the layers are taken
one after the other: the model reads the prompts up to a layer, the moments of the layer's inputs
are taken, its tensors are merged by ``regmean`` with them, and the next layer's inputs come from
that.

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
    """A step of the merge: the modules of one layer, or one module of none."""

    groups: tuple[Group, ...]
    until: nn.Module | None
    """The layer, after which a pass need not go on; None: it must."""


Read = Callable[[Stage, str], Iterator[tuple[Group, Sum]]]
"""Has the model read a task's prompts, and yields the sums of a stage's groups."""


class Along:
    """A merge by ``regmean`` that goes along with a calibration.

    Args:
        model: The base, loaded; it holds the base's weights again at the end.
        vectors: The task vectors of the models, which are named as the tasks are.
        groups: The base's modules that have moments, in the model's order.
        is_read_once: Whether each module is called once in a pass.
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
        # Only what a model changes is merged and needs moments; and what reads the same in several
        # layers, as cross-attention does, is merged layer by layer all the same.
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
        """Say in a line how prompts are read."""
        names = ", ".join(self._vectors.names)
        return f"Prompts are read along a merge of {names}, in {len(self.stages)} steps"

    def moments(self, tasks: Sequence[str], read: Read) -> Iterator[tuple[str, Group, Moment]]:
        """Yield the moments of the tasks' prompts, layer by layer, and merge each layer after it.

        Args:
            tasks: The tasks.
            read: Has the model read.
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
                # What the prompts of a task do not reach stays as the base has it.
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
        """Add the merge of some tensors to the model; return what takes it back."""
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
                assert task is not None, "regmean reads the moments of tasks alone"
                return moments[name, tasks[task]]

            context = replace(context, inputs=Inputs(self._sides[name], read))
        deltas = {t: self._vectors.deltas[m.name][name] for t, m in tensor.models.items()}
        return RegMean().merge(Deltas.of(deltas), context, None)
