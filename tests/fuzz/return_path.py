"""Both ends of a return path for the fuzzer, as they run: the loop of a page source without its socket, and what a
supervisor does with messages of sources and workers (router, fast path, link, flow control, engine, paging) without
its kernel.

Random bytes seldom reach a listening stream or an open request. So each end begins in a state where most messages have
a meaning, and is given messages that fit what is open (``nearly``), with random changes.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from postcopy_kernel.memory import address_of
from postcopy_kernel.userfaultfd import Outcome, Status
from postcopy_protocol.codec import decode, encode, pack_offsets, unpack_offsets
from postcopy_protocol.errors import BadMessage, PageLost
from postcopy_protocol.messages import ControlRefused, Lost, Message, RequestPages, Wake
from postcopy_protocol.received_map import FLAGS, LOST, RECEIVED
from postcopy_protocol.return_path import (
    FEATURES,
    FROM_SOURCE,
    FROM_SUPERVISOR,
    NONCE,
    SLOT_FREE,
    SLOT_FULL,
    STAGING_HEADER,
    Advise,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RangeKind,
    RequestRanges,
    SourceRefused,
    Staged,
    Staging,
    UseStaging,
    check_pages,
    check_staged,
    check_staging,
    pack_ranges,
    unpack_ranges,
)
from postcopy_protocol.source_conversation import Offer, Phase
from postcopy_protocol.source_conversation import Stream as Open
from postcopy_protocol.templates import FIRST_REQUEST
from postcopy_sources.loop import Loop
from postcopy_supervisor import main_loop
from postcopy_supervisor.paging import fast_path
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.paging.paging import RemotePaging
from postcopy_supervisor.paging.placer import Placer
from postcopy_supervisor.paging.source_link import AdvisedBlock
from postcopy_supervisor.paging.wakers import Wakers
from postcopy_supervisor.parts import RunState
from postcopy_supervisor.remote import sources
from postcopy_wire.transport import FULL, SENT, UNREACHABLE

PAGE = 4096
COUNT = 65
SIZE = 64 * PAGE + 5
NAME, IDENTITY, CLIENT, BLOCK = "ram0", "x", 3, 1
BASE = 1 << 40
SUPERVISOR, SOURCE, WORKER = b"postcopy-1", b"s1-1", b"w3.1"


def some_ranges(dice: random.Random) -> list[tuple[int, int]]:
    """Pages of the block, mostly; few overlap."""
    pages = [dice.randrange(COUNT) for _ in range(dice.choice((1, 1, 1, 2, 5)))]
    return [(page * PAGE, dice.choice((1, 1, 1, 1, 1, 2, COUNT)) * PAGE) for page in pages]


# --- the source -------------------------------------------------------------------------------------------------------


class Fickle:
    """Reads at once, later, wrongly or not at all, by the page."""

    name, size, page_size = NAME, SIZE, PAGE

    def read(self, offset: int, length: int) -> bytes | None:
        match offset // PAGE % 8:
            case 1:
                return None
            case 2:
                raise PageLost("torn")
            case 3:
                return b"short"
            case 4:
                raise OSError("broken")
        return b"x" * length

    def read_now(self, offset: int, length: int) -> bytes | None:
        if offset // PAGE % 3 == 0:
            raise BlockingIOError
        return self.read(offset, length)


class SourceEnd:
    """A page source that one supervisor speaks to. Every answer must be one that a supervisor would take."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.express = dice, 0
        self.fresh()

    def _unstage(self) -> None:
        for peer in self.loop.connections.values():
            peer.unstage()

    def fresh(self) -> None:
        if hasattr(self, "loop"):
            self._unstage()
        self.refused, self._calls = False, deque[Callable[[], None]]()
        source = Fickle()
        calls = SimpleNamespace(call_soon=self._calls.append, take=self._posted)
        router = SimpleNamespace(send_parts=self._send, trust=lambda name, trusted=True: None)
        readers = SimpleNamespace(put=self._read, check=lambda: None)
        known = {NAME: (source, Offer(NAME, SIZE, PAGE, IDENTITY))}
        self.loop = Loop(cast(Any, known), lambda *_: cast(Any, router), cast(Any, calls), cast(Any, readers), FEATURES)
        if self.dice.random() < 0.9:
            self.loop.on_data(
                SUPERVISOR, encode(Advise(NAME, PAGE, self.dice.choice((FEATURES, ("zero", "push"), ()))))
            )
            if self.dice.random() < 0.9:
                self.loop.on_data(SUPERVISOR, encode(Listen(self._stream(), self.dice.choice((0, PAGE, 1 << 24)))))

    def hear(self, data: bytes) -> None:
        """One frame of the supervisor's; what it asks for is read and sent, unless the supervisor does not read."""
        loop, self.refused = self.loop, False
        peer = loop.connections.get(SUPERVISOR)
        if peer is not None and loop.answerer.answer_fast(peer, data):
            decode(data, expect=FROM_SUPERVISOR)  # what is taken unread must be what decode takes
            self.express += 1
        else:
            loop.on_data(SUPERVISOR, data)
        if self.dice.random() < 0.8:
            self._settle()
        if self.refused:
            raise BadMessage("refused")

    def nearly(self) -> Message:
        """A word that would be taken, or would have been a moment ago."""
        pick, stream = self.dice.choice, self._stream()
        request = pick((1, 7, FIRST_REQUEST, FIRST_REQUEST + self.dice.randrange(99), (1 << 32) - 1, 1 << 40))
        ranges = some_ranges(self.dice)
        chance = self.dice.random()
        if chance < 0.3 and (missing := self._missing()) is not None:
            return missing
        if chance < 0.02:
            return pick((Advise(NAME, PAGE, ("zero", "push")), Advise(NAME, 1 << 21, ()), Complete(stream)))
        if chance < 0.04:
            peer = self.loop.connections.get(SUPERVISOR)
            return UseStaging(peer.staging.number if peer is not None and peer.staging is not None else 1)
        if chance < 0.08:
            return pick((Listen(stream, pick((0, PAGE, 1 << 24))), Ping(pick((0, 1, 1 << 63)))))
        if chance < 0.5:  # the common one
            page = (ranges[0][0] + pick((0,) * 9 + (8, 1 << 40)), PAGE)
            return RequestRanges(FIRST_REQUEST + self.dice.randrange(99), stream, True, pack_ranges([page]))
        return RequestRanges(request, stream, pick((True, True, False)), pack_ranges(ranges))

    def _streams(self) -> list[Open]:
        peer = self.loop.connections.get(SUPERVISOR)
        return list(peer.conversation.streams.values()) if peer is not None else []

    def _stream(self) -> int:
        return next((stream.number for stream in self._streams()), 1)

    def _missing(self) -> Message | None:
        """What has to be said before a request is taken."""
        streams = self._streams()
        if not streams:
            return Advise(NAME, PAGE, ("zero", "push"))
        return Listen(streams[0].number, 1 << 24) if streams[0].phase is not Phase.LISTENING else None

    def _send(self, to: bytes, parts: Sequence[Any]) -> int:
        """The router, at times full, and the supervisor at times gone."""
        if self.dice.random() < 0.05:
            return FULL if self.dice.random() < 0.98 else UNREACHABLE
        assert to == SUPERVISOR
        self._sent(decode(parts[0], expect=FROM_SOURCE), [len(one) for one in parts[1:]])
        return SENT

    def _sent(self, message: Message, lengths: Sequence[int]) -> None:
        if isinstance(message, Pages):
            check_pages(message, lengths, PAGE, SIZE)
        if isinstance(message, Staging):
            assert check_staging(message) > STAGING_HEADER
        if isinstance(message, Staged):
            self._placed(message)
        self.refused |= isinstance(message, SourceRefused)

    def _placed(self, message: Staged) -> None:
        """The supervisor sets the slot free, mostly."""
        staging = self.loop.connections[SUPERVISOR].staging
        check_staged(message, 1 << 20, PAGE, SIZE)
        if staging is not None and staging.number == message.number and self.dice.random() < 0.9:
            assert staging._memory[NONCE + message.slot] == SLOT_FULL, "said to be full, and is not"
            staging._memory[NONCE + message.slot] = SLOT_FREE

    def _read(self, job: Any, *, urgent: bool) -> None:
        """A reading thread that is as quick as can be."""
        job.done(job.read())

    def _posted(self) -> list[Callable[[], None]]:
        calls = list(self._calls)
        self._calls.clear()
        return calls

    def _settle(self) -> None:
        """All that is open is read and sent, and then nothing counts as open."""
        loop = self.loop
        while loop.answerer.streaming or self._calls or loop.sender.held:
            loop.tick(time.monotonic())
            if loop.answerer.streaming:
                loop.answerer.stream_next()
            for call in self._posted():  # the loop would log what goes wrong in one, and go on
                call()
        peer = loop.connections.get(SUPERVISOR)
        if peer is not None:
            talk = peer.conversation
            assert (talk.open_requests, talk.open_bytes, peer.outbox_bytes) == (0, 0, 0)

    def close(self) -> None:
        self._unstage()


# --- the supervisor ---------------------------------------------------------------------------------------------------


class Core:
    """A userfaultfd that looks where it is told to copy from, and to."""

    def __init__(self) -> None:
        self.frames: list[range] = []
        self.copied: set[int] = set()

    def fileno(self) -> int:
        return -1

    def ioctl(self, fd: int, what: int, argument: bytearray) -> None:
        target, source, length, *_ = memoryview(argument).cast("Q")
        self.copy(target, source, length)

    def copy(self, target: int, source: int, length: int) -> Outcome:
        first, pages = divmod(target - BASE, PAGE)[0], length // PAGE
        assert not (target - BASE) % PAGE and not length % PAGE, "half a page"
        assert 0 <= first < first + pages <= COUNT, "outside the block"
        assert any(source in frame and source + length <= frame.stop for frame in self.frames), "not what has come"
        assert not self.copied & set(range(first, first + pages)), "placed twice"
        self.copied |= set(range(first, first + pages))
        return Outcome(Status.DONE, length)


class Slots:
    """A staging memory whose slots are always full; its number is 9."""

    number, slot_bytes, count, address = 9, 4 * PAGE, 3, 1 << 41

    def address_of(self, message: Staged) -> int:
        if message.slot >= self.count:
            raise BadMessage("no such slot")
        return self.address + message.slot * self.slot_bytes

    def free(self, slot: int) -> None:
        assert slot < self.count

    def close(self) -> None:
        pass


class SupervisorEnd:
    """A supervisor with one remote block, one client that faults and one source. A wake is sent only for
    pages that are marked and placed; engine and flow control are consistent after every message."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.now, self.express, self.placed = dice, 1000.0, 0, 0
        clock = SimpleNamespace(
            monotonic=lambda: self.now, monotonic_ns=lambda: int(self.now * 1e9), sleep=lambda _: None
        )
        self._patches = [patch.object(module, "time", clock) for module in (main_loop, fast_path, sources)]
        for one in self._patches:
            one.start()
        self.fresh()

    def fresh(self) -> None:
        self.core, self.answered, self._advised = Core(), list[bytes](), 100
        received = bytearray(COUNT + FLAGS)
        block: Any = SimpleNamespace(
            number=BLOCK, name=NAME, page_size=PAGE, pages=COUNT, length=COUNT * PAGE, memory=-1, received=received
        )
        block.mapping = SimpleNamespace(address=BASE)
        block.forget_own_pages = _void
        block.lost_pages = lambda: [page for page in range(COUNT) if received[page] == LOST]
        self.block = block
        alarm, event = SimpleNamespace(tick_at=_void, call_soon=_void), cast(Any, _void)
        own, clients = SimpleNamespace(release=_void), SimpleNamespace(with_block=lambda number: [CLIENT])
        self.paging = RemotePaging(
            {BLOCK: block},
            Engine(),
            Placer(cast(Any, self.core), alarm, event),
            Wakers({BLOCK: block}, SimpleNamespace(send=self._tell_worker), own, clients, event),
            SimpleNamespace(fetch=_void),
            alarm,
            event,
            fault_around=4 * PAGE,
            background_rate=self.dice.choice((-1, -1, 0, 1 << 20)),
            poison_on_loss=self.dice.random() < 0.2,
            clock=lambda: self.now,
        )
        self.link = self.paging.add_source("ipc:///x", [AdvisedBlock(BLOCK, NAME, PAGE, SIZE, IDENTITY)], 5.0, _void)
        self.loop = self._main_loop()
        if self.dice.random() < 0.9:
            self.link.tick(self.now)
            self.from_source(encode(Pong(1)))
            self.from_source(encode(self._advice()))

    def _main_loop(self) -> main_loop.MainLoop:
        """The real dispatcher, with the ports that fault traffic passes."""
        made: Any = object.__new__(sources.Sources)
        made.links, made._paging, made._bad_messages, made._event = {SOURCE: self.link}, self.paging, {}, _void
        made.staging, made.parked, made._unshared = {SOURCE: Slots()}, deque(), {""}
        fast = fast_path.source_fast_path(self.paging, self.link, [self.block], self.core.ioctl)
        made.fast_paths = {SOURCE: fast}
        made._bad_message = self._nonsense
        self.sources = made
        ports: Any = SimpleNamespace(
            state=RunState(0.0, "running"),
            blocks={BLOCK: self.block},
            clients={CLIENT},
            pool=SimpleNamespace(on_hello=_void, explain=_void, send=_void, events=deque()),
            zero=SimpleNamespace(on_fetched=lambda message: unpack_offsets(message.lost)),
            paging=self.paging,
            sources=made,
            periodic=SimpleNamespace(stream=lambda: self.paging.stream(1 << 62)),
            answers=SimpleNamespace(answer=lambda question: ControlRefused("fuzzed")),
            long_answers=SimpleNamespace(ask=_void),
            replies=SimpleNamespace(
                send_answer=lambda identity, answer: self.answered.append(encode(answer)), report_bug=_raised
            ),
            event=_void,
        )
        loop = main_loop.MainLoop()
        loop.start(ports)
        return loop

    def from_source(self, data: bytes) -> None:
        """One head, with raw frames as it promises them, mostly."""
        raw = [memoryview(bytearray(length)) for length in self._lengths(data)]
        self.core.frames = [_range(one) for one in raw if len(one)]
        zeros = self.paging.placer._zeros
        self.core.frames.append(range(zeros.address, zeros.address + zeros.length))
        self.core.frames.append(range(Slots.address, Slots.address + Slots.count * Slots.slot_bytes))
        expected = self.link.answers.get(data) if len(raw) == 1 else None
        if expected is not None and expected.length == len(raw[0]):
            decode(data, expect=FROM_SOURCE)
            self.express += 1
        self._said(self.loop.on_source_message, SOURCE, [memoryview(bytearray(data)), *raw])

    def from_worker(self, data: bytes) -> None:
        self.answered.clear()
        self._said(self.loop.on_message, WORKER, data)
        for answer in self.answered:
            message = decode(answer, expect=(ControlRefused,))
            raise BadMessage(message.reason)

    def nearly_of_source(self) -> Message | bytes:
        """A message that the source might send now."""
        dice, link = self.dice, self.link
        chance, pick = dice.random(), dice.choice
        if chance < 0.35 and link.answers:
            return pick(list(link.answers))
        if chance < 0.45:
            return pick((Pong(link._nonce), Pong(1), SourceRefused("out-of-phase", NAME, ""), self._advice()))
        outstanding = list(link.flow.outstanding.values())
        wish = pick(outstanding) if outstanding else None
        ranges = [(wish.offset, wish.length)] if wish is not None and dice.random() < 0.6 else some_ranges(dice)
        if dice.random() < 0.3:
            ranges = [(at, PAGE) for offset, length in ranges for at in range(offset, offset + length, PAGE)]
        request = wish.number if wish is not None and dice.random() < 0.8 else pick((0, 0, 1, FIRST_REQUEST + 5))
        stream = pick([*link._blocks, *link._blocks, *link._blocks, 7])
        if chance < 0.6:
            self.sources.staging[SOURCE] = Slots()  # opened again, if it was given up
            return Staged(stream, request, *ranges[0], pick((9, 9, 9, 8)), pick((0, 1, 2, 2, 3, 1 << 40)))
        if chance < 0.61:
            return Staging(10, pick((1, 1 << 40)), dice.randrange(99), bytes(16), 4, 4 * PAGE)
        kinds = bytes(pick((0, 0, 0, 1, 2)) for _ in ranges)
        return Pages(stream, request, pack_ranges(ranges), kinds, pick(("", "gone")))

    def nearly_of_worker(self) -> Message:
        dice = self.dice
        offsets = [dice.randrange(COUNT) * PAGE for _ in range(dice.choice((1, 1, 1, 2, 9)))]
        if dice.random() < 0.1:
            offsets.append(dice.choice((1, COUNT * PAGE, (1 << 64) - 1, 1 << 63)))
        return RequestPages(CLIENT, BLOCK, pack_offsets(offsets[-9:]))

    def _said(self, hear: Callable[[bytes, Any], None], identity: bytes, message: Any) -> None:
        self.now += self.dice.choice((0.0, 0.0001, 0.001, 0.001, 0.3))
        try:
            hear(identity, message)
            while self.sources.parked:
                self.loop._place_parked()
            if self.dice.random() < 0.1:
                self.now += self.dice.choice((0.1, 0.5, 2.0, 7.0, 16.0))
                self.sources.tick(self.now)
        finally:
            self.link.flow.check()
            self.paging.engine.check()
            marked = {page for page in range(COUNT) if self.block.received[page] == RECEIVED}
            assert marked == self.core.copied, "marked and placed are not the same"
            if len(marked) > COUNT - 4:
                self.placed += len(marked)
                self.fresh()

    def _tell_worker(self, worker: int, data: bytes) -> None:
        message = decode(data, expect=(Wake, Lost))
        assert worker == CLIENT and isinstance(message, Wake | Lost) and message.block == BLOCK
        for offset in unpack_offsets(message.offsets):
            state = self.block.received[offset // PAGE]
            assert not offset % PAGE
            assert state == RECEIVED if isinstance(message, Wake) else state != RECEIVED

    def _nonsense(self, link: object, error: Exception) -> None:
        raise BadMessage(str(error)) from error

    def _advice(self) -> Advised:
        self._advised += 1
        size = SIZE if self.dice.random() < 0.95 else SIZE + 1
        return Advised(NAME, self._advised, size, IDENTITY, ("zero", "push"))

    def _lengths(self, data: bytes) -> list[int]:
        lengths: list[int] = []
        try:
            message = decode(data, expect=(Pages,))
            ranges = unpack_ranges(message.ranges)
            lengths = [
                length for (_, length), kind in zip(ranges, message.kinds, strict=False) if kind == RangeKind.DATA
            ]
        except BadMessage:
            lengths = [PAGE] * self.dice.choice((0, 0, 1))
        lengths = [min(length, COUNT * PAGE) for length in lengths]
        if self.dice.random() < 0.1:
            lengths = [*lengths[self.dice.choice((0, 1)) :], self.dice.choice((0, 1, PAGE - 1, PAGE, 2 * PAGE))]
        return lengths

    def close(self) -> None:
        for one in self._patches:
            one.stop()


def _range(buffer: memoryview) -> range:
    at = address_of(buffer)
    return range(at, at + len(buffer))


def _raised(what: object, error: Exception) -> None:
    raise error


def _void(*_: Any, **__: Any) -> None:
    """Accepts any arguments and does nothing."""
