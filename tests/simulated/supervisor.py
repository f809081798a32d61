"""The whole service of one remote block, on the simulated kernel and the simulated wire.

The fault handlers, requests, main loop, paging, link and flow control are the real ones. Written here are the ports
between them: mailboxes, connections, and how each program dies. Every program is a ``Life`` that stops before every
call (of the kernel, or to send a message), so that it can be killed before or after any of them:

* A worker dies with its unread messages; its successor wakes every waiter. Without a custodian none is started.
* The supervisor dies with its engine, its links and its unread messages; some requests may reach its successor.
  Received map, page cache and workers outlive it. Workers say hello to the successor, which answers with an empty Wake,
  and they request everything again.
* The source dies with the requests that it had; it comes back with the same content. A client dies with its threads.

Any number of workers may die, and any one of supervisor, custodian and source at a time, as the service promises.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from postcopy_kernel import abi
from postcopy_kernel.userfaultfd import Outcome, Status, Userfaultfd
from postcopy_protocol import counters
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import BlockGrant, Lost, Message, RegionGrant, Wake, WorkerHello
from postcopy_protocol.received_map import FLAGS, GUARDED, LOST, MISSING, RECEIVED, SHARED
from postcopy_protocol.return_path import FROM_SOURCE, FROM_SUPERVISOR, Pages, unpack_range
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.window import FaultAround
from postcopy_supervisor.blocks import RamBlock
from postcopy_supervisor.events import ListenerEvent, ProcessEnded, Tick, WorkerEvent
from postcopy_supervisor.main_loop import MainLoop, Ports, Replies
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.paging.fast_path import SourceFastPath, source_fast_path
from postcopy_supervisor.paging.flow_control import Limits
from postcopy_supervisor.paging.paging import RemotePaging
from postcopy_supervisor.paging.placer import Placer
from postcopy_supervisor.paging.source_link import AdvisedBlock, SourceLink
from postcopy_supervisor.paging.wakers import Wakers
from postcopy_supervisor.parts import RunState
from postcopy_workers.client_ufd import ClientGone, ClientUserfaultfd, Region
from postcopy_workers.fault_handler import FaultHandler
from postcopy_workers.fault_loop import MESSAGE_FIELDS
from postcopy_workers.guarded_block import GuardedBlock
from postcopy_workers.page_sources import RemotePages
from postcopy_workers.page_waker import PageWaker
from postcopy_workers.placing import Block, Calls, OwnMapping, Structure
from postcopy_workers.requests import Requests
from tests.simulated import kernel as simulated
from tests.simulated.kernel import SIGBUS, Area, Kernel, Memory, Space, Thread
from tests.simulated.lives import Life
from tests.simulated.wire import NAMES, PAGE, PAGES, RIGHT, SIZES, Source, Word

BLOCK = 1
COUNT = PAGES[BLOCK]
ABSENT = cast(Any, None)
SOURCE = b"s1"
SOURCE_AT = 0x7000_0000_0000
BATCH = 8
PATIENCE = 0.5
MEANINGS = {errno.EEXIST: Status.PRESENT, errno.EAGAIN: Status.PARTIAL, errno.ENOSPC: Status.EXHAUSTED}
FOR_EVER = Limits(patience=2.0, attempts=1000)
"""Requests are not given up here, because time is half real; only a source that reports a loss loses pages."""


def content(page: int) -> bytes:
    """What the source has: never zeros."""
    return bytes((0x41 + page,)) * PAGE


@dataclass(eq=False)
class Client:
    """A client process with one region, and the two threads of its worker, if it has one."""

    number: int
    space: Space
    descriptor: int
    userfaultfd: simulated.Userfaultfd
    grant: RegionGrant
    words: memoryview
    threads: list[Thread] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    main: Life | None = None
    waker: Life | None = None
    mailbox: deque[bytes] = field(default_factory=deque)

    @property
    def served(self) -> bool:
        return self.main is not None and not self.main.over

    @property
    def sleepers(self) -> list[int]:
        """Pages on which its threads sleep."""
        asleep = [thread for thread in self.threads if self.space.alive and thread.asleep_on is not None]
        return [(thread.address - self.grant.address) // PAGE for thread in asleep]


class SimulatedPlacer(Placer):
    """The source's bytes are in real memory, which is not here: what they are is known."""

    there: dict[int, bytes]

    def _accept_present(self, block: RamBlock, page: int, source: int) -> bool:
        if block.received[block.pages + GUARDED]:
            self.there[page] = content(page)
        block.received[page] = RECEIVED
        return True

    def _present(self, block: RamBlock, page: int) -> bool:
        return page in self.there


class Core:
    """The supervisor's userfaultfd over its own mapping of the block."""

    def __init__(self, kernel: Kernel, life: Life, memory: Memory, birth: int) -> None:
        self.space = kernel.space(f"supervisor {birth}")
        self.address = (birth + 512) << 36
        ufd = simulated.Userfaultfd(self.space)
        self.space.areas.append(Area(self.address, self.address + memory.size, memory, 0, True, ufd))
        self._descriptor, self._calls, self._copy = kernel.open(ufd), life.calls_of(kernel), Structure(5)
        self.ioctl = self._calls.ioctl

    def fileno(self) -> int:
        return self._descriptor

    def copy(self, target: int, source: int, length: int) -> Outcome:
        for place, value in enumerate((target, source, length, 0, 0)):
            self._copy.fields[place] = value
        try:
            self._calls.ioctl(self._descriptor, abi.UFFDIO_COPY, self._copy.buffer)
        except OSError as error:
            done = max(0, self._copy.result(4))
            status = MEANINGS[error.errno or 0]
            return Outcome(status, done if status is Status.PARTIAL else 0)
        return Outcome(Status.DONE, length)


@dataclass(frozen=True, slots=True)
class Bytes:
    """A raw frame, and its buffer: ``length`` bytes at ``address``."""

    address: int
    length: int

    @property
    def buffer(self) -> Bytes:
        return self

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A message that the router delivers."""

    message: WorkerHello | bytes


@dataclass(frozen=True, slots=True)
class FromSource:
    """A message of the page source, with the lengths of its frames."""

    word: Word


Input = FromWorker | FromSource | ListenerEvent


class SimulatedPool:
    """Messages to workers: only a worker that has connected gets them."""

    def __init__(self, service: SimulatedService, life: Life) -> None:
        self.events: deque[WorkerEvent] = deque()
        self.connected: set[int] = set()
        self._service = service
        self._life = life

    def on_hello(self, message: WorkerHello) -> None:
        self.connected.add(message.worker)

    def send(self, worker: int, data: bytes) -> None:
        self._life.call("tell", lambda: self._deliver(worker, data))

    def _deliver(self, worker: int, data: bytes) -> None:
        client = self._service.client(worker)
        if worker in self.connected and client.served:
            client.mailbox.append(data)

    def on_process_ended(self, pidfd: int) -> bool:
        return False  # the simulation starts successors of workers itself

    def on_custodian_message(self, message: Message | None, fds: tuple[int, ...]) -> None:
        raise AssertionError(message)

    def explain(self, worker: int, why: str) -> None:
        raise AssertionError(why)


class SimulatedClients:
    """Which clients are attached; the number of one is its pidfd here."""

    def __init__(self, numbers: set[int], paging: RemotePaging) -> None:
        self.attached = numbers
        self._paging = paging

    def on_process_ended(self, pidfd: int) -> None:
        self.attached.discard(pidfd)
        self._paging.left(pidfd)

    def kill(self, number: int, offset: int) -> None:
        raise AssertionError("no client here is a machine")

    def failure_reported(self, number: int) -> bool:
        return number in self.attached


class SimulatedSources:
    """One source on the simulated wire; its frames are addresses in the simulated kernel."""

    def __init__(self, service: SimulatedService, paging: RemotePaging, link: SourceLink, fast: SourceFastPath) -> None:
        self.links = {SOURCE: link}
        self.fast_paths = {SOURCE: fast}
        self.parked: deque[Any] = deque()
        self._service = service
        self._paging = paging
        self._link = link

    def on_message(self, name: bytes, frames: list[memoryview], /) -> bool:
        message, now = decode(frames[0], expect=FROM_SOURCE), time.monotonic() + self._service.skipped
        try:
            arrived = self._link.on_message(message, [len(frame) for frame in frames[1:]], now)
        except BadMessage:  # an answer that comes twice, or after its time, is not used
            return False
        if arrived is not None:
            places = {frame: SOURCE_AT + offset for offset, _, _, frame in arrived.ranges}
            self._paging.arrived(arrived, [places.get(frame, 0) for frame in range(len(frames) - 1)])
        return arrived is not None

    def place_parked(self) -> bool:
        raise AssertionError("the simulated source has no staging memory")


class SimulatedPeriodic:
    """Ticks reach the link; there is no background stream."""

    def __init__(self, service: SimulatedService, link: SourceLink) -> None:
        self._service = service
        self._link = link

    def tick(self, now: float, at: float) -> None:
        self._link.tick(now + self._service.skipped)

    def stream(self) -> None:
        pass

    def worker_ended(self) -> None:
        raise AssertionError("the simulated pool reports no workers")


class Supervisor:
    """One life of it: the real main loop, paging and link. ``inbox`` holds messages and events that it has not read."""

    def __init__(self, service: SimulatedService) -> None:
        self.service = service
        self.inbox: deque[Input] = deque()
        self.paging: RemotePaging
        self.link: SourceLink
        self.pool: SimulatedPool
        self.life = Life(self._work)

    def _work(self, life: Life) -> None:
        core = Core(self.service.kernel, life, self.service.memory, self.service.births)
        self.pool = SimulatedPool(self.service, life)
        loop = self._main_loop(life, core, self._block(core))
        while True:
            unread = life.call("hear", lambda: self.inbox.popleft() if self.inbox else None)
            match unread:
                case None:
                    pass
                case FromWorker(message):
                    loop.on_message(b"", message if isinstance(message, bytes) else encode(message))
                case FromSource(word):
                    loop.on_source_message(SOURCE, _frames(word))
                case _:
                    loop.on_event(unread)

    def _block(self, core: Core) -> RamBlock:
        received = self.service.map
        block = SimpleNamespace(
            number=BLOCK,
            name=NAMES[BLOCK],
            page_size=PAGE,
            pages=COUNT,
            length=COUNT * PAGE,
            received=received,
            mapping=SimpleNamespace(address=core.address),
            memory=-1,
            forget_own_pages=core.space.table.clear,
            lost_pages=lambda: [page for page in range(COUNT) if received[page] == LOST],
        )
        return cast(RamBlock, block)

    def _main_loop(self, life: Life, core: Core, block: RamBlock) -> MainLoop:
        service = self.service

        def send_to_source(data: bytes) -> None:
            word = Word(decode(data, expect=FROM_SUPERVISOR))
            life.call("say", lambda: service.out.append(word))

        alarm = SimpleNamespace(tick_at=lambda due: None, call_soon=lambda act: act())
        placer = SimulatedPlacer(cast(Userfaultfd, core), alarm, self._event)
        placer.there = service.memory.pages
        own, by_block = SimpleNamespace(release=_never), SimpleNamespace(with_block=lambda number: service.living())
        self.paging = RemotePaging(
            {BLOCK: block},
            Engine(),
            placer,
            Wakers({BLOCK: block}, self.pool, own, by_block, self._event),
            SimpleNamespace(fetch=_never),
            alarm,
            self._event,
            fault_around=4 * PAGE,
            background_rate=0,
            poison_on_loss=False,
        )
        advised = AdvisedBlock(BLOCK, NAMES[BLOCK], PAGE, SIZES[BLOCK], RIGHT)
        link = self.link = self.paging.add_source("ipc:///x", [advised], PATIENCE, send_to_source, FOR_EVER)
        address = lambda buffer: cast(Bytes, buffer).address  # noqa: E731
        fast = source_fast_path(self.paging, link, [block], core.ioctl, address)
        clients = SimulatedClients(set(service.living()), self.paging)
        loop = MainLoop()
        loop.start(
            Ports(
                state=RunState(0.0, "running"),
                router=ABSENT,
                queue=deque(),
                wakeup=-1,
                blocks={BLOCK: block},
                clients=clients.attached,
                pool=self.pool,
                attach=ABSENT,
                release=clients,
                zero=ABSENT,
                paging=self.paging,
                sources=SimulatedSources(service, self.paging, link, fast),
                periodic=SimulatedPeriodic(service, link),
                answers=ABSENT,
                long_answers=ABSENT,
                replies=cast(Replies, SimpleNamespace(report_bug=_raise)),
                event=self._event,
            )
        )
        return loop

    def _event(self, kind: str, detail: str, **where: int | str) -> None:
        self.service.events.append(kind)
        if kind == "source" and self.service.births > 1:
            self.paging.source_back([BLOCK])

    @property
    def busy(self) -> bool:
        return not self.life.over and (self.life.at != "hear" or bool(self.inbox))


class SimulatedService:
    """``modes``: one client each. ``out`` and ``back`` are the wire between supervisor and source."""

    def __init__(self, modes: list[str], *, guarded: bool = False) -> None:
        self.kernel = Kernel(self.seen)
        self.memory = Memory(COUNT)
        self.descriptor = self.kernel.open(self.memory)
        self.map = bytearray(COUNT + FLAGS)
        self.map[COUNT + SHARED] = "shared" in modes
        self.map[COUNT + GUARDED] = guarded
        self.page_words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        self.page_words[counters.WINDOW_LIMIT] = 1 << 30
        self.grant = BlockGrant(BLOCK, "one", SIZES[BLOCK], PAGE, COUNT, "remote", "", 0, b"", self.descriptor, 1, -1)
        self.kernel.readable(SOURCE_AT, COUNT * PAGE, lambda at, size: b"".join(map(content, _pages(at, size))))
        self.source = Source()
        self.source.start(RIGHT)
        self.out: list[Word] = []
        self.back: list[Word] = []
        self.lossy: set[int] = set()
        self.events: list[str] = []
        self.skipped = 0.0
        self.births = self.worker_births = 0
        self.custodian = True
        self.supervisor: Supervisor | None = None
        self.rogue = self.kernel.space("rogue")
        self.rogue.areas.append(Area(1 << 32, (1 << 32) + COUNT * PAGE, self.memory, 0, True))
        self.clients = [self._client(number, mode) for number, mode in enumerate(modes, 1)]
        self.start_supervisor()
        for client in self.clients:
            self.start_worker(client)

    # --- births -------------------------------------------------------------------------------------------------------

    def _client(self, number: int, mode: str) -> Client:
        space = self.kernel.space(f"client {number}")
        ufd = simulated.Userfaultfd(space)
        start = number << 33
        area = Area(start, start + COUNT * PAGE, self.memory, 0, mode == "shared")
        area.registered, area.minor = ufd, bool(self.map[COUNT + GUARDED])
        space.areas.append(area)
        grant = RegionGrant(BLOCK, mode, start, COUNT * PAGE, 0)
        words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        return Client(number, space, self.kernel.open(ufd), ufd, grant, words)

    def client(self, number: int) -> Client:
        return self.clients[number - 1]

    def living(self) -> list[int]:
        return [client.number for client in self.clients if client.space.alive]

    def start_supervisor(self) -> None:
        """The first, or a successor: running workers connect to it and say hello."""
        unread = self.supervisor.inbox if self.supervisor is not None else ()
        self.births += 1
        self.supervisor = Supervisor(self)
        self.supervisor.inbox.extend(unread)
        self.supervisor.inbox.append(Tick(time.monotonic()))
        for client in self.clients:
            if client.served:
                self.supervisor.inbox.append(_hello(client))

    def start_worker(self, client: Client) -> None:
        """Started by the supervisor, or by the custodian where there is none."""
        client.mailbox = deque()
        if self.supervisor is not None:
            self.supervisor.pool.connected.discard(client.number)
        client.words[counters.BUSY_SINCE_NS] = 0
        self.worker_births += 1
        birth = self.worker_births
        shared: list[Requests] = []
        client.main = Life(lambda life: self._serve(life, client, birth, shared))
        client.waker = Life(lambda life: self._wake(life, client, birth, shared))

    def send_to_supervisor(self, message: FromWorker) -> None:
        """A message that is sent while it is dead waits at its sender; ``kill_supervisor`` may lose it."""
        if self.supervisor is not None:
            self.supervisor.inbox.append(message)

    def _requests(self, life: Life, client: Client) -> Requests:
        def send(data: bytes) -> None:
            life.call("ask", lambda: self.send_to_supervisor(FromWorker(data)))

        return Requests(client.number, client.words, send)

    def _handler(self, life: Life, client: Client, birth: int, requests: Requests) -> FaultHandler:
        calls: Calls = life.calls_of(self.kernel)
        space = self.kernel.space(f"worker {birth}")
        ufd = simulated.Userfaultfd(space)
        start = (2 * birth + (life is client.waker) + 64) << 40
        space.areas.append(Area(start, start + self.memory.size, self.memory, 0, True, ufd))
        own = OwnMapping(self.kernel.open(ufd), start, space.table.clear)
        received = memoryview(self.map)
        parts = self.grant, self.descriptor, received, RemotePages(self.grant), own, _no_report, calls
        block = GuardedBlock(*parts, locks=-1) if received[COUNT + GUARDED] else Block(*parts)
        region = Region(client.grant, block, FaultAround(4, True))
        pause = lambda seconds: life.call("pause", lambda: None)  # noqa: E731
        return FaultHandler(
            client.descriptor, [region], client.words, self.page_words, _no_report, calls, pause, requests
        )

    def _serve(self, life: Life, client: Client, birth: int, shared: list[Requests]) -> None:
        """The main thread of a worker."""
        requests = self._requests(life, client)
        shared.append(requests)
        handler = self._handler(life, client, birth, requests)
        handler.wake_everything()
        handler.unpoison_local()
        words = memoryview(bytearray(32 * BATCH)).cast("Q")
        while True:
            taken = life.call("read", lambda: self.kernel.messages(client.descriptor, BATCH))
            for at, message in enumerate(taken):
                for place, value in enumerate(message):
                    words[at * MESSAGE_FIELDS + place] = value
            if taken:
                handler.messages(words, len(taken))

    def _wake(self, life: Life, client: Client, birth: int, shared: list[Requests]) -> None:
        """The waker of a worker."""
        while not shared:
            life.call("start", lambda: None)
        requests = shared[0]
        handler = self._handler(life, client, -birth, requests)
        life.call("hello", lambda: self.send_to_supervisor(_hello(client)))
        mailbox = client.mailbox
        calls: Calls = life.calls_of(self.kernel)
        ufd, again = ClientUserfaultfd(client.descriptor, client.words, calls), self._requests(life, client)
        waker = PageWaker(handler.regions, ufd, client.words, calls, requests, again)
        while True:
            data = life.call("listen", lambda: mailbox.popleft() if mailbox else None)
            if data is not None and (placed := waker.fast_paths.get(data[:-OFFSET_BYTES])):
                placed(int.from_bytes(data[-OFFSET_BYTES:], "little"))
            elif data is not None:
                message = decode(data, expect=(Wake, Lost))
                assert isinstance(message, Wake | Lost)
                waker.receive(message)

    # --- deaths -------------------------------------------------------------------------------------------------------

    def kill_worker(self, client: Client, when: str, which: int = 0) -> None:
        """One thread where it stands, and with it the other."""
        lives = [life for life in (client.main, client.waker) if life is not None]
        for place, life in enumerate(lives):
            life.kill(when if place == which else "before")

    def kill_supervisor(self, when: str, kept: int) -> None:
        """``kept`` of its unread requests are still at their senders; the others are lost."""
        assert self.supervisor is not None
        self.supervisor.life.kill(when)
        unread = [one for one in self.supervisor.inbox if isinstance(one, FromWorker)]
        requests = [one for one in unread if isinstance(one.message, bytes)]
        self.supervisor.inbox = deque(requests[len(requests) - min(kept, len(requests)) :])
        self.out.clear()
        self.back.clear()  # sent to the routing id of the dead one

    def pollute(self, page: int) -> None:
        """A foreign user's unregistered mapping touches the page of a guarded block."""
        if self.map[COUNT + GUARDED]:
            self.kernel.touch(self.rogue, (1 << 32) + page * PAGE)

    def _strange(self, page: int) -> bool:
        return bool(self.map[COUNT + GUARDED]) and self.memory.pages.get(page) == bytes(PAGE)

    def kill_client(self, client: Client) -> None:
        self.kernel.die(client.space)
        self.kill_worker(client, "before")
        if self.supervisor is not None:
            self.supervisor.inbox.append(ProcessEnded(client.number))

    # --- the course of things -----------------------------------------------------------------------------------------

    def touch(self, client: Client, page: int, write: int | None = None) -> Thread:
        thread = self.kernel.touch(client.space, client.grant.address + page * PAGE, write)
        client.threads.append(thread)
        return thread

    @property
    def supervised(self) -> bool:
        return self.supervisor is not None and not self.supervisor.life.over

    def busy(self, client: Client) -> Life | None:
        """A thread of its worker that has work."""
        if not client.served:
            return None
        assert client.main is not None and client.waker is not None
        if client.main.at != "read" or client.userfaultfd.pending:
            return client.main
        return client.waker if client.waker.at != "listen" or client.mailbox else None

    def step(self, life: Life) -> None:
        life.step()
        if life.over:
            assert isinstance(life.end, ClientGone), f"a program ended by {life.end!r}"

    def exchange(self, style: str = "whole") -> bool:
        """One message each way."""
        moved = False
        if self.out and self.source.content:
            word, moved = self.out.pop(0), True
            self.back += self.source.hear(word.message, style)
        if self.back and self.supervisor is not None and self.supervised:
            self.supervisor.inbox.append(FromSource(self.back.pop(0)))
            moved = True
        return moved

    def settle(self, rounds: int = 3000) -> None:
        """Run until no program has work; programs that died get successors, if a program that can start them lives."""
        idle = 0
        for _ in range(rounds):
            moved = self._round()
            idle = 0 if moved else idle + 1
            if idle > 12:  # some ticks without any progress
                return
            if idle and self.supervised:
                self._tick()
        raise AssertionError("the programs never rest")

    def _tick(self) -> None:
        """Time passes, and the wire is emptied, so that pings do not pile up before other messages."""
        assert self.supervisor is not None
        self.skipped += 0.3
        self.supervisor.inbox.append(Tick(time.monotonic()))
        moved = True
        while moved:
            while self.supervisor.busy:
                self.step(self.supervisor.life)
            moved = self.exchange()
        if self.source.content is None:
            self.out.clear()

    def _round(self) -> bool:
        moved = False
        for thread in list(self.kernel.woken):
            self.kernel.run(thread)
            moved = True
        for client in self.clients:
            if client.space.alive and not client.served and self.custodian:
                self.start_worker(client)
            life = self.busy(client)
            if life is not None:
                self.step(life)
                moved = True
        if self.supervisor is not None and self.supervisor.busy:
            self.step(self.supervisor.life)
            moved = True
        talk = any(type(word.message).__name__ not in ("Ping", "Pong", "Listen") for word in [*self.out, *self.back])
        return (self.exchange() and talk) or moved

    def end(self) -> None:
        for client in self.clients:
            self.kill_worker(client, "before")
        if self.supervisor is not None:
            self.supervisor.life.kill("before")

    # --- the truth ----------------------------------------------------------------------------------------------------

    def seen(self, thread: Thread) -> None:
        client = next((client for client in self.clients if client.space is thread.space), None)
        if client is None:
            return
        page = (thread.address - client.grant.address) // PAGE
        if isinstance(thread.outcome, str):
            assert thread.outcome == SIGBUS and page in self.lossy, f"page {page}: {thread.outcome}"
            return
        assert thread.outcome is not None and thread.outcome[1:] == content(page)[1:], f"page {page} is not its source"

    def check(self) -> None:
        """Holds at every moment."""
        for page in range(COUNT):
            state, present = self.map[page], page in self.memory.pages and not self._strange(page)
            assert state != RECEIVED or present, f"page {page} is marked and was never placed"
            assert state != MISSING or not present, f"page {page} is present, and is marked missing"
            assert state != LOST or (page in self.lossy and not present), f"page {page} is given up"
        for page, found in self.memory.pages.items():
            if self._strange(page) and self.map[page] != RECEIVED:
                continue
            assert found[1:] == content(page)[1:], f"page {page} of the block is not what it should be"

    def check_rest(self) -> None:
        """Holds when every program has run as far as it could. A sleeping thread waits for an absent page, and the
        supervisor, if there is one, has its request. With supervisor, source and memory no thread sleeps."""
        for client in self.clients:
            if client.space.alive and not client.served:
                assert not self.custodian, f"{client.space.name} has no worker, and there is a custodian"
                continue
            for page in client.sleepers:
                assert self.map[page] != RECEIVED, f"{client.space.name} sleeps on page {page}, which is received"
                away = self.source.content is None or not self.supervised
                assert away or self.memory.room == 0, f"no program brings page {page}"
                if self.supervised and self.supervisor is not None:
                    standing = self.supervisor.paging.engine.waiters_of(BLOCK, page)
                    assert client.number in standing, (
                        f"{client.space.name} waits for page {page}, and no request has it"
                    )
        if self.supervised and self.supervisor is not None:
            self.supervisor.paging.engine.check()
            self.supervisor.link.flow.check()
            for ask in self.supervisor.paging.engine.outstanding():
                orphans = self.supervisor.link.flow.not_requested(ask.block, ask.first * PAGE, ask.end * PAGE)
                assert not orphans, f"counted as asked for, and is not: {orphans}"


def _hello(client: Client) -> FromWorker:
    return FromWorker(WorkerHello(client.number, 1, 0))


def _frames(word: Word) -> list[memoryview]:
    """The head, and frames that stand for their bytes in the simulated kernel."""
    frames: list[Any] = [memoryview(encode(word.message))]
    first = unpack_range(word.message.ranges, 0)[0] if isinstance(word.message, Pages) and word.frames else 0
    return frames + [Bytes(SOURCE_AT + first, length) for length in word.frames]


def _raise(what: object, error: Exception) -> None:
    raise error


def _never(*_: Any) -> None:
    raise AssertionError("there is no client zero here")


def _no_report(kind: str, block: int, offset: int, detail: str) -> None:
    assert kind != "polluted", detail


def _pages(offset: int, length: int) -> range:
    return range(offset // PAGE, (offset + length) // PAGE)
