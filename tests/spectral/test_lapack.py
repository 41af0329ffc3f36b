"""LAPACK through ctypes: the threads it leaves alone, and those it does not start."""

import ctypes
import sys
import threading

import numpy as np
import pytest
import threadpoolctl
import torch
from scipy.linalg import lapack as reference

from starmerge_models.spectral import lapack


def scipys_threads():
    (threads,) = (
        library["num_threads"]
        for library in threadpoolctl.threadpool_info()
        if "scipy.libs" in library["filepath"]
    )
    return threads


def test_scalars_strings_and_tensors_are_passed():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    diagonal, beside, tau, work = (torch.zeros(2, dtype=torch.float64) for _ in range(4))
    info = ctypes.c_int(-1)
    lapack.call("dsytrd", "L", 2, matrix, 2, diagonal, beside, tau, work, 2, info)
    assert info.value == 0
    assert diagonal.tolist() == [4.0, 3.0]
    assert abs(beside[0].item()) == 1.0


def test_an_unknown_routine_is_refused():
    with pytest.raises(KeyError, match="dnothing"):
        lapack.call("dnothing", 1)


def test_other_threads_go_on_while_lapack_computes():
    n, calls = 300, 40
    done, started = [], threading.Event()
    info = ctypes.c_int()

    def compute():
        started.set()
        for _ in range(calls):
            matrix = torch.ones(n, n, dtype=torch.float64)
            values, beside, tau, work = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
            lapack.call("dsytrd", "L", n, matrix, n, values, beside, tau, work, n, info)
            done.append(1)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is asked to let go of the lock
    try:
        worker = threading.Thread(target=compute)
        worker.start()
        started.wait()
        seen = len(done)
        worker.join()
    finally:
        sys.setswitchinterval(before)
    assert seen < calls == len(done)


def test_blas_has_one_thread_while_anybody_computes():
    inside, leave = threading.Event(), threading.Event()

    def compute():
        with lapack.one_thread():
            inside.set()
            leave.wait()

    worker = threading.Thread(target=compute)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert scipys_threads() == 2
        with lapack.one_thread():
            assert scipys_threads() == 1
            worker.start()
            inside.wait()
        assert scipys_threads() == 1
        leave.set()
        worker.join()
        assert scipys_threads() == 2


def test_the_routines_are_scipys():
    d, e = np.random.default_rng(0).standard_normal((2, 30))
    expected, info = reference.dsterf(d, e[:-1])
    assert info == 0
    values, beside, status = torch.from_numpy(d.copy()), torch.from_numpy(e.copy()), ctypes.c_int()
    lapack.call("dsterf", 30, values, beside, status)
    np.testing.assert_array_equal(values.numpy(), expected)
