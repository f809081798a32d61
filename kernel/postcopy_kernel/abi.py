"""linux/userfaultfd.h in Python: numbers, layouts, flags, messages, and the meaning of each errno of a placing ioctl.

Taken from the header of Linux 6.12, not from an installed one, which is often older than the running kernel.
Everything is native-endian. :mod:`postcopy_kernel.userfaultfd` exports what its callers need.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import Final

API: Final = 0xAA
MESSAGE_BYTES: Final = 32

# The same on x86_64 and arm64 (both use the generic ioctl encoding); only the number of the system call differs.
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04
UFFDIO_MOVE: Final = 0xC028AA05  # Linux 6.8; private anonymous memory of one process only
UFFDIO_WRITEPROTECT: Final = 0xC018AA06  # Linux 5.7
UFFDIO_CONTINUE: Final = 0xC020AA07  # Linux 5.13
UFFDIO_POISON: Final = 0xC020AA08  # Linux 6.6
IOC_NEW: Final = 0xAA00  # on the device: the argument is the flags, the result is the descriptor

COPY_DONTWAKE: Final = 1
COPY_WP: Final = 2
DONTWAKE: Final = 1  # ZEROPAGE, CONTINUE, POISON
WRITEPROTECT_WP: Final = 1
WRITEPROTECT_DONTWAKE: Final = 2
USER_MODE_ONLY: Final = 1

# Layouts of the arguments, for callers that reuse a buffer of their own. The last field of the first three is the
# result: bytes done, or a negative errno, or unchanged if the kernel refused the argument itself.
COPY_LAYOUT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode, copy
RANGE_MODE_LAYOUT: Final = struct.Struct("=QQQq")  # start, len, mode, zeropage / mapped / updated
REGISTER_LAYOUT: Final = struct.Struct("=QQQQ")  # start, len, mode, ioctls
RANGE_LAYOUT: Final = struct.Struct("=QQ")  # start, len
API_LAYOUT: Final = struct.Struct("=QQQ")  # api, features, ioctls
WRITEPROTECT_LAYOUT: Final = struct.Struct("=QQQ")  # start, len, mode

EHWPOISON: Final = 133  # no constant in Python 3.11's errno


class Feature(IntFlag):
    """Features of UFFDIO_API; the comment is the first kernel that has it."""

    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
    EVENT_FORK = 1 << 1  # 4.11; needs CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2  # 4.11
    EVENT_REMOVE = 1 << 3  # 4.11
    MISSING_HUGETLBFS = 1 << 4  # 4.11; nothing to enable
    MISSING_SHMEM = 1 << 5  # 4.11; nothing to enable
    EVENT_UNMAP = 1 << 6  # 4.11
    SIGBUS = 1 << 7  # 4.14; no messages, the touching thread gets SIGBUS
    THREAD_ID = 1 << 8  # 4.14; as in the thread's own pid namespace
    MINOR_HUGETLBFS = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18; without it addresses are rounded down to a page
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7
    MOVE = 1 << 16  # 6.8


class Ioctl(IntFlag):
    """Ioctls that UFFDIO_REGISTER reports (bit = 1 << number). For shmem it reports MOVE, which fails."""

    REGISTER = 1 << 0
    UNREGISTER = 1 << 1
    WAKE = 1 << 2
    COPY = 1 << 3
    ZEROPAGE = 1 << 4
    MOVE = 1 << 5
    WRITEPROTECT = 1 << 6
    CONTINUE = 1 << 7
    POISON = 1 << 8
    API = 1 << 63


class RegisterMode(IntFlag):
    """Which faults of a range are reported. MINOR: the page exists, but this address space has not mapped it."""

    MISSING = 1
    WP = 2
    MINOR = 4


class EventKind(IntEnum):
    """First byte of a message."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class FaultFlag(IntFlag):
    """Why a thread waits. None set: it read a missing page."""

    WRITE = 1
    WP = 2
    MINOR = 4


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at ``address``. ``thread`` is 0 without Feature.THREAD_ID.

    There is one message for each waiting thread, and another each time a signal interrupts the wait.
    """

    address: int
    flags: FaultFlag
    thread: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The owner forked; ``fd`` is the child's userfaultfd, now open in *this* process."""

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """The owner moved ``length`` bytes by mremap."""

    source: int
    destination: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """The owner discarded the contents of ``[start, end)`` (MADV_DONTNEED, MADV_REMOVE)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The owner unmapped ``[start, end)``."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """An event with an unknown number."""

    event: int


Event = PageFault | Fork | Remap | Remove | Unmap | Unknown


class Status(Enum):
    """Result of a placing ioctl."""

    DONE = "done"
    PARTIAL = "partial"  # EAGAIN, some bytes are placed and woken: advance by them; the next call returns the reason
    RETRY = "retry"  # EAGAIN, nothing done: read the waiting fork, mremap or madvise event, then retry
    PRESENT = "present"  # EEXIST: the page is there and NO WAITER WAS WOKEN: wake it. (Also: empty hugetlb pool!)
    STALE = "stale"  # ENOENT: not inside one registered mapping (of any userfaultfd of that process)
    GONE = "gone"  # ESRCH: the owner's address space is gone
    UNREADABLE = "unreadable"  # EFAULT: the source cannot be read, or (CONTINUE) the page is absent
    EXHAUSTED = "exhausted"  # ENOMEM, ENOSPC
    POISONED = "poisoned"  # EHWPOISON, EIO


_MEANINGS: Final = {
    errno.EEXIST: Status.PRESENT,
    errno.ENOENT: Status.STALE,
    errno.ESRCH: Status.GONE,
    errno.EFAULT: Status.UNREADABLE,
    errno.ENOMEM: Status.EXHAUSTED,
    errno.ENOSPC: Status.EXHAUSTED,
    EHWPOISON: Status.POISONED,
    errno.EIO: Status.POISONED,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Status and bytes ``done``, which are 0 unless the status is DONE or PARTIAL."""

    status: Status
    done: int


def outcome_of(error: OSError, done: int) -> Outcome:
    """The outcome of a failed placing ioctl, for callers of fcntl.ioctl with buffers of their own.

    ``done`` is the result field as the kernel left it (a negative errno counts as nothing done). It is used for EAGAIN
    only: ESRCH and EINVAL do not write the field. Raises ``error`` if it means a bug (EINVAL, EBADF...).
    """
    if error.errno == errno.EAGAIN:
        return Outcome(Status.PARTIAL, done) if done > 0 else Outcome(Status.RETRY, 0)
    status = _MEANINGS.get(error.errno or 0)
    if status is None:
        raise error
    return Outcome(status, 0)


def parse_event(message: memoryview) -> Event:
    """The event in one message of MESSAGE_BYTES."""
    kind = message[0]
    first, second, third = struct.unpack_from("=QQQ", message, 8)
    if kind == EventKind.PAGEFAULT:
        return PageFault(second, FaultFlag(first), third & 0xFFFFFFFF)
    if kind == EventKind.FORK:
        return Fork(first & 0xFFFFFFFF)
    if kind == EventKind.REMAP:
        return Remap(first, second, third)
    if kind == EventKind.REMOVE:
        return Remove(first, second)
    if kind == EventKind.UNMAP:
        return Unmap(first, second)
    return Unknown(kind)
