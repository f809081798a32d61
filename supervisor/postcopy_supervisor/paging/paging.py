"""Remote paging: ties the engine, the links to sources, the placer, the wakers and the background stream together.

A fault of a local block goes to worker zero, one of a remote block over the link of its source. Pages that come are
placed here, then their waiters are released.

Pages for which there is no memory are given up for now. Those with a waiter are requested again a little later
(flow_control.py); the others are as if they had not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from postcopy_protocol.counters import bucket
from postcopy_protocol.geometry import runs
from postcopy_protocol.received_map import LOST, MISSING, RECEIVED
from postcopy_protocol.return_path import RangeKind
from postcopy_protocol.stages import PLACED
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.window import FaultAround, placed_until

from ..blocks import RamBlock
from ..event_log import RecordEvent
from .background import Background
from .engine import Ask, Effect, Engine, Release
from .fast_path import WorkerFastPath, worker_fast_path
from .flow_control import BACKGROUND, Limits, RangeRequest
from .placer import Placer, event_fields
from .ports import Alarm, Clock, LocalPages, SendToSource
from .source_link import AdvisedBlock, Arrived, LinkState, SourceLink
from .wakers import Wakers

REMOTE_WINDOW = 256 << 10  # largest fault-around of a remote block: while clients wait, no answer is longer
AHEAD = 2 << 20  # bytes in front of a client that others have requested, above which it requests none behind them
STREAMS = 64  # of all clients of a block together
FOLLOWING_SECONDS = 0.02  # so long, or as an urgent request takes, a client that follows waits for more than its page
MOST_FOLLOWING_SECONDS = 0.05  # ... but no longer: its page may be here, and the urgent request may have been held up
MOST_FAST_PATHS = 64  # of one worker: it requests pages of as many blocks, each in one form
MISSING_BYTE = bytes((MISSING,))


@dataclass(frozen=True, slots=True)
class Follower:
    """A waiter of a page that others have requested. It continues when the last page of the window that was requested
    on its behalf has an answer, or at ``due``: then it has many pages before it and not one."""

    waiter: int
    page: int
    due: float


class RemotePaging:
    """Faults in, pages in; requests, placements and releases out. It owns the links (a ``LinkOwner``)."""

    def __init__(
        self,
        blocks: dict[int, RamBlock],
        engine: Engine,
        placer: Placer,
        wakers: Wakers,
        local: LocalPages,
        alarm: Alarm,
        event: RecordEvent,
        *,
        fault_around: int,
        background_rate: int,
        poison_on_loss: bool,
        clock: Clock = time.monotonic,
    ) -> None:
        """``blocks`` by number; ``fault_around`` in bytes; ``background_rate`` as for ``Background``."""
        self.engine, self.placer, self.wakers = engine, placer, wakers
        self.links: dict[int, SourceLink] = {}  # by block, of remote blocks
        self.background = Background(engine, blocks, self.links, background_rate, clock(), self)
        self.cursor = self.background.cursor
        self.fast_paths: dict[bytes, WorkerFastPath] = {}
        """By the head of a worker's requests for one page: ``worker_fast_path.on_request``. Filled by ``learn``."""
        self.following: dict[tuple[int, int], list[Follower]] = {}
        """By block and the page that they wait for; always the same object. That page is requested, so at rest there is
        none: it has an answer, or is lost, or they are due."""
        self.roomy = True  # false: memory is scarce, so only pages with a waiter may come
        self._blocks, self._local, self._alarm, self._event = blocks, local, alarm, event
        self._fault_around, self._poison_on_loss, self._clock = fault_around, poison_on_loss, clock
        self._heads: dict[int, list[bytes]] = {}  # by worker: its keys of fast_paths
        self._windows: dict[int, FaultAround] = {}  # by block: a window belongs to the stream of all its clients
        self._held = False
        self._short_at = -1  # what ``placed`` was at the last shortage of memory

    @property
    def placed(self) -> int:
        """Pages of remote blocks placed since the start."""
        return self.placer.placed

    def add_source(
        self,
        endpoint: str,
        blocks: Sequence[AdvisedBlock],
        patience: float,
        send: SendToSource,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> SourceLink:
        """The link to one more source, which has these blocks."""
        link = SourceLink(endpoint, blocks, patience, send, self._event, self, limits)
        self.links.update(dict.fromkeys((block.block for block in blocks), link))
        return link

    def fault(self, waiter: int, block: RamBlock, pages: Sequence[int], window: int = 0) -> None:
        """A waiter faulted on these pages. ``window``: pages to request with each, instead of the fault-around."""
        effects: list[Effect] = []
        link = self.links.get(block.number)
        denied = self._poison_on_loss and link is not None and link.state is LinkState.PAUSED
        for page in pages:
            state = block.received[page]
            if state in (RECEIVED, LOST):
                effects.append(Release(waiter, block.number, page, state == LOST))
            elif denied:
                effects.append(Release(waiter, block.number, page, True))
            elif self.engine.first_gap(block.number, page, page + 1) is None:
                asks, last = ([], -1) if window or link is None else self._extend(block, page, link)
                if link is not None and link.flow.background_in_flight:
                    alone = link.promote(waiter, block.number, page * block.page_size, block.page_size, self._clock())
                    if last >= 0 and (alone or (block.number, page) in self.following):
                        last = page  # it comes before the others
                effects += asks if last >= 0 else self.engine.fault(waiter, block.number, page, page + 1)
                if link is not None and last >= 0:
                    self._follow(waiter, block.number, page, last, link.flow.urgent_pace)
            else:
                end = self._end_of_request(block, page, window or self._window_of(block).window(page))
                self.cursor[block.number] = end
                effects += self.engine.fault(waiter, block.number, page, end)
        self._do(effects, waiter)

    def hold(self, held: bool) -> None:
        """While held no page is requested of a source; those that are in flight come. The fast paths, which would
        request pages, are made again afterwards."""
        if held:
            self.fast_paths.clear()
            self._heads.clear()
        self._held = held
        for link in {id(link): link for link in self.links.values()}.values():
            link.hold(held, self._clock())

    def learn(self, data: bytes, waiter: int, block: RamBlock) -> None:
        """``data`` was a RequestPages of one page that ``decode`` took: messages that differ only in the offset take
        the fast path from now on."""
        link = self.links.get(block.number)
        heads = self._heads.setdefault(waiter, [])
        if link is not None and not self._held and len(heads) < MOST_FAST_PATHS:
            heads.append(data[:-OFFSET_BYTES])
            window = self._window_of(block).window
            self.fast_paths[data[:-OFFSET_BYTES]] = worker_fast_path(self, waiter, block, link, window)

    def left(self, waiter: int) -> None:
        """A client is gone."""
        self.engine.leave(waiter)
        for key in list(self.following):
            self._take(key, lambda one: one.waiter == waiter)
        for head in self._heads.pop(waiter, ()):
            self.fast_paths.pop(head, None)

    def do(self, effects: list[Effect]) -> None:
        """Carry out effects of the engine that no client in particular has caused."""
        self._do(effects, BACKGROUND)

    @property
    def idle(self) -> bool:
        """``stream`` has nothing to do: there is no background, and no follower whose wait may be over."""
        return not self.background.rate and not self.following

    def stream(self, left: int) -> float | None:
        """Request pages in the background, at most ``left`` bytes; returns when to call again at the latest."""
        due = self._late() if self.following else None
        later = self.background.stream(left, self._clock()) if self.roomy else None
        return later if due is None else due if later is None else min(due, later)

    def catch_up(self, block: int, first: int, end: int) -> None:
        """Pages have an answer: the followers that wait for one of them fault again, and get theirs."""
        for key in [key for key in self.following if key[0] == block and first <= key[1] < end]:
            for one in self.following.pop(key):
                self.fault(one.waiter, self._blocks[block], (one.page,), 1)

    def _follow(self, waiter: int, block: int, page: int, last: int, pace: float) -> None:
        self.engine.deduplicated += 1
        due = self._clock() + min(max(FOLLOWING_SECONDS, pace), MOST_FOLLOWING_SECONDS)
        self.following.setdefault((block, last), []).append(Follower(waiter, page, due))
        self._alarm.tick_at(due)

    def _late(self) -> float | None:
        """Followers that have waited long enough fault again: they get their page, or wait for it alone. Returns when
        the next one is due."""
        now = self._clock()
        for key in [key for key, group in self.following.items() if group[0].due <= now]:
            for one in self._take(key, lambda one: one.due <= now):
                self.fault(one.waiter, self._blocks[key[0]], (one.page,), 1)
        return min((group[0].due for group in self.following.values()), default=None)

    def _take(self, key: tuple[int, int], over: Callable[[Follower], bool]) -> list[Follower]:
        """Take those of a group whose wait is ``over``."""
        found: list[Follower] = []
        kept: list[Follower] = []
        for one in self.following.pop(key):
            (found if over(one) else kept).append(one)
        if kept:
            self.following[key] = kept
        return found

    def _end_of_request(self, block: RamBlock, page: int, window: int) -> int:
        """The end of what is requested with a page: within the window, as far as everything is missing."""
        behind = block.received[page + 1 : min(block.pages, page + window)] if window > 1 and self.roomy else b""
        return page + 1 + len(behind) - len(behind.lstrip(MISSING_BYTE))

    def _extend(self, block: RamBlock, page: int, link: SourceLink) -> tuple[list[Effect], int]:
        """One more client walks where pages are requested already. It has its share in the stream: a window behind what
        is requested, so that as much is in flight as if each client walked alone. Returns what to request, and the page
        to wait for; -1: ``page`` itself."""
        if self._window_of(block).largest_pages == 1:
            return [], -1  # there are no streams, only pages
        number, received, end = block.number, block.received, page
        last = min(block.pages, page + AHEAD // block.page_size)
        while end < last:
            gap = self.engine.first_gap(number, end, last)
            requested = last if gap is None else gap[0]
            placed = placed_until(requested, received[requested:last])
            if placed == end:
                break
            end = placed
        if end == last:
            follows = received[end - 1] == MISSING and not link.flow.background_in_flight
            # One page is no window: it may be the page itself.
            return [], end - 1 if follows and self.engine.ranges(number).start(end - 1) < end - 1 else -1
        pages = self._window_of(block).extend(page, end)
        gap = self.engine.first_gap(number, end, self._end_of_request(block, end, pages))
        if gap is None or min(pages, gap[1] - end) < 2:
            return [], -1
        self.cursor[number] = gap[1]
        return self.engine.ask(number, *gap), gap[1] - 1

    def _window_of(self, block: RamBlock) -> FaultAround:
        """Fault-around of one block."""
        around = self._windows.get(block.number)
        if around is None:
            largest = max(1, min(self._fault_around, REMOTE_WINDOW) // block.page_size)
            around = self._windows[block.number] = FaultAround(largest, True, block.received, STREAMS)
        return around

    def _do(self, effects: list[Effect], client: int) -> None:
        releases: list[Release] = []
        for effect in effects:
            if isinstance(effect, Ask):
                self._request(effect, client)
            else:
                releases.append(effect)
        if releases:
            self.wakers.release(releases)

    def _request(self, ask: Ask, client: int) -> None:
        link = self.links.get(ask.block)
        if link is None:
            return self._local.fetch(ask)
        size = self._blocks[ask.block].page_size
        return link.request(client, ask.block, ask.first * size, (ask.end - ask.first) * size, self._clock())

    def arrived(self, arrived: Arrived, addresses: Sequence[int]) -> None:
        """Place what a source has sent (``addresses`` of the raw frames), then release its waiters."""
        block = self._blocks[arrived.block]
        for offset, length, kind, frame in arrived.ranges:
            first, end = offset // block.page_size, (offset + length) // block.page_size
            lost: Sequence[int] = ()
            stop = end
            if kind == RangeKind.LOST:
                lost = self.placer.lose(block, first, end, arrived.reason)
            else:
                self.wakers.await_arrived(block, first, end)
                if kind == RangeKind.ZERO:
                    stop = self.placer.place_zeros(block, first, end)
                else:
                    stop = self._place_timed(block, first, end, addresses[frame])
            if first < stop:
                self._answered(block, first, stop, lost)
            if stop < end:
                self._no_memory(block, stop, end)

    def _place_timed(self, block: RamBlock, first: int, end: int, source: int) -> int:
        begun = self._clock()
        stop = self.placer.place(block, first, end, source)
        took = int((self._clock() - begun) * 1e9)
        self.links[block.number].stages[block.number][bucket(took) + PLACED] += stop > first
        return stop

    def _answered(self, block: RamBlock, first: int, end: int, lost: Sequence[int] = ()) -> None:
        self.do(self.engine.answered(block.number, first, end, lost))
        self.wakers.unpoison(block, first, end)
        if self.following:
            self.catch_up(block.number, first, end)

    def _no_memory(self, block: RamBlock, first: int, end: int) -> None:
        """Pages have come for which there is no memory. Parts that another request brings are left to it. Of the rest,
        pages with a waiter, or whose SIGBUS is to be taken back, are deferred; the others are not requested again."""
        number, size, flow, now = block.number, block.page_size, self.links[block.number].flow, self._clock()
        if self.placed != self._short_at and not any(link.flow.short_of_memory(now) for link in self.links.values()):
            text = f"block {block.name}: no memory for page {first}; it is tried again"
            self._event("no-memory", text, **event_fields(block, first, first + 1), cause="no memory")
        self._short_at = self.placed
        awaited, wanted = self.wakers.awaited.get(number, ()), []
        for low, high in flow.not_requested(number, first * size, end * size):
            at, pages = low // size, range(low // size, high // size)
            absent = (page for page in pages if block.received[page] != RECEIVED)
            kept = [page for page in absent if (number, page) in self.engine.waiting or page in awaited]
            for start, stop in [*runs(kept), (pages.stop, pages.stop)]:
                if at < start:
                    self._answered(block, at, start)
                if start < stop:
                    client = min(self.engine.waiters_of(number, start), default=BACKGROUND)
                    wanted.append(RangeRequest(client, number, start * size, (stop - start) * size))
                at = stop
        flow.defer(wanted, now)
        self._alarm.tick_at(flow.retry_at)

    def gave_up(self, request: RangeRequest) -> None:
        """A source never answered this request."""
        block = self._blocks[request.block]
        first, end = request.offset // block.page_size, request.end // block.page_size
        lost = self.placer.lose(block, first, end, "its source gives no answer")
        self._answered(block, first, end, lost)

    def source_lost(self, blocks: Collection[int]) -> None:
        """With ``--on-source-loss poison``: tell every waiter that its page does not come."""
        if not self._poison_on_loss:
            return
        for block in blocks:
            for page in self.engine.pages_waited_for(block):
                self.do(self.engine.answered(block, page, page + 1, [page]))

    def source_back(self, blocks: Collection[int]) -> None:
        """Request the lost pages once more: the source may have them again."""
        for block in blocks:
            for first, end in runs(self.wakers.await_lost(self._blocks[block])):
                self.do(self.engine.ask(block, first, end))
