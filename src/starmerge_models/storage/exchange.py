"""Exchanging the names of two files or folders in one step of the system."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Both of Linux' fcntl.h."""
_RENAME_SWAP = 2
"""Of macOS' stdio.h."""

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""How kernels, file systems (NFS: EINVAL) and sandboxes (EPERM) say that they cannot exchange."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders on one file system, atomically.

    Other processes, and the disk after a power cut, have both names at all times. Linux does this
    by ``renameat2`` (glibc since 2.28; ext4, XFS, Btrfs and tmpfs can, NFS cannot), macOS by
    ``renamex_np`` (APFS can).

    Returns:
        Whether they were exchanged: False if the system or the file system has no such operation.

    Raises:
        OSError: It has, and it failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    arguments: tuple[int | bytes | ctypes.c_uint, ...]
    if sys.platform == "darwin":
        name, arguments = "renamex_np", (first, second, ctypes.c_uint(_RENAME_SWAP))
    else:
        flags = ctypes.c_uint(_RENAME_EXCHANGE)
        name, arguments = "renameat2", (_AT_FDCWD, first, _AT_FDCWD, second, flags)
    function = getattr(library, name, None)
    if function is None:
        return False
    if function(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
