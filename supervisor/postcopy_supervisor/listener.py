"""The porter: one thread that sleeps on every descriptor but the router, and hands what happens to the main thread.

Its poll set, in the order in which a wake-up is worked off: the core userfaultfd, the quit signal, then everything
foreign (custodian, processes that end, the door and its visitors). It reads and decodes; it decides nothing. State
belongs to the main thread, which waits in a turn of the router and is rung by an eventfd when the porter has left
something in its box.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from postcopy_kernel import descriptors, process
from postcopy_kernel.filewatch import FileWatch
from postcopy_kernel.userfaultfd import Event, Userfaultfd
from postcopy_protocol.attach_conversation import FROM_CLIENT
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import CustodianReady, ForkFailed, Message, WorkerExited, WorkerForked

from .blocks import RamBlock

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
ACCEPT_AT_ONCE = 64
BOX_LIMIT = 4096
FAILED = 1
"""Exit status."""


@dataclass(frozen=True, slots=True)
class CoreFaults:
    """What the core userfaultfd gave."""

    events: list[Event]


@dataclass(frozen=True, slots=True)
class QuitAsked:
    """SIGTERM, SIGINT, or the process we are to die with."""


@dataclass(frozen=True, slots=True)
class CustodianMessage:
    """A message of the custodian with its descriptors; None: it is gone."""

    message: Message | None
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A watched pidfd became readable (it is not watched any more)."""

    pidfd: int


@dataclass(frozen=True, slots=True)
class ClientConnected:
    """A new connection at the door, taken ``at`` this monotonic time."""

    connection: socket.socket
    at: float


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """A visitor's message with its descriptors; BadMessage if it was none; None: the connection has ended."""

    connection: socket.socket
    message: Message | BadMessage | None
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; ``at``: the monotonic time when this was put into the box."""

    at: float


ListenerEvent = CoreFaults | QuitAsked | CustodianMessage | ProcessEnded | ClientConnected | ClientMessage | Tick
FROM_CUSTODIAN = (CustodianReady, WorkerForked, ForkFailed, WorkerExited)


class SourceWatch:
    """Files under local blocks: a change is marked for the workers at once. Without inotify their own look each second
    has to do."""

    def __init__(self, blocks: Iterable[RamBlock]) -> None:
        self._blocks: dict[int, list[RamBlock]] = {}  # one number for a file, however many blocks it has
        self._watch: FileWatch | None = None
        try:
            self._watch = FileWatch()
            for block in blocks:
                if block.opened.descriptor >= 0:
                    self._blocks.setdefault(self._watch.add(block.opened.descriptor), []).append(block)
        except OSError as error:
            log.warning("changes of files are noticed within a second only: %s", error)

    def fileno(self) -> int:
        return self._watch.fileno() if self._watch else -1

    def look(self) -> None:
        for number in self._watch.read() & self._blocks.keys() if self._watch else ():
            for block in self._blocks[number]:
                block.look_at_source()


class Listener(threading.Thread):
    """``watch_*`` and ``forget`` may be called from the main thread at any time; epoll takes it."""

    def __init__(
        self,
        core: Userfaultfd,
        quit_bell: int,
        door: socket.socket,
        sources: SourceWatch,
    ) -> None:
        super().__init__(name="porter", daemon=True)
        self.box: collections.deque[ListenerEvent] = collections.deque()
        self._errands: collections.deque[Callable[[], None]] = collections.deque()
        self.bell = descriptors.create_eventfd()
        """Readable when something has been put into the box."""
        self._core = core
        self._quit_bell = quit_bell
        self._door = door
        self._sources = sources
        self._alarm = descriptors.create_eventfd()
        self._stopping = False
        self._due: float | None = None
        self._pidfds: set[int] = set()
        self._custodian: socket.socket | None = None
        self._visitors: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        for fd in (core.fileno(), quit_bell, door.fileno(), self._alarm):
            self._epoll.register(fd, select.EPOLLIN)
        if sources.fileno() >= 0:
            self._epoll.register(sources.fileno(), select.EPOLLIN)

    # --- called by the main thread ------------------------------------------------------------------------------------

    def watch_process(self, pidfd: int) -> None:
        self._pidfds.add(pidfd)
        self._epoll.register(pidfd, select.EPOLLIN)

    def forget_process(self, pidfd: int) -> None:
        if pidfd in self._pidfds:
            self._pidfds.discard(pidfd)
            with contextlib.suppress(OSError):  # the other thread was a moment faster
                self._epoll.unregister(pidfd)

    def watch_custodian(self, channel: socket.socket) -> None:
        self._custodian = channel
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def watch_visitor(self, connection: socket.socket) -> None:
        self._visitors[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def forget_visitor(self, connection: socket.socket) -> None:
        if self._visitors.pop(connection.fileno(), None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(connection.fileno())

    def ring_at(self, due: float | None) -> None:
        """A Tick no later than this monotonic time, besides the regular ones."""
        if due is not None and (self._due is None or due < self._due):
            self._due = due
            descriptors.signal_eventfd(self._alarm)

    def aside(self, act: Callable[[], None]) -> None:
        """Do this in the porter's thread, soon: a system call that would hold up the main thread for milliseconds."""
        self._errands.append(act)
        descriptors.signal_eventfd(self._alarm)

    def stop(self) -> None:
        """Leave the loop and close what is the porter's own."""
        self._stopping = True
        descriptors.signal_eventfd(self._alarm)
        self.join(5)
        self._epoll.close()
        os.close(self._alarm)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._carry()
        except Exception:
            if self._stopping:
                return
            # Without its porter a supervisor hears neither door nor custodian nor SIGTERM: a successor is better.
            log.exception("the porter has failed, the supervisor ends: serve --recover takes its clients over")
            os._exit(FAILED)

    def _carry(self) -> None:
        ticked = 0.0
        while not self._stopping:
            ready = [fd for fd, _ in self._epoll.poll(self._patience(ticked))]
            for fd in sorted(ready, key=self._rank):
                self._look(fd)
            while self._errands and not self._stopping:
                self._errands.popleft()()
            now = time.monotonic()
            if now - ticked >= TICK_SECONDS or (self._due is not None and now >= self._due):
                ticked, self._due = now, None
                self.box.append(Tick(now))
            if self.box:
                descriptors.signal_eventfd(self.bell)

    def _patience(self, ticked: float) -> float:
        now = time.monotonic()
        due = ticked + TICK_SECONDS if self._due is None else min(self._due, ticked + TICK_SECONDS)
        return max(0.0, due - now)

    def _rank(self, fd: int) -> int:
        if fd == self._core.fileno():
            return 0
        return 1 if fd == self._quit_bell else 2

    def _look(self, fd: int) -> None:
        if fd == self._core.fileno():
            self.box.append(CoreFaults(self._core.read()))
        elif fd == self._quit_bell:
            os.eventfd_read(fd)
            self.box.append(QuitAsked())
        elif fd == self._alarm:
            os.eventfd_read(fd)
        elif fd == self._sources.fileno():
            self._sources.look()
        elif fd in self._pidfds:
            if not process.pidfd_exited(fd):
                return  # a number that was closed and used again while this wake-up was on its way
            self.forget_process(fd)
            self.box.append(ProcessEnded(fd))
        elif fd == self._door.fileno():
            self._accept()
        elif self._custodian is not None and fd == self._custodian.fileno():
            self._hear_custodian(self._custodian)
        elif (visitor := self._visitors.get(fd)) is not None:  # in one step: the main thread forgets visitors, too
            self._hear_visitor(visitor)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = self._door.accept()
            except BlockingIOError:
                return
            except OSError:
                time.sleep(0.05)  # no descriptor left: they wait in the backlog, and we do not spin over them
                return
            connection.setblocking(False)
            self.box.append(ClientConnected(connection, time.monotonic()))

    def _hear_custodian(self, channel: socket.socket) -> None:
        if not _room_for_one():
            time.sleep(0.05)  # a worker whose pidfd is lost would be nobody's: its word waits until there is room
            return
        try:
            heard = descriptors.receive_message(channel)
            message = decode(heard.data, expect=FROM_CUSTODIAN) if heard.data else None
        except BlockingIOError:
            return
        except (OSError, BadMessage):
            heard, message = descriptors.Received(b"", ()), None
        if message is None:
            self._epoll.unregister(channel.fileno())
            self._custodian = None
        self.box.append(CustodianMessage(message, tuple(heard.fds)))

    def _hear_visitor(self, connection: socket.socket) -> None:
        if len(self.box) > BOX_LIMIT:
            time.sleep(0.005)  # a visitor who talks faster than we can listen waits, in the kernel's buffer
        fds: tuple[int, ...] = ()
        message: Message | BadMessage | None
        try:
            heard = descriptors.receive_message(connection, max_bytes=8192, max_fds=8)
            fds = tuple(heard.fds)
            message = decode(heard.data, expect=FROM_CLIENT) if heard.data else None
        except BlockingIOError:
            return
        except BadMessage as error:
            message = error
        except descriptors.TruncatedMessage as error:
            message = BadMessage(str(error.strerror))
        except OSError:
            message = None
        if message is None:
            self.forget_visitor(connection)
        self.box.append(ClientMessage(connection, message, fds))


def _room_for_one() -> bool:
    """Could a descriptor be received now?"""
    try:
        os.close(os.dup(2))
    except OSError:
        return False
    return True
