"""A worker: one process, one client's userfaultfd, two threads.

The **main thread** does nothing but a blocking read of the userfaultfd and the resolution of what it read. The
**attendant**, a second thread that sleeps nearly always, waits for everything else: quit eventfd, the client's pidfd,
ZeroMQ, reports to send. When told to leave it ends the process at once, in the middle of whatever the main thread
does: that is legal, because a worker keeps nothing worth saving, and cheap: one thread with poll() costs a tenth of
the latency more, measured.

A blocking userfaultfd reports POLLERR to every poller and the flag belongs to all duplicates, so nobody else may poll
it. The client holds a duplicate and may set O_NONBLOCK; then we wait with poll() ourselves instead of spinning.
"""

from __future__ import annotations

import collections
import fcntl
import importlib
import io
import logging
import mmap
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

from postcopy_kernel import crashpoints, descriptors, process
from postcopy_kernel.filewatch import give_up_lease, lease_wanted
from postcopy_kernel.memory import DONTFORK, DONTNEED, Mapping
from postcopy_kernel.userfaultfd import MESSAGE_BYTES, RegisterMode, Userfaultfd, open_userfaultfd
from postcopy_protocol import counters, stages
from postcopy_protocol.codec import decode, encode, pack_offsets, unpack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Assignment, BlockGrant, Lost, Message, Report, Wake, WorkerHello
from postcopy_protocol.received_map import CHANGED, LEASED, WATCHED
from postcopy_protocol.templates import OFFSET_BYTES, template_of
from postcopy_protocol.window import FaultAround
from postcopy_wire.factory import open_channel
from postcopy_wire.transport import Channel

from . import crashing, sandbox
from .fault_handler import EVENT_PAGEFAULT, MESSAGE_WORDS, CannotGoOn, ClientGone, FaultHandler, Region
from .page_sources import FilePages, Handler, HandlerPages, NoPages, PageSource, RemotePages, SourceChanged, ZeroPages
from .placing import Block, Calls, OwnMapping
from .recording import Recording
from .requests import Requests

PRIVILEGED = True
"""False once the custodian has given up what a worker must not have, for itself and all that it forks."""
BATCH = 16
SOURCE_CHECK_SECONDS = 1.0
HELD_SECONDS = 0.01
"""Between two tries to send what the supervisor does not take."""
CLIENT_GONE, TOLD_TO_LEAVE, FAILED = 0, 4, 3
"""Exit statuses. The first says that nobody is left to serve: an orphaned custodian forks no successor."""
MAX_REPORTS_OF_A_KIND = 16
"""A client that provokes one report after another is heard this often, then each time the number has doubled."""

log = logging.getLogger(__name__)


class Reports:
    """Reports on their way to the supervisor: made by the main thread, sent by the attendant."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=256)
        self._counts: collections.Counter[str] = collections.Counter()
        self.bell = descriptors.create_eventfd()

    def __call__(self, kind: str, block: int, offset: int, detail: str) -> None:
        self._counts[kind] += 1
        count = self._counts[kind]
        if count > MAX_REPORTS_OF_A_KIND:
            if count & (count - 1):
                return
            detail += f" (the {count}th of its kind)"
        self._waiting.append(encode(Report(self._worker, kind, block, offset, detail)))
        descriptors.signal_eventfd(self.bell)

    def take(self) -> list[bytes]:
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken


class Worker:
    """What an assignment and its descriptors make: blocks, channel to the supervisor, and for a client its fault
    handler."""

    def __init__(self, assignment: Assignment, fds: list[int]) -> None:
        self.assignment = assignment
        self.reports = Reports(assignment.worker)
        self._fds = fds
        self.words = _words(fds[assignment.statistics_page])
        self.house = _words(fds[assignment.control_page])
        self.words[counters.WORKER_PID] = os.getpid()
        self.words[counters.INCARNATION] = assignment.incarnation
        self.words[counters.BUSY_SINCE_NS] = 0
        self._own = self._own_userfaultfd()
        if PRIVILEGED:
            process.drop_privileges()
        self.blocks = {grant.block: self._block(grant) for grant in assignment.blocks}
        self.stages = _stages(fds[assignment.statistics_page], self.blocks)
        self._raise_walls()

    def _raise_walls(self) -> None:
        """All is open that will ever be, and there is one thread: walls hold for those that come."""
        told = self.assignment
        cgroups = self._fds[told.cgroup :] if told.cgroup >= 0 else []
        try:
            sandbox.enter(cgroups)
        except OSError as error:
            raise CannotGoOn(f"cannot enter its cgroup: {error}") from None
        handlers = any(grant.kind == "handler" for grant in told.blocks)
        standing, wrong = sandbox.enter_sandbox_walls(told.sandbox, len(self._fds), runs_handler=handlers)
        self.words[counters.SANDBOX] = standing | (counters.CGROUP if cgroups else 0)
        for what in wrong:
            self.reports("no-wall", -1, -1, what)

    def descriptor(self, place: int) -> int:
        return self._fds[place]

    def _own_userfaultfd(self) -> Userfaultfd:
        device = self.assignment.device
        own = open_userfaultfd(device=self._fds[device] if device >= 0 else None)
        own.handshake()
        return own

    def _block(self, grant: BlockGrant) -> Block:
        length = grant.pages * grant.page_size
        memory = self._fds[grant.memory]
        mapping = Mapping.of(memory, length)
        mapping.advise(DONTFORK)
        self._own.register(mapping.address, length, RegisterMode.MISSING)
        received = memoryview(mmap.mmap(self._fds[grant.received], 0))
        own = OwnMapping(self._own.fileno(), mapping.address, partial(mapping.advise, DONTNEED))
        return Block(grant, memory, received, self._pages(grant), own, self.reports, Calls())

    def _pages(self, grant: BlockGrant) -> PageSource:
        stretch = max(grant.page_size, self.assignment.fault_around)
        if grant.kind == "file":
            return FilePages(grant, self._fds[grant.source])
        if grant.kind == "zero":
            return ZeroPages(grant, stretch)
        if grant.kind == "handler":
            try:
                return HandlerPages(grant, self._handler(grant.detail), stretch)
            except Exception as error:
                reason = f"cannot import {grant.detail}: {type(error).__name__}: {error}"
                self.reports("handler-failed", grant.block, 0, reason)
                return NoPages(grant, reason)
        if grant.kind == "remote":
            return RemotePages(grant)
        if grant.kind == "orphaned":
            return NoPages(grant, grant.detail)
        if grant.kind == "quarantined":
            return NoPages(grant, "the client is quarantined: its worker crashed too often")
        raise CannotGoOn(f"block {grant.name}: kind {grant.kind} is unknown to this worker")

    def _handler(self, detail: str) -> Handler:
        module, _, function = detail.partition(":")
        if self.assignment.handler_path not in sys.path:
            sys.path.insert(0, self.assignment.handler_path)
        found: Handler = getattr(importlib.import_module(module), function)
        return found

    @property
    def remote(self) -> bool:
        """Does any block come over a return path?"""
        return any(isinstance(block.pages, RemotePages) for block in self.blocks.values())

    def channel(self) -> Channel:
        """The one to the supervisor; not connected yet."""
        told = self.assignment
        hello = encode(WorkerHello(told.worker, told.incarnation, os.getpid()))
        held = partial(descriptors.signal_eventfd, self.reports.bell)
        return open_channel(told.transport, told.endpoint, b"w%d.%d" % (told.worker, told.incarnation), hello, held)

    def tend(self, channel: Channel) -> float:
        """Send the reports that wait, and what the channel holds; seconds until that is to be done again."""
        if channel.connected:
            for frame in self.reports.take():
                channel.send(frame)
            channel.flush()
        return HELD_SECONDS if channel.holds() else SOURCE_CHECK_SECONDS

    def check_sources(self) -> None:
        """Has a file changed since it is served? Marked for every worker, reported once. And does somebody want to
        write to one while no supervisor lives who would give up the lease?"""
        for number, block in self.blocks.items():
            trust, descriptor = block.received[block.trust_at], block.pages.descriptor
            if trust == CHANGED or descriptor < 0:
                continue
            if trust == LEASED and lease_wanted(descriptor):
                block.received[block.trust_at] = WATCHED
                give_up_lease(descriptor)
            try:
                block.pages.check()
            except SourceChanged as changed:
                block.received[block.trust_at] = CHANGED
                self.reports("source-changed", number, 0, f"{changed}; pages that are missing by now are lost")

    def requests(self, channel: Channel) -> Requests | None:
        """For the main thread; None where every block is local."""
        if not self.remote:
            return None
        send = crashpoints.around("worker.unasked", channel.send, "worker.asked")
        return Requests(self.assignment.worker, self.words, send, self.stages)

    def fault_handler(self, requests: Requests | None) -> FaultHandler:
        told = self.assignment
        regions = []
        for grant in told.regions:
            block = self.blocks[grant.block]
            around = FaultAround(max(1, told.fault_around >> block.shift), told.adaptive)
            regions.append(Region(grant, block, around, self.stages[grant.block]))
        calls, ufd = crashing.calls(), self._fds[told.userfaultfd]
        return FaultHandler(ufd, regions, self.words, self.house, self.reports, calls, time.sleep, requests)


class MonitorThread(threading.Thread):
    """The second thread: waits for everything that is no fault, and ends the process when there is reason to. Where all
    blocks are local it reads the channel too, on which nothing is said to it, to hear when the supervisor is gone."""

    def __init__(self, worker: Worker, channel: Channel) -> None:
        super().__init__(name="attendant", daemon=True)
        self._worker = worker
        self._channel = channel
        self._next_check = 0.0

    def run(self) -> None:
        try:
            self._attend()
        except Exception:
            # Without its attendant a worker would hear neither quit nor its client's end: a successor is better.
            log.exception("worker %d has lost its attendant", self._worker.assignment.worker)
            os._exit(FAILED)

    def _attend(self) -> NoReturn:
        worker, channel, reads = self._worker, self._channel, not self._worker.remote
        quit_fd, client = (
            worker.descriptor(place) for place in (worker.assignment.quit_eventfd, worker.assignment.client_pidfd)
        )
        bell = worker.reports.bell
        while True:
            pause = worker.tend(channel)
            waiting = select.poll()
            for fd in (quit_fd, client, bell):
                waiting.register(fd, select.POLLIN)
            listened = channel.fileno() if reads else -1
            if listened >= 0:
                waiting.register(listened, select.POLLIN)
            elif reads:
                pause = channel.retry_in
            ready = [fd for fd, _ in waiting.poll(pause * 1000)]
            if bell in ready:
                os.eventfd_read(bell)
            if client in ready or quit_fd in ready:
                worker.tend(channel)  # the bell may have rung meanwhile: a page that a client dies of is reported
                os._exit(CLIENT_GONE if client in ready else TOLD_TO_LEAVE)
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


class Waker(threading.Thread):
    """The third thread, where blocks are remote: it sleeps in recv() and wakes the client where the supervisor says.
    One thread that polls for faults and for words was measured: it costs a worker a fifth more of each fault."""

    def __init__(self, worker: Worker, handler: FaultHandler, requests: Requests, channel: Channel) -> None:
        super().__init__(name="waker", daemon=True)
        self._worker = worker
        self._handler = handler
        self._requests = requests
        self._channel = channel

    def run(self) -> None:
        receive = self._channel.receive
        self._again = Requests(
            self._worker.assignment.worker, self._worker.words, self._channel.send, self._worker.stages
        )
        lanes = {
            template_of(Wake(number, pack_offsets([0])), OFFSET_BYTES): self._lane(number)
            for number in self._worker.blocks
        }
        while True:
            for data in receive():
                lane = lanes.get(data[:-OFFSET_BYTES])
                try:
                    if lane is not None:  # one page is placed: as these bytes, but for the offset: nothing to decode
                        lane(int.from_bytes(data[-OFFSET_BYTES:], "little"))
                    else:
                        self._heard(decode(data, expect=(Wake, Lost)))
                except BadMessage as error:
                    log.warning("worker %d: not understood: %s", self._worker.assignment.worker, error)
                except ClientGone:
                    os._exit(CLIENT_GONE)
                except OSError:
                    log.exception("worker %d cannot wake", self._worker.assignment.worker)
                    os._exit(FAILED)

    def _lane(self, number: int) -> Callable[[int], None]:
        return self._requests.lane(number, crashpoints.before("worker.told", self._handler.waking(number)))

    def _heard(self, message: Message) -> None:
        assert isinstance(message, Wake | Lost)
        if not message.block:  # the supervisor has heard our hello: what it said before may not have come
            self._requests.forget()
            self._handler.wake_everything()
            self._again.forget()
            return self._handler.heal(self._again.ask)
        offsets = unpack_offsets(message.offsets)
        self._requests.answered(message.block, offsets)
        crashpoints.before("worker.told", self._handler.woken)(message.block, offsets, lost=isinstance(message, Lost))


def serve_client(assignment: Assignment, fds: list[int]) -> NoReturn:
    """The life of a client's worker; never returns."""
    if assignment.incarnation > 1:
        crashpoints.disarm()
    worker = Worker(assignment, fds)
    channel = worker.channel()
    channel.connect()  # if there is a supervisor just now; else its reader tries again
    requests = worker.requests(channel)
    handler = worker.fault_handler(requests)
    userfaultfd = fds[assignment.userfaultfd]
    os.set_blocking(userfaultfd, True)
    recording = Recording.of(fds[assignment.statistics_page], assignment.worker)
    attendant = MonitorThread(worker, channel)
    handler.wake_everything()
    attendant.start()
    try:
        handler.heal()  # before there is a waker, which heals too
        if requests is not None:
            waking = worker.fault_handler(requests)
            if recording is not None:
                recording.wrap_wakes(waking)
            Waker(worker, waking, requests, channel).start()
        if recording is not None:
            recording.wrap(handler)
        _read_for_ever(userfaultfd, handler)
    except ClientGone:
        _leave(worker, "client-gone", "its memory is gone", CLIENT_GONE)
    except (CannotGoOn, OSError) as error:
        _leave(worker, "failed", str(error), FAILED)


def _read_for_ever(userfaultfd: int, handler: FaultHandler) -> NoReturn:
    readinto = io.FileIO(userfaultfd, closefd=False).readinto
    buffer = bytearray(MESSAGE_BYTES * BATCH)
    words = memoryview(buffer).cast("Q")
    one, fault, answer, messages = MESSAGE_BYTES, EVENT_PAGEFAULT, handler.answer, handler.messages
    idle = _idle(userfaultfd)
    while True:
        length = readinto(buffer)
        if length == one and words[0] == fault:
            answer(words[1], words[2])
        elif length:
            messages(words, length // (8 * MESSAGE_WORDS))
        else:
            idle()


def _idle(userfaultfd: int) -> Callable[[], None]:
    """For a client that made its userfaultfd non-blocking: wait with poll, take the flag back, never spin."""
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


def _leave(worker: Worker, kind: str, detail: str, status: int) -> NoReturn:
    """Say why, give the attendant a moment to send it, end."""
    worker.reports(kind, -1, -1, detail)
    log.error("worker %d (%s) ends: %s", worker.assignment.worker, worker.assignment.name, detail)
    time.sleep(0.05)
    os._exit(status)


def _words(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, counters.PAGE_BYTES)).cast("Q")


def _stages(fd: int, blocks: Iterable[int]) -> dict[int, memoryview]:
    """Room for the stages of each block; where a supervisor of before has left none, words that nobody reads."""
    size = os.fstat(fd).st_size
    if size < stages.END:
        return {block: stages.scratch() for block in blocks}
    figures = memoryview(mmap.mmap(fd, stages.END))
    places = {block: stages.position(block) for block in blocks}
    return {
        block: figures[at : at + stages.BYTES].cast("Q") if at is not None else stages.scratch()
        for block, at in places.items()
    }
