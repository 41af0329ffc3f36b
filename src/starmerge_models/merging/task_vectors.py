"""The task vectors of models, read once from files and merged many times in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.metric import Metric, open_metric
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.deltas import Delta, LowRank, Stored
from starmerge_models.errors import UsageError, nearest
from starmerge_models.merging.checks import check_delta, check_weights
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.in_memory import check_one_update, merge_all
from starmerge_models.merging.layout import lay_out
from starmerge_models.merging.plan import check_merge, choose, open_models
from starmerge_models.methods.method import Deltas, Method, TensorContext
from starmerge_models.methods.pipeline import Pipeline, as_pipeline
from starmerge_models.recipe import make_recipe, model_entries, reference


def load_task_vectors(
    base: str | Path,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    any_base: bool = False,
    common: bool = False,
) -> TaskVectors:
    """Read the task vectors of fine-tunes of one base, for repeated merges.

    Adapters are held as factors; full fine-tunes, and the base's tensors that they change, are held
    in memory in their stored dtype: as many bytes as in their files. The files are not read again,
    except by methods that need the base, which read the remaining base tensors once. The same
    checks are made as by :func:`starmerge_models.merge`.

    Args:
        base: The base model: a folder, or a Hub id ``org/name`` or ``org/name@revision``.
        models: LoRA adapters in PEFT's layout and full fine-tunes, as folders or Hub ids; a mapping
            gives them names.
        any_base: Accept models whose config names another base, or differs from the base's.
        common: Read only the tensors that models and base have in common.

    Raises:
        UsageError: An argument is wrong.
        StarmergeError: An input is broken, does not fit, or has a NaN or an infinity.

    Example:
        ``vectors = sm.load_task_vectors("base", ["adapters/a", "adapters/b"])``
    """
    recipe = make_recipe(
        {
            "base": reference(base),
            "models": model_entries(models),
            "any_base": any_base,
            "common": common,
        }
    )
    opened, fine_tunes = open_models(recipe)
    deltas: dict[str, dict[str, Delta]] = {model.name: {} for model in fine_tunes}
    bases: dict[str, Tensor] = {}
    for tensor in lay_out(opened, fine_tunes):
        if not tensor.models:
            continue
        name = tensor.source.name
        weight = opened.checkpoint.read(name)
        for model in tensor.models.values():
            delta = model.delta(name, weight)
            if isinstance(delta, Stored):
                # Copy the tensor: a memory-mapped tensor keeps a file descriptor open, and reading
                # it after the file was truncated would crash the process.
                if name not in bases:
                    bases[name] = weight.clone()
                terms = [(c, tuned.clone()) for c, tuned in delta.terms]
                delta = Stored(terms, bases[name], delta.factor)
            elif isinstance(delta, LowRank):  # factors of a .bin file are memory-mapped too
                delta = LowRank(delta.B.clone(), delta.A.clone(), delta.scale)
            check_delta(delta, model, tensor.source, weight)
            deltas[model.name][name] = delta
    return TaskVectors(opened, fine_tunes, deltas, bases)


@dataclass(frozen=True, eq=False, repr=False)
class TaskVectors:
    """The task vectors of some fine-tunes of one base, in memory.

    Created by :func:`load_task_vectors`. The SVD of each task vector is cached for the lifetime of
    this object, so that a sweep over parameters, methods and subsets of the models computes it
    once.
    """

    base: Base
    models: tuple[FineTune, ...]
    deltas: Mapping[str, Mapping[str, Delta]]
    """Deltas by the model's name and the tensor's name."""
    _bases: dict[str, Tensor]
    """The base's tensors that were needed so far, by name."""

    def __repr__(self) -> str:
        tensors = {name for deltas in self.deltas.values() for name in deltas}
        return f"<TaskVectors of {', '.join(self.names)}: {len(tensors)} tensors>"

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(model.name for model in self.models)

    def merge(
        self,
        method: Method | Pipeline | str = "star",
        *,
        models: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        metric: str | Path | Metric | None = None,
        threads: int | None = None,
    ) -> dict[str, Delta]:
        """Merge all or some models, with the result of :func:`starmerge_models.merge` for files.

        The result does not depend on ``threads``.

        Args:
            method: A method, a chain, or a name such as "star+ties".
            models: Names of the models to merge, in this order; by default all.
            weights: Factors of the task vectors, one for each merged model; by default all are 1.
            metric: A metric of the base, or its file: spectral methods then merge in whitened
                inputs. The base's files are hashed once per process.
            threads: Number of tensors merged at the same time; by default as many as for
                :func:`starmerge_models.merge`.

        Returns:
            For each tensor that some model changes, the update, which
            :func:`starmerge_models.apply` adds to a model. Dense results are matrices (m, n).

        Raises:
            UsageError: A model is unknown or given twice; or the method, its parameters, the
                weights or the metric do not fit.
            StarmergeError: None of the models changes any tensor; the metric is damaged.
        """
        chosen = self.models if models is None else self._chosen(models)
        opened = open_metric(metric) if isinstance(metric, str | Path) else metric
        pipeline, _ = choose(as_pipeline(method), chosen, opened)
        check_one_update(pipeline)
        tasks = [model.name for model in chosen]
        factors = check_weights(weights, len(chosen))
        tensors = lay_out(self.base, chosen)
        tensors = check_merge(pipeline, self.base, chosen, factors, tensors, opened)
        planned = {tensor.source.name: tensor for tensor in tensors if tensor.models}

        def inputs(name: str) -> tuple[Deltas, TensorContext]:
            changing = planned[name].models
            if pipeline.merge.needs_base and name not in self._bases:
                self._bases[name] = self.base.checkpoint.read(name).clone()
            context = planned[name].context(tasks, factors, self._bases.get(name))
            return Deltas.of({t: self.deltas[m.name][name] for t, m in changing.items()}), context

        def memory(name: str) -> int:
            return planned[name].memory(pipeline, tasks)

        with Threads(threads) as executor:
            return merge_all(pipeline, planned, inputs, executor, memory)

    def _chosen(self, names: Sequence[str]) -> tuple[FineTune, ...]:
        """Return the models of the given names."""
        if isinstance(names, str):
            raise UsageError(f"models is the text {names!r}. Give a list of names.")
        ours = {model.name: model for model in self.models}
        for name in names:
            if name not in ours:
                raise UsageError(f"No model is called {name!r}.{nearest(name, ours)}")
        if len(set(names)) < len(names) or not names:
            raise UsageError(f"models is {list(names)}. Give each model once, and at least one.")
        return tuple(ours[name] for name in names)
