"""Atomic exchange of the names of two files or folders."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Constants of Linux' fcntl.h."""
_RENAME_SWAP = 2
"""Constant of macOS' stdio.h."""

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""Errors of kernels, file systems (NFS: EINVAL) and sandboxes (EPERM) without this operation."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders on one file system, atomically.

    Both names exist at all times, for other processes and on the disk after a power cut. On Linux
    the call is ``renameat2`` (glibc since 2.28; supported by ext4, XFS, Btrfs and tmpfs, not by
    NFS), on macOS ``renamex_np`` (supported by APFS).

    Returns:
        Whether they were exchanged: False if the system or the file system lacks the operation.

    Raises:
        OSError: The operation failed.
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
