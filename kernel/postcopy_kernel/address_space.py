"""Another process's address space, as /proc tells it: where a file is mapped, what is registered, what is locked.

Reading it wants the right to ptrace the process (same user, or root) and the same pid namespace. What is read is true
at that moment only: read it while the process waits for us.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MappedRange:
    """One line of /proc/PID/maps. ``device`` is what st_dev says of the file. ``flags`` are there only if they were
    asked for: VmFlags, among them ``um``, registered with a userfaultfd, and ``lo``, locked."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    name: str
    flags: frozenset[str] = frozenset()

    @property
    def file(self) -> tuple[int, int]:
        return self.device, self.inode

    @property
    def accessible(self) -> bool:
        return not self.permissions.startswith("---")


def mapped_ranges(pid: int) -> list[MappedRange]:
    """All mappings of a process, in order of address. Raises OSError: EACCES, ENOENT or ESRCH when it is gone."""
    with open(f"/proc/{pid}/maps", "rb") as lines:
        return [_range(line) for line in lines]


def flagged_ranges(pid: int) -> list[MappedRange]:
    """As ``mapped_ranges``, with the flags of each (slower: the kernel counts pages)."""
    return list(_flagged(pid))


def _flagged(pid: int) -> Iterator[MappedRange]:
    current: MappedRange | None = None
    with open(f"/proc/{pid}/smaps", "rb") as lines:
        for line in lines:
            if line.startswith(b"VmFlags:"):
                if current is not None:
                    flags = frozenset(line.decode().split()[1:])
                    yield MappedRange(
                        current.start,
                        current.end,
                        current.permissions,
                        current.offset,
                        current.device,
                        current.inode,
                        current.name,
                        flags,
                    )
            elif not line[:1].isupper():
                current = _range(line)


def _range(line: bytes) -> MappedRange:
    words = line.rstrip(b"\n").split(None, 5)
    start, _, end = words[0].partition(b"-")
    major, _, minor = words[3].partition(b":")
    return MappedRange(
        int(start, 16),
        int(end, 16),
        words[1].decode(),
        int(words[2], 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(words[4]),
        words[5].decode("utf-8", "replace") if len(words) > 5 else "",
    )


def any_registered(pid: int, ranges: Iterable[tuple[int, int]]) -> bool:
    """Is any byte of the ranges (start, length) registered with a userfaultfd? Raises OSError."""
    registered = [(at.start, at.end) for at in flagged_ranges(pid) if "um" in at.flags]
    return any(first < start + length and start < last for start, length in ranges for first, last in registered)


def maps_memory_at(pid: int, address: int) -> bool:
    """Is a memfd (or another file without a name) mapped at this address? Raises OSError."""
    return any(at.start <= address < at.end and at.name.endswith("(deleted)") for at in mapped_ranges(pid))


def covered(runs: Iterable[tuple[int, int]], start: int, end: int) -> bool:
    """Do the runs, in order, cover the range without a gap?"""
    for first, last in runs:
        if first <= start < last:
            start = last
    return start >= end


def locks_its_memory(pid: int) -> bool:
    """Does the process lock what it maps (mlockall)? Then the kernel fills a mapping the moment it is made, with zeros
    where pages are missing. Raises OSError.

    Seen from the main thread's stack and the heap: who locks those has locked all, single locked buffers are elsewhere.
    """
    return any("lo" in at.flags for at in flagged_ranges(pid) if at.name in ("[stack]", "[heap]"))


def pid_of(pidfd: int) -> int:
    """The pid that a pidfd names in this pid namespace. Raises ValueError when the descriptor is no pidfd, or the
    process is gone or of another namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as lines:
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"Pid":
                if int(value) > 0:
                    return int(value)
                raise ValueError("the process is gone, or of another pid namespace")
    raise ValueError("the descriptor is no pidfd")


def owner_of(pid: int) -> int:
    """The user who may look into a process: its effective user, or root where the kernel protects it from him (a
    set-uid or set-gid program, one that has changed its user). Raises OSError when it is gone.

    That is what the owner of a file says that is not everybody's to read; /proc/PID itself always is its user's."""
    return os.stat(f"/proc/{pid}/environ").st_uid
