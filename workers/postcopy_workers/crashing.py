"""The system calls of the fault path with crash points between them; see ``postcopy_kernel.crashpoints``.

The fault handler gets its system calls as a port, so that nothing of this stands in its way when no point is armed.
"""

from __future__ import annotations

import fcntl
from typing import Any

from postcopy_kernel import crashpoints
from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE

from .placing import Calls


def calls() -> Calls:
    """The port of a worker: the plain system calls, unless this process is to die between them."""
    if crashpoints.armed("worker.read", "worker.copied", "worker.marked", "worker.woken"):
        return Calls(ioctl=_Ioctl())
    return Calls()


class _Ioctl:
    """A wake counts only when a page was placed before it: the first act of every worker is to wake everybody."""

    def __init__(self) -> None:
        self._placed = False

    def __call__(self, fd: int, request: int, buffer: bytearray) -> Any:
        if request == UFFDIO_COPY:
            crashpoints.at("worker.read")
            answer = fcntl.ioctl(fd, request, buffer)
            crashpoints.at("worker.copied")
            self._placed = True
            return answer
        if request not in (UFFDIO_WAKE, UFFDIO_CONTINUE) or not self._placed:
            return fcntl.ioctl(fd, request, buffer)
        crashpoints.at("worker.marked")
        answer = fcntl.ioctl(fd, request, buffer)
        crashpoints.at("worker.woken")
        self._placed = False
        return answer
