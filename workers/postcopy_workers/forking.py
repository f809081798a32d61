"""A fork that becomes a worker."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn

from postcopy_kernel import descriptors, process
from postcopy_protocol.messages import Assignment
from postcopy_wire.factory import preload

from . import worker, worker_zero


@dataclass(frozen=True, slots=True)
class ForkedWorker:
    """A child that waits for the word to live. ``pidfd`` is the caller's."""

    pid: int
    pidfd: int
    tell: int

    def live(self) -> None:
        """Now. A custodian that dies before has left nobody behind: the child hears the end of its pipe and ends."""
        with contextlib.suppress(BrokenPipeError):  # it has been killed already: its pidfd says so
            os.write(self.tell, b"!")
        os.close(self.tell)


def fork_worker(assignment: Assignment, fds: list[int]) -> ForkedWorker:
    """Fork; raises OSError. The child keeps ``fds`` and nothing else."""
    preload(assignment.transport)  # else every worker would import it for itself
    hear, tell = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        descriptors.close_all((hear, tell))
        raise
    if pid == 0:
        _be_worker(assignment, fds, hear)
    os.close(hear)
    try:
        return ForkedWorker(pid, process.pidfd_open(pid), tell)  # no race: nobody but us reaps it
    except OSError:
        os.close(tell)  # not told to live, it ends
        os.waitpid(pid, 0)
        raise


def _be_worker(assignment: Assignment, fds: list[int], hear: int) -> NoReturn:
    """In the child: close what is not ours, then live as a worker. Whatever goes wrong ends this process only."""
    status = 70
    try:
        descriptors.close_others({*fds, hear})
        if not os.read(hear, 1):
            os._exit(status)
        os.close(hear)
        process.name_process(f"postcopy-w{assignment.worker}")
        live = worker_zero.serve_worker_zero if assignment.worker == 0 else worker.serve_client
        live(assignment, fds)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
