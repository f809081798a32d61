"""The whole service around one remote block, on the simulated kernel and the simulated wire.

The real fault handlers, requests, engine, paging, link and flow; what is written here is what stands between them:
mailboxes, who is connected, and how each program dies. Every program is a life that stands still before every call
(of the kernel, or to send a word), so that it can be killed before or after any of them:

* a worker dies with all that it was told; its successor wakes everybody. None is born while there is no custodian.
* the supervisor dies with its engine, its links and everything in its box; some of what workers had said may reach its
  successor. Received map, page cache and workers outlive it. Workers say hello to the next one, which answers with a
  wake of nothing: everything is asked anew.
* the source dies with what it was asked; it comes back as itself. A client dies with its threads.

Any number of workers, and any one of supervisor, custodian and source at a time, as the service promises.
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
from postcopy_protocol.codec import decode, encode, unpack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import BlockGrant, Lost, RegionGrant, RequestPages, Wake
from postcopy_protocol.received_map import FLAGS, LOST, MISSING, RECEIVED, SHARED
from postcopy_protocol.return_path import FROM_SUPERVISOR, Pages, unpack_range
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.window import FaultAround
from postcopy_supervisor.blocks import RamBlock
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.paging.fast_path import source_fast_path
from postcopy_supervisor.paging.flow_control import Limits
from postcopy_supervisor.paging.paging import RemotePaging
from postcopy_supervisor.paging.placer import Placer
from postcopy_supervisor.paging.source_link import AdvisedBlock, SourceLink
from postcopy_supervisor.paging.wakers import Wakers
from postcopy_workers.client_ufd import ClientGone, ClientUserfaultfd, Region
from postcopy_workers.fault_handler import MESSAGE_FIELDS, FaultHandler
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
SOURCE_AT = 0x7000_0000_0000
BATCH = 8
PATIENCE = 0.5
MEANINGS = {errno.EEXIST: Status.PRESENT, errno.EAGAIN: Status.PARTIAL, errno.ENOSPC: Status.EXHAUSTED}
FOR_EVER = Limits(patience=2.0, attempts=1000)
"""Pages are given up only where a source says that it has lost them: time is half real here."""


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
    """A predecessor's page is compared with its source in real memory, which is not here: nobody pollutes here."""

    there: dict[int, bytes]

    def _accept_present(self, block: RamBlock, page: int, source: int) -> bool:
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


class Supervisor:
    """One life of it. ``box`` is what it has been told and has not read."""

    def __init__(self, service: SimulatedHouse) -> None:
        self.service = service
        self.box: deque[tuple[str, Any]] = deque()
        self.connected: set[int] = set()
        self.paging: RemotePaging
        self.link: SourceLink
        self.life = Life(self._work)

    def _work(self, life: Life) -> None:
        service = self.service
        core = Core(service.kernel, life, service.memory, service.births)
        block = SimpleNamespace(
            number=BLOCK,
            name=NAMES[BLOCK],
            page_size=PAGE,
            pages=COUNT,
            length=COUNT * PAGE,
            received=service.map,
            mapping=SimpleNamespace(address=core.address),
            memory=-1,
            forget_own_pages=core.space.table.clear,
            lost_pages=lambda: [page for page in range(COUNT) if service.map[page] == LOST],
        )
        ram = cast(RamBlock, block)

        def to_worker(worker: int, data: bytes) -> None:
            life.call("tell", lambda: self._tell(worker, data))

        def say(data: bytes) -> None:
            word = Word(decode(data, expect=FROM_SUPERVISOR))
            life.call("say", lambda: service.out.append(word))

        alarm = SimpleNamespace(ring_at=lambda due: None, aside=lambda act: act())
        placer = SimulatedPlacer(cast(Userfaultfd, core), alarm, self._event)
        placer.there = service.memory.pages
        living = lambda number: [client.number for client in service.clients if client.space.alive]  # noqa: E731
        wakers = Wakers(
            {BLOCK: ram},
            SimpleNamespace(send=to_worker),
            SimpleNamespace(release=_never),
            SimpleNamespace(with_block=living),
            self._event,
        )
        paging = self.paging = RemotePaging(
            {BLOCK: ram},
            Engine(),
            placer,
            wakers,
            SimpleNamespace(fetch=_never),
            alarm,
            self._event,
            fault_around=4 * PAGE,
            background_rate=0,
            poison_on_loss=False,
        )
        advised = AdvisedBlock(BLOCK, NAMES[BLOCK], PAGE, SIZES[BLOCK], RIGHT)
        self.link = paging.add_source("ipc:///x", [advised], PATIENCE, say, FOR_EVER)
        self.lane = source_fast_path(paging, self.link, [ram], core.ioctl, lambda buffer: cast(Bytes, buffer).address)
        while True:
            told = life.call("hear", lambda: self.box.popleft() if self.box else None)
            if told is not None:
                self._told(told[0], told[1], ram)

    def _told(self, kind: str, what: Any, block: RamBlock) -> None:
        paging = self.paging
        if kind == "hello":
            self.connected.add(what)
            paging.wakers.send(what, encode(Wake(0, b"")))
        elif kind == "request":
            self._requested(what, block)
        elif kind == "left":
            paging.left(what)
        elif kind == "tick":
            self.link.tick(time.monotonic() + self.service.skipped)
        elif kind == "word":
            self._word(what)

    def _requested(self, data: bytes, block: RamBlock) -> None:
        lane = self.paging.fast_paths.get(data[:-OFFSET_BYTES])
        if lane is not None:
            return lane(data)
        message = decode(data, expect=(RequestPages,))
        pages = [offset // PAGE for offset in unpack_offsets(message.offsets)]
        if self.service.client(message.worker).space.alive:
            if len(pages) == 1:
                self.paging.learn(data, message.worker, block)
            self.paging.fault(message.worker, block, pages)
        return None

    def _word(self, what: Word) -> None:
        paging = self.paging
        if isinstance(what.message, Pages) and len(what.frames) == 1:
            frame = Bytes(SOURCE_AT + unpack_range(what.message.ranges, 0)[0], what.frames[0])
            if self.lane(encode(what.message), cast(memoryview, frame)) is not None:
                return
        try:
            arrived = self.link.on_message(what.message, what.frames, time.monotonic() + self.service.skipped)
        except BadMessage:  # what comes twice, and after its time: not used
            return
        if arrived is not None:
            places = {frame: SOURCE_AT + offset for offset, _, _, frame in arrived.ranges}
            paging.arrived(arrived, [places.get(frame, 0) for frame in range(len(what.frames))])

    def _event(self, kind: str, detail: str, **where: int | str) -> None:
        self.service.events.append(kind)
        if kind == "source" and self.service.births > 1:
            self.paging.source_back([BLOCK])

    def _tell(self, worker: int, data: bytes) -> None:
        """The router: who is not connected does not hear."""
        client = self.service.client(worker)
        if worker in self.connected and client.served:
            client.mailbox.append(data)

    @property
    def busy(self) -> bool:
        return not self.life.over and (self.life.at != "hear" or bool(self.box))


class SimulatedHouse:
    """``modes``: one client each. ``out`` and ``back`` are the wire between supervisor and source."""

    def __init__(self, modes: list[tuple[str, bool]]) -> None:
        self.kernel = Kernel(self.seen)
        self.memory = Memory(COUNT)
        self.descriptor = self.kernel.open(self.memory)
        self.map = bytearray(COUNT + FLAGS)
        self.map[COUNT + SHARED] = any(mode == "shared" for mode, _ in modes)
        self.page_words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        self.page_words[counters.WINDOW_LIMIT] = 1 << 30
        self.grant = BlockGrant(BLOCK, "one", SIZES[BLOCK], PAGE, COUNT, "remote", "", 0, 0, self.descriptor, 1, -1)
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
        self.clients = [self._client(number, *mode) for number, mode in enumerate(modes, 1)]
        self.start_supervisor()
        for client in self.clients:
            self.start_worker(client)

    # --- births -------------------------------------------------------------------------------------------------------

    def _client(self, number: int, mode: str, announced: bool) -> Client:
        space = self.kernel.space(f"client {number}")
        ufd = simulated.Userfaultfd(space)
        start = number << 33
        area = Area(start, start + COUNT * PAGE, self.memory, 0, mode == "shared")
        area.registered, area.minor = ufd, announced
        space.areas.append(area)
        grant = RegionGrant(BLOCK, mode, start, COUNT * PAGE, 0, announced)
        words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        return Client(number, space, self.kernel.open(ufd), ufd, grant, words)

    def client(self, number: int) -> Client:
        return self.clients[number - 1]

    def start_supervisor(self) -> None:
        """The first, or a successor: workers that live connect to it and say hello."""
        unread = self.supervisor.box if self.supervisor is not None else ()
        self.births += 1
        self.supervisor = Supervisor(self)
        self.supervisor.box.extend(unread)
        self.supervisor.box.append(("tick", None))
        for client in self.clients:
            if client.served:
                self.supervisor.box.append(("hello", client.number))

    def start_worker(self, client: Client) -> None:
        """Ordered by the supervisor, or by the custodian where there is none."""
        client.mailbox = deque()
        if self.supervisor is not None:
            self.supervisor.connected.discard(client.number)
        client.words[counters.BUSY_SINCE_NS] = 0
        self.worker_births += 1
        birth = self.worker_births
        shared: list[Requests] = []
        client.main = Life(lambda life: self._serve(life, client, birth, shared))
        client.waker = Life(lambda life: self._wake(life, client, birth, shared))

    def tell_supervisor(self, kind: str, what: Any) -> None:
        """What is said while it is dead waits with who said it (and may be lost yet, see kill_supervisor)."""
        if self.supervisor is not None:
            self.supervisor.box.append((kind, what))

    def _requests(self, life: Life, client: Client) -> Requests:
        def send(data: bytes) -> None:
            life.call("ask", lambda: self.tell_supervisor("request", data))

        return Requests(client.number, client.words, send)

    def _handler(self, life: Life, client: Client, birth: int, requests: Requests) -> FaultHandler:
        calls: Calls = life.calls_of(self.kernel)
        space = self.kernel.space(f"worker {birth}")
        ufd = simulated.Userfaultfd(space)
        start = (2 * birth + (life is client.waker) + 64) << 40
        space.areas.append(Area(start, start + self.memory.size, self.memory, 0, True, ufd))
        own = OwnMapping(self.kernel.open(ufd), start, space.table.clear)
        received = memoryview(self.map)
        block = Block(self.grant, self.descriptor, received, RemotePages(self.grant), own, _no_report, calls)
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
        life.call("hello", lambda: self.tell_supervisor("hello", client.number))
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
        """``kept`` of the words that it has not read are still with those who said them; the others are lost."""
        assert self.supervisor is not None
        self.supervisor.life.kill(when)
        mine = [told for told in self.supervisor.box if told[0] == "request"]
        self.supervisor.box = deque(mine[len(mine) - min(kept, len(mine)) :])
        self.out.clear()
        self.back.clear()  # said to the routing id of the one that is dead

    def kill_client(self, client: Client) -> None:
        self.kernel.die(client.space)
        self.kill_worker(client, "before")
        if self.supervisor is not None:
            self.supervisor.box.append(("left", client.number))

    # --- the course of things -----------------------------------------------------------------------------------------

    def touch(self, client: Client, page: int, write: int | None = None) -> Thread:
        thread = self.kernel.touch(client.space, client.grant.address + page * PAGE, write)
        client.threads.append(thread)
        return thread

    @property
    def supervised(self) -> bool:
        return self.supervisor is not None and not self.supervisor.life.over

    def busy(self, client: Client) -> Life | None:
        """A thread of its worker that has something to do."""
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
        """One word each way."""
        moved = False
        if self.out and self.source.content:
            word, moved = self.out.pop(0), True
            self.back += self.source.hear(word.message, style)
        if self.back and self.supervisor is not None and self.supervised:
            self.supervisor.box.append(("word", self.back.pop(0)))
            moved = True
        return moved

    def settle(self, rounds: int = 3000) -> None:
        """Until nobody has anything to do; programs that died have successors, as far as somebody lives to start
        them."""
        idle = 0
        for _ in range(rounds):
            moved = self._round()
            idle = 0 if moved else idle + 1
            if idle > 12:  # some ticks in which nothing came of anything
                return
            if idle and self.supervised:
                self._tick()
        raise AssertionError("they spin")

    def _tick(self) -> None:
        """A moment passes, and the wire is emptied: pings must not pile up before what matters."""
        assert self.supervisor is not None
        self.skipped += 0.3
        self.supervisor.box.append(("tick", None))
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
        """True at every moment."""
        for page in range(COUNT):
            state, present = self.map[page], page in self.memory.pages
            assert state != RECEIVED or present, f"page {page} is marked and was never placed"
            assert state != MISSING or not present, f"page {page} is present, and nobody said that it is ours"
            assert state != LOST or (page in self.lossy and not present), f"page {page} is given up"
        for page, found in self.memory.pages.items():
            assert found[1:] == content(page)[1:], f"page {page} of the block is not what it should be"

    def check_rest(self) -> None:
        """True when everybody has run as far as they could: who sleeps, sleeps for a page that is not there, and stands
        in the book of a supervisor that asks for it; with a supervisor, a source and memory, nobody sleeps."""
        for client in self.clients:
            if client.space.alive and not client.served:
                assert not self.custodian, f"{client.space.name} has no worker, and there is a custodian"
                continue
            for page in client.sleepers:
                assert self.map[page] != RECEIVED, f"{client.space.name} sleeps on page {page}, which is received"
                away = self.source.content is None or not self.supervised
                assert away or self.memory.room == 0, f"nobody brings page {page}"
                if self.supervised and self.supervisor is not None:
                    standing = self.supervisor.paging.engine.waiters_of(BLOCK, page)
                    assert client.number in standing, f"{client.space.name} waits for page {page}, and nobody knows"
        if self.supervised and self.supervisor is not None:
            self.supervisor.paging.engine.check()
            self.supervisor.link.flow.check()
            for ask in self.supervisor.paging.engine.outstanding():
                orphans = self.supervisor.link.flow.not_requested(ask.block, ask.first * PAGE, ask.end * PAGE)
                assert not orphans, f"counted as asked for, and is not: {orphans}"


def _never(*_: Any) -> None:
    raise AssertionError("there is no client zero here")


def _no_report(kind: str, block: int, offset: int, detail: str) -> None:
    assert kind != "polluted", detail


def _pages(offset: int, length: int) -> range:
    return range(offset // PAGE, (offset + length) // PAGE)
