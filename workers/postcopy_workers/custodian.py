"""The custodian: forks workers, and keeps a duplicate of every descriptor that any successor would need.

A small program with one thread, without ZeroMQ and without code of a user. It has imported all that a worker needs, so
a fork is a worker (11 ms from attach to the first byte; a fresh interpreter takes 94 ms). It outlives the supervisor.
While it lives, the last reference of a shared userfaultfd is never closed, which would turn the pages that its client
waits for into zeros. Without a supervisor it replaces workers that die (``standby``), and the next supervisor takes
over at its socket (``takeover_socket``).

``python -m postcopy_workers.custodian --channel FD --directory DIR`` with a SEQPACKET socket whose other end the
supervisor holds.
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
import struct
import time
from dataclasses import dataclass, replace

from postcopy_kernel import crashpoints, descriptors, log_queue, process
from postcopy_protocol import messages
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import Assignment, Message

from . import standby
from .forking import fork_worker
from .life_records import LifeRecords
from .standby import Order, StandbyPolicy
from .takeover_socket import TakeoverSocket
from .worker import ExitStatus

MESSAGE_LIMIT = 1 << 18
SEND_SECONDS = 5  # a supervisor that takes over and does not read the inventory in this time is given up
ORDERS = (messages.Keep, messages.Drop, messages.ForkWorker, messages.Adopt, messages.WhenOrphaned, messages.Dismiss)
SUPERVISOR_KEY, QUIT_EVENTFD = "house", 0
LIFELINE_KEY = "lifeline"
CLIENT_PIDFD = 1  # where in the descriptors of their keys these are
log = logging.getLogger("postcopy.custodian")


@dataclass(frozen=True, slots=True)
class Life:
    """A process of a worker. ``child``: ours to reap; otherwise an earlier custodian has forked it. ``poisoned``: it
    has no remote sources, because no supervisor came in time."""

    pid: int
    worker: int
    incarnation: int
    began: float
    child: bool = True
    poisoned: bool = False


class Custodian:
    """Descriptors by key, workers by pidfd, their last orders by number, and the channel to a supervisor.
    ``privileged``: workers keep the custodian's capabilities until their userfaultfd is open."""

    def __init__(
        self, channel: socket.socket, takeover: TakeoverSocket | None, records: LifeRecords, *, privileged: bool
    ) -> None:
        self._channel: socket.socket | None = channel
        self._takeover = takeover
        self._privileged, self._records = privileged, records
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._orders: dict[int, Order] = {}
        self._lives: dict[int, Life] = {}
        self._when_orphaned = (0.0, False)
        self._lost_at: float | None = None
        self._standby: StandbyPolicy | None = None
        self._clients: dict[int, int] = {}  # pidfd: client, watched only without a supervisor
        self._ending = False
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)

    def run(self) -> None:
        """Run until it is dismissed, or no supervisor can come and no client is left, and every worker has ended."""
        self._send(messages.CustodianReady(os.getpid()))
        while not self._ending or self._lives:
            for fd, _ in self._poll.poll(self._timeout_ms() if self._standby else None):
                self._on_ready(fd)
            if self._standby is not None:
                self._tick(self._standby, time.monotonic())

    def _on_ready(self, fd: int) -> None:
        if fd in self._lives:
            if process.pidfd_exited(fd):  # not a number that was closed and used again since the poll
                self._reap(fd)
        elif self._channel is not None and fd == self._channel.fileno():
            self._receive(self._channel)
        elif self._standby is not None:
            self._on_ready_in_standby(self._standby, fd)

    def _receive(self, channel: socket.socket) -> None:
        try:
            received = descriptors.receive_message(channel, max_bytes=MESSAGE_LIMIT, wait=True)
        except descriptors.TruncatedMessage:
            return log.exception("no free descriptors for what the supervisor gives to keep")
        except OSError:
            return self._lost()
        if not received.data:
            return self._lost()
        try:
            message = decode(received.data, expect=ORDERS)
        except BadMessage:
            log.exception("cannot decode a message of the supervisor")
            return descriptors.close_all(received.fds)
        self._lost_at = None  # the take-over, if there was one, is committed
        self._execute(message, received.fds)

    def _execute(self, message: Message, fds: tuple[int, ...]) -> None:
        match message:
            case messages.Keep():
                return self._keep(message, fds)
            case messages.Adopt() if len(fds) == 1:
                return self._adopt(message, fds[0])
            case messages.Drop():
                self._drop(message.key)
            case messages.ForkWorker():
                self._order(message)
            case messages.WhenOrphaned():
                self._when_orphaned = (message.timeout_ms / 1000, message.poison)
            case messages.Dismiss():
                self._end()
        descriptors.close_all(fds)

    def _keep(self, message: messages.Keep, fds: tuple[int, ...]) -> None:
        _, old = self._kept.pop(message.key, (b"", ()))
        self._kept[message.key] = (message.meta, fds)
        descriptors.close_all(old)
        crashpoints.at("custodian.kept")

    def _drop(self, key: str) -> None:
        _, fds = self._kept.pop(key, (b"", ()))
        self._orders.pop(standby.client_of(key), None)
        if len(fds) > CLIENT_PIDFD and self._clients.pop(fds[CLIENT_PIDFD], None) is not None:
            self._poll.unregister(fds[CLIENT_PIDFD])
        descriptors.close_all(fds)

    def _adopt(self, message: messages.Adopt, pidfd: int) -> None:
        """Watch, and replace, a worker that an earlier custodian has forked."""
        self._orders[message.worker] = Order(message.keys, message.assignment, message.incarnation)
        self._watch(pidfd, Life(message.pid, message.worker, message.incarnation, time.monotonic(), child=False))

    def _order(self, message: messages.ForkWorker) -> None:
        try:
            if message.worker and any(
                life.worker == message.worker and not process.pidfd_exited(fd) for fd, life in self._lives.items()
            ):
                raise OSError("another process of this worker has not ended")
            self._orders[message.worker] = Order(message.keys, message.assignment, message.incarnation)
            self._fork(self._assignment(message.worker))
        except (OSError, BadMessage) as error:
            self._send(messages.ForkFailed(message.worker, message.incarnation, str(error)))

    def _assignment(self, number: int) -> Assignment:
        """The worker's last assignment. Decoded before the fork: the memory that the codec touches would be copied for
        every worker (0.4 MB)."""
        assignment = decode(self._orders[number].assignment, expect=(Assignment,))
        assert isinstance(assignment, Assignment)
        return assignment

    def _fork(self, assignment: Assignment, *, poisoned: bool = False) -> None:
        number, incarnation = assignment.worker, assignment.incarnation
        keys = self._orders[number].keys
        missing = [key for key in keys if key not in self._kept]
        if missing:
            raise BadMessage(f"not kept here: {', '.join(missing)}")
        fds, title = [fd for key in keys for fd in self._kept[key][1]], self._title(number)
        lifeline = self._lifeline()
        try:
            forked = fork_worker(assignment, fds, lifeline, title, privileged=self._privileged)
        finally:
            if lifeline >= 0:
                os.close(lifeline)
        self._watch(forked.pidfd, Life(forked.pid, number, incarnation, time.monotonic(), poisoned=poisoned))
        crashpoints.at("custodian.forked")
        self._send(messages.WorkerForked(number, incarnation, forked.pid), [forked.pidfd])
        crashpoints.at("custodian.announced")
        self._records.write(number, forked.pid)
        # Only now may it begin: had we died before, no process would have its pidfd, and a second worker would read the
        # same ufd.
        forked.begin()
        crashpoints.at("custodian.released")

    def _lifeline(self) -> int:
        """The reading end of the pipe whose end shows a worker that its supervisor and we have died; -1: none."""
        _, fds = self._kept.get(LIFELINE_KEY, (b"", ()))
        return os.open(f"/proc/self/fd/{fds[0]}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if fds else -1

    def _title(self, number: int) -> str:
        """What ``ps`` shows of a worker: whose it is."""
        meta, _ = self._kept.get(f"client/{number}", (b"", ()))
        if not meta:
            return "postcopy_workers: worker 0 of the supervisor itself"
        try:
            note = decode(meta, expect=(messages.ClientNote,))
        except BadMessage:  # of a supervisor of another version, whose notes we need not understand
            return f"postcopy_workers: client {number}"
        assert isinstance(note, messages.ClientNote)
        return f"postcopy_workers: client {number} (pid {note.pid}, {note.name})"

    def _watch(self, pidfd: int, life: Life) -> None:
        self._lives[pidfd] = life
        self._poll.register(pidfd, select.POLLIN)

    def _reap(self, pidfd: int) -> None:
        life = self._lives.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        client_gone = False
        if life.child:
            _, status = os.waitpid(life.pid, 0)
            client_gone = os.waitstatus_to_exitcode(status) == ExitStatus.CLIENT_GONE
            self._send(messages.WorkerExited(life.worker, life.incarnation, status))
        if self._standby is not None:
            self._do(self._standby.exited(life.worker, life.incarnation, client_gone, time.monotonic()))

    def _lost(self) -> None:
        """The channel has ended. Workers go on serving local pages; worker zero has no supervisor to work for."""
        if self._channel is not None:
            self._poll.unregister(self._channel)
            self._channel.close()
        self._channel = None
        if self._ending:
            return
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if SUPERVISOR_KEY in self._kept:
            with contextlib.suppress(OSError):  # it died while it ended in order: its clients are still served
                os.eventfd_read(self._kept[SUPERVISOR_KEY][1][QUIT_EVENTFD])
        if self._takeover is not None:
            self._poll.register(self._takeover.fileno(), select.POLLIN)
        self._standby = self._standby_policy(self._lost_at)
        log.warning("the supervisor is gone; %d workers go on for %d clients", len(self._lives), self._standby.clients)
        self._do(self._standby.begin(now))

    def _standby_policy(self, lost_at: float) -> StandbyPolicy:
        policy = StandbyPolicy(lost_at, *self._when_orphaned)
        for key, (meta, fds) in self._kept.items():
            number = standby.client_of(key)
            if not number or len(fds) <= CLIENT_PIDFD:
                continue
            self._clients[fds[CLIENT_PIDFD]] = number
            self._poll.register(fds[CLIENT_PIDFD], select.POLLIN)
            assignment = self._assignment(number) if number in self._orders else None
            policy.add_client(
                number,
                self._orders[number].incarnation if assignment else 0,
                wanted=assignment is not None and standby.wants_worker(meta, assignment),
                remote=assignment is not None and standby.asks_remote(assignment),
            )
        for life in self._lives.values():
            policy.add_life(life.worker, life.incarnation, life.began, poisoned=life.poisoned)
        return policy

    def _timeout_ms(self) -> float | None:
        """Milliseconds until something is due; None: for ever."""
        assert self._standby is not None
        dues = [self._standby.next_due(), self._takeover.next_due() if self._takeover else None]
        due = min((due for due in dues if due is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1

    def _on_ready_in_standby(self, policy: StandbyPolicy, fd: int) -> None:
        if fd in self._clients:
            if process.pidfd_exited(fd):
                self._do(policy.client_ended(self._clients[fd]))
        elif self._takeover is not None and fd == self._takeover.fileno():
            pending = self._takeover.accept(time.monotonic())
            if pending >= 0:
                self._poll.register(pending, select.POLLIN)
        elif self._takeover is not None and self._takeover.is_pending(fd):
            self._poll.unregister(fd)
            connection = self._takeover.read(fd)
            if connection is not None:
                self._hand_over(policy, connection)

    def _tick(self, policy: StandbyPolicy, now: float) -> None:
        self._do(policy.tick(now))
        for fd in self._takeover.expired(now) if self._takeover else ():
            self._poll.unregister(fd)
            assert self._takeover is not None
            self._takeover.close_pending(fd)
        abandoned = self._takeover is None or not self._takeover.reachable
        if policy.ended or (abandoned and not policy.clients):
            log.info("no client is left, and no supervisor %s", "can take over" if abandoned else "has taken over")
            self._end()

    def _do(self, effects: list[standby.Effect]) -> None:
        for effect in effects:
            match effect:
                case standby.Fork():
                    self._replace(effect)
                case standby.Kill(number):
                    self._kill(number)
                case standby.Drop(number):
                    self._drop(f"{standby.CLIENT}{number}")
                case standby.Log(text):
                    log.warning("%s", text)

    def _replace(self, effect: standby.Fork) -> None:
        assert self._standby is not None
        number = effect.worker
        try:
            self._orders[number] = replace(self._orders[number], incarnation=effect.incarnation)
            assignment = replace(self._assignment(number), incarnation=effect.incarnation)
            self._fork(standby.without_remote(assignment) if effect.poison else assignment, poisoned=effect.poison)
            self._standby.forked(number, effect.incarnation, time.monotonic())
            log.warning("worker %d is replaced (incarnation %d)", number, effect.incarnation)
        except (OSError, BadMessage) as error:
            log.error("worker %d cannot be replaced: %s", number, error)
            self._standby.fork_failed(number, time.monotonic())

    def _kill(self, number: int) -> None:
        for pidfd, life in self._lives.items():
            if life.worker == number:
                with contextlib.suppress(ProcessLookupError):
                    process.pidfd_signal(pidfd, signal.SIGKILL)

    def _end(self) -> None:
        """Accept no supervisor any more, and exit when the last worker has ended."""
        self._ending = True
        self._leave_standby()
        if self._takeover is not None:
            self._takeover.close()
        self._takeover = None

    def _leave_standby(self) -> None:
        """Stop watching the clients and the takeover socket, and close its pending connections."""
        if self._standby is None:
            return
        self._standby = None
        for pidfd in self._clients:
            self._poll.unregister(pidfd)
        self._clients.clear()
        if self._takeover is not None:
            for fd in self._takeover.pending:
                self._poll.unregister(fd)
                self._takeover.close_pending(fd)
            self._poll.unregister(self._takeover.fileno())

    def _hand_over(self, policy: StandbyPolicy, connection: socket.socket) -> None:
        """Send the inventory to a supervisor that takes over; one that does not read it is given up."""
        self._do(policy.taken())
        self._leave_standby()
        self._channel = connection
        self._poll.register(connection, select.POLLIN)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", SEND_SECONDS, 0))
        try:
            self._send_inventory(connection)
        except OSError as error:
            log.error("cannot send the inventory: %s", error)
            return self._lost()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", 0, 0))

    def _send_inventory(self, connection: socket.socket) -> None:
        for key, (meta, fds) in self._kept.items():
            descriptors.send_message(connection, encode(messages.Kept(key, meta)), fds, wait=True)
        for pidfd, life in self._lives.items():
            message = encode(messages.WorkerForked(life.worker, life.incarnation, life.pid))
            descriptors.send_message(connection, message, [pidfd], wait=True)
        last = messages.InventoryEnd(os.getpid(), len(self._kept), len(self._lives))
        descriptors.send_message(connection, encode(last), wait=True)

    def _send(self, message: Message, fds: list[int] | None = None) -> None:
        if self._channel is None:
            return
        with contextlib.suppress(OSError):  # the end of a supervisor is noticed in _receive
            descriptors.send_message(self._channel, encode(message), fds or [], wait=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m postcopy_workers.custodian", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the supervisor")
    parser.add_argument(
        "--directory", required=True, help="the runtime directory: the next supervisor takes over there"
    )
    parser.add_argument("--keep-privileges", action="store_true", help="workers need them once (no /dev/userfaultfd)")
    parser.add_argument("--log-format", choices=log_queue.FORMATS, default="text")
    options = parser.parse_args()
    channel = socket.socket(fileno=options.channel)
    channel.setblocking(True)
    log_queue.set_up(options.log_format)
    # A Ctrl-C at the supervisor's terminal is for the supervisor. Not setsid(): a session is a scheduling group of its
    # own (autogroup), and each switch between client and worker would cross groups: 1.44 x C instead of 1.23 x.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # When the supervisor dies our process group is orphaned. If one member, such as a worker, is stopped at that
    # moment, the kernel sends SIGHUP to all of them: the custodian and every worker would end.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process.name_process("postcopy-cust")
    process.title_process(f"postcopy_workers.custodian in {options.directory}")
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what programs of a handler print belongs into the log
    descriptors.raise_descriptor_limit()
    if not options.keep_privileges:
        # Here instead of in every worker, which inherits it: the call would cost each of them 0.4 MB.
        process.drop_privileges()
    try:
        takeover = TakeoverSocket(options.directory)
    except (OSError, BadInput) as error:
        log.error("no supervisor can take over later: %s", error)
        takeover = None
    gc.collect()
    gc.freeze()  # what is imported by now stays shared between all workers
    Custodian(channel, takeover, LifeRecords(options.directory), privileged=options.keep_privileges).run()


if __name__ == "__main__":
    main()
