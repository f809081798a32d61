"""What another living process holds: its identity, its descriptors, the files that it has mapped.

Reading descriptors (pidfd_getfd(2), Linux 5.6) needs the right to ptrace the process: the same user, or CAP_SYS_PTRACE.
Opening a mapped file through /proc/PID/map_files needs CAP_CHECKPOINT_RESTORE (Linux 5.9) or CAP_SYS_ADMIN.

Example::

    pidfd = open_process(pid, started)
    for number in userfaultfds(pid):
        duplicate = fetch_descriptor(pidfd, number)
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress
from typing import Final

from .address_space import MappedRange
from .memory import reopen
from .process import pidfd_exited

_PIDFD_GETFD: Final = 438  # Linux 5.6, the same number on every architecture
_USERFAULTFD: Final = "anon_inode:[userfaultfd]"
_MEMFD: Final = "/memfd:{} (deleted)"
_START_TIME: Final = 19  # field 22 of /proc/PID/stat; the list begins behind the name, with field 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def boot_id() -> str:
    """A text that is new at each boot of the kernel: pids and start times of an earlier boot mean nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
        return text.read().strip()


def start_time(pid: int) -> int:
    """When a process was started, in clock ticks since boot: with the pid it identifies the process. Raises OSError
    (ProcessLookupError) if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as text:
            return int(text.read().rpartition(b")")[2].split()[_START_TIME])
    except (FileNotFoundError, IndexError):
        raise ProcessLookupError(errno.ESRCH, "there is no such process") from None


def open_process(pid: int, started: int) -> int:
    """A pidfd of the process ``pid`` that was started at ``started``. Raises ProcessLookupError when it has ended, also
    when its pid belongs to another process by now; other OSErrors for a lack of descriptors."""
    if pid <= 0:
        raise ProcessLookupError(errno.ESRCH, "the process has no pid in this pid namespace")
    pidfd = os.pidfd_open(pid)
    try:
        if start_time(pid) != started:  # asked after the pidfd is open: now the pid cannot be reused unnoticed
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is another one, which was started later")
        if pidfd_exited(pidfd):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def fetch_descriptor(pidfd: int, descriptor: int) -> int:
    """A duplicate of another process's descriptor (close on exec). Raises OSError: PermissionError, EBADF, ESRCH."""
    found = _libc.syscall(ctypes.c_long(_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_int(descriptor), ctypes.c_uint(0))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
    return int(found)


def userfaultfds(pid: int) -> list[int]:
    """The numbers of a process's descriptors that are userfaultfds. Raises OSError: PermissionError, FileNotFoundError
    if it is gone."""
    return _descriptors(pid, _USERFAULTFD)


def memfds(pid: int, name: str) -> list[int]:
    """The numbers of a process's descriptors that are memfds of this name. Raises OSError as ``userfaultfds``."""
    return _descriptors(pid, _MEMFD.format(name))


def _descriptors(pid: int, target: str) -> list[int]:
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since
            if os.readlink(f"/proc/{pid}/fd/{number}") == target:
                found.append(int(number))
    return sorted(found)


def open_mapped(pid: int, mapped: MappedRange, file: tuple[int, int]) -> int:
    """Open the file behind a mapping of another process for reading and writing (close on exec).

    It is identified before it is really opened (O_PATH first), because the process may map something else meanwhile.
    Raises OSError: PermissionError without the right, ESTALE unless it is the regular ``file`` (device, inode) of our
    own user."""
    place = os.open(f"/proc/{pid}/map_files/{mapped.start:x}-{mapped.end:x}", os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(place)
        if (found.st_dev, found.st_ino) != file or not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.ESTALE, f"process {pid} has other memory there")
        return reopen(place, writable=True)
    finally:
        os.close(place)
