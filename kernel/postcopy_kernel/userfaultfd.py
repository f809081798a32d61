"""userfaultfd(2): memory whose missing pages are supplied by a program.

The words are the kernel's. What a newcomer has to know before the first line:

* A userfaultfd is bound to the **address space of the process that created it**, for ever. Passing the descriptor
  (SCM_RIGHTS, fork) moves the handle, not the memory: every address below is an address *there*. The one exception is
  the source of :meth:`Userfaultfd.copy`, which is an address of the caller. So a process can fill another's memory.
* **Closing the last descriptor releases every waiter into zero pages**, without an error anywhere. Somebody who will
  outlive the handler must hold a duplicate.
* A message that was read is not delivered again. A handler that takes over from a dead one issues one
  :meth:`Userfaultfd.wake` over each registered range: whoever still misses a page faults again and is announced again.
* "Already there" and "try again" are everyday results, not errors: :class:`Outcome`. What raises is a bug or a limit.

Nothing in here reads or writes the memory in question; only the kernel touches missing pages.
Sources of fact: include/uapi/linux/userfaultfd.h and fs/userfaultfd.c up to Linux 6.12, and runs on 6.18.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from types import TracebackType
from typing import Final

DEVICE: Final = "/dev/userfaultfd"  # misc device, Linux 6.1
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

# How the argument of each ioctl is laid out, for lean callers that preset a buffer of their own. The last field of the
# first three is the result: bytes done, or a negative errno, or untouched when the argument itself was refused.
COPY_LAYOUT: Final = struct.Struct("=QQQQq")  # dst, src, len, mode, copy
RANGE_MODE_LAYOUT: Final = struct.Struct("=QQQq")  # start, len, mode, zeropage / mapped / updated
REGISTER_LAYOUT: Final = struct.Struct("=QQQQ")  # start, len, mode, ioctls
RANGE_LAYOUT: Final = struct.Struct("=QQ")  # start, len
API_LAYOUT: Final = struct.Struct("=QQQ")  # api, features, ioctls
WRITEPROTECT_LAYOUT: Final = struct.Struct("=QQQ")  # start, len, mode

EHWPOISON: Final = 133  # no constant in Python 3.11's errno
_SYSCALLS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_LINK: Final = "anon_inode:[userfaultfd]"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Feature(IntFlag):
    """Features of UFFDIO_API; the comment is the first kernel that has it."""

    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
    EVENT_FORK = 1 << 1  # 4.11; wants CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2  # 4.11
    EVENT_REMOVE = 1 << 3  # 4.11
    MISSING_HUGETLBFS = 1 << 4  # 4.11; nothing to enable
    MISSING_SHMEM = 1 << 5  # 4.11; nothing to enable
    EVENT_UNMAP = 1 << 6  # 4.11
    SIGBUS = 1 << 7  # 4.14; no messages, the toucher gets SIGBUS
    THREAD_ID = 1 << 8  # 4.14; as seen in the toucher's pid namespace
    MINOR_HUGETLBFS = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18; without it addresses are rounded down to a page
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7
    MOVE = 1 << 16  # 6.8


_NO_FEATURES: Final = Feature(0)


class Ioctl(IntFlag):
    """What UFFDIO_REGISTER says the *memory* could do (bit = 1 << number). MOVE is claimed for shmem, and fails."""

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
    """Which faults of a range are announced. MINOR: the page exists and this address space has not mapped it yet."""

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


class UserfaultfdUnavailable(OSError):
    """No userfaultfd can be made here. The message is one line that names the remedy."""


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at ``address``. ``thread`` is 0 unless Feature.THREAD_ID was asked for.

    One message per waiting thread, and another each time a signal interrupts the wait: dedupe by page.
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
    """The owner gave the contents of ``[start, end)`` back (MADV_DONTNEED, MADV_REMOVE)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The owner unmapped ``[start, end)``."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """An event number that this module does not know."""

    event: int


Event = PageFault | Fork | Remap | Remove | Unmap | Unknown


class Status(Enum):
    """What became of a placing ioctl."""

    DONE = "done"
    PARTIAL = "partial"  # EAGAIN, some bytes are placed and woken: advance by them, the next call gives the real reason
    RETRY = "retry"  # EAGAIN, nothing done: a fork/mremap/madvise event waits to be read; read it first, then retry
    PRESENT = "present"  # EEXIST: the page is there and NOBODY WAS WOKEN: wake the range. (Also an empty hugetlb pool!)
    STALE = "stale"  # ENOENT: not inside one mapping that is registered with this userfaultfd
    GONE = "gone"  # ESRCH: the owner's address space is no more
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
    """Result of a placing ioctl; ``done`` is in bytes and 0 unless status is DONE or PARTIAL."""

    status: Status
    done: int


def outcome_of(error: OSError, done: int) -> Outcome:
    """The meaning of a failed placing ioctl, for callers of fcntl.ioctl with buffers of their own.

    ``done`` is the result field as the kernel left it (a negative errno counts as nothing done). It is believed for
    EAGAIN only: ESRCH and EINVAL do not write the field. Raises ``error`` where it means a bug (EINVAL, EBADF...).
    """
    if error.errno == errno.EAGAIN:
        return Outcome(Status.PARTIAL, done) if done > 0 else Outcome(Status.RETRY, 0)
    status = _MEANINGS.get(error.errno or 0)
    if status is None:
        raise error
    return Outcome(status, 0)


def open_device() -> int:
    """An open /dev/userfaultfd (close on exec). Whoever holds it can make a userfaultfd for kernel-mode faults too,
    without any right of its own: give it to an unprivileged process. Raises UserfaultfdUnavailable."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserfaultfdUnavailable(
            errno.ENOENT, f"{DEVICE} does not exist: it wants Linux 6.1 and CONFIG_USERFAULTFD (load it into /dev)"
        ) from error
    except OSError as error:
        reason = f"{DEVICE} cannot be opened ({error.strerror}): run as root or `chgrp` the device to your group"
        raise UserfaultfdUnavailable(error.errno, reason) from error


def open_userfaultfd(
    *, device: int | None = None, nonblocking: bool = True, user_mode_only: bool = False
) -> Userfaultfd:
    """A userfaultfd for the memory of this process, not yet shaken hands with.

    Made through ``device`` (see :func:`open_device`), else through an own open of the device, else by the system call.
    ``user_mode_only`` needs no right at all, but a system call that touches a missing page then fails with EFAULT.
    ``nonblocking``: poll() answers POLLERR for a blocking one, always. Raises UserfaultfdUnavailable.
    """
    flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0) | (USER_MODE_ONLY if user_mode_only else 0)
    if device is not None:
        return Userfaultfd(_from_device(device, flags))
    try:
        own = open_device()
    except UserfaultfdUnavailable as error:
        return Userfaultfd(_from_syscall(flags, error))
    try:
        return Userfaultfd(_from_device(own, flags))
    finally:
        os.close(own)


def _from_device(device: int, flags: int) -> int:
    try:
        return fcntl.ioctl(device, IOC_NEW, flags)
    except OSError as error:
        reason = f"the descriptor given is no usable {DEVICE} ({error.strerror}): hand over an open {DEVICE}"
        raise UserfaultfdUnavailable(error.errno, reason) from error


def _from_syscall(flags: int, before: UserfaultfdUnavailable) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise before
    fd = int(_libc.syscall(ctypes.c_long(number), ctypes.c_long(flags)))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        reason = "this kernel has no userfaultfd: it wants CONFIG_USERFAULTFD"
    else:
        reason = (
            f"userfaultfd is refused ({os.strerror(code)}): run as root, give access to {DEVICE}, "
            "or set sysctl vm.unprivileged_userfaultfd=1"
        )
    raise UserfaultfdUnavailable(code, reason) from before


def probe_features() -> Feature:
    """Every feature this kernel has, asked of a throw-away descriptor (a handshake is possible once per descriptor)."""
    with open_userfaultfd() as probe:
        return probe.handshake()


def is_userfaultfd(fd: int) -> bool:
    """Whether ``fd`` is a userfaultfd, without any ioctl on it: a stranger's descriptor may be anything.

    The link's text cannot be forged: a file's has a leading slash.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _LINK
    except OSError:
        return False


def stuck_faults(fd: int) -> tuple[int, int]:
    """(pending, total): waiters not yet read, and all waiters, of any userfaultfd that this process holds."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["pending"]), int(fields["total"])


def _parse(message: memoryview) -> Event:
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


class Userfaultfd:
    """An open userfaultfd, made here or received from the process whose memory it governs.

    All starts, destinations and lengths are bytes, multiples of the page size of the memory (huge pages: of those).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Close this descriptor. If it is the last one, every waiter continues with zeros: see the module's head."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def handshake(self, features: Feature = _NO_FEATURES) -> Feature:
        """UFFDIO_API: must come first and once. Enables ``features``; returns all that the kernel *has*.

        Raises OSError: EINVAL (unknown feature, second handshake), EPERM (EVENT_FORK without CAP_SYS_PTRACE).
        """
        argument = bytearray(API_LAYOUT.pack(API, features, 0))
        fcntl.ioctl(self.fd, UFFDIO_API, argument)
        return Feature(API_LAYOUT.unpack(argument)[1])

    def register(self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING) -> Ioctl:
        """Announce faults of the range from now on; returns what can be done about them.

        Raises OSError: EINVAL (unaligned, a hole or unsuitable memory in the range), EBUSY (another userfaultfd has
        it), EPERM (shared mapping of a read-only descriptor), ENOMEM (the owner is gone).
        """
        argument = bytearray(REGISTER_LAYOUT.pack(start, length, mode, 0))
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, argument)
        return Ioctl(REGISTER_LAYOUT.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """Forget the range and wake every waiter in it: *they continue with zeros* where a page is still missing.

        Raises OSError: ENOMEM when the owner is gone.
        """
        fcntl.ioctl(self.fd, UFFDIO_UNREGISTER, RANGE_LAYOUT.pack(start, length))

    def set_blocking(self, blocking: bool) -> None:
        """Whether read() waits. The flag belongs to all duplicates of the descriptor, in every process."""
        os.set_blocking(self.fd, blocking)

    def read(self, limit: int = 64) -> list[Event]:
        """Up to ``limit`` events; none there: an empty list (even after poll: somebody else may have resolved it).

        A blocking descriptor waits for the first. One reading process per userfaultfd: each message is given once.
        """
        try:
            data = memoryview(os.read(self.fd, MESSAGE_BYTES * limit))
        except BlockingIOError:
            return []
        return [_parse(data[at : at + MESSAGE_BYTES]) for at in range(0, len(data), MESSAGE_BYTES)]

    def copy(self, dst: int, src: int, length: int, *, wake: bool = True, protect: bool = False) -> Outcome:
        """Fill missing pages at ``dst`` (owner's address) from ``src`` (caller's address), and wake their waiters."""
        mode = (0 if wake else COPY_DONTWAKE) | (COPY_WP if protect else 0)
        argument = bytearray(COPY_LAYOUT.pack(dst, src, length, mode, 0))
        try:
            fcntl.ioctl(self.fd, UFFDIO_COPY, argument)
        except OSError as error:  # the result field is written all the same
            return outcome_of(error, COPY_LAYOUT.unpack(argument)[4])
        return Outcome(Status.DONE, length)

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """Fill missing pages with zeros. Not for hugetlb (EINVAL raises): copy from zeros there."""
        return self._range(UFFDIO_ZEROPAGE, start, length, wake)

    def continue_(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """Map pages that the block has into the owner, and wake. UNREADABLE: the block has none there.

        Also clears poison (the owner's page then is the block's). PRESENT: the owner has it mapped already.
        """
        return self._range(UFFDIO_CONTINUE, start, length, wake)

    def poison(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """Touching these pages raises SIGBUS in the owner from now on. Ask for presence first: a page that the block
        has but the owner has not mapped is poisoned all the same. PRESENT or PARTIAL: stopped at a mapped page."""
        return self._range(UFFDIO_POISON, start, length, wake)

    def wake(self, start: int, length: int) -> None:
        """Let every waiter in the range run; who still misses a page faults and is announced again.

        Succeeds for unmapped ranges and dead owners too: it proves nothing.
        """
        fcntl.ioctl(self.fd, UFFDIO_WAKE, RANGE_LAYOUT.pack(start, length))

    def writeprotect(self, start: int, length: int, protect: bool, *, wake: bool = True) -> Outcome:
        """Protect a range that is registered WP, or lift the protection (and wake, unless told not to)."""
        mode = WRITEPROTECT_WP if protect else (0 if wake else WRITEPROTECT_DONTWAKE)
        try:
            fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, bytearray(WRITEPROTECT_LAYOUT.pack(start, length, mode)))
        except OSError as error:
            return outcome_of(error, 0)
        return Outcome(Status.DONE, length)

    def _range(self, request: int, start: int, length: int, wake: bool) -> Outcome:
        argument = bytearray(RANGE_MODE_LAYOUT.pack(start, length, 0 if wake else DONTWAKE, 0))
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            return outcome_of(error, RANGE_MODE_LAYOUT.unpack(argument)[3])
        return Outcome(Status.DONE, length)
