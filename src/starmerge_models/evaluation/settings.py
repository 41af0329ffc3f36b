"""Settings of an evaluation: the scorer, the rows, the device and other choices of the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from starmerge_models.errors import UsageError, nearest
from starmerge_models.evaluation.models.loading import Dtype
from starmerge_models.evaluation.models.scorers import SCORERS
from starmerge_models.evaluation.scoring.matching import Mode


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation."""

    scorer: str = "generate"
    """A name of :data:`starmerge_models.evaluation.models.scorers.SCORERS`; for tasks of text."""
    mode: Mode = "strict"
    """How responses are parsed; "reference" for comparison with published numbers."""
    rows: int | None = None
    """Most rows of a task; None: the whole sample."""
    batch_size: int | None = None
    """Most rows of a batch; None: as many as fit."""
    device: str | None = None
    """Such as "cpu" or "cuda:1"; None: the GPU if there is one."""
    dtype: Dtype = "auto"
    """Dtype of the weights; "auto": the stored dtype if the device computes in it natively."""

    backend: str = "transformers"
    """The inference library: transformers, or vllm (text tasks, on a GPU)."""

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise UsageError(
                f"The scorer {self.scorer!r} is unknown.{nearest(self.scorer, SCORERS)}"
            )
        if self.mode not in ("strict", "reference"):
            raise UsageError(f"Matching is strict or reference, not {self.mode!r}.")
        if self.backend not in ("transformers", "vllm"):
            raise UsageError(f"The backend is transformers or vllm, not {self.backend!r}.")
        if self.dtype not in get_args(Dtype):
            raise UsageError(
                f"The dtype {self.dtype!r} is unknown.{nearest(self.dtype, get_args(Dtype))}"
            )
        for name, number in (("rows", self.rows), ("batch_size", self.batch_size)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise UsageError(f"{name} is {number!r}. Give a whole number, 1 or more.")


def check_settings(settings: object) -> None:
    """Check that a program gives the settings as an object.

    Raises:
        UsageError: It gives something else.
    """
    if not isinstance(settings, Settings):
        raise UsageError(f"The settings are {settings!r}. Give an object: Settings(rows=50).")
