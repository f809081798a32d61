"""The custodian: forks workers, and keeps a duplicate of every descriptor that a successor of anybody would need.

A small program with one thread, no ZeroMQ context and nothing of a user's in it. It has imported all that a worker
needs, so a fork is a worker (11 ms from attach to the first byte; a fresh interpreter takes 94). It outlives the
supervisor: while it lives, no last reference of a shared userfaultfd is closed, which would turn the pages its client
waits for into zeros.

``python -m postcopy_workers.custodian --channel FD`` with a SEQPACKET socket whose other end the supervisor holds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

from postcopy_kernel import descriptors, process
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import (
    Assignment,
    CustodianReady,
    Drop,
    ForkFailed,
    ForkWorker,
    Keep,
    Message,
    WorkerExited,
    WorkerForked,
)

from . import errand, worker

MESSAGE_LIMIT = 1 << 18
log = logging.getLogger("postcopy.custodian")


class Custodian:
    """Kept descriptors by key, running workers by pid, and the channel to the supervisor while there is one."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel: socket.socket | None = channel
        self._kept: dict[str, tuple[int, ...]] = {}
        self._workers: dict[int, tuple[int, int, int]] = {}  # pidfd: (pid, worker, incarnation)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)

    def run(self) -> None:
        """Serve until the supervisor has gone and the last worker has ended."""
        self._say(CustodianReady(os.getpid()))
        while self._channel is not None or self._workers:
            for fd, _ in self._poll.poll():
                if fd in self._workers:
                    self._reap(fd)
                elif self._channel is not None and fd == self._channel.fileno():
                    self._listen(self._channel)

    def _listen(self, channel: socket.socket) -> None:
        try:
            received = descriptors.receive_message(channel, max_bytes=MESSAGE_LIMIT, wait=True)
        except OSError:
            return self._orphaned()
        if not received.data:
            return self._orphaned()
        try:
            message = decode(received.data, expect=(Keep, Drop, ForkWorker))
        except BadMessage:
            log.exception("the supervisor said something that this custodian does not understand")
            return descriptors.close_all(received.fds)
        if isinstance(message, Keep):
            self._drop(message.key)
            self._kept[message.key] = tuple(received.fds)
            return None
        descriptors.close_all(received.fds)
        if isinstance(message, ForkWorker):
            self._fork(message)
        elif isinstance(message, Drop):
            self._drop(message.key)

    def _drop(self, key: str) -> None:
        descriptors.close_all(self._kept.pop(key, ()))

    def _orphaned(self) -> None:
        """No supervisor any more. Workers go on with what they can do alone; worker zero has nobody to work for."""
        if self._workers:
            log.warning("the supervisor is gone; %d workers go on for their clients", len(self._workers))
        if self._channel is not None:
            self._poll.unregister(self._channel)
            self._channel.close()
        self._channel = None
        for pidfd, (_, number, _) in self._workers.items():
            if number == 0:
                with contextlib.suppress(ProcessLookupError):
                    process.pidfd_signal(pidfd, signal.SIGKILL)

    def _fork(self, order: ForkWorker) -> None:
        missing = [key for key in order.keys if key not in self._kept]
        if missing:
            return self._say(ForkFailed(order.worker, order.incarnation, f"not kept here: {', '.join(missing)}"))
        fds = [fd for key in order.keys for fd in self._kept[key]]
        try:
            # Decoded on this side of the fork: what the codec touches would be copied for every worker (0.4 MB).
            assignment = decode(order.assignment, expect=(Assignment,))
            hear, tell = os.pipe()
            pid = os.fork()
        except (OSError, BadMessage) as error:
            return self._say(ForkFailed(order.worker, order.incarnation, f"fork: {error}"))
        if pid == 0:
            assert isinstance(assignment, Assignment)
            os.close(tell)
            _be_worker(assignment, fds, hear)
        os.close(hear)
        pidfd = process.pidfd_open(pid)  # no race: nobody but us reaps it
        self._workers[pidfd] = (pid, order.worker, order.incarnation)
        self._poll.register(pidfd, select.POLLIN)
        self._say(WorkerForked(order.worker, order.incarnation, pid), [pidfd])
        # Only now may it live: if we die before, nobody has its pidfd, and a second life would read the same ufd.
        with contextlib.suppress(BrokenPipeError):  # it has been killed already: its pidfd says so
            os.write(tell, b"!")
        os.close(tell)

    def _reap(self, pidfd: int) -> None:
        pid, number, incarnation = self._workers.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._say(WorkerExited(number, incarnation, status))

    def _say(self, message: Message, fds: list[int] | None = None) -> None:
        if self._channel is None:
            return
        with contextlib.suppress(OSError):  # a supervisor that has gone is noticed where we listen
            descriptors.send_message(self._channel, encode(message), fds or [], wait=True)


def _be_worker(assignment: Assignment, fds: list[int], hear: int) -> NoReturn:
    """In the child: close what is not ours, then live as a worker. Whatever goes wrong ends this process only."""
    status = 70
    try:
        descriptors.close_others({*fds, hear})
        if not os.read(hear, 1):
            os._exit(status)
        os.close(hear)
        process.name_process(f"postcopy-w{assignment.worker}")
        live = errand.serve_errands if assignment.worker == 0 else worker.serve_client
        live(assignment, fds)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m postcopy_workers.custodian", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the supervisor")
    parser.add_argument("--keep-privileges", action="store_true", help="workers need them once (no /dev/userfaultfd)")
    told = parser.parse_args()
    channel = socket.socket(fileno=told.channel)
    channel.setblocking(True)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # A Ctrl-C at the supervisor's terminal is the supervisor's business. Not setsid(): a session is a scheduling group
    # of its own (autogroup), and every hand-over between client and worker would cross: 1.44 x C instead of 1.23 x.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process.name_process("postcopy-cust")
    descriptors.raise_descriptor_limit()
    if not told.keep_privileges:
        # Here instead of in every worker, which inherits it: the doing would cost each of them 0.4 MB.
        process.drop_privileges()
        worker.PRIVILEGED = False
    gc.collect()
    gc.freeze()  # what is imported by now stays shared between all workers
    Custodian(channel).run()


if __name__ == "__main__":
    main()
