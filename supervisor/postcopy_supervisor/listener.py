"""The listener: one thread that sleeps on every descriptor except the router's, and queues events for the main thread.

It handles a wake-up in this order: the core userfaultfd, the stop eventfd, then everything else (custodian, processes
that end, the attach socket and its connections). It reads and decodes, and decides nothing. All state belongs to the
main thread, which waits in a turn of the router. An eventfd wakes that when the queue has something."""

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

from postcopy_kernel import descriptors, process
from postcopy_kernel.filewatch import FileWatch
from postcopy_kernel.userfaultfd import Userfaultfd
from postcopy_protocol.attach_conversation import FROM_CLIENT
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import CustodianReady, ForkFailed, Message, WorkerExited, WorkerForked

from . import events
from .blocks import RamBlock

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
ACCEPT_AT_ONCE = 64
QUEUE_LIMIT = 4096
FAILED = 1  # exit status
FROM_CUSTODIAN = (CustodianReady, WorkerForked, ForkFailed, WorkerExited)


Job = Callable[[], object]  # a short piece of work for the listener's thread


class FileWatches:
    """Watches the files under local blocks, and marks a change for the workers at once. Without inotify a worker's own
    check finds it within a second."""

    def __init__(self, blocks: Iterable[RamBlock]) -> None:
        self._blocks: dict[int, list[RamBlock]] = {}  # by watch; inotify has one for a file, whatever its blocks
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

    def check(self) -> None:
        for number, written in self._watch.read().items() if self._watch else ():
            for block in self._blocks.get(number, ()):
                block.look_at_source(written=written)


class Listener(threading.Thread):
    """``watch_*`` and ``forget_*`` may be called from the main thread at any time; epoll allows it."""

    def __init__(self, core: Userfaultfd, stop_eventfd: int, attach_socket: socket.socket, files: FileWatches) -> None:
        super().__init__(name="listener", daemon=True)
        self.queue: collections.deque[events.ListenerEvent] = collections.deque()
        self.wakeup = descriptors.create_eventfd()  # readable when something has been queued
        self._jobs: collections.deque[Job] = collections.deque()
        self._core, self._stop_eventfd, self._attach_socket, self._files = core, stop_eventfd, attach_socket, files
        self._alarm = descriptors.create_eventfd()
        self._stopping = False
        self._due: float | None = None
        self._pidfds: set[int] = set()
        self._custodian: socket.socket | None = None
        self._connections: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        for fd in (core.fileno(), stop_eventfd, attach_socket.fileno(), self._alarm):
            self._epoll.register(fd, select.EPOLLIN)
        if files.fileno() >= 0:
            self._epoll.register(files.fileno(), select.EPOLLIN)

    def watch_process(self, pidfd: int) -> None:
        self._pidfds.add(pidfd)
        self._epoll.register(pidfd, select.EPOLLIN)

    def forget_process(self, pidfd: int) -> None:
        if pidfd in self._pidfds:
            self._pidfds.discard(pidfd)
            with contextlib.suppress(OSError):  # the listener's thread was faster
                self._epoll.unregister(pidfd)

    def watch_custodian(self, channel: socket.socket) -> None:
        self._custodian = channel
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def watch_connection(self, connection: socket.socket) -> None:
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def forget_connection(self, connection: socket.socket) -> None:
        if self._connections.pop(connection.fileno(), None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(connection.fileno())

    def tick_at(self, due: float | None) -> None:
        """Queue a Tick no later than this monotonic time, besides the regular ones."""
        if due is not None and (self._due is None or due < self._due):
            self._due = due
            descriptors.signal_eventfd(self._alarm)

    def call_soon(self, job: Job) -> None:
        """Run ``job`` in the listener's thread, soon: a system call that would stop the main thread for
        milliseconds."""
        self._jobs.append(job)
        descriptors.signal_eventfd(self._alarm)

    def stop(self) -> None:
        """End the thread and close its own descriptors."""
        self._stopping = True
        descriptors.signal_eventfd(self._alarm)
        self.join(5)
        self._epoll.close()
        os.close(self._alarm)

    def run(self) -> None:
        try:
            self._loop()
        except Exception:
            if self._stopping:
                return
            # Without this thread a supervisor hears no client, no custodian and no SIGTERM: a successor is better.
            log.exception("the listener thread has failed, the supervisor ends: serve --recover takes its clients over")
            os._exit(FAILED)

    def _loop(self) -> None:
        ticked = 0.0
        while not self._stopping:
            ready = [fd for fd, _ in self._epoll.poll(self._timeout(ticked))]
            for fd in sorted(ready, key=self._priority):
                self._on_readable(fd)
            while self._jobs and not self._stopping:
                self._jobs.popleft()()
            now = time.monotonic()
            if now - ticked >= TICK_SECONDS or (self._due is not None and now >= self._due):
                ticked, self._due = now, None
                self.queue.append(events.Tick(now))
            if self.queue:
                descriptors.signal_eventfd(self.wakeup)

    def _timeout(self, ticked: float) -> float:
        now = time.monotonic()
        due = ticked + TICK_SECONDS if self._due is None else min(self._due, ticked + TICK_SECONDS)
        return max(0.0, due - now)

    def _priority(self, fd: int) -> int:
        if fd == self._core.fileno():
            return 0
        return 1 if fd == self._stop_eventfd else 2

    def _on_readable(self, fd: int) -> None:
        if fd == self._core.fileno():
            self.queue.append(events.CoreFaults(self._core.read()))
        elif fd == self._stop_eventfd:
            os.eventfd_read(fd)
            self.queue.append(events.StopRequested())
        elif fd == self._alarm:
            os.eventfd_read(fd)
        elif fd == self._files.fileno():
            self._files.check()
        elif fd in self._pidfds:
            if not process.pidfd_exited(fd):
                return  # the number was closed and used again while this wake-up was on its way
            self.forget_process(fd)
            self.queue.append(events.ProcessEnded(fd))
        elif fd == self._attach_socket.fileno():
            self._accept()
        elif self._custodian is not None and fd == self._custodian.fileno():
            self._read_custodian(self._custodian)
        elif (connection := self._connections.get(fd)) is not None:  # one step: the main thread removes some, too
            self._read_client(connection)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = self._attach_socket.accept()
            except BlockingIOError:
                return
            except OSError:
                time.sleep(0.05)  # no descriptor is left: clients wait in the backlog, and this thread does not spin
                return
            connection.setblocking(False)
            self.queue.append(events.ClientConnected(connection, time.monotonic()))

    def _read_custodian(self, channel: socket.socket) -> None:
        if not _descriptor_is_free():
            time.sleep(0.05)  # a worker without its pidfd could not be killed: the message waits until there is room
            return
        try:
            received = descriptors.receive_message(channel)
            message = decode(received.data, expect=FROM_CUSTODIAN) if received.data else None
        except BlockingIOError:
            return
        except (OSError, BadMessage):
            received, message = descriptors.Received(b"", ()), None
        if message is None:
            self._epoll.unregister(channel.fileno())
            self._custodian = None
        self.queue.append(events.CustodianMessage(message, tuple(received.fds)))

    def _read_client(self, connection: socket.socket) -> None:
        if len(self.queue) > QUEUE_LIMIT:
            time.sleep(0.005)  # a client that sends faster than the main thread reads waits in the kernel's buffer
        fds: tuple[int, ...] = ()
        message: Message | BadMessage | None
        try:
            received = descriptors.receive_message(connection, max_bytes=8192, max_fds=8)
            fds = tuple(received.fds)
            message = decode(received.data, expect=FROM_CLIENT) if received.data else None
        except BlockingIOError:
            return
        except BadMessage as error:
            message = error
        except descriptors.TruncatedMessage as error:
            message = BadMessage(str(error.strerror))
        except OSError:
            message = None
        if message is None:
            self.forget_connection(connection)
        self.queue.append(events.ClientMessage(connection, message, fds))


def _descriptor_is_free() -> bool:
    """Could a descriptor be received now?"""
    try:
        os.close(os.dup(2))
    except OSError:
        return False
    return True
