"""A simulated return path: the wire between link and source, a source of the real law, and the supervisor's side of it
(engine, link, and a received map where ``Paging`` has memory)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    Advise,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RangeKind,
    RequestRanges,
    Staged,
    Staging,
    UseStaging,
    pack_ranges,
)
from postcopy_protocol.source_conversation import Offer, Phase, SourceConversation, SourceRefusal
from postcopy_supervisor.paging.engine import Ask, Effect, Engine, Release
from postcopy_supervisor.paging.flow_control import RangeRequest
from postcopy_supervisor.paging.source_link import AdvisedBlock, Arrived, SourceLink

PAGE = 4096
SIZES = {1: 8 * PAGE, 2: 4 * PAGE + 17}
NAMES = {1: "one", 2: "two"}
PAGES = {1: 8, 2: 5}
RIGHT, OTHER, LONGER = "right", "other", "longer"
SLOTS = 2


@dataclass(slots=True)
class Word:
    """A message on its way, the lengths of its frames, and which content its pages are of."""

    message: Message
    frames: tuple[int, ...] = ()
    content: str = RIGHT


@dataclass(slots=True)
class Slots:
    """A staging memory: what lies in each slot (block's name, offset, length, content), None where it is free."""

    number: int
    used: bool = False
    slots: list[tuple[str, int, int, str] | None] = field(default_factory=lambda: [None] * SLOTS)


@dataclass
class Source:
    """A source program, life after life: ``content`` is None while it is dead. Stream numbers go on, as real ones."""

    content: str | None = RIGHT
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))
    conversation: SourceConversation | None = None
    asked: list[tuple[str, int]] = field(default_factory=list)  # every page of every request that was heard
    memories: dict[int, Slots] = field(default_factory=dict)  # every staging memory that there ever was
    staging: Slots | None = None

    def start(self, content: str) -> None:
        self.content = content
        extra = 7 * PAGE if content == LONGER else 0
        identity = RIGHT if content == LONGER else content
        offers = {name: Offer(name, SIZES[block] + extra, PAGE, identity) for block, name in NAMES.items()}
        self.conversation, self.staging = SourceConversation(offers, self.numbers.__next__), None

    def stop(self) -> None:
        self.content = self.conversation = self.staging = None

    def hear(self, message: Message, style: str = "whole") -> list[Word]:
        assert self.conversation is not None and self.content is not None
        try:
            match message:
                case Advise():
                    self.staging = None
                    return [Word(self.conversation.advise(message)[0])]
                case Listen():
                    self.conversation.listen(message)
                    return self._offer()
                case UseStaging(number):
                    if self.staging is not None and self.staging.number == number:
                        self.staging.used = True
                case Complete():
                    self.conversation.complete(message)
                case Ping():
                    return [Word(Pong(message.nonce))]
                case RequestRanges():
                    return self._request(message, style)
        except SourceRefusal as refusal:
            return [Word(refusal.message())]
        return []

    def _offer(self) -> list[Word]:
        if self.staging is not None:
            return []
        number = next(self.numbers)
        self.staging = self.memories[number] = Slots(number)
        return [Word(Staging(number, 1, 1, bytes(16), SLOTS, 4 * PAGE))]

    def _stage(self, message: RequestRanges, name: str, offset: int, length: int) -> list[Word]:
        """Through a free slot; nothing when there is none."""
        staging = self.staging
        if staging is None or not staging.used or length > 4 * PAGE or None not in staging.slots:
            return []
        slot = staging.slots.index(None)
        staging.slots[slot] = (name, offset, length, self.content or RIGHT)
        return [
            Word(
                Staged(message.stream, message.request, offset, length, staging.number, slot), (), self.content or RIGHT
            )
        ]

    def _request(self, message: RequestRanges, style: str) -> list[Word]:
        assert self.conversation is not None
        stream, ranges = self.conversation.request(message)
        self.conversation.answered(sum(length for _, length in ranges))
        pages = [at for offset, length in ranges for at in range(offset, offset + length, PAGE)]
        self.asked += [(stream.offer.name, at // PAGE) for at in pages]
        number, request = stream.number, message.request
        if style == "never":
            return []
        if style == "staged":
            staged = [(self._stage(message, stream.offer.name, *one), one) for one in ranges]
            return [
                word for said, one in staged for word in said or [self.pages(number, request, [one], RangeKind.DATA)]
            ]
        if style == "whole":
            return [self.pages(number, request, ranges, RangeKind.DATA)]
        kind = {"zero": RangeKind.ZERO, "lost": RangeKind.LOST}.get(style, RangeKind.DATA)
        words = [self.pages(number, request, [(at, PAGE)], kind) for at in pages]
        if style == "first":  # and nothing more
            return words[:1]
        return words * 2 if style == "twice" else words

    def pages(self, stream: int, request: int, ranges: Sequence[tuple[int, int]], kind: int) -> Word:
        frames = tuple(length for _, length in ranges) if kind == RangeKind.DATA else ()
        kinds = bytes([kind]) * len(ranges)
        reason = "gone" if kind == RangeKind.LOST else ""
        return Word(Pages(stream, request, pack_ranges(ranges), kinds, reason), frames, self.content or RIGHT)

    def listening(self) -> list[tuple[int, str]]:
        """Streams that take pushed pages."""
        streams = self.conversation.streams.values() if self.conversation else ()
        return [(stream.number, stream.offer.name) for stream in streams if stream.phase is Phase.LISTENING]


class Supervisor:
    """Engine and link as Paging and MainLoop join them, with sets for memory. ``out`` is what goes to the source."""

    def __init__(self, patience: float = 5.0) -> None:
        self.now = 1000.0
        self.memories: dict[int, Slots] = {}  # those of the source: what can be opened
        self.staging: Slots | None = None
        self.staged = 0  # answers that came in a slot
        self.engine = Engine()
        self.expected = 0  # answers that came as they were expected
        self.out: list[Word] = []
        self.events: list[tuple[str, str]] = []
        self.received: set[tuple[int, int]] = set()
        self.lost: set[tuple[int, int]] = set()
        self.waiting: set[tuple[int, int, int]] = set()
        blocks = [AdvisedBlock(block, NAMES[block], PAGE, SIZES[block], RIGHT) for block in SIZES]
        self.link = SourceLink("ipc:///x", blocks, patience, self._send, self._event, self)

    def _event(self, kind: str, detail: str, **_: int | str) -> None:
        self.events.append((kind, detail))

    def _send(self, data: bytes) -> None:
        self.out.append(Word(decode(data, expect=FROM_SUPERVISOR)))

    def gave_up(self, request: RangeRequest) -> None:
        self._lose(request.block, request.offset, request.length)

    def source_lost(self, blocks: object) -> None:
        self.staging = None

    def source_back(self, blocks: object) -> None:
        """Nothing is requested again here."""

    def _lose(self, block: int, offset: int, length: int) -> None:
        pages = [
            page for page in range(offset // PAGE, (offset + length) // PAGE) if (block, page) not in self.received
        ]
        self.lost |= {(block, page) for page in pages}
        self._do(self.engine.answered(block, offset // PAGE, (offset + length) // PAGE, pages), -1)

    def fault(self, client: int, block: int, page: int, window: int) -> None:
        if (block, page) in self.received | self.lost:
            return
        self.waiting.add((client, block, page))
        self._do(self.engine.fault(client, block, page, self._end(block, page, window)), client)

    def _end(self, block: int, page: int, window: int) -> int:
        """As the supervisor's paging does: a window ends where something is there already."""
        end = page + 1
        while end < min(PAGES[block], page + window) and (block, end) not in self.received | self.lost:
            end += 1
        return end

    def background(self, block: int, page: int, window: int) -> None:
        if (block, page) not in self.received | self.lost:
            self._do(self.engine.ask(block, page, self._end(block, page, window)), -1)

    def leave(self, client: int) -> None:
        self.engine.leave(client)
        self.waiting = {key for key in self.waiting if key[0] != client}

    def hear(self, word: Word) -> None:
        if len(word.frames) == 1:
            wish = self._expected(encode(word.message), word.frames[0])
            if wish is not None:
                assert word.content == RIGHT, "pages of another content were taken"
                self._arrived(Arrived(wish.block, [(wish.offset, wish.length, RangeKind.DATA, 0)], ""))
                self.link.completed(wish, self.now)
                self.expected += 1
                return
        try:
            match word.message:
                case Staged():
                    return self._staged(word.message)
                case Staging(number):
                    self.staging = self.memories.get(number)
                    return self.link.use_staging(number) if self.staging is not None else None
            arrived = self.link.on_message(word.message, word.frames, self.now)
        except BadMessage as error:
            self.events.append(("source-nonsense", str(error)))
            return
        if arrived is not None:
            assert word.content == RIGHT, "pages of another content were taken"
            self._arrived(arrived)

    def _expected(self, head: bytes, length: int) -> RangeRequest | None:
        """As the fast path knows an answer."""
        request = self.link.answers.pop(head, None)
        known = request is not None and self.link.flow.outstanding.get(request.number) is request
        return request if known and request is not None and request.length == length else None

    def _staged(self, message: Staged) -> None:
        """As Sources does: placed from the slot as it is at this instant, and set free whatever becomes of it."""
        staging, slot = self.staging, message.slot
        if staging is None or staging.number != message.number or staging.slots[slot] is None:
            return
        lies = staging.slots[slot]
        arrived = self.link.on_staged(message, 4 * PAGE, self.now)
        staging.slots[slot] = None
        if arrived is not None:
            assert lies == (NAMES[arrived.block], message.offset, message.length, RIGHT), "other bytes were placed"
            self.staged += 1
            self._arrived(arrived)

    def _arrived(self, arrived: Arrived) -> None:
        for offset, length, kind, _ in arrived.ranges:
            if kind == RangeKind.LOST:
                self._lose(arrived.block, offset, length)
                continue
            pages = range(offset // PAGE, (offset + length) // PAGE)
            self.received |= {(arrived.block, page) for page in pages}
            self.lost -= self.received
            self._do(self.engine.answered(arrived.block, pages.start, pages.stop), -1)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.link.tick(self.now)

    def _do(self, effects: Sequence[Effect], client: int) -> None:
        for effect in effects:
            if isinstance(effect, Ask):
                length = (effect.end - effect.first) * PAGE
                self.link.request(client, effect.block, effect.first * PAGE, length, self.now)
            else:
                self._release(effect)

    def _release(self, release: Release) -> None:
        key = (release.waiter, release.block, release.page)
        assert key in self.waiting, f"{key} is released twice, or never waited"
        assert release.lost or key[1:] in self.received, "released before its page was there"
        self.waiting.discard(key)

    def check(self) -> None:
        """What must hold after every event."""
        self.engine.check()
        self.link.flow.check()
        waiting = {key for key, _ in _pairs(self.engine)}
        assert not waiting & self.received, "somebody waits for a page that has arrived"
        assert {key[1:] for key in self.waiting} == waiting
        flow = self.link.flow
        wishes = [*flow.outstanding.values(), *(wish for queue in flow.queues.values() for wish in queue)]
        asked = [(wish.block, page) for wish in wishes for page in _pages_of(wish.offset, wish.length)]
        assert len(asked) == len(set(asked)), "a page is on its way twice"
        open_pages = {(ask.block, page) for ask in self.engine.outstanding() for page in range(ask.first, ask.end)}
        assert open_pages <= set(asked), f"counted as asked for, and is not: {open_pages - set(asked)}"
        assert set(self.link._blocks) == set(self.link._streams.values())
        kinds = [kind for kind, _ in self.events if kind in ("source", "pause", "recover")]
        assert kinds[:1] in ([], ["source"]) and set(kinds[1::2]) <= {"pause"} and set(kinds[2::2]) <= {"recover"}
        assert (self.link.state == "up") == (bool(kinds) and kinds[-1] != "pause")


def _pairs(engine: Engine) -> list[tuple[tuple[int, int], set[int]]]:
    return list(engine.waiting.items())


def _pages_of(offset: int, length: int) -> range:
    return range(offset // PAGE, (offset + length) // PAGE)
