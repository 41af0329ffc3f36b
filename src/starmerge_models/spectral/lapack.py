"""LAPACK and BLAS routines that release Python's global lock.

The wrappers of ``scipy.linalg.lapack`` hold Python's global lock while LAPACK computes. The module
``scipy.linalg.cython_lapack`` exports the same routines as C functions; calls through ctypes
release the lock, so that other threads can read, write and decompose tensors meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from torch import Tensor

_LOCK = Lock()
_callers = 0
_threads_before = 0


def call(name: str, *arguments: object) -> None:
    """Call a routine by its Fortran name.

    Args:
        name: Name of the routine, such as "dsytrd".
        arguments: Arguments in the routine's order: strings, integers and floats for inputs,
            tensors in the routine's memory layout (float64, or int32 for its integers), and ctypes
            objects for scalar outputs.
    """
    _routine(name, len(arguments))(*map(_pointer, arguments))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit SciPy's OpenBLAS to one thread, in the whole process, for the ``with`` block.

    More threads would change the rounding of sums, and wait for each other on a shared machine. The
    previous setting is restored when the last concurrent block ends. (threadpoolctl is not used
    because it lets only one thread of the process set limits. BLAS libraries other than OpenBLAS,
    with which SciPy can be built, are not changed.)
    """
    global _callers, _threads_before  # noqa: PLW0603  (OpenBLAS' setting is as global)
    get, set_ = _thread_setting()
    with _LOCK:
        if _callers == 0:
            _threads_before = get()
            set_(1)
        _callers += 1
    try:
        yield
    finally:
        with _LOCK:
            _callers -= 1
            if _callers == 0:
                set_(_threads_before)


@cache
def _thread_setting() -> tuple[Callable[[], int], Callable[[int], object]]:
    """Return the functions that get and set OpenBLAS' number of threads."""
    from scipy.linalg import cython_lapack  # noqa: PLC0415

    library = ctypes.CDLL(cython_lapack.__file__)  # also exports the symbols of linked libraries
    for name in ("scipy_openblas_{}_num_threads", "openblas_{}_num_threads"):
        if hasattr(library, name.format("set")):
            return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return (lambda: 1), (lambda _: None)


@cache
def _routine(name: str, count: int) -> Callable[..., None]:
    # scipy.linalg takes 0.3 s to import, and only large dense deltas need it.
    from scipy.linalg import cython_blas, cython_lapack  # noqa: PLC0415

    table = {**cython_lapack.__pyx_capi__, **cython_blas.__pyx_capi__}
    signature = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
        ("PyCapsule_GetName", ctypes.pythonapi)
    )(table[name])
    address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )(table[name], signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)


def _pointer(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, str):
        return ctypes.cast(ctypes.c_char_p(argument.encode()), ctypes.c_void_p)
    if isinstance(argument, int):
        argument = ctypes.c_int(argument)
    elif isinstance(argument, float):
        argument = ctypes.c_double(argument)
    return ctypes.cast(ctypes.pointer(argument), ctypes.c_void_p)
