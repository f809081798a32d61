"""Forks the client processes of a group: ``python -m postcopy.load.starter SOCKET PARENT``.

It imports once what every client needs, and has one thread, so a fork is safe. A message on SOCKET is a job (JSON) with
three descriptors: the client's input, its output, and the shared page of the barrier. The answers are
``{"started": PID}`` with a pidfd, and later ``{"ended": PID, "status": N}``. It ends with the other end of SOCKET.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress

from postcopy_kernel.descriptors import close_all, receive_message, send_message
from postcopy_kernel.process import die_with_parent

from . import toucher


class Starter:
    """Serves one socket until its other end is closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._pids: dict[int, int] = {}
        """Of living clients, by pidfd."""

    def serve(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._pids:
                    self._reap(fd)
                elif not self._fork():
                    return

    def _fork(self) -> bool:
        """Start the client of the next job; False: there will be no more."""
        received = receive_message(self._socket)
        if not received.data:
            return False
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            self._become_client(received.data, received.fds, parent)
        close_all(received.fds)
        pidfd = os.pidfd_open(pid)  # only this process reaps it, so the pid is still this child's
        send_message(self._socket, json.dumps({"started": pid}).encode(), (pidfd,), wait=True)
        self._pids[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        return True

    def _become_client(self, job: bytes, fds: tuple[int, ...], parent: int) -> None:
        status = 1
        try:
            # Until there is something to report, Ctrl-C ends a client at once; the group's process explains it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            their_input, their_output, slots = fds
            os.dup2(their_input, 0)
            os.dup2(their_output, 1)
            close_all((their_input, their_output, self._socket.fileno(), *self._pids))
            die_with_parent(parent)
            status = toucher.run(json.loads(job), slots)
        finally:
            os._exit(status)

    def _reap(self, pidfd: int) -> None:
        pid = self._pids.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        message = {"ended": pid, "status": os.waitstatus_to_exitcode(status)}
        send_message(self._socket, json.dumps(message).encode(), wait=True)


def main() -> None:
    """Serve the socket of ``sys.argv[1]``; end with the process ``sys.argv[2]``."""
    fd, parent = map(int, sys.argv[1:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; clients still have to report
    die_with_parent(parent)
    sys.argv[:] = ["toucher.py"]  # the clients' name in the status
    gc.freeze()  # the collector must not write to pages that the clients share
    with socket.socket(fileno=fd) as sock, suppress(BrokenPipeError, ConnectionResetError):
        Starter(sock).serve()


if __name__ == "__main__":
    main()
