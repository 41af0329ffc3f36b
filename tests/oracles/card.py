"""An imitation of a GPU, on which the CPU computes, and which refuses what a GPU refuses.

Its tensors lie on a device of their own. Put together with a tensor of the CPU they raise, as do
routines that want a pointer; its memory is limited and counted; and its linear algebra is loaded at
the first call, during which a second thread's call raises what torch 2.11 raises.
"""

import time
import weakref
from contextlib import contextmanager
from threading import Lock, get_ident

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from starmerge_models.device import Accelerator

CARD = torch.device("meta")
"""A device of which torch has no memory; the imitation has the values."""

LAZY = {
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_qr",
    "linalg_cholesky_ex",
    "cholesky_solve",
    "_linalg_solve_ex",
    "linalg_solve_triangular",
}
"""What torch loads its CUDA linear algebra for."""

MOVES = {"_to_copy", "copy_"}


class Card(Accelerator):
    """A card with some memory, in bytes."""

    seconds_to_load = 0.0
    """How long the first call of linear algebra takes, in which a second one fails."""

    def __init__(self, memory=2**40):
        super().__init__(CARD)
        self.memory, self.used, self.peak = memory, 0, 0
        self.calls = []
        """(thread, routine) of each call of linear algebra."""
        self.visits = 0
        self._holders, self._counting = {}, Lock()
        self._loaded, self._loading = False, Lock()

    def exists(self):
        return True

    def free_memory(self):
        return self.memory - self.used

    def make_ready(self):
        with _Mode(self):
            super().make_ready()

    @contextmanager
    def reserve(self, need):
        with super().reserve(need), _Mode(self):
            self.visits += 1
            yield

    def load(self, routine):
        """Load the linear algebra at the first call."""
        self.calls.append((get_ident(), routine))
        if not self._loaded:
            if not self._loading.acquire(blocking=False):
                raise RuntimeError("lazy wrapper should be called at most once")
            time.sleep(self.seconds_to_load)
            self._loaded = True

    def hold(self, tensor):
        """Return values as a tensor of the card, and count them as long as it lives."""
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        with self._counting:
            count = self._holders.get(place, 0)
            self.used += 0 if count else size
            if self.used > self.memory:
                self.used -= size
                raise torch.OutOfMemoryError("CUDA out of memory.")
            self._holders[place] = count + 1
            self.peak = max(self.peak, self.used)
        held = _Held(tensor)
        weakref.finalize(held, self._let_go, place, size)
        return held

    def _let_go(self, place, size):
        with self._counting:
            self._holders[place] -= 1
            if not self._holders[place]:
                del self._holders[place]
                self.used -= size


class _Held(torch.Tensor):
    """A tensor of the card."""

    @staticmethod
    def __new__(cls, values):
        held = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CARD,
        )
        held.values = values
        return held

    @classmethod
    def __torch_dispatch__(cls, routine, types, args=(), kwargs=None):
        raise RuntimeError(f"{routine} of the card's tensors outside of work on the card.")


class _Mode(TorchDispatchMode):
    """Lets this thread compute with the card's tensors."""

    def __init__(self, card):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, routine, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = routine.overloadpacket.__name__
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        held = [isinstance(x, _Held) for x in given]
        target = kwargs.get("device")
        if not any(held) and (target is None or torch.device(target) != CARD):
            return routine(*args, **kwargs)
        if name not in MOVES and any(held):
            for tensor, is_held in zip(given, held, strict=True):
                if not is_held and tensor.ndim:
                    raise RuntimeError(f"{name}: expected all tensors to be on the same device.")
        if name in LAZY:
            self.card.load(name)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        found = routine(*tree_map(_values, args), **tree_map(_values, kwargs))
        if target is not None and torch.device(target) != CARD:
            return found
        if name == "copy_" and not isinstance(args[0], _Held):
            return found
        if torch.Tag.inplace_view in routine.tags:  # such as squeeze_
            with no_dispatch():
                routine(*args, **kwargs)
            return args[0]
        return tree_map(lambda x: self.card.hold(x) if isinstance(x, torch.Tensor) else x, found)


def _values(x):
    return x.values if isinstance(x, _Held) else x
