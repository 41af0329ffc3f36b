"""LAPACK and BLAS routines that other threads need not wait for.

The wrappers of ``scipy.linalg.lapack`` hold Python's global lock for as long as LAPACK computes.
The same routines stand in ``scipy.linalg.cython_lapack`` as C functions; called through ctypes they
leave the lock to the threads that read, write and decompose other tensors meanwhile.
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
        name: Such as "dsytrd".
        arguments: In the routine's order; strings, integers and floats that it only reads, tensors
            in its memory layout (float64, or int32 for its integers), and ctypes objects for the
            scalars that it returns.
    """
    _routine(name, len(arguments))(*map(_pointer, arguments))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep SciPy's OpenBLAS to one thread, in the whole process.

    More threads would change how sums are rounded, and wait for each other on a shared machine.
    What was set before returns when the last of several callers leaves. (threadpoolctl would not
    do: it lets only one thread of the process set limits. Other BLAS libraries than OpenBLAS, with
    which SciPy can be built, are left as they are.)
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

    library = ctypes.CDLL(cython_lapack.__file__)  # finds what this is linked with, too
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
