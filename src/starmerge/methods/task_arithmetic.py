"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from starmerge.deltas import Delta, total
from starmerge.methods.method import Merged, Method, TensorContext, method


@method("task_arithmetic")
class TaskArithmetic(Method):
    """The scaled sum of the task vectors: base + α Σ δ_t.

    Source: arXiv 2212.04089 (addition of task vectors); defining repository
    github.com/mlfoundations/task_vectors. There α is chosen on validation data; 0.4 is a common
    choice without. The sum grows with the number of models: lower α for many.
    Cost: one addition a tensor and task.
    When to use: when there is a validation set to choose α on.
    """

    alpha: Annotated[float, Field(description="factor of the summed task vectors")] = 0.4

    def merge(self, deltas: Iterable[Delta], context: TensorContext) -> Merged:
        """Merge one tensor; see :meth:`Method.merge`."""
        return Merged(total(deltas).scaled(self.alpha))
