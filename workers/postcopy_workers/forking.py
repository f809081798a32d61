"""Forking a worker: the child waits until its parent has announced it."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import NoReturn

from postcopy_kernel import descriptors, log_queue, process
from postcopy_protocol.messages import Assignment
from postcopy_wire.factory import preload

from .client_worker import serve_client
from .worker_zero import serve_worker_zero

log = logging.getLogger("postcopy.worker")


@dataclass(frozen=True, slots=True)
class ForkedWorker:
    """A child that waits until it may begin. ``pidfd`` is the caller's to close."""

    pid: int
    pidfd: int
    gate: int

    def begin(self) -> None:
        """Let the child begin. When the custodian dies before this, the child reads the end of its pipe and ends."""
        with contextlib.suppress(BrokenPipeError):  # it has been killed already: its pidfd says so
            os.write(self.gate, b"!")
        os.close(self.gate)


def fork_worker(assignment: Assignment, fds: list[int], lifeline: int, title: str, *, privileged: bool) -> ForkedWorker:
    """Fork a worker that keeps ``fds``, the end of the ``lifeline`` (-1: there is none) and no other descriptor; raises
    OSError. ``title``: what ``ps`` shows of it; ``privileged``: see ``Worker``."""
    preload(assignment.transport)  # here, or every worker would import it into memory of its own
    waiting, gate = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        descriptors.close_all((waiting, gate))
        raise
    if pid == 0:
        _be_worker(assignment, fds, lifeline, waiting, title, privileged)
    os.close(waiting)
    try:
        return ForkedWorker(pid, process.pidfd_open(pid), gate)  # no race: only this process reaps it
    except OSError:
        os.close(gate)  # the child ends
        os.waitpid(pid, 0)
        raise


def _be_worker(
    assignment: Assignment, fds: list[int], lifeline: int, waiting: int, title: str, privileged: bool
) -> NoReturn:
    """In the child: close what is not ours, then serve. Every failure ends this process only."""
    status = os.EX_SOFTWARE
    try:
        descriptors.close_others({*fds, waiting, *([lifeline] if lifeline >= 0 else [])})
        if not os.read(waiting, 1):
            os._exit(status)
        os.close(waiting)
        process.name_process(f"postcopy-w{assignment.worker}")
        process.title_process(title)
        if assignment.worker == 0:
            serve_worker_zero(assignment, fds, privileged=privileged)
        serve_client(assignment, fds, lifeline, privileged=privileged)
    except BaseException:
        log.critical("worker %d failed", assignment.worker, exc_info=True)
        log_queue.flush()
    finally:
        os._exit(status)
