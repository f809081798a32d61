"""userfaultfd(2): memory whose missing pages are supplied by a program.

The names are the kernel's. Read this first:

* A userfaultfd is bound to the **address space of the process that created it**, for ever. Passing the descriptor
  (SCM_RIGHTS, fork) moves the handle, not the memory: every address below is an address *there*. The one exception is
  the source of :meth:`Userfaultfd.copy`, an address of the caller. So one process can fill another's memory.
* **Closing the last descriptor releases every waiter into zero pages**, without an error. A process that outlives the
  handler must hold a duplicate.
* A message that was read is not delivered again. A handler that takes over from a dead one calls
  :meth:`Userfaultfd.wake` once for each registered range: threads that still miss a page fault and are reported again.
* "Already present" and "try again" are normal results, not errors: :class:`Outcome`. An exception is a bug or a limit.

Nothing here reads or writes the memory in question; only the kernel touches missing pages.
Sources: include/uapi/linux/userfaultfd.h and fs/userfaultfd.c up to Linux 6.12, and tests on 6.18.

Example: fill the first page of a mapping when it is touched::

    with open_userfaultfd() as ufd:
        ufd.handshake()
        ufd.register(mapping.address, mapping.length)
        poll([ufd])
        for fault in ufd.read():
            ufd.copy(fault.address & -4096, address_of(page), 4096)
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

from . import abi
from .abi import EHWPOISON as EHWPOISON
from .abi import MESSAGE_BYTES as MESSAGE_BYTES
from .abi import UFFDIO_CONTINUE as UFFDIO_CONTINUE
from .abi import UFFDIO_COPY as UFFDIO_COPY
from .abi import UFFDIO_POISON as UFFDIO_POISON
from .abi import UFFDIO_WAKE as UFFDIO_WAKE
from .abi import UFFDIO_ZEROPAGE as UFFDIO_ZEROPAGE
from .abi import Event as Event
from .abi import FaultFlag as FaultFlag
from .abi import Feature as Feature
from .abi import Fork as Fork
from .abi import Ioctl as Ioctl
from .abi import Outcome as Outcome
from .abi import PageFault as PageFault
from .abi import RegisterMode as RegisterMode
from .abi import Remap as Remap
from .abi import Remove as Remove
from .abi import Status as Status
from .abi import Unknown as Unknown
from .abi import Unmap as Unmap
from .abi import outcome_of as outcome_of

DEVICE: Final = "/dev/userfaultfd"  # misc device, Linux 6.1
_SYSCALLS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # temporary: more rights would not help
_LINK: Final = "anon_inode:[userfaultfd]"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NO_FEATURES: Final = Feature(0)


class UserfaultfdUnavailable(OSError):
    """No userfaultfd can be made here. The text is one line that names the remedy."""


def open_device() -> int:
    """Open /dev/userfaultfd (Linux 6.1; close on exec).

    A process that holds it can make a userfaultfd that handles kernel-mode faults too, without any right of its own: so
    it may be given to an unprivileged process. Raises UserfaultfdUnavailable, or OSError for a shortage (EMFILE)."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserfaultfdUnavailable(
            errno.ENOENT, f"{DEVICE} does not exist: it needs Linux 6.1 and CONFIG_USERFAULTFD"
        ) from error
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        reason = f"{DEVICE} cannot be opened ({error.strerror}): run as root or `chgrp` the device to your group"
        raise UserfaultfdUnavailable(error.errno, reason) from error


def open_userfaultfd(
    *, device: int | None = None, nonblocking: bool = True, user_mode_only: bool = False
) -> Userfaultfd:
    """Make a userfaultfd for the memory of this process; the handshake comes next.

    Tries ``device`` (see :func:`open_device`) if given, else opens the device, else uses the system call.
    ``user_mode_only`` needs no rights, but a system call that touches a missing page then fails with EFAULT.
    ``nonblocking``: keep it, because poll() always reports POLLERR for a blocking one. Raises UserfaultfdUnavailable.

    Example::

        ufd = open_userfaultfd()
        features = ufd.handshake(Feature.MINOR_SHMEM)
    """
    flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0) | (abi.USER_MODE_ONLY if user_mode_only else 0)
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
        return fcntl.ioctl(device, abi.IOC_NEW, flags)
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        reason = f"the descriptor is no usable {DEVICE} ({error.strerror}): pass an open {DEVICE}"
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
        reason = "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD"
    else:
        reason = (
            f"userfaultfd is refused ({os.strerror(code)}): run as root, give access to {DEVICE}, "
            "or set sysctl vm.unprivileged_userfaultfd=1 (in a container: allow the system call)"
        )
    raise UserfaultfdUnavailable(code, reason) from before


def probe_features() -> Feature:
    """All features of this kernel, asked on a temporary descriptor (each can have only one handshake)."""
    with open_userfaultfd() as probe:
        return probe.handshake()


def is_userfaultfd(fd: int) -> bool:
    """Whether ``fd`` is a userfaultfd. Uses no ioctl, because a received descriptor may be anything.

    The text of the link cannot be forged: that of a file begins with a slash.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == _LINK
    except OSError:
        return False


def stuck_faults(fd: int) -> tuple[int, int]:
    """(pending, total): unread waiters and all waiters of a userfaultfd that this process holds."""
    # Bytes, as everywhere in this wing: a process in the sandbox may be unable to load a text codec.
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        fields = dict(line.split(b":", 1) for line in lines if b":" in line)
    return int(fields[b"pending"]), int(fields[b"total"])


class Userfaultfd:
    """An open userfaultfd, made here or received from the process whose memory it governs.

    It is never closed by garbage collection, because every waiter would continue with zeros. All starts, destinations
    and lengths are in bytes and multiples of the page size of the memory (of the huge page size for huge pages).
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Close this descriptor. If it is the last one, every waiter continues with zeros."""
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
        """UFFDIO_API, required first and once. Enables ``features``; returns all that the kernel *has*.

        Raises OSError: EINVAL (unknown feature, second handshake), EPERM (EVENT_FORK without CAP_SYS_PTRACE).
        """
        argument = bytearray(abi.API_LAYOUT.pack(abi.API, features, 0))
        fcntl.ioctl(self.fd, abi.UFFDIO_API, argument)
        return Feature(abi.API_LAYOUT.unpack(argument)[1])

    def register(self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING) -> Ioctl:
        """UFFDIO_REGISTER: report faults of the range. Returns the ioctls that the range allows.

        Raises OSError: EINVAL (unaligned, a hole or unsuitable memory in the range), EBUSY (another userfaultfd has
        it), EPERM (shared mapping of a read-only descriptor), ENOMEM (the owner is gone).
        """
        argument = bytearray(abi.REGISTER_LAYOUT.pack(start, length, mode, 0))
        fcntl.ioctl(self.fd, abi.UFFDIO_REGISTER, argument)
        return Ioctl(abi.REGISTER_LAYOUT.unpack(argument)[3])

    def unregister(self, start: int, length: int) -> None:
        """UFFDIO_UNREGISTER, which wakes every waiter: *they continue with zeros* where a page is still missing.

        Raises OSError: ENOMEM when the owner is gone.
        """
        fcntl.ioctl(self.fd, abi.UFFDIO_UNREGISTER, abi.RANGE_LAYOUT.pack(start, length))

    def set_blocking(self, blocking: bool) -> None:
        """Set whether read() waits. The flag is shared by all duplicates of the descriptor, in every process."""
        os.set_blocking(self.fd, blocking)

    def read(self, limit: int = 64) -> list[Event]:
        """Up to ``limit`` events. The list may be empty even after poll(): another process may have resolved the fault.

        A blocking descriptor waits for the first. Only one process may read, because each message is delivered once.
        """
        try:
            data = memoryview(os.read(self.fd, MESSAGE_BYTES * limit))
        except BlockingIOError:
            return []
        return [abi.parse_event(data[at : at + MESSAGE_BYTES]) for at in range(0, len(data), MESSAGE_BYTES)]

    def copy(self, dst: int, src: int, length: int, *, wake: bool = True, protect: bool = False) -> Outcome:
        """UFFDIO_COPY: fill missing pages at ``dst`` (owner's address) from ``src`` (caller's), wake waiters."""
        mode = (0 if wake else abi.COPY_DONTWAKE) | (abi.COPY_WP if protect else 0)
        argument = bytearray(abi.COPY_LAYOUT.pack(dst, src, length, mode, 0))
        try:
            fcntl.ioctl(self.fd, UFFDIO_COPY, argument)
        except OSError as error:  # the result field is written all the same
            return outcome_of(error, abi.COPY_LAYOUT.unpack(argument)[4])
        return Outcome(Status.DONE, length)

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """UFFDIO_ZEROPAGE: fill missing pages with zeros. Not for hugetlb (OSError EINVAL): copy zeros there."""
        return self._range(abi.UFFDIO_ZEROPAGE, start, length, wake)

    def continue_(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """UFFDIO_CONTINUE (Linux 5.13): map pages of the block into the owner, and wake. UNREADABLE: they are absent.

        Also removes poison. PRESENT: the owner has mapped the page already.
        """
        return self._range(UFFDIO_CONTINUE, start, length, wake)

    def poison(self, start: int, length: int, *, wake: bool = True) -> Outcome:
        """UFFDIO_POISON (Linux 6.6): touching these pages raises SIGBUS in the owner.

        Check presence first: a page that the block has and the owner has not mapped is poisoned too. PRESENT or
        PARTIAL: stopped at a mapped page."""
        return self._range(UFFDIO_POISON, start, length, wake)

    def wake(self, start: int, length: int) -> None:
        """UFFDIO_WAKE: let every waiter in the range run. One that still misses a page faults and is reported again.

        Also succeeds for unmapped ranges and dead owners, so it proves nothing.
        """
        fcntl.ioctl(self.fd, UFFDIO_WAKE, abi.RANGE_LAYOUT.pack(start, length))

    def owner_lives(self) -> bool:
        """Whether the owner's address space still exists. False after an exit or an exec (Linux 5.13).

        Changes nothing: it continues a page where no program has memory. The kernel returns ESRCH only if the address
        space is gone."""
        try:
            return self.continue_(1 << 16, mmap.PAGESIZE).status is not Status.GONE
        except OSError:
            return True

    def writeprotect(self, start: int, length: int, protect: bool, *, wake: bool = True) -> Outcome:
        """UFFDIO_WRITEPROTECT: protect a range registered WP, or remove the protection and ``wake``."""
        mode = abi.WRITEPROTECT_WP if protect else (0 if wake else abi.WRITEPROTECT_DONTWAKE)
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_WRITEPROTECT, bytearray(abi.WRITEPROTECT_LAYOUT.pack(start, length, mode)))
        except OSError as error:
            return outcome_of(error, 0)
        return Outcome(Status.DONE, length)

    def _range(self, request: int, start: int, length: int, wake: bool) -> Outcome:
        argument = bytearray(abi.RANGE_MODE_LAYOUT.pack(start, length, 0 if wake else abi.DONTWAKE, 0))
        try:
            fcntl.ioctl(self.fd, request, argument)
        except OSError as error:
            return outcome_of(error, abi.RANGE_MODE_LAYOUT.unpack(argument)[3])
        return Outcome(Status.DONE, length)
