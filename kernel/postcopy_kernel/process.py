"""Processes: names, rights, pidfds, memory use.

``python-prctl`` is imported inside the functions that need it. It needs a compiler to install, and a client install
does not have it (the extra ``supervisor`` does).

Example::

    pidfd = pidfd_open(pid)
    pidfd_signal(pidfd, signal.SIGTERM)
    assert pidfd_exited(pidfd, within=5.0)
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal as signals
from typing import Final

from . import polling

NAME_LENGTH: Final = 15  # what the kernel keeps of a name (TASK_COMM_LEN - 1)

_PR_SET_PDEATHSIG: Final = 1
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
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


def name_process(name: str) -> None:
    """Set the name of the calling thread, which ``ps`` and ``top`` show; the kernel keeps 15 bytes."""
    import prctl

    prctl.set_name(name[:NAME_LENGTH])


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
    import prctl

    prctl.set_no_new_privs(1)
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
    it, so call it last. A parent that died before the call would not be noticed, hence ``expected_parent_pid``. Needs
    no python-prctl. Raises OSError for an unknown signal.
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


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a tracer. Hold its pidfd, so that ``pid`` is not reused."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def memory_figures(pid: int) -> dict[str, int]:
    """Memory of a process in bytes: ``private`` (freed when it ends), ``shared``, ``rss`` (Linux 4.14).

    Raises OSError: ESRCH or ENOENT if it is gone, EACCES if it is another user's.
    """
    figures = {b"Private": 0, b"Shared": 0, b"Rss": 0}
    with open(f"/proc/{pid}/smaps_rollup", "rb") as lines:
        for line in lines:
            field, _, value = line.partition(b":")
            kind = field.partition(b"_")[0]  # Private_Clean, Private_Dirty, Private_Hugetlb...
            if kind in figures:
                figures[kind] += int(value.split()[0]) << 10
    return {kind.decode().lower(): figure for kind, figure in figures.items()}
