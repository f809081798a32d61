"""The listener: one thread that sleeps on every descriptor except the router's, and queues events for the main thread.

It handles a wake-up in this order: the core userfaultfd, the stop eventfd, then everything else (custodian, processes
that end), and last the attach socket and its connections. It reads and decodes; it decides only which peers are let in
and when their messages are read (``admission``). All other state belongs to the main thread, which waits in a turn of
the router. An eventfd wakes that when the queue has something.

Clients get at most half of this thread's time, because each step of it holds the interpreter's lock, which a fault of
another client needs. What clients send meanwhile waits in the kernel."""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable

from postcopy_kernel import access_list, descriptors, log_queue, process
from postcopy_kernel.filewatch import FileWatch
from postcopy_kernel.userfaultfd import Userfaultfd
from postcopy_protocol.attach_conversation import FROM_CLIENT, Refusal
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import CustodianReady, ForkFailed, Message, WorkerExited, WorkerForked

from . import events
from .admission import Admission
from .blocks import RamBlock

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
CLIENTS_AT_ONCE = 16
"""Connections that are accepted, and connections that are read, before anything else is looked at."""
CLIENTS_SHARE, CLIENTS_BURST = 0.5, 0.004
"""Share of this thread's time for clients, and the seconds of it that may be used at once."""
QUEUE_LIMIT = 64
"""Events in the queue beyond which clients wait: so one that floods does not delay those that follow it for long."""
QUEUE_PAUSE = 0.001
MOST_FDS = 8  # beside one message of a client
CLOSING_PAUSE = 0.01  # seconds between two looks whether what a user has sent is closed; until then it is not read
_FAMILY, _KIND = int(socket.AF_UNIX), int(socket.SOCK_SEQPACKET)
FAILED = 1  # exit status
REPORTED = ("denied", "limit", "failed")  # refusals that are events
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

    def __init__(
        self,
        core: Userfaultfd,
        stop_eventfd: int,
        attach_socket: socket.socket,
        files: FileWatches,
        admission: Admission,
        door: str,
    ) -> None:
        """``door``: the path of the attach socket."""
        super().__init__(name="listener", daemon=True)
        self.queue: collections.deque[events.ListenerEvent] = collections.deque()
        self.wakeup = descriptors.create_eventfd()  # readable when something has been queued
        self._jobs: collections.deque[Job] = collections.deque()
        self._core, self._stop_eventfd, self._attach_socket, self._files = core, stop_eventfd, attach_socket, files
        self._admission, self._door = admission, door
        self.closer = admission.closer
        self._alarm = descriptors.create_eventfd()
        self._stopping = False
        self._due: float | None = None
        self._pidfds: set[int] = set()
        self._custodian: socket.socket | None = None
        self._connections: dict[int, tuple[socket.socket, int]] = {}  # with the peer's user
        self._held: list[tuple[float, int, socket.socket]] = []  # not read before this time; a heap
        self._order = itertools.count()
        self._epoll, self._clients_epoll = select.epoll(), select.epoll()
        self._clients_used, self._clients_at = 0.0, 0.0  # time used by clients, and when it was counted
        self._paused_until = 0.0
        self._clients_epoll.register(attach_socket.fileno(), select.EPOLLIN)
        for fd in (core.fileno(), stop_eventfd, self._clients_epoll.fileno(), self._alarm):
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

    def watch_attach_socket(self) -> None:
        """Its descriptor is another socket since: the kernel has forgotten the old one."""
        self._clients_epoll.register(self._attach_socket.fileno(), select.EPOLLIN)
        self._admission.bans.changed = True  # the new one has no list

    def watch_connection(self, connection: socket.socket, uid: int) -> None:
        self._connections[connection.fileno()] = connection, uid
        self._clients_epoll.register(connection.fileno(), select.EPOLLIN)

    def forget_connection(self, connection: socket.socket) -> None:
        fd = connection.fileno()  # once: the other thread may close it, and then it is -1
        if self._connections.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._clients_epoll.unregister(fd)

    def close_connection(self, connection: socket.socket, uid: int) -> None:
        """Close a connection, without waiting for descriptors that its peer may have sent."""
        if not descriptors.close_drained(connection):
            self.closer.close(uid, connection)

    def count_refusal(self, uid: int, refusal: Refusal) -> None:
        """Count a refusal. Those that concern the user are reported, with others of it; the log has the rest."""
        if refusal.code in REPORTED:
            return self.call_soon(lambda: self._admission.refused(uid, refusal.code, str(refusal)))
        self.call_soon(lambda: self._admission.refusals.update((refusal.code,)))

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
        self._clients_epoll.close()
        os.close(self._alarm)

    def run(self) -> None:
        try:
            self._loop()
        except Exception:
            if self._stopping:
                return
            # Without this thread a supervisor hears no client, no custodian and no SIGTERM: a successor is better.
            log.exception("the listener thread has failed, the supervisor ends: serve --recover takes its clients over")
            log_queue.flush()
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
            self._resume_clients(now)
            if now - ticked >= TICK_SECONDS or (self._due is not None and now >= self._due):
                ticked, self._due = now, None
                self._admission.check_bans(now)
                self._ban(now)
                self.queue.extend(events.PeersRefused(*report) for report in self._admission.reports(now))
                self.queue.append(events.Tick(now))
            if self.queue:
                descriptors.signal_eventfd(self.wakeup)

    def _timeout(self, ticked: float) -> float:
        now = time.monotonic()
        due = ticked + TICK_SECONDS if self._due is None else min(self._due, ticked + TICK_SECONDS)
        if self._paused_until:
            due = min(due, self._paused_until)
        if self._held:
            due = min(due, self._held[0][0])
        return max(0.0, due - now)

    def _priority(self, fd: int) -> int:
        if fd == self._core.fileno():
            return 0
        if fd == self._clients_epoll.fileno():
            return 3
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
        elif self._custodian is not None and fd == self._custodian.fileno():
            self._read_custodian(self._custodian)
        elif fd == self._clients_epoll.fileno():
            self._serve_clients()

    def _serve_clients(self) -> None:
        """Accept and read for a bounded time, and pause when clients have used up their share."""
        began, used = time.monotonic(), time.thread_time()
        for fd, _ in self._clients_epoll.poll(0, CLIENTS_AT_ONCE):
            if fd == self._attach_socket.fileno():
                self._accept(began)
            elif (known := self._connections.get(fd)) is not None:  # one step: the main thread removes some, too
                self._read_client(*known, began)
        ended, used = time.monotonic(), time.thread_time() - used
        self._clients_used = max(0.0, self._clients_used - (ended - self._clients_at) * CLIENTS_SHARE) + used
        self._clients_at = ended
        if self._clients_used > CLIENTS_BURST:
            self._pause_clients(ended + (self._clients_used - CLIENTS_BURST) / CLIENTS_SHARE)
        elif len(self.queue) > QUEUE_LIMIT:
            self._pause_clients(ended + QUEUE_PAUSE)

    def _pause_clients(self, until: float) -> None:
        self._paused_until = until
        self._epoll.modify(self._clients_epoll.fileno(), 0)

    def _resume_clients(self, now: float) -> None:
        """Look at clients again, and at the connections that were held, whose time has come."""
        while self._held and self._held[0][0] <= now:
            _, _, connection = heapq.heappop(self._held)
            with contextlib.suppress(OSError, ValueError):  # it has been closed
                if self._connections.get(connection.fileno(), (None,))[0] is connection:
                    self._clients_epoll.register(connection.fileno(), select.EPOLLIN)
        if not self._paused_until or now < self._paused_until:
            return
        if len(self.queue) > QUEUE_LIMIT:
            self._paused_until = now + QUEUE_PAUSE
            return
        self._paused_until = 0.0
        self._epoll.modify(self._clients_epoll.fileno(), select.EPOLLIN)

    def _accept(self, now: float) -> None:
        """A refusal takes 20 us, less than the connection that it answers. So a flood does not fill the backlog."""
        for _ in range(CLIENTS_AT_ONCE):
            try:
                fd, _address = self._attach_socket._accept()  # type: ignore[attr-defined]  # accept() costs twice that
            except BlockingIOError:
                return
            except OSError:
                self._pause_clients(now + 0.05)  # no descriptor is left: clients wait in the backlog
                return
            connection = socket.socket(_FAMILY, _KIND, 0, fd)
            connection.setblocking(False)
            admitted = self._admission.admit(connection, now)
            if not isinstance(admitted, bytes):
                if descriptors.has_ended(connection):  # the main thread need not know
                    connection.close()
                    self._admission.has_left(admitted.uid, now)
                    self._ban(now)
                    continue
                self.queue.append(events.ClientConnected(connection, admitted, now))
                continue
            with contextlib.suppress(OSError):
                descriptors.send_message(connection, admitted)
            self.close_connection(connection, descriptors.peer_credentials(connection).uid)
            self._ban(now)

    def _ban(self, now: float) -> None:
        if self._admission.bans.changed:
            with contextlib.suppress(OSError):  # a file system without access lists: they are refused one by one
                access_list.refuse_users(self._door, self._admission.bans.take(now))

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

    def _read_client(self, connection: socket.socket, uid: int, now: float) -> None:
        until = now + CLOSING_PAUSE if self.closer.busy(uid) else self._admission.hold(uid, now)
        if until:
            with contextlib.suppress(OSError, ValueError):  # the main thread was faster
                self._clients_epoll.unregister(connection.fileno())
                heapq.heappush(self._held, (until, next(self._order), connection))
            return
        fds: tuple[int, ...] = ()
        message: Message | BadMessage | None
        try:
            received = descriptors.receive_message(
                connection,
                max_bytes=8192,
                max_fds=descriptors.MOST_DESCRIPTORS,
                close=lambda fds: self.closer.close(uid, *fds),
            )
            fds = received.fds
            if len(fds) > MOST_FDS:
                self.closer.close(uid, *fds)
                fds = ()
                raise BadMessage(f"a message of more than {MOST_FDS} descriptors")
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
        self._admission.count(uid, message)
        self.queue.append(events.ClientMessage(connection, uid, message, fds))


def _descriptor_is_free() -> bool:
    """Could a descriptor be received now?"""
    try:
        os.close(os.dup(2))
    except OSError:
        return False
    return True
