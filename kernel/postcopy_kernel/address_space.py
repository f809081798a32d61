"""Another process's address space, from /proc: where a file is mapped, what is registered, what is locked.

Reading it needs the right to ptrace the process (same user, or root) and the same pid namespace. The result is valid
only at that moment, so read it while the process waits for us.

Example::

    registered = [(at.start, at.end) for at in flagged_ranges(pid) if "um" in at.flags]
    assert covered(registered, start, start + length)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class MappedRange:
    """One line of /proc/PID/maps. ``device`` is the file's st_dev. ``flags`` are VmFlags, filled by ``flagged_ranges``:
    ``um`` is registered with a userfaultfd for missing pages, ``lo`` is locked."""

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
        """Device and inode."""
        return self.device, self.inode

    @property
    def accessible(self) -> bool:
        """Whether it is mapped with any right."""
        return not self.permissions.startswith("---")


def mapped_ranges(pid: int) -> list[MappedRange]:
    """All mappings of a process, in order of address. Raises OSError: EACCES; ENOENT or ESRCH if it is gone."""
    with open(f"/proc/{pid}/maps", "rb") as lines:
        return [_range(line) for line in lines]


def flagged_ranges(pid: int) -> list[MappedRange]:
    """As ``mapped_ranges``, with flags (slower: the kernel counts pages)."""
    return list(_flagged(pid))


def _flagged(pid: int) -> Iterator[MappedRange]:
    current: MappedRange | None = None
    with open(f"/proc/{pid}/smaps", "rb") as lines:
        for line in lines:
            if line.startswith(b"VmFlags:"):
                if current is not None:
                    yield replace(current, flags=frozenset(line.decode().split()[1:]))
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
    """Whether any byte of the ranges (start, length) is registered with a userfaultfd. Raises OSError."""
    registered = [(at.start, at.end) for at in flagged_ranges(pid) if "um" in at.flags]
    return any(first < start + length and start < last for start, length in ranges for first, last in registered)


def maps_memory_at(pid: int, address: int) -> bool:
    """Whether a memfd (or another deleted file) is mapped at this address. Raises OSError."""
    return any(at.start <= address < at.end and at.name.endswith("(deleted)") for at in mapped_ranges(pid))


def covered(runs: Iterable[tuple[int, int]], start: int, end: int) -> bool:
    """Whether the runs, in order, cover the range without a gap."""
    for first, last in runs:
        if first <= start < last:
            start = last
    return start >= end


def locks_its_memory(pid: int) -> bool:
    """Whether the process locks all its memory (mlockall). Then the kernel fills every new mapping at once, with zeros
    for missing pages. Raises OSError.

    It looks at the main thread's stack and the heap: mlockall locks them, mlock of single buffers does not.
    """
    return any("lo" in at.flags for at in flagged_ranges(pid) if at.name in ("[stack]", "[heap]"))


def pid_of(pidfd: int) -> int:
    """The pid of a pidfd's process in this pid namespace. Raises ValueError if the descriptor is no pidfd, or the
    process is gone or in another namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as lines:
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"Pid":
                if int(value) > 0:
                    return int(value)
                raise ValueError("the process is gone, or in another pid namespace")
    raise ValueError("the descriptor is no pidfd")


def owner_of(pid: int) -> int:
    """The user that may inspect a process: its effective user, or root if the kernel protects it (a set-uid or set-gid
    program, one that has changed its user). Raises OSError if it is gone.

    The owner of a private file in /proc/PID shows it; the directory itself always belongs to the process's user."""
    return os.stat(f"/proc/{pid}/environ").st_uid
