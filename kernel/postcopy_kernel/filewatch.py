"""Changes of an open file: leases report them before they happen, inotify afterwards.

A read lease (fcntl(2), F_SETLEASE) makes a process that opens the file for writing, or truncates it, wait until the
lease is released, at most /proc/sys/fs/lease-break-time (45 s). The holder gets SIGIO. The lease belongs to the open
file description, so duplicates in other processes keep it and can release it. It cannot be taken while the file is open
for writing, on file systems without leases, or for a file of another user without CAP_LEASE.

inotify(7) is a hint, not a proof: it does not report changes on another host of a network file system, or through a
shared mapping. For those see ``filestamp``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from contextlib import suppress
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

_IN_MODIFY: Final = 0x2  # write(2) and truncate(2)
_IN_ATTRIB: Final = 0x4  # times, among others
_EVENT: Final = struct.Struct("iIII")  # watch, mask, cookie, length of the name behind it


def lease(fd: int) -> bool:
    """Take a read lease on a file that is open read-only. Returns False if that is not possible."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def hear_of_lease(fd: int) -> None:
    """Direct SIGIO for the lease on this open file to this process, whichever process took it."""
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())


def lease_wanted(fd: int) -> bool:
    """Whether another process waits for the lease (or the lease is gone already)."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def give_up_lease(fd: int) -> None:
    """Release the lease, so that waiting processes continue. It is no error if the lease is gone already."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


class FileWatch:
    """One inotify instance for all files (a user has 128 instances by default)."""

    def __init__(self) -> None:
        """Raises OSError: EMFILE if the user has no instance left."""
        self.fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        return self.fd

    def add(self, fd: int) -> int:
        """Watch the file of a descriptor. Returns its number in the result of ``read``. Raises OSError."""
        path = b"/proc/self/fd/%d" % fd
        return _checked(_libc.inotify_add_watch(self.fd, path, ctypes.c_uint32(_IN_MODIFY | _IN_ATTRIB)))

    def read(self) -> dict[int, bool]:
        """Numbers of the files with events since the last call; True: written or truncated, False: times, or links."""
        try:
            events = os.read(self.fd, 65536)
        except BlockingIOError:
            return {}
        changed, at = dict[int, bool](), 0
        while at + _EVENT.size <= len(events):
            watch, mask, _, length = _EVENT.unpack_from(events, at)
            changed[watch] = changed.get(watch, False) or bool(mask & _IN_MODIFY)
            at += _EVENT.size + length
        return changed

    def close(self) -> None:
        os.close(self.fd)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"inotify: {os.strerror(code)}")
    return result
