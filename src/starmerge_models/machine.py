"""Limits of processors and memory of this process, read from its control groups.

Containers, Kubernetes, Slurm and systemd limit a process by nested control groups (cgroups): the
limits of all groups from the process's own up to the root apply. Both versions are supported, as
defined in cgroups(7) and the kernel's documents cgroup-v1 and cgroup-v2:

======================  ==========================  ===================================
limit                   version 2                   version 1
======================  ==========================  ===================================
processors              ``cpu.max``                 ``cpu.cfs_quota_us``, ``cpu.cfs_period_us``
bytes of memory         ``memory.max``,             ``memory.limit_in_bytes``,
                        ``memory.high``             ``memory.stat``
======================  ==========================  ===================================

Sets of processors (cpusets, taskset, Slurm's binding) are read from the kernel's affinity mask.
Files that cannot be read or parsed are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

_UNLIMITED = 2**62
"""Limits from this number of bytes are ignored: version 1 writes a huge number for "no limit"."""


def usable_processors(root: Path = Path("/")) -> float:
    """Return the number of processors that this process may use; a fraction for a quota of 1.5.

    Args:
        root: Folder that contains ``proc`` and ``sys``; tests pass another folder.
    """
    return min([_bound_processors(), *_quotas(root)])


def usable_memory(root: Path = Path("/")) -> int:
    """Return the memory of this machine, or the limit of this process's group, in bytes.

    Args:
        root: Folder that contains ``proc`` and ``sys``; tests pass another folder.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_memory_limits(root)])


def resident_memory() -> int | None:
    """Return the resident memory (RSS) in bytes; None if the system does not report it."""
    text = _text(Path("/proc/self/statm")).split()
    return int(text[1]) * os.sysconf("SC_PAGE_SIZE") if len(text) > 1 else None


def _bound_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of processors of this process's groups."""
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        words = words or [
            *_text(group / "cpu.cfs_quota_us").split(),
            *_text(group / "cpu.cfs_period_us").split(),
        ]
        with suppress(ValueError):  # "max", or not what the kernel writes
            quota, period = map(int, words)
            if quota > 0 and period > 0:
                yield quota / period


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield the limits of memory, in bytes, of this process's groups."""
    for group in _groups(root, "memory"):
        texts = [
            _text(group / file) for file in ("memory.max", "memory.high", "memory.limit_in_bytes")
        ]
        # Version 1 reports the lowest limit of all parent groups, some of which a container hides.
        for line in _text(group / "memory.stat").splitlines():
            if line.startswith("hierarchical_memory_limit "):
                texts.append(line.split()[1])
        for text in texts:
            with suppress(ValueError):
                if 0 < int(text) < _UNLIMITED:
                    yield int(text)


def _groups(root: Path, controller: str) -> tuple[Path, ...]:
    """Return the folders of this process's groups for a controller, from its own to the outermost.

    If versions 1 and 2 are both mounted, these are the groups of both.
    """
    process = root / "proc" / "self"
    return _parsed(root, controller, _text(process / "cgroup"), _text(process / "mountinfo"))


@lru_cache(maxsize=8)
def _parsed(root: Path, controller: str, cgroup: str, mountinfo: str) -> tuple[Path, ...]:
    """Return the folders that the kernel's two texts about a process name; see :func:`_groups`."""
    found: list[Path] = []
    paths = dict(_paths(cgroup))
    for version, names, mount_root, mount in _mounts(mountinfo):
        if version == 2:
            path = paths.get("")
        elif controller in names:
            path = paths.get(controller)
        else:
            continue
        # In a container the mount's root may be the process's group or a parent of it, and the path
        # may be that on the host, of which only the mount is visible.
        inner = PurePosixPath("/")
        if path is not None and path.is_relative_to(mount_root) and ".." not in path.parts:
            inner = path.relative_to(mount_root)
        parts = [part for part in inner.parts if part != "/"]
        for depth in range(len(parts), -1, -1):
            found.append(root.joinpath(mount.lstrip("/"), *parts[:depth]))
    return tuple(found)


def _paths(cgroup: str) -> Iterator[tuple[str, PurePosixPath]]:
    """Yield the path of a process's group for each controller; "" stands for version 2.

    Args:
        cgroup: The text of ``/proc/self/cgroup``.
    """
    for line in cgroup.splitlines():
        _, _, rest = line.partition(":")
        names, found, path = rest.partition(":")
        if found and path.startswith("/"):
            for name in names.split(","):
                yield name, PurePosixPath(path)


def _mounts(mountinfo: str) -> Iterator[tuple[int, list[str], PurePosixPath, str]]:
    """Yield version, controllers, root group and folder of each mounted tree of groups.

    Args:
        mountinfo: The text of ``/proc/self/mountinfo``. A line has the fields (proc(5)): number,
            parent, device, root, folder, options, optional fields, "-", type of file system,
            source, options of the file system.
    """
    for line in mountinfo.splitlines():
        words = line.split()
        if "-" not in words[6:]:
            continue
        end = words.index("-", 6)
        kind, options = words[end + 1 : end + 2], words[-1].split(",")
        if kind in (["cgroup"], ["cgroup2"]):
            version = 2 if kind == ["cgroup2"] else 1
            yield version, options, PurePosixPath(_unescaped(words[3])), _unescaped(words[4])


def _unescaped(text: str) -> str:
    r"""Return a path of ``mountinfo`` with its escapes decoded, such as ``\040`` for a blank."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _text(file: Path) -> str:
    """Return the text of a small file; an empty string if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""
