"""The custodian: forks workers, and keeps a duplicate of every descriptor that a successor of anybody would need.

A small program with one thread, no ZeroMQ context and nothing of a user's in it. It has imported all that a worker
needs, so a fork is a worker (11 ms from attach to the first byte; a fresh interpreter takes 94). It outlives the
supervisor: while it lives, no last reference of a shared userfaultfd is closed, which would turn the pages its client
waits for into zeros; workers that die are replaced (``standby.py`` is the law); and the next supervisor takes over at
its own socket (``rendezvous.py``).

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
import sys
import time
from dataclasses import dataclass, replace

from postcopy_kernel import crashpoints, descriptors, process
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import (
    Adopt,
    Assignment,
    CustodianReady,
    Dismiss,
    Drop,
    ForkFailed,
    ForkWorker,
    InventoryEnd,
    Keep,
    Kept,
    Message,
    WhenOrphaned,
    WorkerExited,
    WorkerForked,
)

from . import orders, standby, worker
from .forking import fork_worker
from .orders import Order
from .standby import StandbyPolicy
from .takeover_socket import TakeoverSocket

MESSAGE_LIMIT = 1 << 18
SEND_SECONDS = 5
"""A new supervisor that does not read what it is given is none."""
ORDERS = (Keep, Drop, ForkWorker, Adopt, WhenOrphaned, Dismiss)
HOUSE, QUIT = "house", 0
PIDFD = 1
log = logging.getLogger("postcopy.custodian")


@dataclass(frozen=True, slots=True)
class Life:
    """A worker's process. ``child``: ours to reap; else a custodian before us has forked it. ``poisoned``: it has no
    remote sources, because no supervisor came in time."""

    pid: int
    worker: int
    incarnation: int
    began: float
    child: bool = True
    poisoned: bool = False


class Custodian:
    """Descriptors by key, workers by pidfd, their last orders by number, and the channel while there is one."""

    def __init__(self, channel: socket.socket, rendezvous: TakeoverSocket | None) -> None:
        self._channel: socket.socket | None = channel
        self._rendezvous = rendezvous
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._orders: dict[int, Order] = {}
        self._lives: dict[int, Life] = {}
        self._when_orphaned = (0.0, False)
        self._lost_at: float | None = None
        self._orphan: StandbyPolicy | None = None
        self._clients: dict[int, int] = {}  # pidfd: client, watched only without a supervisor
        self._ending = False
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)

    def run(self) -> None:
        """Live until nobody is left to care for."""
        self._say(CustodianReady(os.getpid()))
        while not self._ending or self._lives:
            for fd, _ in self._poll.poll(self._patience() if self._orphan else None):
                self._look(fd)
            if self._orphan is not None:
                self._deputize(self._orphan, time.monotonic())

    def _look(self, fd: int) -> None:
        if fd in self._lives:
            if process.pidfd_exited(fd):  # not a number that was closed and used again since the poll
                self._reap(fd)
        elif self._channel is not None and fd == self._channel.fileno():
            self._listen(self._channel)
        elif self._orphan is not None:
            self._look_orphaned(self._orphan, fd)

    # --- with a supervisor --------------------------------------------------------------------------------------------

    def _listen(self, channel: socket.socket) -> None:
        try:
            received = descriptors.receive_message(channel, max_bytes=MESSAGE_LIMIT, wait=True)
        except descriptors.TruncatedMessage:
            return log.exception("no room for what the supervisor gives to keep")
        except OSError:
            return self._lost()
        if not received.data:
            return self._lost()
        try:
            message = decode(received.data, expect=ORDERS)
        except BadMessage:
            log.exception("the supervisor said something that this custodian does not understand")
            return descriptors.close_all(received.fds)
        self._lost_at = None  # it is here to stay
        self._obey(message, received.fds)

    def _obey(self, message: Message, fds: tuple[int, ...]) -> None:
        match message:
            case Keep():
                return self._keep(message, fds)
            case Adopt() if len(fds) == 1:
                return self._adopt(message, fds[0])
            case Drop():
                self._drop(message.key)
            case ForkWorker():
                self._ordered(message)
            case WhenOrphaned():
                self._when_orphaned = (message.timeout_ms / 1000, message.poison)
            case Dismiss():
                self._end()
        descriptors.close_all(fds)

    def _keep(self, message: Keep, fds: tuple[int, ...]) -> None:
        _, old = self._kept.pop(message.key, (b"", ()))
        self._kept[message.key] = (message.meta, fds)
        descriptors.close_all(old)
        crashpoints.at("custodian.kept")

    def _drop(self, key: str) -> None:
        _, fds = self._kept.pop(key, (b"", ()))
        self._orders.pop(orders.client_of(key), None)
        if len(fds) > PIDFD and self._clients.pop(fds[PIDFD], None) is not None:
            self._poll.unregister(fds[PIDFD])
        descriptors.close_all(fds)

    def _adopt(self, told: Adopt, pidfd: int) -> None:
        """A custodian before us has forked it; it is watched, and replaced, like one of ours."""
        self._orders[told.worker] = Order(told.keys, told.assignment, told.incarnation)
        self._watch(pidfd, Life(told.pid, told.worker, told.incarnation, time.monotonic(), child=False))

    def _ordered(self, told: ForkWorker) -> None:
        try:
            if told.worker and any(
                life.worker == told.worker and not process.pidfd_exited(fd) for fd, life in self._lives.items()
            ):
                raise OSError("another life of it has not ended")
            self._orders[told.worker] = Order(told.keys, told.assignment, told.incarnation)
            self._fork(self._read(told.worker))
        except (OSError, BadMessage) as error:
            self._say(ForkFailed(told.worker, told.incarnation, str(error)))

    # --- workers ------------------------------------------------------------------------------------------------------

    def _read(self, number: int) -> Assignment:
        """The worker's last order. Read on this side of the fork: what the codec touches would be copied for every
        worker (0.4 MB)."""
        assignment = decode(self._orders[number].assignment, expect=(Assignment,))
        assert isinstance(assignment, Assignment)
        return assignment

    def _fork(self, assignment: Assignment, *, poisoned: bool = False) -> None:
        number, incarnation = assignment.worker, assignment.incarnation
        keys = self._orders[number].keys
        missing = [key for key in keys if key not in self._kept]
        if missing:
            raise BadMessage(f"not kept here: {', '.join(missing)}")
        newborn = fork_worker(assignment, [fd for key in keys for fd in self._kept[key][1]])
        self._watch(newborn.pidfd, Life(newborn.pid, number, incarnation, time.monotonic(), poisoned=poisoned))
        crashpoints.at("custodian.forked")
        self._say(WorkerForked(number, incarnation, newborn.pid), [newborn.pidfd])
        crashpoints.at("custodian.announced")
        # Only now may it live: if we die before, nobody has its pidfd, and a second life would read the same ufd.
        newborn.live()
        crashpoints.at("custodian.released")

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
            client_gone = os.waitstatus_to_exitcode(status) == worker.CLIENT_GONE
            self._say(WorkerExited(life.worker, life.incarnation, status))
        if self._orphan is not None:
            self._do(self._orphan.exited(life.worker, life.incarnation, client_gone, time.monotonic()))

    # --- without one --------------------------------------------------------------------------------------------------

    def _lost(self) -> None:
        """The channel has ended. Workers go on with what they can do alone; worker zero has nobody to work for."""
        if self._channel is not None:
            self._poll.unregister(self._channel)
            self._channel.close()
        self._channel = None
        if self._ending:
            return
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if HOUSE in self._kept:
            with contextlib.suppress(OSError):  # it died while it ended in order: its clients are still here
                os.eventfd_read(self._kept[HOUSE][1][QUIT])
        if self._rendezvous is not None:
            self._poll.register(self._rendezvous.fileno(), select.POLLIN)
        self._orphan = self._made_orphan(self._lost_at)
        log.warning("the supervisor is gone; %d workers go on for %d clients", len(self._lives), self._orphan.clients)
        self._do(self._orphan.begin(now))

    def _made_orphan(self, lost_at: float) -> StandbyPolicy:
        law = StandbyPolicy(lost_at, *self._when_orphaned)
        for key, (meta, fds) in self._kept.items():
            number = orders.client_of(key)
            if not number or len(fds) <= PIDFD:
                continue
            self._clients[fds[PIDFD]] = number
            self._poll.register(fds[PIDFD], select.POLLIN)
            told = self._read(number) if number in self._orders else None
            law.client(
                number,
                self._orders[number].incarnation if told else 0,
                wanted=told is not None and orders.wants_worker(meta, told),
                remote=told is not None and orders.asks_remote(told),
            )
        for life in self._lives.values():
            law.life(life.worker, life.incarnation, life.began, poisoned=life.poisoned)
        return law

    def _patience(self) -> float | None:
        """Milliseconds until something is due."""
        assert self._orphan is not None
        dues = [self._orphan.next_due(), self._rendezvous.next_due() if self._rendezvous else None]
        due = min((due for due in dues if due is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1

    def _look_orphaned(self, law: StandbyPolicy, fd: int) -> None:
        if fd in self._clients:
            if process.pidfd_exited(fd):
                self._do(law.client_ended(self._clients[fd]))
        elif self._rendezvous is not None and fd == self._rendezvous.fileno():
            visitor = self._rendezvous.visit(time.monotonic())
            if visitor >= 0:
                self._poll.register(visitor, select.POLLIN)
        elif self._rendezvous is not None and self._rendezvous.waits(fd):
            self._poll.unregister(fd)
            connection = self._rendezvous.hear(fd)
            if connection is not None:
                self._taken(law, connection)

    def _deputize(self, law: StandbyPolicy, now: float) -> None:
        self._do(law.tick(now))
        for fd in self._rendezvous.silent(now) if self._rendezvous else ():
            self._poll.unregister(fd)
            assert self._rendezvous is not None
            self._rendezvous.show_out(fd)
        abandoned = self._rendezvous is None or not self._rendezvous.stands
        if law.ended or (abandoned and not law.clients):
            log.info("no client is left, and no supervisor %s", "can come" if abandoned else "came")
            self._end()

    def _do(self, effects: list[standby.Effect]) -> None:
        for effect in effects:
            match effect:
                case standby.Fork():
                    self._replace(effect)
                case standby.Kill(number):
                    self._kill(number)
                case standby.Drop(number):
                    self._drop(f"{orders.CLIENT}{number}")
                case standby.Say(text):
                    log.warning("%s", text)

    def _replace(self, effect: standby.Fork) -> None:
        assert self._orphan is not None
        number = effect.worker
        try:
            self._orders[number] = replace(self._orders[number], incarnation=effect.incarnation)
            assignment = replace(self._read(number), incarnation=effect.incarnation)
            self._fork(orders.without_remote(assignment) if effect.poison else assignment, poisoned=effect.poison)
            self._orphan.forked(number, effect.incarnation, time.monotonic())
            log.warning("worker %d is replaced (incarnation %d)", number, effect.incarnation)
        except (OSError, BadMessage) as error:
            log.error("worker %d cannot be replaced: %s", number, error)
            self._orphan.fork_failed(number, time.monotonic())

    def _kill(self, number: int) -> None:
        for pidfd, life in self._lives.items():
            if life.worker == number:
                with contextlib.suppress(ProcessLookupError):
                    process.pidfd_signal(pidfd, signal.SIGKILL)

    def _end(self) -> None:
        """Nobody can take over any more; the last worker's end is ours."""
        self._ending = True
        self._alone_no_more()
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._rendezvous = None

    def _alone_no_more(self) -> None:
        """Watch neither clients nor the rendezvous, and show out whoever is there."""
        if self._orphan is None:
            return
        self._orphan = None
        for pidfd in self._clients:
            self._poll.unregister(pidfd)
        self._clients.clear()
        if self._rendezvous is not None:
            for fd in self._rendezvous.visitors:
                self._poll.unregister(fd)
                self._rendezvous.show_out(fd)
            self._poll.unregister(self._rendezvous.fileno())

    # --- the next one -------------------------------------------------------------------------------------------------

    def _taken(self, law: StandbyPolicy, connection: socket.socket) -> None:
        """Tell all that is kept. Until the end of the inventory has been sent, whoever does not read is given up."""
        self._do(law.taken())
        self._alone_no_more()
        self._channel = connection
        self._poll.register(connection, select.POLLIN)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", SEND_SECONDS, 0))
        try:
            self._tell_all(connection)
        except OSError as error:
            log.error("what is kept could not be handed over: %s", error)
            return self._lost()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", 0, 0))

    def _tell_all(self, connection: socket.socket) -> None:
        for key, (meta, fds) in self._kept.items():
            descriptors.send_message(connection, encode(Kept(key, meta)), fds, wait=True)
        for pidfd, life in self._lives.items():
            words = encode(WorkerForked(life.worker, life.incarnation, life.pid))
            descriptors.send_message(connection, words, [pidfd], wait=True)
        last = InventoryEnd(os.getpid(), len(self._kept), len(self._lives))
        descriptors.send_message(connection, encode(last), wait=True)

    def _say(self, message: Message, fds: list[int] | None = None) -> None:
        if self._channel is None:
            return
        with contextlib.suppress(OSError):  # a supervisor that has gone is noticed where we listen
            descriptors.send_message(self._channel, encode(message), fds or [], wait=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m postcopy_workers.custodian", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the socket to the supervisor")
    parser.add_argument("--directory", required=True, help="the runtime directory: the next supervisor comes there")
    parser.add_argument("--keep-privileges", action="store_true", help="workers need them once (no /dev/userfaultfd)")
    told = parser.parse_args()
    channel = socket.socket(fileno=told.channel)
    channel.setblocking(True)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # A Ctrl-C at the supervisor's terminal is the supervisor's business. Not setsid(): a session is a scheduling group
    # of its own (autogroup), and every hand-over between client and worker would cross: 1.44 x C instead of 1.23 x.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # When the supervisor dies our process group is an orphan, and if one member, such as a worker, is stopped in that
    # moment, the kernel sends SIGHUP to all: custodian and every worker would end with it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process.name_process("postcopy-cust")
    descriptors.raise_descriptor_limit()
    if not told.keep_privileges:
        # Here instead of in every worker, which inherits it: the doing would cost each of them 0.4 MB.
        process.drop_privileges()
        worker.PRIVILEGED = False
    try:
        rendezvous = TakeoverSocket(told.directory)
    except (OSError, BadInput) as error:
        log.error("no supervisor will be able to take over: %s", error)
        rendezvous = None
    gc.collect()
    gc.freeze()  # what is imported by now stays shared between all workers
    Custodian(channel, rendezvous).run()


if __name__ == "__main__":
    main()
