"""Small disks, which fill up, and users without rights."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
"""A user that owns no files."""


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str | None]:
    """Mount a disk in memory on a folder; yield None, or why that is not possible.

    Args:
        folder: The folder, which is made.
        size: Its bytes.
    """
    folder.mkdir()
    if not shutil.which("mount"):
        yield "there is no mount"
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        yield f"no disk can be mounted here: {mounted.stderr.strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def is_superuser() -> bool:
    """Tell whether tests may run commands as another user."""
    return os.getuid() == 0
