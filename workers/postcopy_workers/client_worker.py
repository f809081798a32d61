"""The worker of one client: one process, one client's userfaultfd, two or three threads.

The **main thread** only reads the userfaultfd (blocking) and resolves what it has read. The **monitor thread** sleeps
nearly always: it waits for the quit eventfd, the client's pidfd, the channel and reports to send. When the worker is to
leave it ends the process at once, whatever the main thread is doing. That is safe, because a worker keeps nothing worth
saving. One thread with poll() was measured: it adds a tenth to the latency of a fault.

Where blocks are remote, a third thread, the **waker**, sleeps in recv() and wakes the client's threads. One thread that
polls for faults and for messages was measured: it costs a worker a fifth more of each fault.

A blocking userfaultfd reports POLLERR to every poller, and the flag belongs to all duplicates, so no other process may
poll it. The client holds a duplicate and may set O_NONBLOCK; then the main thread waits with poll() and never spins.
"""

from __future__ import annotations

import fcntl
import io
import logging
import mmap
import os
import select
import threading
import time
from functools import partial
from typing import NoReturn

from postcopy_kernel import crashpoints, log_queue
from postcopy_kernel.userfaultfd import MESSAGE_BYTES
from postcopy_protocol import counters
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Assignment, Lost, Wake
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.window import FaultAround
from postcopy_wire.transport import Channel

from . import twin
from .client_ufd import ClientGone, ClientUserfaultfd, Region
from .fault_handler import CannotContinue, FaultHandler, Idle
from .fault_loop import BATCH, EVENT_PAGEFAULT, MESSAGE_FIELDS
from .orphaned import NO_SUPERVISOR, Life, Orphaned
from .own_memory import OnlyWakes, OwnMemory
from .page_waker import PageWaker
from .placing import system_calls
from .recording import Recording
from .requests import Requests, Send
from .worker import SOURCE_CHECK_SECONDS, ExitStatus, Worker

LEAVE_SECONDS = 0.05  # time for the monitor thread to send the last report

log = logging.getLogger(__name__)


def serve_client(assignment: Assignment, fds: list[int], lifeline: int, *, privileged: bool) -> NoReturn:
    """Serve one client until it, or this worker, is to end; never returns."""
    life = Life((fds[grant.received] for grant in assignment.blocks), assignment.worker)
    if assignment.incarnation > 1:
        crashpoints.disarm()
    worker = Worker(assignment, fds, privileged=privileged)
    channel = worker.channel()
    channel.connect()  # where no supervisor listens now, the thread that reads the channel tries again
    requests = None
    if worker.remote:
        requests = _requests(worker, crashpoints.around("worker.unasked", channel.send, "worker.asked"))
    recording = Recording.of(fds[assignment.statistics_page], assignment.worker)
    handler = _fault_handler(worker, requests, recording)
    userfaultfd = fds[assignment.userfaultfd]
    os.set_blocking(userfaultfd, True)
    handler.wake_everything()
    poison = partial(_poison_remote, handler, requests, worker.counters)
    MonitorThread(worker, channel, life, Orphaned(lifeline, worker.control, poison)).start()
    try:
        handler.unpoison_local()  # before there is a waker, which unpoisons too
        if requests is not None:
            waker = _page_waker(worker, handler, requests, channel, recording)
            WakerThread(assignment.worker, waker, channel).start()
        if handler.own is not None:
            _read_events_first(userfaultfd, handler)
        if handler.reads:
            handler.serve(_idle(userfaultfd))
        _read_forever(userfaultfd, handler)
    except ClientGone:
        _leave(worker, "client-gone", "its memory is gone", ExitStatus.CLIENT_GONE)
    except (CannotContinue, OSError) as error:
        _leave(worker, "failed", str(error), ExitStatus.FAILED)


def _poison_remote(handler: FaultHandler, requests: Requests | None, counters: memoryview) -> None:
    """On the monitor thread: every page that is, or will be, requested is poisoned instead, by the main thread."""
    if requests is not None:
        requests.refuse(lambda block, offsets: handler.refuse(block, offsets, NO_SUPERVISOR))
        ClientUserfaultfd(handler.userfaultfd.descriptor, counters, system_calls()).wake_all(handler.regions)


def _requests(worker: Worker, send: Send) -> Requests:
    return Requests(worker.assignment.worker, worker.counters, send, worker.stages)


def _fault_handler(worker: Worker, requests: Requests | None, recording: Recording | None) -> FaultHandler:
    assignment = worker.assignment
    regions = []
    for grant in assignment.regions:
        block = worker.blocks[grant.block]
        around = FaultAround(max(1, assignment.fault_around >> block.shift), assignment.adaptive, block.received)
        regions.append(Region(grant, block, around, worker.stages[grant.block]))
    worker.counters[counters.FAULT_LOOP] = counters.FAULT_LOOPS.index("compiled" if twin.COMPILED else "python")
    return FaultHandler(
        worker.fds[assignment.userfaultfd],
        regions,
        worker.counters,
        worker.control,
        worker.reports,
        system_calls(),
        time.sleep,
        requests,
        recording,
        _own_memory(worker),
    )


def _own_memory(worker: Worker) -> OwnMemory | None:
    assignment = worker.assignment
    if assignment.copied_map < 0:
        return None
    memory = memoryview(mmap.mmap(worker.fds[assignment.copied_map], 0))
    return OwnMemory(worker.fds[assignment.userfaultfd], worker.counters, system_calls(), memory)


def _page_waker(
    worker: Worker, handler: FaultHandler, requests: Requests, channel: Channel, recording: Recording | None
) -> PageWaker:
    calls = system_calls()
    kind = ClientUserfaultfd if handler.own is None else OnlyWakes
    userfaultfd = kind(handler.userfaultfd.descriptor, worker.counters, calls)
    own_requests = _requests(worker, channel.send)
    return PageWaker(handler.regions, userfaultfd, worker.counters, calls, requests, own_requests, recording)


def _read_forever(userfaultfd: int, handler: FaultHandler) -> NoReturn:
    """For a client without common local blocks (``is_for_loop``), and for one that is recorded. ``handler.answer`` is
    the closure of its one region, of a remote block ``_remote.answer_remote``, or the one that chooses a region."""
    readinto = io.FileIO(userfaultfd, closefd=False).readinto
    buffer = bytearray(MESSAGE_BYTES * BATCH)
    fields = memoryview(buffer).cast("Q")
    one, fault, answer, messages = MESSAGE_BYTES, EVENT_PAGEFAULT, handler.answer, handler.messages
    idle = _idle(userfaultfd)
    while True:
        length = readinto(buffer)
        if length == one and fields[0] == fault:
            answer(fields[1], fields[2])
        elif length:
            messages(fields, length // (8 * MESSAGE_FIELDS))
        else:
            idle()


def _read_events_first(userfaultfd: int, handler: FaultHandler) -> NoReturn:
    """For a client that may give pages back (a machine): what a read reports as removed is noted before any fault is
    answered by ``FaultHandler.messages``. The messages are read into memory that outlives this process, so a successor
    notes what a dead worker had read."""
    own = handler.own
    assert own is not None
    readinto, idle = io.FileIO(userfaultfd, closefd=False).readinto, _idle(userfaultfd)
    buffer = own.messages[: MESSAGE_BYTES * BATCH]
    fields = buffer.cast("Q")
    own.note_removals(handler.regions, fields, BATCH)
    while True:
        length = readinto(buffer)
        if length:
            count = length // (8 * MESSAGE_FIELDS)
            crashpoints.at("machine.read")
            own.note_removals(handler.regions, fields, count)
            handler.messages(fields, count)
        else:
            idle()


def _idle(userfaultfd: int) -> Idle:
    """For a client that made its userfaultfd non-blocking: wait with poll, make it blocking again, never spin."""
    waiting = select.poll()
    waiting.register(userfaultfd, select.POLLIN)

    def idle() -> None:
        events = waiting.poll(1000)
        if events and events[0][1] & select.POLLIN:
            return
        if not fcntl.fcntl(userfaultfd, fcntl.F_GETFL) & os.O_NONBLOCK:
            return
        os.set_blocking(userfaultfd, True)

    return idle


def _leave(worker: Worker, kind: str, detail: str, status: ExitStatus) -> NoReturn:
    """Report why, give the monitor thread a moment to send it, end."""
    worker.reports(kind, -1, -1, detail)
    log.error("worker %d (%s) ends: %s", worker.assignment.worker, worker.assignment.name, detail)
    time.sleep(LEAVE_SECONDS)
    log_queue.flush()
    os._exit(status)


class MonitorThread(threading.Thread):
    """Waits for everything that is no fault, and ends the process when there is a reason. Where all blocks are local it
    reads the channel too. No message comes there, but the end of the supervisor shows."""

    def __init__(self, worker: Worker, channel: Channel, life: Life, orphaned: Orphaned) -> None:
        super().__init__(name="monitor", daemon=True)
        self._worker = worker
        self._life, self._orphaned = life, orphaned
        self._channel = channel
        self._next_check = 0.0

    def run(self) -> None:
        try:
            self._monitor()
        except Exception:
            # Without this thread a worker would notice neither quit nor its client's end: a successor is better.
            log.exception("worker %d has lost its monitor thread", self._worker.assignment.worker)
            log_queue.flush()
            os._exit(ExitStatus.FAILED)

    def _monitor(self) -> NoReturn:
        worker, channel, orphaned, reads = self._worker, self._channel, self._orphaned, not self._worker.remote
        quit_fd, client = worker.fds[worker.assignment.quit_eventfd], worker.fds[worker.assignment.client_pidfd]
        wakeup = worker.reports.wakeup
        while True:
            pause = worker.send_waiting(channel)
            waiting = select.poll()
            for fd in (quit_fd, client, wakeup):
                waiting.register(fd, select.POLLIN)
            listened = channel.fileno() if reads else -1
            if listened >= 0:
                waiting.register(listened, select.POLLIN)
            elif reads:
                pause = channel.retry_in
            if orphaned.lifeline >= 0:
                waiting.register(orphaned.lifeline, 0)  # its end is reported all the same
            ready = [fd for fd, _ in waiting.poll(orphaned.wait(pause, time.monotonic()) * 1000)]
            if orphaned.lifeline in ready:
                orphaned.ended(time.monotonic())
            orphaned.tick(time.monotonic())
            if wakeup in ready:
                os.eventfd_read(wakeup)
            if client in ready or quit_fd in ready:
                worker.send_waiting(channel)  # a report of the lost page that the client died of may have come last
                os._exit(ExitStatus.CLIENT_GONE if client in ready else ExitStatus.QUIT)
            if listened in ready:
                channel.receive_now()
            elif reads and listened < 0:
                channel.connect()
            self._check_sources()

    def _check_sources(self) -> None:
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + SOURCE_CHECK_SECONDS
            self._worker.check_sources()
            self._life.show()


class WakerThread(threading.Thread):
    """Receives the supervisor's messages, Wake and Lost, and lets ``PageWaker`` act on them."""

    def __init__(self, number: int, waker: PageWaker, channel: Channel) -> None:
        super().__init__(name="waker", daemon=True)
        self._number = number
        self._waker = waker
        self._channel = channel

    def run(self) -> None:
        """A Wake of one page goes to ``Requests.fast_path.placed``, which ``PageWaker`` has put into ``fast_paths``."""
        receive, fast_paths = self._channel.receive, self._waker.fast_paths
        while True:
            for data in receive():
                wake = fast_paths.get(data[:-OFFSET_BYTES])
                try:
                    if wake is not None:  # one page is placed: nothing to decode but its offset, at the end
                        wake(int.from_bytes(data[-OFFSET_BYTES:], "little"))
                        continue
                    message = decode(data, expect=(Wake, Lost))
                    assert isinstance(message, Wake | Lost)
                    self._waker.receive(message)
                except BadMessage as error:
                    log.warning("worker %d: cannot decode a message: %s", self._number, error)
                except ClientGone:
                    os._exit(ExitStatus.CLIENT_GONE)
                except OSError:
                    log.exception("worker %d cannot wake its client", self._number)
                    log_queue.flush()
                    os._exit(ExitStatus.FAILED)
