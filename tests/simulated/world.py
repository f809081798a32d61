"""One served block on the simulated kernel: its clients, their workers, and what every client ought to see.

``World`` knows the truth: what the source was when it was served, what shared clients have written since, what each
private client has written for itself. Every touch that ends is compared with it at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from postcopy_kernel import abi
from postcopy_protocol import counters
from postcopy_protocol.messages import BlockGrant, RegionGrant
from postcopy_protocol.received_map import CHANGED, FLAGS, GUARDED, LOST, MISSING, RECEIVED, SHARED, TRUST, WATCHED
from postcopy_protocol.window import FaultAround
from postcopy_workers.client_ufd import ClientGone, Region
from postcopy_workers.fault_handler import FaultHandler
from postcopy_workers.fault_loop import MESSAGE_FIELDS
from postcopy_workers.guarded_block import GuardedBlock
from postcopy_workers.page_sources import NoPages, PageSource
from postcopy_workers.placing import Block, Calls, OwnMapping
from tests.simulated.kernel import SIGBUS, Area, Kernel, Memory, Space, Thread, Userfaultfd
from tests.simulated.lives import Killed, Life
from tests.simulated.sources import Function, SimulatedFilePages, SimulatedHandlerPages, SourceFile

BATCH = 16
CALLS_FOR_A_MESSAGE = 48
"""More system calls than any message needs, its window of at most eight pages included."""


@dataclass(frozen=True)
class Kind:
    """What a client is: how it mapped the block, and which pages of it (to ``end``; 0: all)."""

    mode: str
    guarded: bool = False
    first: int = 0
    end: int = 0
    largest: int = 8
    adaptive: bool = True


@dataclass(eq=False)
class Client:
    """A client process, and its worker's life, if it has one."""

    kind: Kind
    space: Space
    userfaultfd: Userfaultfd
    descriptor: int
    grant: RegionGrant
    words: memoryview
    threads: list[Thread] = field(default_factory=list)
    own_pages: dict[int, bytes] = field(default_factory=dict)
    life: Life | None = None
    handler: FaultHandler | None = None
    messages: int = 0
    calls_before: int = 0

    def address(self, page: int) -> int:
        return self.grant.address + page * self.space.page_size - self.grant.offset

    @property
    def pages(self) -> range:
        size = self.space.page_size
        return range(self.grant.offset // size, (self.grant.offset + self.grant.length) // size)

    @property
    def sleepers(self) -> list[Thread]:
        return [thread for thread in self.threads if self.space.alive and thread.asleep_on is not None]


class World:
    """``pages`` pages; the source is ``short`` bytes shorter. ``kind`` is ``file`` or ``handler``."""

    def __init__(
        self, kinds: list[Kind], pages: int = 12, *, kind: str = "file", page_size: int = 4096, short: int = 0
    ) -> None:
        self.kernel = Kernel(self.seen)
        self.page_size = page_size
        size = pages * page_size - short
        self.memory = Memory(pages, page_size)
        self.source = SourceFile(self.kernel, size, page_size)
        self.function = Function(self.source)
        self.descriptor = self.kernel.open(self.memory)
        self.map = bytearray(pages + FLAGS)
        self.map[pages + SHARED] = any(kind.mode == "shared" for kind in kinds)
        self.guarded = self.map[pages + GUARDED] = any(kind.guarded for kind in kinds)
        self.service = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        self.service[counters.WINDOW_LIMIT] = 1 << 30
        self.grant = BlockGrant(0, "ram0", size, page_size, pages, kind, "", size, b"", self.descriptor, 1, 2)
        self.truth = {page: self.source.page(page) for page in range(pages)}
        self.reports: list[tuple[str, int, int, str]] = []
        self.paused: list[float] = []
        self.births = 0
        self.quarantined: set[int] = set()  # clients, by number, whose next workers have no source
        # What was done to the block that our code cannot be blamed for: pages by deed.
        self.punched: set[int] = set()
        self.polluted: set[int] = set()
        self.hopeless: set[int] = set()  # a handler has failed at them at least once
        self.rogue = self.kernel.space("rogue", page_size)
        self.rogue.areas.append(Area(1 << 40, (1 << 40) + self.memory.size, self.memory, 0, True))
        self.clients = [self._client(number, kind) for number, kind in enumerate(kinds)]

    # --- birth --------------------------------------------------------------------------------------------------------

    def _client(self, number: int, kind: Kind) -> Client:
        space = self.kernel.space(f"client {number}", self.page_size)
        ufd = Userfaultfd(space)
        start, size = (number + 1) << 33, self.page_size
        end = kind.end or self.grant.pages
        area = Area(start, start + (end - kind.first) * size, self.memory, kind.first * size, kind.mode == "shared")
        area.registered, area.minor = ufd, self.guarded
        space.areas.append(area)
        grant = RegionGrant(0, kind.mode, start, area.end - start, area.offset)
        words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        return Client(kind, space, ufd, self.kernel.open(ufd), grant, words)

    def block(self, calls: Calls, quarantined: bool = False) -> Block:
        """A block as a new worker makes it: from the grant, an own mapping and the shared received map."""
        self.births += 1
        space = self.kernel.space(f"worker {self.births}", self.page_size)
        ufd = Userfaultfd(space)
        start = (self.births + 64) << 36
        space.areas.append(Area(start, start + self.memory.size, self.memory, 0, True, ufd))
        own = OwnMapping(self.kernel.open(ufd), start, space.table.clear)
        pages = NoPages(self.grant, "quarantined") if quarantined else self._pages()
        parts = self.grant, self.descriptor, memoryview(self.map), pages, own, self._report, calls
        return GuardedBlock(*parts, locks=-1) if self.guarded else Block(*parts)

    def _pages(self) -> PageSource:
        if self.grant.kind == "handler":
            at = 0x6000_0000_0000 + (self.births << 28)
            return SimulatedHandlerPages(self.grant, self.function, 8 * self.page_size, self.kernel, at)
        return SimulatedFilePages(self.source)

    def _report(self, kind: str, block: int, offset: int, detail: str) -> None:
        self.reports.append((kind, block, offset, detail))

    def reported(self, kind: str) -> list[int]:
        """Pages reported so."""
        return [offset // self.page_size for what, _, offset, _ in self.reports if what == kind]

    def fault_handler(self, client: Client, calls: Calls, life: Life | None = None) -> FaultHandler:
        def pause(seconds: float) -> None:
            self.paused.append(seconds)
            if life is not None:
                life.call("pause", lambda: None)

        kind = client.kind
        quarantined = self.clients.index(client) in self.quarantined
        region = Region(client.grant, self.block(calls, quarantined), FaultAround(kind.largest, kind.adaptive))
        return FaultHandler(client.descriptor, [region], client.words, self.service, self._report, calls, pause)

    def live(self, client: Client) -> Life:
        """A worker for this client: the first, or a successor. It stands before its first call."""
        assert client.life is None or client.life.over

        def work(life: Life) -> None:
            handler = client.handler = self.fault_handler(client, life.calls_of(self.kernel), life)
            handler.wake_everything()
            handler.unpoison_local()
            client.calls_before = life.calls  # as many as there were pages to heal
            words = memoryview(bytearray(32 * BATCH)).cast("Q")
            while True:
                taken = life.call("read", lambda: self.kernel.messages(client.descriptor, BATCH))
                self._bounded(client, life, len(taken))
                for at, (event, flags, address) in enumerate(taken):
                    words[at * MESSAGE_FIELDS : at * MESSAGE_FIELDS + 3] = memoryview(
                        event.to_bytes(8, "little") + flags.to_bytes(8, "little") + address.to_bytes(8, "little")
                    ).cast("Q")
                if taken:
                    handler.messages(words, len(taken))

        client.words[counters.BUSY_SINCE_NS] = 0  # a worker's first store: its predecessor may have died busy
        client.messages, client.calls_before = 0, 0
        client.life = Life(work)
        return client.life

    @staticmethod
    def _bounded(client: Client, life: Life, taken: int) -> None:
        spent, causes = life.calls - client.calls_before, client.messages
        assert spent <= 2 + causes * CALLS_FOR_A_MESSAGE, f"{spent} calls for {causes} messages and pages to heal"
        client.messages = taken + len(counters.denied(client.words))
        client.calls_before = life.calls

    # --- the course of things -----------------------------------------------------------------------------------------

    def touch(self, client: Client, page: int, write: int | None = None) -> Thread:
        thread = self.kernel.touch(client.space, client.address(page), write)
        client.threads.append(thread)
        return thread

    def busy(self, client: Client) -> bool:
        """Has this client's worker anything to do?"""
        life = client.life
        if life is None or life.over:
            return False
        return life.at != "read" or bool(client.userfaultfd.pending or client.userfaultfd.events)

    def step(self, client: Client) -> None:
        """One call of its worker; what ends a worker must have a reason."""
        assert client.life is not None
        client.life.step()
        self.check_end(client)

    def check_end(self, client: Client) -> None:
        life = client.life
        if life is not None and life.over and not isinstance(life.end, Killed):
            assert isinstance(life.end, ClientGone) and not client.space.alive, f"a worker ended by {life.end!r}"

    def kill(self, client: Client, when: str) -> None:
        assert client.life is not None
        client.life.kill(when)

    def settle(self) -> None:
        """Let everybody run until nobody has anything to do; workers that died have successors."""
        for _ in range(4000):
            for thread in list(self.kernel.woken):
                self.kernel.run(thread)
            for client in self.clients:
                if client.space.alive and (client.life is None or client.life.over):
                    self.live(client)
                if self.busy(client):
                    self.step(client)
            if not self.kernel.woken and not any(self.busy(client) for client in self.clients):
                return
        raise AssertionError(f"they spin; at {[client.life and client.life.at for client in self.clients]}")

    def end(self) -> None:
        for client in self.clients:
            if client.life is not None:
                client.life.kill("before")

    # --- what others do to the block ----------------------------------------------------------------------------------

    def punch(self, page: int) -> None:
        self.kernel.punch(self.memory, page)
        self.truth[page] = self.source.page(page)
        self.punched.add(page)

    def pollute(self, page: int) -> None:
        """Somebody's unregistered mapping touches it."""
        if page not in self.memory.pages:
            self.polluted.add(page)
            self.kernel.touch(self.rogue, (1 << 40) + page * self.page_size)

    def change_the_file(self, size: int | None = None, *, noticed: bool = True) -> None:
        """Cut it, or write to it. Nobody could without our giving up the lease; whoever looks first may notice it, and
        marks it for all workers."""
        if size is None:
            self.source.rewrite()
        else:
            self.source.cut(size)
        self.map[self.grant.pages + TRUST] = CHANGED if noticed else WATCHED

    # --- the truth ----------------------------------------------------------------------------------------------------

    def seen(self, thread: Thread) -> None:
        """Compare what a thread found with the truth, and learn what it wrote."""
        client = next((client for client in self.clients if client.space is thread.space), None)
        if client is None:
            return
        page = (thread.address - client.grant.address + client.grant.offset) // self.page_size
        if isinstance(thread.outcome, str):
            assert thread.outcome == SIGBUS, f"page {page}: {thread.outcome}"
            denied = (0, page) in counters.denied(client.words)
            assert denied or self.may_be_lost(page), f"{client.space.name} got SIGBUS at page {page}, which can be had"
            return
        found = thread.outcome
        assert found is not None
        own = client.own_pages.get(page)
        if own is not None:
            assert found == own, f"page {page}: a private client has lost what it wrote"
        elif not self.excused(page):
            assert found == self.truth[page], f"{client.space.name} found {found[:1]!r} in page {page}: {found[1:3]!r}"
        if thread.write is not None:
            stored = bytes((thread.write,)) + found[1:]
            if client.kind.mode == "private":
                client.own_pages[page] = stored
            else:
                self.truth[page] = stored

    def excused(self, page: int) -> bool:
        """May this client find something else than the truth? Only where a page was polluted, and nobody could tell
        (the block is not guarded), or it was ours before (punched by a client that may write)."""
        return page in self.polluted and (not self.guarded or page in self.punched)

    def may_be_lost(self, page: int) -> bool:
        return self.source.changed or page in self.hopeless or bool(self.source.unreadable)

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """True at every moment, whoever stands wherever."""
        for page in range(self.grant.pages):
            state, present = self.map[page], page in self.memory.pages
            if state == RECEIVED and not present:
                assert page in self.punched, f"page {page} is marked and was never placed"
            if state == MISSING and present:
                assert page in self.polluted, f"page {page} is present, and nobody said that it is ours"
            if state == LOST:
                assert self.may_be_lost(page), f"page {page} is given up"

    def check_rest(self) -> None:
        """True when everybody has run as far as they could."""
        for client in self.clients:
            if client.space.alive:
                pages = [(thread.address - client.address(0)) // self.page_size for thread in client.sleepers]
                assert not pages, f"{client.space.name} sleeps on {[(page, self.map[page]) for page in pages]}"
                assert client.words[counters.BUSY_SINCE_NS] == 0, "an idle worker looks busy to the watchdog"
        for page, bytes_of_it in self.memory.pages.items():
            if not self.excused(page) and (page not in self.polluted or self.map[page] == RECEIVED):
                assert bytes_of_it == self.truth[page], f"page {page} is not what it should be"

    def check_healed(self) -> None:
        """A client that is not in quarantine has no poison at a page that is there."""
        for number, client in enumerate(self.clients):
            if client.space.alive and number not in self.quarantined:
                there = [page for page in self.memory.pages if self.map[page] == RECEIVED]
                stuck = [page for _, page in counters.denied(client.words) if page in there]
                assert not stuck, f"{client.space.name} was denied pages {stuck}, which are there"


EVENT = (int(abi.EventKind.REMOVE), 0, 0)
