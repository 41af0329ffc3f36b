"""Where the linear algebra of dense deltas runs: on a GPU, if torch has one, else on the CPU.

:func:`run` chooses the device for a piece of work; nothing else in the package does. It settles
three things that every call on a GPU would otherwise have to mind:

- **First use.** torch loads its CUDA linear algebra when a routine of it is called for the first
  time. A second thread that calls one meanwhile gets "lazy wrapper should be called at most once"
  (torch 2.11). So the first thread to come calls every routine once, under a lock, and all others
  wait for it.
- **Memory.** A piece of work says how many bytes it needs at most. Those in work together need no
  more than :data:`SHARE` of what is free on the card; one that needs more runs alone.
- **Failure.** Work that fails on the card, as a rule because its memory is full, is done on the
  CPU from the beginning.
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
"""Share of the free memory that is given out; the rest is for what the libraries take besides."""

LARGE = 512
"""Matrices with a shorter side below this stay on the CPU, which has them done before the copying
and the many small launches pay. Not measured; at 1024 a card is eight times as fast as a core."""

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
"""What this package calls of torch's linear algebra on a GPU."""


class Accelerator:
    """The card, shared by the threads of this process.

    Args:
        device: Torch's device. By default the first GPU; CUDA_VISIBLE_DEVICES says which one that
            is, and with an empty value that there is none.
    """

    def __init__(self, device: torch.device = FIRST_GPU) -> None:
        self.device = device
        self._first_use = Lock()
        self._usable: bool | None = None
        self._turn, self._changed = Lock(), Condition()
        self._promised = self._capacity = 0

    def is_usable(self) -> bool:
        """Tell whether there is a card that works, after making it ready.

        The first caller makes it ready; callers in other threads wait until it is. A card that
        cannot be made ready is not used by this process, and the reason is logged as a warning.
        """
        with self._first_use:
            if self._usable is None:
                self._usable = self.exists() and self._is_made_ready()
            return self._usable

    @contextmanager
    def visit(self, need: int) -> Iterator[None]:
        """Wait until the card has room for some work, and keep the room as long as it lasts.

        Threads get in one after the other, so that small work does not keep large work waiting.

        Args:
            need: Bytes that the work takes at most.
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
        """Tell whether torch finds the card."""
        return torch.cuda.is_available()

    def make_ready(self) -> None:
        """Call each of :data:`ROUTINES` once.

        Raises:
            RuntimeError: The card or its libraries do not work.
        """
        matrix = torch.eye(2, dtype=torch.float64, device=self.device)
        for routine in ROUTINES:
            routine(matrix)
        matrix.cpu()  # waits for all of them, and raises what went wrong

    def free_memory(self) -> int:
        """Return the bytes that are free: the driver's, and those that torch keeps unused."""
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
    """Return ``work(device)``, on the card if there is one, else on the CPU.

    The work moves its inputs to the device that it is given and its result back to ``home``, and
    changes nothing outside: if it fails on the card, it is called again with the CPU. Work within
    other work, in the same thread, runs where that one does, and its room is part of that one's.

    Args:
        work: Is called with the device.
        home: Where the inputs lie.
        need: Bytes that the work takes on the card at most; None keeps it at ``home``.
    """
    here: torch.device | None = getattr(_current, "device", None)
    if here is not None:
        return work(here)
    if need is not None and ACCELERATOR.is_usable():
        try:
            with ACCELERATOR.visit(need), _within(ACCELERATOR.device):
                return work(ACCELERATOR.device)
        except torch.OutOfMemoryError as error:
            _LOG.debug("Again on the CPU: %s", error)
        except RuntimeError as error:  # of the driver, or of a library that converges differently
            _LOG.warning("Again on the CPU: %s", error)
        # Only here, where the error and its frames are gone, is the card's memory free again.
    elsewhere = home if need is None else CPU
    _make_ready(elsewhere)
    with _within(elsewhere):
        return work(elsewhere)


def is_large(shape: tuple[int, int]) -> bool:
    """Tell whether a matrix is so large that a card is faster at it; see :data:`LARGE`."""
    return min(shape) >= LARGE


def ready(tensor: Tensor) -> Tensor:
    """Return a tensor, on whose device every routine of linear algebra may be called at once.

    For callers of ``torch.linalg`` whose tensors lie where the user put them.
    """
    _make_ready(tensor.device)
    return tensor


def _make_ready(device: torch.device) -> None:
    if device.type == ACCELERATOR.device.type:
        ACCELERATOR.is_usable()


@contextmanager
def _within(device: torch.device) -> Iterator[None]:
    """Let work within this thread's work run on the same device."""
    _current.device = device
    try:
        yield
    finally:
        del _current.device
