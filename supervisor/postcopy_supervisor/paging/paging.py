"""Paging: who waits for which page (the engine), where its bytes are asked for, and how they get into the block.

Local blocks are fetched through worker zero; remote ones over the link of their source, and placed here, through the
core userfaultfd: store PLACING, UFFDIO_COPY, store RECEIVED, then word to exactly the workers whose clients wait.

Pages for which there is no memory are given up for now, so that nobody else waits for it: those that somebody waits for
are asked for again a little later (flow.py), the others are as if they had not come.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence

from postcopy_kernel import crashpoints
from postcopy_kernel.memory import Mapping, is_present
from postcopy_kernel.userfaultfd import Status, Userfaultfd
from postcopy_protocol.codec import encode, pack_offsets
from postcopy_protocol.counters import bucket
from postcopy_protocol.geometry import PAGE_2M, runs
from postcopy_protocol.messages import Lost, Wake
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED, SHARED, runs_of
from postcopy_protocol.return_path import RangeKind
from postcopy_protocol.stages import PLACED
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.window import FaultAround

from ..blocks import RamBlock
from ..observe.event_log import Tell
from .engine import Ask, Effect, Engine, Release
from .fast_path import WorkerFastPath, worker_fast_path
from .flow_control import BACKGROUND
from .source_link import Arrived, SourceLink

log = logging.getLogger(__name__)

REMOTE_WINDOW = 256 << 10
"""Largest fault-around of a remote block: while clients wait, no answer is longer than that."""
PIECE = 256 << 10
"""Bytes of background in one request while clients wait, or as many bytes as a second may have are told."""
CALM_PIECE = 1 << 20
"""... and else: what a piece costs beside its bytes, it costs once in place of four times. Both are what a source sends
in one message (its loop.py), so that the answer comes as it was expected (lanes.py)."""
ZERO_PIECE = 1 << 20
DROP_AFTER = 32 << 20
MOST_LANES = 64
"""Of one worker: it asks for pages of as many blocks, each in one form."""
MISSING_BYTE, RECEIVED_BYTE, LOST_BYTE = bytes((MISSING,)), bytes((RECEIVED,)), bytes((LOST,))


class Paging:
    """The engine and its surroundings. ``fetch`` asks worker zero; ``to_worker`` sends; ``release_own`` lets client
    zero run on (block, page, lost)."""

    def __init__(
        self,
        core: Userfaultfd,
        blocks: dict[int, RamBlock],
        fault_around: int,
        fetch: Callable[[Ask], None],
        to_worker: Callable[[int, bytes], None],
        release_own: Callable[[RamBlock, int, bool], None],
        event: Tell,
    ) -> None:
        self.engine = Engine()
        self.links: dict[int, SourceLink] = {}  # by block
        self.poison_on_loss = False
        self.lanes: dict[bytes, WorkerFastPath] = {}
        """By the head of a worker's requests for one page each."""
        self._lanes_of: dict[int, list[bytes]] = {}
        self.placed = self._undropped = 0
        self._starved_at = -1
        """What ``placed`` was when there was last no memory."""
        self.ring_at: Callable[[float], None] = lambda due: None
        """Asks for a tick no later than at this monotonic time."""
        self.roomy = True
        """False: memory is scarce, only pages that are waited for may come."""
        self.aside: Callable[[Callable[[], None]], None] = lambda act: act()
        """Does what takes some milliseconds and can wait, in another thread."""
        self.core = crashpoints.watched(core, "copy", "page.arrived", "page.placed")
        self._blocks = blocks
        self._around = fault_around
        self._fetch = fetch
        self.tell_worker = crashpoints.before("page.marked", to_worker)
        self.release_own = release_own
        self._event = event
        self._windows: dict[tuple[int, int], FaultAround] = {}
        self.cursor = dict.fromkeys(blocks, 0)
        self._credit = 0.0
        self._credited = time.monotonic()
        self._zeros = Mapping.anonymous(ZERO_PIECE)
        self.clients_with: Callable[[int], list[int]] = lambda block: []
        self._told_lost: dict[int, set[int]] = {}  # by block: pages that some client was told are lost
        self.healing: dict[int, set[int]] = {}
        """By block: pages that were lost and are asked for again."""

    # --- faults -------------------------------------------------------------------------------------------------------

    def fault(self, waiter: int, block: RamBlock, pages: Sequence[int], window: int = 0) -> None:
        """A waiter stands at these pages. ``window``: pages to ask for with each, where no window of ours is to
        grow."""
        effects: list[Effect] = []
        for page in pages:
            state = block.received[page]
            if state in (RECEIVED, LOST):
                effects.append(Release(waiter, block.number, page, state == LOST))
            elif self.poison_on_loss and block.number in self.links and self.links[block.number].state == "paused":
                effects.append(Release(waiter, block.number, page, True))
            else:
                end = self.end_of(block, page, window or self.window_of(waiter, block)(page))
                self.cursor[block.number] = end
                asked = self.engine.fault(waiter, block.number, page, end)
                effects += asked
                link = self.links.get(block.number)
                if not asked and link is not None and link.flow.streaming:
                    link.promote(waiter, block.number, page * block.page_size, block.page_size, time.monotonic())
        self._do(effects, waiter)

    def end_of(self, block: RamBlock, page: int, window: int) -> int:
        """End of what is asked for with a page: as far as the window goes and everything is missing."""
        behind = block.received[page + 1 : min(block.pages, page + window)] if window > 1 and self.roomy else b""
        return page + 1 + len(behind) - len(behind.lstrip(MISSING_BYTE))

    def window_of(self, waiter: int, block: RamBlock) -> Callable[[int], int]:
        """Fault-around of one waiter on one block: by page, how many to ask for from there on."""
        key = (waiter, block.number)
        around = self._windows.get(key)
        if around is None:
            largest = max(1, min(self._around, REMOTE_WINDOW) // block.page_size)
            around = self._windows[key] = FaultAround(largest)
        return around.window

    def learn(self, data: bytes, waiter: int, block: RamBlock) -> None:
        """``data`` was a RequestPages of one page, taken by ``decode``: what differs only in the offset needs it no
        more."""
        link = self.links.get(block.number)
        heads = self._lanes_of.setdefault(waiter, [])
        if link is not None and len(heads) < MOST_LANES:
            heads.append(data[:-OFFSET_BYTES])
            self.lanes[data[:-OFFSET_BYTES]] = worker_fast_path(self, waiter, block, link)

    def left(self, waiter: int) -> None:
        """A client is gone."""
        self.engine.leave(waiter)
        for key in [key for key in self._windows if key[0] == waiter]:
            del self._windows[key]
        for head in self._lanes_of.pop(waiter, ()):
            self.lanes.pop(head, None)

    def do(self, effects: list[Effect]) -> None:
        """Carry out what the engine says for nobody in particular."""
        self._do(effects, BACKGROUND)

    def _do(self, effects: list[Effect], client: int) -> None:
        woken: dict[tuple[int, int, bool], list[int]] = {}
        for effect in effects:
            if isinstance(effect, Ask):
                self._ask(effect, client)
            elif effect.waiter == 0:
                self.release_own(self._blocks[effect.block], effect.page, effect.lost)
            else:
                woken.setdefault((effect.waiter, effect.block, effect.lost), []).append(effect.page)
        for (worker, number, lost), pages in woken.items():
            if lost:
                self._told_lost.setdefault(number, set()).update(pages)
            size = self._blocks[number].page_size
            offsets = pack_offsets([page * size for page in pages])
            self.tell_worker(worker, encode(Lost(number, offsets) if lost else Wake(number, offsets)))

    def _ask(self, ask: Ask, client: int) -> None:
        link = self.links.get(ask.block)
        if link is None:
            return self._fetch(ask)
        size = self._blocks[ask.block].page_size
        link.wish(client, ask.block, ask.first * size, (ask.end - ask.first) * size, time.monotonic())
        return None

    # --- pages that have come -----------------------------------------------------------------------------------------

    def arrived(self, arrived: Arrived, addresses: Sequence[int]) -> None:
        """Place what a source has sent (``addresses`` of the raw frames), then release whoever waits."""
        block = self._blocks[arrived.block]
        for offset, length, kind, frame in arrived.ranges:
            first, end = offset // block.page_size, (offset + length) // block.page_size
            lost: Sequence[int] = ()
            stop = end
            if kind == RangeKind.LOST:
                lost = self.lose(block, first, end, arrived.reason)
            else:
                self._found_again(block, first, end)
                if kind == RangeKind.ZERO:
                    stop = self._place_zeros(block, first, end)
                else:
                    stop = self._place_timed(block, first, end, addresses[frame])
            if first < stop:
                self._have(block, first, stop, lost)
            if stop < end:
                self._defer(block, stop, end, time.monotonic())

    def _have(self, block: RamBlock, first: int, end: int, lost: Sequence[int] = ()) -> None:
        self.do(self.engine.answered(block.number, first, end, lost))
        self.heal(block, first, end)

    def _defer(self, block: RamBlock, first: int, end: int, now: float) -> None:
        """There is no memory for what has come of these pages. What another request brings as well is left to that;
        else who stands at a page (or was denied it) gets it later, and the rest is not asked for any more."""
        number, size, flow = block.number, block.page_size, self.links[block.number].flow
        if self.placed != self._starved_at and not any(link.flow.short(now) for link in self.links.values()):
            text = f"no memory for page {first}; it is tried again"
            self._about(block, first, 1, "no-memory", text, "no memory")
        self._starved_at = self.placed
        healing, wanted = self.healing.get(number, ()), []
        for low, high in flow.unwished(number, first * size, end * size):
            at, pages = low // size, range(low // size, high // size)
            absent = (page for page in pages if block.received[page] != RECEIVED)
            kept = [page for page in absent if (number, page) in self.engine.waiting or page in healing]
            for start, stop in [*runs(kept), (pages.stop, pages.stop)]:
                if at < start:
                    self._have(block, at, start)
                if start < stop:
                    client = min(self.engine.standing(number, start), default=BACKGROUND)
                    wanted.append((client, number, start * size, (stop - start) * size))
                at = stop
        flow.defer(wanted, now)
        self.ring_at(flow.again_at)

    def _place_timed(self, block: RamBlock, first: int, end: int, source: int) -> int:
        begun = time.monotonic()
        stop = self.place(block, first, end, source)
        took = int((time.monotonic() - begun) * 1e9)
        self.links[block.number].stages[block.number][bucket(took) + PLACED] += stop > first
        return stop

    def place(self, block: RamBlock, first: int, end: int, source: int) -> int:
        """Put pages into the block from memory at ``source``; those that are received already stay as they are. Returns
        the first page for which there is no memory, or ``end``."""
        size, received = block.page_size, block.received
        if end - first == 1:
            return end if received[first] == RECEIVED else self._copy(block, first, end, source)
        states, at = received[first:end], 0
        while at < len(states):
            stop = states.find(RECEIVED_BYTE, at)
            stop = len(states) if stop < 0 else stop
            if stop > at:
                placed = self._copy(block, first + at, first + stop, source + at * size)
                if placed < first + stop:
                    return placed
            at = stop + 1
        return end

    def _copy(self, block: RamBlock, first: int, end: int, source: int) -> int:
        size, received, base = block.page_size, block.received, block.mapping.address
        before = received[first:end]
        while first < end:
            received[first:end] = bytes((PLACING,)) * (end - first)
            outcome = self.core.copy(base + first * size, source, (end - first) * size)
            done = max(0, outcome.done) // size
            received[first : first + done] = bytes((RECEIVED,)) * done
            self.count(block, done)
            first, source = first + done, source + done * size
            present = outcome.status is Status.PRESENT
            if present and self._settle(block, first, source):
                first, source = first + 1, source + size
            elif present or outcome.status is Status.EXHAUSTED:
                self._not_placed(block, first, before[first - end :])
                break
            elif outcome.status not in (Status.DONE, Status.PARTIAL, Status.RETRY):
                raise OSError(errno.EIO, f"UFFDIO_COPY into block {block.name}: {outcome.status.name}")
        return first

    def _not_placed(self, block: RamBlock, first: int, states: bytes) -> None:
        """Pages from ``first`` on are what they were before. PLACING may have been stored for this very COPY; it stays
        only where a page is there, the work of a predecessor that was killed."""
        block.received[first : first + len(states)] = states
        for low, high in runs_of(states, PLACING):
            for page in range(first + low, first + high):
                if not self._present(block, page):
                    block.received[page] = MISSING

    def _present(self, block: RamBlock, page: int) -> bool:
        """Is it there? Of huge pages the kernel does not say it, and nobody audits them."""
        return block.page_size != PAGE_2M and is_present(block.memory, page * block.page_size)

    def count(self, block: RamBlock, pages: int) -> None:
        """So many have been placed."""
        self.placed += pages
        self._undropped += pages * block.page_size
        if self._undropped >= DROP_AFTER:  # our page tables of what we placed count as our memory; the data stays
            self._undropped = 0
            self.aside(block.forget_own_pages)

    def _settle(self, block: RamBlock, page: int, source: int) -> bool:
        """Nobody but us places pages of a remote block: a page that is there already is a predecessor's, or a
        stranger's. False: it is not there, for an empty pool of huge pages says EEXIST, too."""
        size = block.page_size
        want = Mapping(source, size).view(size, writable=False)
        found = os.pread(block.memory, size, page * size)
        if found != want:
            if size == PAGE_2M and found.count(0) == size:
                return False
            if not block.received[block.pages + SHARED]:
                os.pwrite(block.memory, want, page * size)
            text = f"page {page} was made by an unregistered mapping"
            self._about(block, page, 1, "polluted", text, "a mapping that is not registered made it")
        block.received[page] = RECEIVED
        return True

    def _place_zeros(self, block: RamBlock, first: int, end: int) -> int:
        step = max(1, ZERO_PIECE // block.page_size)
        if block.page_size > ZERO_PIECE and self._zeros.length < block.page_size:
            self._zeros = Mapping.anonymous(block.page_size)
        for at in range(first, end, step):
            stop = self.place(block, at, min(end, at + step), self._zeros.address)
            if stop < min(end, at + step):
                return stop
        return end

    def lose(self, block: RamBlock, first: int, end: int, reason: str) -> list[int]:
        """Mark what is absent as lost; the pages that are."""
        lost = [page for page in range(first, end) if block.received[page] in (MISSING, PLACING)]
        for page in lost:
            block.received[page] = LOST
        if lost:
            text = f"{len(lost)} pages from page {lost[0]}: {reason}"
            self._about(block, lost[0], lost[-1] + 1 - lost[0], "lost", text, reason)
        return lost

    def gave_up(self, number: int, offset: int, length: int) -> None:
        """A source never answered for this range."""
        block = self._blocks[number]
        first, end = offset // block.page_size, (offset + length) // block.page_size
        lost = self.lose(block, first, end, "its source gives no answer")
        self.do(self.engine.answered(number, first, end, lost))

    def source_lost(self, link: SourceLink) -> None:
        """With ``--on-source-loss poison``: whoever waits is told that the page does not come."""
        if not self.poison_on_loss:
            return
        for number in [number for number, other in self.links.items() if other is link]:
            for page in self.engine.waited_for(number):
                self.do(self.engine.answered(number, page, page + 1, [page]))

    def source_back(self, link: SourceLink) -> None:
        """It may have again what was lost: those pages are asked for once more."""
        for number in [number for number, other in self.links.items() if other is link]:
            block = self._blocks[number]
            pages = self._told_lost.pop(number, set()) | set(block.lost_pages())
            for page in pages:
                if block.received[page] == LOST:
                    block.received[page] = MISSING  # absent, by the proof that LOST needs
            self.healing.setdefault(number, set()).update(pages)
            for first, end in runs(pages):
                self.do(self.engine.ask(number, first, end))

    def _found_again(self, block: RamBlock, first: int, end: int) -> None:
        """Lost pages among these are pushed by a source that was there all the time: whoever was denied them is to be
        told as well."""
        if LOST_BYTE in block.received[first:end]:
            pages = {page for page in range(first, end) if block.received[page] == LOST}
            self.healing.setdefault(block.number, set()).update(pages)

    def told_lost(self, block: int, page: int) -> bool:
        """Was some client told that it is lost, since its source was last there?"""
        return page in self._told_lost.get(block, ())

    def heal(self, block: RamBlock, first: int, end: int) -> None:
        """A page that was lost has come after all: whoever was given SIGBUS there gets it mapped (CONTINUE)."""
        healing = self.healing.get(block.number)
        if not healing:
            return
        back = {page for page in healing if first <= page < end and block.received[page] == RECEIVED}
        healing -= back
        if not healing:
            del self.healing[block.number]
        if back:
            offsets = pack_offsets([page * block.page_size for page in sorted(back)])
            for worker in self.clients_with(block.number):
                self.tell_worker(worker, encode(Wake(block.number, offsets)))
            text = f"{len(back)} lost pages from page {min(back)} are there again"
            self._about(block, min(back), max(back) + 1 - min(back), "healed", text, "a source has them again")

    def _about(self, block: RamBlock, first: int, pages: int, kind: str, text: str, cause: str) -> None:
        """An event about pages of a block."""
        size = block.page_size
        text = f"block {block.name}: {text}"
        self._event(kind, text, block=block.name, offset=first * size, length=pages * size, cause=cause)

    # --- background ---------------------------------------------------------------------------------------------------

    def background(self, rate: int, left: int, now: float) -> None:
        """Ask for what nobody has asked for yet, next to where somebody did; ``rate`` in bytes a second (-1: all that
        the link takes), urgent requests first, and no more than ``left`` bytes."""
        if not rate:
            return
        for number, link in self.links.items():
            block = self._blocks[number]
            room = min(left, link.flow.room_for_background(now))
            largest = PIECE if rate > 0 or link.flow.busy(now) else CALM_PIECE
            # Not into every gap: a small piece would come back as a small gap, and soon all pieces would be small.
            while room >= largest and self._afford(rate, now):
                piece = self._next_piece(block, largest)
                if piece is None:
                    break
                length = (piece[1] - piece[0]) * block.page_size
                self._credit -= length
                room, left = room - length, left - length
                self.do(self.engine.ask(number, *piece))

    def _afford(self, rate: int, now: float) -> bool:
        if rate < 0:
            return True
        self._credit = min(self._credit + (now - self._credited) * rate, float(max(PIECE, rate // 4)))
        self._credited = now
        return self._credit >= PIECE

    def _next_piece(self, block: RamBlock, length: int) -> tuple[int, int] | None:
        """The next run of missing pages behind the cursor, around the end of the block once."""
        pages = max(1, length // block.page_size)
        for low, high in ((self.cursor[block.number], block.pages), (0, self.cursor[block.number])):
            first = block.received.find(MISSING_BYTE, low, high)
            while first >= 0:
                end = min(high, first + pages)
                states = block.received[first:end]
                end = first + len(states) - len(states.lstrip(MISSING_BYTE))
                self.cursor[block.number] = end
                free = self.engine.first_free(block.number, first, end)
                if free is not None:
                    return free
                first = block.received.find(MISSING_BYTE, end, high)
        return None
