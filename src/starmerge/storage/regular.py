"""Opening files of other people: regular ones alone."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from starmerge.errors import StarmergeError


def open_regular(path: Path) -> io.FileIO:
    """Open a file to read its bytes, unbuffered, if it is a regular one.

    A pipe or a device may never end, and opening a pipe may wait for ever.

    Raises:
        FileNotFoundError: There is no such file.
        StarmergeError: It is a folder, a pipe or a device, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StarmergeError(f"{path} cannot be opened: {reason}. Give another file.") from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return io.FileIO(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise StarmergeError(f"{path} is a folder. A file is wanted there.")
    raise StarmergeError(
        f"{path} is a pipe or a device, which may never end. Save its content as a file."
    )
