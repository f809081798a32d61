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
import mmap
import os
import platform
from types import TracebackType
from typing import Final

from postcopy_kernel.abi import (
    API,
    API_LAYOUT,
    COPY_DONTWAKE,
    COPY_LAYOUT,
    COPY_WP,
    DONTWAKE,
    EHWPOISON,
    IOC_NEW,
    MESSAGE_BYTES,
    RANGE_LAYOUT,
    RANGE_MODE_LAYOUT,
    REGISTER_LAYOUT,
    UFFDIO_API,
    UFFDIO_CONTINUE,
    UFFDIO_COPY,
    UFFDIO_MOVE,
    UFFDIO_POISON,
    UFFDIO_REGISTER,
    UFFDIO_UNREGISTER,
    UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT,
    UFFDIO_ZEROPAGE,
    USER_MODE_ONLY,
    WRITEPROTECT_DONTWAKE,
    WRITEPROTECT_LAYOUT,
    WRITEPROTECT_WP,
    Event,
    EventKind,
    FaultFlag,
    Feature,
    Fork,
    Ioctl,
    Outcome,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Status,
    Unknown,
    Unmap,
    outcome_of,
    parse_event,
)

__all__ = [
    "API",
    "API_LAYOUT",
    "COPY_DONTWAKE",
    "COPY_LAYOUT",
    "COPY_WP",
    "DEVICE",
    "DONTWAKE",
    "EHWPOISON",
    "IOC_NEW",
    "MESSAGE_BYTES",
    "RANGE_LAYOUT",
    "RANGE_MODE_LAYOUT",
    "REGISTER_LAYOUT",
    "UFFDIO_API",
    "UFFDIO_CONTINUE",
    "UFFDIO_COPY",
    "UFFDIO_MOVE",
    "UFFDIO_POISON",
    "UFFDIO_REGISTER",
    "UFFDIO_UNREGISTER",
    "UFFDIO_WAKE",
    "UFFDIO_WRITEPROTECT",
    "UFFDIO_ZEROPAGE",
    "USER_MODE_ONLY",
    "WRITEPROTECT_DONTWAKE",
    "WRITEPROTECT_LAYOUT",
    "WRITEPROTECT_WP",
    "Event",
    "EventKind",
    "FaultFlag",
    "Feature",
    "Fork",
    "Ioctl",
    "Outcome",
    "PageFault",
    "RegisterMode",
    "Remap",
    "Remove",
    "Status",
    "Unknown",
    "Unmap",
    "Userfaultfd",
    "UserfaultfdUnavailable",
    "is_userfaultfd",
    "open_device",
    "open_userfaultfd",
    "outcome_of",
    "probe_features",
    "stuck_faults",
]

DEVICE: Final = "/dev/userfaultfd"  # misc device, Linux 6.1
_SYSCALLS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # pass by: no reason to send anybody for more rights
_LINK: Final = "anon_inode:[userfaultfd]"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NO_FEATURES: Final = Feature(0)


class UserfaultfdUnavailable(OSError):
    """No userfaultfd can be made here. The message is one line that names the remedy."""


def open_device() -> int:
    """An open /dev/userfaultfd (close on exec). Whoever holds it can make a userfaultfd for kernel-mode faults too,
    without any right of its own: give it to an unprivileged process. Raises UserfaultfdUnavailable, or another OSError
    where nothing is wrong with the device (EMFILE)."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserfaultfdUnavailable(
            errno.ENOENT, f"{DEVICE} does not exist: it wants Linux 6.1 and CONFIG_USERFAULTFD"
        ) from error
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
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
        if error.errno in _SHORTAGES:
            raise
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
    if code in _SHORTAGES:
        raise OSError(code, f"userfaultfd: {os.strerror(code)}")
    if code == errno.ENOSYS:
        reason = "this kernel has no userfaultfd: it wants CONFIG_USERFAULTFD"
    else:
        reason = (
            f"userfaultfd is refused ({os.strerror(code)}): run as root, give access to {DEVICE}, "
            "or set sysctl vm.unprivileged_userfaultfd=1 (in a container: allow the system call)"
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
    # Bytes, here as everywhere in this wing: a process that gave up its rights may be unable to load a codec any more.
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        fields = dict(line.split(b":", 1) for line in lines if b":" in line)
    return int(fields[b"pending"]), int(fields[b"total"])


class Userfaultfd:
    """An open userfaultfd, made here or received from the process whose memory it governs.

    It never closes itself: where a forgotten object became garbage, every waiter would continue with zeros.
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
        return [parse_event(data[at : at + MESSAGE_BYTES]) for at in range(0, len(data), MESSAGE_BYTES)]

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

    def owner_lives(self) -> bool:
        """Is the memory that this belongs to still there? False after an exit or an exec (from Linux 5.13 on).

        Changes nothing: it asks for a page where no program has its memory, and only of memory that is gone the kernel
        says ESRCH."""
        try:
            return self.continue_(1 << 16, mmap.PAGESIZE).status is not Status.GONE
        except OSError:
            return True

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
