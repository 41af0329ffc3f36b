"""Choice of the device for the linear algebra of dense deltas: a GPU, if torch has one, or the CPU.

:func:`run` chooses the device for a piece of work; no other code of the package does. It handles
three problems of work on a GPU:

- **First use.** torch loads its CUDA linear algebra on the first call of a routine. A second thread
  that calls a routine at the same time gets "lazy wrapper should be called at most once" (torch
  2.11). So the first thread calls every routine once, under a lock, and all other threads wait.
- **Memory.** The caller states an upper bound of the bytes that the work needs. Concurrent work
  gets at most :data:`SHARE` of the GPU's free memory; work that needs more runs alone.
- **Failure.** Work that fails on the GPU, usually because its memory is full, is run again on the
  CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, local
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_LOG = logging.getLogger("starmerge_models.device")

CPU = torch.device("cpu")
FIRST_GPU = torch.device("cuda", 0)

SHARE = 0.8
"""Share of the free memory that is given to work; the rest is left for the libraries."""

LARGE = 512
"""Matrices with a shorter side below this stay on the CPU, where the cost of copies and of many
small kernel launches is saved. The value is not measured; at 1024 a GPU is eight times as fast as a
core."""

ROUTINES: tuple[Callable[[Tensor], object], ...] = (
    torch.linalg.eigh,
    torch.linalg.svd,
    torch.linalg.svdvals,
    torch.linalg.qr,
    torch.linalg.cholesky,
    lambda matrix: torch.cholesky_solve(matrix, matrix),
    lambda matrix: torch.linalg.solve(matrix, matrix),
    lambda matrix: torch.linalg.solve_triangular(matrix, matrix, upper=True),
    lambda matrix: matrix @ matrix,
)
"""The routines of torch's linear algebra that this package calls on a GPU."""


class Accelerator:
    """The GPU, shared by the threads of this process.

    Args:
        device: Torch's device. By default the first GPU, which CUDA_VISIBLE_DEVICES selects; an
            empty value of this variable hides all GPUs.
    """

    def __init__(self, device: torch.device = FIRST_GPU) -> None:
        self.device = device
        self._first_use = Lock()
        self._usable: bool | None = None
        self._turn, self._changed = Lock(), Condition()
        self._promised = self._capacity = 0

    def is_usable(self) -> bool:
        """Initialise the GPU if necessary, and return whether it works.

        The first caller initialises it; callers in other threads wait. If the initialisation
        fails, this process never uses the GPU, and the reason is logged as a warning.
        """
        with self._first_use:
            if self._usable is None:
                self._usable = self.exists() and self._is_made_ready()
            return self._usable

    @contextmanager
    def reserve(self, need: int) -> Iterator[None]:
        """Wait until the GPU has enough free memory, and reserve it for the ``with`` block.

        Waiting threads are served in order, so that small work cannot starve large work.

        Args:
            need: Upper bound of the bytes that the work takes.
        """
        with self._turn, self._changed:
            self._changed.wait_for(
                lambda: not self._promised or self._promised + need <= self._capacity
            )
            if not self._promised:
                self._capacity = int(SHARE * self.free_memory())
            self._promised += need
        try:
            yield
        finally:
            with self._changed:
                self._promised -= need
                self._changed.notify_all()

    def exists(self) -> bool:
        """Return whether torch finds the GPU."""
        return torch.cuda.is_available()

    def make_ready(self) -> None:
        """Call each of :data:`ROUTINES` once.

        Raises:
            RuntimeError: The GPU or its libraries do not work.
        """
        matrix = torch.eye(2, dtype=torch.float64, device=self.device)
        for routine in ROUTINES:
            routine(matrix)
        matrix.cpu()  # synchronises, and raises errors of all routines

    def free_memory(self) -> int:
        """Return the free bytes: those of the driver and the unused ones of torch's cache."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept

    def _is_made_ready(self) -> bool:
        try:
            self.make_ready()
        except RuntimeError as error:
            _LOG.warning("%s cannot be used, so the CPU is: %s", self.device, error)
            return False
        return True


ACCELERATOR = Accelerator()

_current = local()


def run(work: Callable[[torch.device], _T], *, home: torch.device, need: int | None) -> _T:
    """Return ``work(device)``, on the GPU if there is one, else on the CPU.

    ``work`` must move its inputs to the device and its result back to ``home``, and must have no
    side effects: if it fails on the GPU, it is called again with the CPU. Nested work in the same
    thread runs on the device of the outer work, which must reserve the memory for both.

    Args:
        work: Function of the device.
        home: Device of the inputs.
        need: Upper bound of the bytes that the work takes on the GPU; None runs it on ``home``.
    """
    here: torch.device | None = getattr(_current, "device", None)
    if here is not None:
        return work(here)
    if need is not None and ACCELERATOR.is_usable():
        try:
            with ACCELERATOR.reserve(need), _within(ACCELERATOR.device):
                return work(ACCELERATOR.device)
        except torch.OutOfMemoryError as error:
            _LOG.debug("Again on the CPU: %s", error)
        except RuntimeError as error:  # from the driver, or from a library that did not converge
            _LOG.warning("Again on the CPU: %s", error)
        # The GPU's memory is free only now, after the error and its stack frames are deleted.
    elsewhere = home if need is None else CPU
    _make_ready(elsewhere)
    with _within(elsewhere):
        return work(elsewhere)


def is_large(shape: tuple[int, int]) -> bool:
    """Return whether a matrix is large enough to be faster on a GPU; see :data:`LARGE`."""
    return min(shape) >= LARGE


def ready(tensor: Tensor) -> Tensor:
    """Initialise the linear algebra of the tensor's device if necessary, and return the tensor.

    Callers of ``torch.linalg`` use this for tensors on a device that the user chose.
    """
    _make_ready(tensor.device)
    return tensor


def _make_ready(device: torch.device) -> None:
    if device.type == ACCELERATOR.device.type:
        ACCELERATOR.is_usable()


@contextmanager
def _within(device: torch.device) -> Iterator[None]:
    """Make nested work of this thread run on the same device."""
    _current.device = device
    try:
        yield
    finally:
        del _current.device
