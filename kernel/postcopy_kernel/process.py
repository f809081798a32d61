"""Processes: names, rights, pidfds, memory use.

Where ``python-prctl`` is installed (the extra ``prctl``, which needs a compiler) it is used; else prctl(2) is called by
ctypes, which does the same.

Example::

    pidfd = pidfd_open(pid)
    pidfd_signal(pidfd, signal.SIGTERM)
    assert pidfd_exited(pidfd, within=5.0)
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import signal as signals
from functools import cache
from typing import Any, Final

from . import polling

NAME_LENGTH: Final = 15  # what the kernel keeps of a name (TASK_COMM_LEN - 1)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_ARG_START, _ARG_END = 48, 49  # fields of /proc/PID/stat, proc(5)
_CAPABILITY_VERSION_3: Final = 0x20080522
_HIGHEST_CAPABILITY: Final = 63  # width of the kernel's sets
_STATUS_FIELDS: Final = {
    b"CapInh": "inheritable",
    b"CapPrm": "permitted",
    b"CapEff": "effective",
    b"CapBnd": "bounding",
    b"CapAmb": "ambient",
    b"NoNewPrivs": "no_new_privs",
}

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> int:
    """prctl(2): 0, or the errno."""
    zero = ctypes.c_ulong(0)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero) >= 0:
        return 0
    return ctypes.get_errno()


@cache
def _python_prctl() -> Any:
    """The module python-prctl, or None."""
    try:
        import prctl
    except ImportError:
        return None
    return prctl


def name_process(name: str) -> None:
    """Set the name of the calling thread, which ``top`` and ``pgrep`` show; the kernel keeps 15 bytes."""
    if (prctl := _python_prctl()) is not None:
        prctl.set_name(name[:NAME_LENGTH])
        return
    text = ctypes.create_string_buffer(name.encode()[:NAME_LENGTH])
    _prctl(_PR_SET_NAME, ctypes.addressof(text))


@cache
def _command_line() -> tuple[int, int]:
    """Address and length of this program's arguments in memory, which a fork inherits."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # from the third field on
    start, end = int(fields[_ARG_START - 3]), int(fields[_ARG_END - 3])
    return start, max(0, end - start)


def title_process(title: str) -> None:
    """Set what ``ps`` shows as the command line, as far as there is room for it. Nothing reads the arguments any more:
    Python has copies."""
    try:
        start, length = _command_line()
    except (OSError, ValueError, IndexError):  # no /proc: only the name tells who it is
        return
    if start and length:
        data = title.encode("utf-8", "replace")[: length - 1].decode("utf-8", "ignore").encode()
        ctypes.memmove(start, data.ljust(length, b"\0"), length)


def set_no_new_privs() -> None:
    """Set no_new_privs: exec gives this thread and its children no new rights. Raises OSError."""
    code = _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if code:
        raise OSError(code, f"PR_SET_NO_NEW_PRIVS: {os.strerror(code)}")


def drop_privileges() -> None:
    """Give up every capability in all five sets, and set no_new_privs.

    Applies to the calling thread and its children: call it before there are other threads. Without CAP_SETPCAP the
    bounding set cannot be emptied. That is harmless, because of no_new_privs. Raises OSError.
    """
    if (prctl := _python_prctl()) is not None:
        prctl.set_no_new_privs(1)
    else:
        set_no_new_privs()
    _empty_bounding_set()
    # Not python-prctl's cap_permitted.limit(): it knows the capabilities of the headers it was built with and would
    # leave newer ones in place. capset(2) takes whole sets, and the kernel lowers the ambient set with them.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def _empty_bounding_set() -> None:
    for capability in range(_HIGHEST_CAPABILITY + 1):
        code = _prctl(_PR_CAPBSET_DROP, capability)
        if code in (errno.EINVAL, errno.EPERM):  # past the last of this kernel / no right to drop it
            return
        if code:
            raise OSError(code, f"PR_CAPBSET_DROP {capability}: {os.strerror(code)}")


def privileges() -> dict[str, int]:
    """The calling thread's capability sets as bit masks (``inheritable``, ``permitted``, ``effective``, ``bounding``,
    ``ambient``) and ``no_new_privs`` (0 or 1)."""
    found = {}
    with open("/proc/thread-self/status", "rb") as lines:
        for line in lines:
            field, _, value = line.partition(b":")
            if field in _STATUS_FIELDS:
                found[_STATUS_FIELDS[field]] = int(value, 16)
    return found


def die_with_parent(expected_parent_pid: int, signal: int = signals.SIGKILL) -> None:
    """Receive ``signal`` when the parent dies, or at once if it is dead already.

    Traps: it follows the *thread* that forked, not the process. A change of uid or an exec of a set-uid program clears
    it, so call it last. A parent that died before the call would not be noticed, hence ``expected_parent_pid``.
    Raises OSError for an unknown signal.
    """
    code = _prctl(_PR_SET_PDEATHSIG, signal)
    if code:
        raise OSError(code, f"PR_SET_PDEATHSIG {signal}: {os.strerror(code)}")
    if os.getppid() != expected_parent_pid:
        os.kill(os.getpid(), signal)


def pidfd_open(pid: int) -> int:
    """A descriptor of this process, valid even when its pid is reused (Linux 5.3; close on exec).

    Raises OSError: ESRCH if there is no such process.
    """
    return os.pidfd_open(pid)


def pidfd_signal(pidfd: int, signal: int) -> None:
    """Signal the process (Linux 5.1). Raises ProcessLookupError if it has been reaped."""
    signals.pidfd_send_signal(pidfd, signal)


def pidfd_exited(pidfd: int, within: float = 0.0) -> bool:
    """Whether the process has ended, reaped or not. Waits up to ``within`` seconds."""
    poll = polling.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within * 1000))


def is_same_process(one: int, other: int) -> bool:
    """Whether two pidfds name the same process, and it lives. Numbers are not compared: a process in another pid
    namespace has none here. On kernels before 6.9, where pidfds have no inode of their own, such a process is never
    the same."""
    facts, others = os.fstat(one), os.fstat(other)
    if (facts.st_dev, facts.st_ino) != (others.st_dev, others.st_ino):
        return False
    if not _has_own_inode(facts):
        with open(f"/proc/self/fdinfo/{one}", "rb") as mine, open(f"/proc/self/fdinfo/{other}", "rb") as theirs:
            pids = {line for file in (mine, theirs) for line in file if line.startswith(b"Pid:")}
        if len(pids) != 1 or int(pids.pop().split()[1]) <= 0:
            return False
    return not (pidfd_exited(one) or pidfd_exited(other))


def _has_own_inode(pidfd: os.stat_result) -> bool:
    """Whether it is on pidfs (Linux 6.9): before that all pidfds share one inode with eventfds."""
    event = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return os.fstat(event).st_dev != pidfd.st_dev
    finally:
        os.close(event)


def unmapped_ids() -> tuple[int, int]:
    """The user and group that the kernel reports for ids without a number in this user namespace (overflowuid); -1
    where every id has one, as on the host."""
    found = []
    for kind in ("uid", "gid"):
        with open(f"/proc/self/{kind}_map", "rb") as lines:
            whole = sum(int(line.split()[2]) for line in lines) >= (1 << 32) - 1
        with open(f"/proc/sys/kernel/overflow{kind}", "rb") as number:
            found.append(-1 if whole else int(number.read()))
    return found[0], found[1]


def lock_holder(path: str) -> int:
    """The pid of the process that holds a file's lock (flock); 0: none is seen here. Takes no lock itself, so that
    another process that tries at this moment is not refused."""
    try:
        found = os.stat(path)
        with open("/proc/locks", "rb") as locks:
            lines = [line.split() for line in locks]
    except OSError:
        return 0
    place = b"%02x:%02x:%d" % (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino)
    holders = (int(words[4]) for words in lines if words[1:3] == [b"FLOCK", b"ADVISORY"] and words[5] == place)
    return max(0, next(holders, 0))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a tracer. Hold its pidfd, so that ``pid`` is not reused."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


_IN_MEMORY = (b"/memfd:", b"/anon_hugepage", b"/dev/shm/", b"/dev/zero", b"/SYSV")


def memory_figures(pid: int) -> dict[str, int]:
    """Memory of a process in bytes: ``private`` (freed when it ends), ``shared``, ``rss`` (Linux 4.14).

    ``private`` is anonymous and shmem memory that no other process maps, and page tables. Pages of a mapped file
    belong to the page cache, although the kernel counts them as Private_* of a process that maps them alone.

    Raises OSError: ESRCH or ENOENT if it is gone, EACCES if it is another user's.
    """
    figures = {"private": 0, "shared": 0, "rss": 0}
    of_a_file = False
    with open(f"/proc/{pid}/smaps", "rb") as lines:
        for line in lines:
            field, *values = line.split(None, 5)
            if not field.endswith(b":"):  # the first line of a mapping: addresses, rights, offset, device, inode, path
                path = values[4] if len(values) > 4 else b""
                of_a_file = values[0].endswith(b"s") and path.startswith(b"/") and not path.startswith(_IN_MEMORY)
                continue
            kind = field.rstrip(b":").decode().partition("_")[0].lower()  # Private_Dirty, Private_Hugetlb, Shared_Clean
            if kind in figures and field != b"Private_Clean:" and not (kind == "private" and of_a_file):
                figures[kind] += int(values[0]) << 10
    with open(f"/proc/{pid}/status", "rb") as status:
        figures["private"] += _page_tables(status.read())
    return figures


class PageTables:
    """The size of this process's own page tables. Its descriptor is opened once, so that a process whose sandbox opens
    no file can still read it. A forked child needs an instance of its own: a descriptor of the parent's file shows the
    parent."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        """Bytes (VmPTE). About 20 us."""
        return _page_tables(os.pread(self._status, 4096, 0))

    def close(self) -> None:
        os.close(self._status)


def _page_tables(status: bytes) -> int:
    """VmPTE of the text of /proc/PID/status, in bytes; 0 for a process that has no memory (a zombie)."""
    found = re.search(rb"^VmPTE:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0
