"""Task arithmetic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from starmerge_models.deltas import Delta, total
from starmerge_models.methods.memory import TensorShape, total_bytes
from starmerge_models.methods.method import Deltas, Merge, TensorContext, method


@method("task_arithmetic")
class TaskArithmetic(Merge):
    """The scaled sum of the task vectors: base + α Σ w_t δ_t.

    Source: arXiv 2212.04089 (addition of task vectors); defining repository
    github.com/mlfoundations/task_vectors. The paper chooses α on validation data; 0.4 is a common
    choice without such data. The sum grows with the number of models: lower α for many.
    Cost: one addition per tensor and task.
    When to use: with a validation set to choose α on.
    """

    alpha: Annotated[float, Field(description="factor of the summed task vectors")] = 0.4

    def memory(self, tensor: TensorShape) -> int:
        """Return the peak memory in bytes; see :meth:`Method.memory`."""
        return total_bytes(tensor)

    def merge(self, deltas: Deltas, tensor: TensorContext, survey: Any) -> Delta:
        """Merge one tensor; see :meth:`Merge.merge`."""
        return total(deltas).scaled(self.alpha)
