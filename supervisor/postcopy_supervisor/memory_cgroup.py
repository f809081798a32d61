"""The memory limits of the cgroups that this process is in, of version 1 and 2, with all their ancestors.

Where they are is read from two texts of the kernel: ``/proc/self/cgroup`` says the path in each hierarchy, and
``/proc/self/mountinfo`` where a hierarchy is mounted and which of its directories is the root of that mount. In a
cgroup namespace, and in a container, both begin at the container's own cgroup: limits above it are not seen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

UNLIMITED = 1 << 62  # version 1 says "no limit" as a number of about 1 << 63
ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
FILE_PAGES = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}
"""Of ``memory.stat``: pages of files, which the kernel gives back before it fails. Pages of blocks are not among them:
shmem is anonymous in these figures."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """One cgroup's directory with a memory controller; ``version`` 1 or 2."""

    version: int
    path: str


def memory_cgroups(cgroup: str, mountinfo: str) -> list[MemoryCgroup]:
    """The cgroup of a process and its ancestors, as far as they are mounted; the innermost first. Pure.

    >>> memory_cgroups("0::/a/b\\n", "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\\n")[0].path
    '/sys/fs/cgroup/a/b'
    """
    places: dict[int, str] = {}
    for line in cgroup.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            places[2] = path
        elif "memory" in controllers.split(","):
            places[1] = path
    found: list[MemoryCgroup] = []
    for version, root, mounted in _mounts(mountinfo):
        path = places.get(version, "")
        if not path.startswith("/") or "/.." in path:  # none, or outside this namespace
            continue
        inside = os.path.relpath(path, root)
        if inside.startswith(".."):  # the mount shows another part of the tree, as in some containers: its root is ours
            inside = "."
        while inside not in ("", "."):
            found.append(MemoryCgroup(version, os.path.join(mounted, inside)))
            inside = os.path.dirname(inside)
        found.append(MemoryCgroup(version, mounted))
        del places[version]  # one mount of each is enough
    return found


def cgroups_of(directories: Iterable[str], mountinfo: str) -> list[MemoryCgroup]:
    """These cgroups, given as directories, and their ancestors, as far as they have a memory controller. Pure."""
    found: list[MemoryCgroup] = []
    for version, _, mounted in _mounts(mountinfo):
        for path in directories:
            while path != mounted and path.startswith(f"{mounted}/"):
                found.append(MemoryCgroup(version, path))
                path = os.path.dirname(path)
            found += [MemoryCgroup(version, mounted)] if path == mounted else []
    return found


def _mounts(mountinfo: str) -> Iterator[tuple[int, str, str]]:
    """Version, root inside the hierarchy and mount point of each hierarchy that may have the memory controller."""
    for line in mountinfo.splitlines():
        before, separator, behind = line.partition(" - ")
        fields, kind = before.split(), behind.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        root, mounted = _plain(fields[3]), _plain(fields[4])
        if kind[0] == "cgroup2":
            yield 2, root, mounted
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield 1, root, mounted


def _plain(path: str) -> str:
    for escape, letter in ESCAPES.items():
        path = path.replace(escape, letter)
    return path


def left_in(cgroup: MemoryCgroup) -> tuple[int, int]:
    """Bytes that may be charged to it before the kernel takes from its own processes, where pages of files count as
    free; and its limit. UNLIMITED where none is set, or nothing can be read."""
    limits = [_number(os.path.join(cgroup.path, name)) for name in LIMITS[cgroup.version]]
    limit = min((limit for limit in limits if limit is not None), default=UNLIMITED)
    if limit >= UNLIMITED:
        return UNLIMITED, UNLIMITED
    used = _number(os.path.join(cgroup.path, USAGE[cgroup.version]))
    return (UNLIMITED, UNLIMITED) if used is None else (limit - used + _file_pages(cgroup), limit)


def _number(path: str) -> int | None:
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        text = file.read().strip()
        return UNLIMITED if text == "max" else int(text)
    return None


def _file_pages(cgroup: MemoryCgroup) -> int:
    total = 0
    with suppress(OSError, ValueError), open(os.path.join(cgroup.path, "memory.stat"), encoding="ascii") as stat:
        for line in stat:
            name, _, value = line.partition(" ")
            if name in FILE_PAGES[cgroup.version]:
                total += int(value)
    return total


def worker_cgroups(directories: Iterable[str], proc: str = "/proc/self") -> list[MemoryCgroup]:
    """Those that workers enter, with their ancestors; none where it cannot be read."""
    with suppress(OSError), open(f"{proc}/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo:
        return cgroups_of(map(os.path.realpath, directories), mountinfo.read())
    return []


def own_cgroups(proc: str = "/proc/self") -> list[MemoryCgroup]:
    """Those of this process; none where it cannot be read."""
    with (
        suppress(OSError),
        open(f"{proc}/cgroup", encoding="utf-8", errors="surrogateescape") as cgroup,
        open(f"{proc}/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo,
    ):
        return memory_cgroups(cgroup.read(), mountinfo.read())
    return []
