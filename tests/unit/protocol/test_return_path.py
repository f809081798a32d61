"""The return path's laws: ranges, what a source may answer, what a supervisor may say and when."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from postcopy_protocol import source_conversation
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage, BadVersion
from postcopy_protocol.geometry import PAGE_2M, PAGE_4K
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FEATURES,
    FROM_SOURCE,
    FROM_SUPERVISOR,
    MAX_OPEN_BYTES,
    MAX_OPEN_REQUESTS,
    MAX_RANGE_BYTES,
    MAX_RANGES,
    MAX_SLOTS,
    MAX_STREAMS,
    NONCE,
    SOURCE_REFUSALS,
    STAGING_HEADER,
    Advise,
    Complete,
    Listen,
    Pages,
    Progress,
    Range,
    RangeKind,
    RequestRanges,
    Staged,
    Staging,
    check_pages,
    check_progress,
    check_ranges,
    check_staged,
    check_staging,
    features_at,
    pack_range,
    pack_ranges,
    unpack_ranges,
)
from postcopy_protocol.source_conversation import Offer, Phase, SourceConversation, SourceRefusal, Stream

U64 = (1 << 64) - 1
SIZE = 10 * PAGE_4K - 7
OFFERS = {
    "small": Offer("small", SIZE, PAGE_4K, "v1"),
    "huge": Offer("huge", 3 * PAGE_2M, PAGE_2M, "v2"),
    "large": Offer("large", 1 << 40, PAGE_4K, "v3"),
}

u64 = st.integers(0, U64)
pages = st.integers(0, 11).map(lambda page: page * PAGE_4K)
offsets = pages | u64 | st.sampled_from((1, SIZE, U64, U64 - PAGE_4K + 1))
ranges_of_any_kind = st.lists(st.tuples(offsets, offsets), max_size=6)


# --- ranges -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(u64, u64), min_size=1, max_size=MAX_RANGES))
def test_ranges_survive_packing(ranges: list[Range]) -> None:
    assert unpack_ranges(pack_ranges(ranges)) == ranges
    assert pack_range(*ranges[0]) == pack_ranges(ranges[:1])


@pytest.mark.parametrize("data", [b"", bytes(8), bytes(17), bytes(16 * (MAX_RANGES + 1))])
def test_what_is_no_list_of_ranges(data: bytes) -> None:
    with pytest.raises(BadMessage):
        unpack_ranges(data)


@pytest.mark.parametrize("number", [-1, U64 + 1])
def test_what_is_no_number_of_64_bits_is_not_packed(number: int) -> None:
    with pytest.raises(BadInput):
        pack_ranges([(0, number)])


def sound(ranges: Sequence[Range], page_size: int, size: int) -> bool:
    """The rule once more, page by page and slowly."""
    end = -(-size // page_size) * page_size
    if any(
        offset % page_size or length % page_size or not length or offset + length > end for offset, length in ranges
    ):
        return False
    touched = [page for offset, length in ranges for page in range(offset, offset + length, page_size)]
    return len(touched) == len(set(touched)) and len(touched) * page_size <= MAX_RANGE_BYTES


@given(ranges_of_any_kind)
def test_ranges_are_judged(ranges: list[Range]) -> None:
    if sound(ranges, PAGE_4K, SIZE):
        assert check_ranges(ranges, PAGE_4K, SIZE) == sum(length for _, length in ranges)
    else:
        with pytest.raises(BadMessage):
            check_ranges(ranges, PAGE_4K, SIZE)


def test_the_most_that_one_message_asks_for() -> None:
    assert check_ranges([(0, MAX_RANGE_BYTES)], PAGE_4K, 1 << 40) == MAX_RANGE_BYTES
    assert check_ranges([(0, PAGE_2M), (2 * PAGE_2M, PAGE_2M)], PAGE_2M, 6 * PAGE_2M - 1) == 2 * PAGE_2M
    with pytest.raises(BadMessage, match="together"):
        check_ranges([(0, MAX_RANGE_BYTES), (1 << 30, PAGE_4K)], PAGE_4K, 1 << 40)
    with pytest.raises(BadMessage, match="aligned"):
        check_ranges([(PAGE_4K, PAGE_4K)], PAGE_2M, 1 << 40)


# --- what a source answers --------------------------------------------------------------------------------------------


@given(
    ranges_of_any_kind,
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.sampled_from((0, 1, PAGE_4K, 2 * PAGE_4K)), max_size=6),
    st.booleans(),
)
def test_pages_are_judged(ranges: list[Range], kinds: list[int], lengths: list[int], fitting: bool) -> None:
    if fitting:  # else hardly any example would pass
        kinds = [kind % 3 for kind in (kinds + [RangeKind.DATA] * len(ranges))[: len(ranges)]]
        lengths = [length for (_, length), kind in zip(ranges, kinds, strict=True) if kind == RangeKind.DATA]
    message = Pages(1, 1, pack_ranges(ranges), bytes(kinds), "")
    data = [length for (_, length), kind in zip(ranges, kinds, strict=False) if kind == RangeKind.DATA]
    if (
        ranges
        and sound(ranges, PAGE_4K, SIZE)
        and len(kinds) == len(ranges)
        and max(kinds) <= RangeKind.LOST
        and data == lengths
    ):
        checked = check_pages(message, lengths, PAGE_4K, SIZE)
        assert [(offset, length) for offset, length, _, _ in checked] == ranges
        assert [kind for _, _, kind, _ in checked] == kinds
        assert [frame for _, _, _, frame in checked if frame >= 0] == list(range(len(lengths)))
        assert all((frame < 0) == (kind != RangeKind.DATA) for _, _, kind, frame in checked)
    else:
        with pytest.raises(BadMessage):
            check_pages(message, lengths, PAGE_4K, SIZE)


PAGE = (PAGE_4K, PAGE_4K)


@pytest.mark.parametrize(
    ("ranges", "kinds", "lengths", "complaint"),
    [
        ([PAGE], b"\0", [], "nothing came"),
        ([PAGE], b"\0", [PAGE_4K - 1], "4095 bytes came"),
        ([PAGE], b"\0", [PAGE_4K] * 2, "2 frames for 1"),
        ([PAGE], b"\1", [PAGE_4K], "1 frames for 0"),
        ([PAGE], b"\2", [PAGE_4K], "1 frames for 0"),
        ([PAGE], b"\3", [], "no kind"),
        ([PAGE], b"", [], "0 kinds for 1"),
        ([PAGE, PAGE], b"\1\1", [], "overlaps"),
        ([(1, PAGE_4K)], b"\1", [], "aligned"),
        ([(10 * PAGE_4K, PAGE_4K)], b"\1", [], "no part"),
        ([(0, 0)], b"\1", [], "no part"),
        ([(U64 - PAGE_4K + 1, PAGE_4K)], b"\1", [], "no part"),
    ],
)
def test_a_source_that_breaks_the_rule(ranges: list[Range], kinds: bytes, lengths: list[int], complaint: str) -> None:
    with pytest.raises(BadMessage, match=complaint):
        check_pages(Pages(1, 1, pack_ranges(ranges), kinds, ""), lengths, PAGE_4K, SIZE)


def test_data_zeros_and_losses_in_one_answer() -> None:
    ranges = [(3 * PAGE_4K, PAGE_4K), (0, 2 * PAGE_4K), (9 * PAGE_4K, PAGE_4K), (5 * PAGE_4K, PAGE_4K)]
    message = Pages(
        1, 1, pack_ranges(ranges), bytes([RangeKind.LOST, RangeKind.DATA, RangeKind.ZERO, RangeKind.DATA]), "the disk"
    )
    assert check_pages(message, [2 * PAGE_4K, PAGE_4K], PAGE_4K, SIZE) == [
        (3 * PAGE_4K, PAGE_4K, RangeKind.LOST, -1),
        (0, 2 * PAGE_4K, RangeKind.DATA, 0),
        (9 * PAGE_4K, PAGE_4K, RangeKind.ZERO, -1),
        (5 * PAGE_4K, PAGE_4K, RangeKind.DATA, 1),
    ]


# --- staging memory ---------------------------------------------------------------------------------------------------


def test_memory_is_shared_on_one_machine_only() -> None:
    assert features_at("ipc:///tmp/s") == FEATURES and "staging" in FEATURES
    assert features_at("tcp://host:1") == tuple(word for word in FEATURES if word != "staging")


def test_a_source_grants_only_what_it_has() -> None:
    talk = SourceConversation(OFFERS, itertools.count(1000).__next__, features_at("tcp://host:1"))
    assert talk.advise(Advise("small", PAGE_4K, FEATURES))[0].features == ("zero", "push", "held", "progress")
    assert conversation().advise(Advise("small", PAGE_4K, FEATURES))[0].features == FEATURES


def test_a_staging_memory_has_a_header_and_slots() -> None:
    assert check_staging(Staging(1, 2, 3, bytes(NONCE), 8, 1 << 20)) == STAGING_HEADER + (8 << 20)
    assert NONCE + MAX_SLOTS <= STAGING_HEADER


@pytest.mark.parametrize(
    ("nonce", "slots", "slot_bytes", "complaint"),
    [
        (NONCE - 1, 8, PAGE_4K, "15 bytes"),
        (NONCE + 1, 8, PAGE_4K, "17 bytes"),
        (NONCE, 0, PAGE_4K, "no staging memory"),
        (NONCE, MAX_SLOTS + 1, PAGE_4K, "no staging memory"),
        (NONCE, 8, 0, "no staging memory"),
        (NONCE, 8, PAGE_4K + 1, "no staging memory"),
        (NONCE, MAX_SLOTS, 2 << 20, "may be"),
        (NONCE, 1, U64 - 4095, "may be"),
    ],
)
def test_a_staging_memory_that_is_none(nonce: int, slots: int, slot_bytes: int, complaint: str) -> None:
    with pytest.raises(BadMessage, match=complaint):
        check_staging(Staging(1, 2, 3, bytes(nonce), slots, slot_bytes))


@given(st.integers(0, U64), st.integers(0, U64), st.sampled_from((PAGE_4K, 1 << 20)))
@example(0, 2 * PAGE_4K, PAGE_4K)
@example(9 * PAGE_4K, PAGE_4K, PAGE_4K)
def test_what_is_taken_of_a_slot_is_in_the_block_and_in_the_slot(offset: int, length: int, slot_bytes: int) -> None:
    with suppress(BadMessage):
        check_staged(Staged(1, 1, offset, length, 1, 0), slot_bytes, PAGE_4K, SIZE)
        assert (
            0 < length <= slot_bytes and offset % PAGE_4K == length % PAGE_4K == 0 and offset + length < SIZE + PAGE_4K
        )


# --- what a supervisor says -------------------------------------------------------------------------------------------


def conversation() -> SourceConversation:
    return SourceConversation(OFFERS, itertools.count(1000).__next__)


def listening(talk: SourceConversation, name: str = "small", page_size: int = PAGE_4K, window: int = 0) -> Stream:
    advised, _ = talk.advise(Advise(name, page_size, ("zero", "push")))
    return talk.listen(Listen(advised.stream, window))


def refused(code: str, say: object, *words: object) -> str:
    with pytest.raises(SourceRefusal) as caught:
        say(*words)  # type: ignore[operator]
    assert caught.value.code == code
    assert "\n" not in caught.value.reason
    assert decode(encode(caught.value.message()), expect=FROM_SOURCE) == caught.value.message()
    return caught.value.reason


def test_a_conversation_in_order() -> None:
    talk = conversation()
    advised, ended = talk.advise(Advise("small", PAGE_4K, ("push", "from-the-future")))
    assert (advised.name, advised.stream, advised.size, advised.identity) == ("small", 1000, SIZE, "v1")
    assert advised.features == ("push",) and not ended
    stream = talk.listen(Listen(1000, 99))
    assert (stream.phase, stream.window) == (Phase.LISTENING, 99)
    assert talk.request(RequestRanges(1, 1000, True, pack_range(9 * PAGE_4K, PAGE_4K))) == (stream, [(36864, PAGE_4K)])
    assert (talk.open_requests, talk.open_bytes) == (1, PAGE_4K)
    talk.answered(PAGE_4K)
    assert (talk.open_requests, talk.open_bytes) == (0, 0)
    assert talk.complete(Complete(1000)) is stream
    assert stream.phase is Phase.ENDED and not talk.streams


def test_to_advise_anew_ends_the_stream_and_numbers_another() -> None:
    talk = conversation()
    first, other = listening(talk), listening(talk, "large")
    advised, ended = talk.advise(Advise("small", PAGE_4K, ()))
    assert ended == [first] and first.phase is Phase.ENDED and other.phase is Phase.LISTENING
    assert advised.stream != first.number
    refused("out-of-phase", talk.request, RequestRanges(1, first.number, True, pack_range(0, PAGE_4K)))


def test_a_window_is_for_those_who_take_what_they_did_not_ask_for() -> None:
    talk = conversation()
    advised, _ = talk.advise(Advise("small", PAGE_4K, ("zero",)))
    assert talk.listen(Listen(advised.stream, 1 << 20)).window == 0
    stream = listening(talk, window=50)
    assert talk.listen(Listen(stream.number, 70)).window == 70, "renewed, not added up"


def test_what_is_refused() -> None:
    talk = conversation()
    assert "small" in refused("no-such-block", talk.advise, Advise("other", PAGE_4K, ()))
    reason = refused("bad-page-size", talk.advise, Advise("huge", PAGE_4K, ()))
    assert "4096" in reason and "2097152" in reason, "both sides' values"
    refused("bad-page-size", talk.advise, Advise("small", 8192, ()))
    refused("bad-page-size", talk.advise, Advise("small", 0, ()))
    refused("out-of-phase", talk.listen, Listen(1000, 0))
    refused("out-of-phase", talk.complete, Complete(1000))
    talk.advise(Advise("small", PAGE_4K, ()))
    ask = RequestRanges(5, 1000, True, pack_range(0, PAGE_4K))
    assert "Listen" in refused("out-of-phase", talk.request, ask)
    talk.listen(Listen(1000, 0))
    refused("bad-message", talk.request, RequestRanges(0, 1000, True, pack_range(0, PAGE_4K)))
    assert "request 6" in refused("bad-range", talk.request, RequestRanges(6, 1000, True, pack_range(1, PAGE_4K)))
    refused("bad-range", talk.request, RequestRanges(6, 1000, True, b"\0"))
    refused("bad-range", talk.request, RequestRanges(6, 1000, True, pack_ranges([(0, PAGE_4K)] * 2)))
    assert talk.request(ask)[1] == [(0, PAGE_4K)], "after all that it goes on"


def test_what_waits_is_bounded() -> None:
    talk = conversation()
    stream = listening(talk, "large")
    many = RequestRanges(1, stream.number, False, pack_range(0, MAX_RANGE_BYTES))
    for _ in range(MAX_OPEN_BYTES // MAX_RANGE_BYTES):
        talk.request(many)
    one = RequestRanges(1, stream.number, True, pack_range(0, PAGE_4K))
    refused("limit", talk.request, one)
    talk.answered(MAX_RANGE_BYTES)
    for _ in range(MAX_OPEN_REQUESTS - talk.open_requests):
        talk.request(one)
    assert "request 1:" in refused("limit", talk.request, one)


def test_streams_are_bounded() -> None:
    offers = {f"b{n}": Offer(f"b{n}", PAGE_4K, PAGE_4K, "") for n in range(MAX_STREAMS + 1)}
    talk = SourceConversation(offers, itertools.count(1).__next__)
    for name in list(offers)[:MAX_STREAMS]:
        talk.advise(Advise(name, PAGE_4K, ()))
    refused("limit", talk.advise, Advise(f"b{MAX_STREAMS}", PAGE_4K, ()))
    talk.advise(Advise("b0", PAGE_4K, ()))  # one of them anew
    reason = refused("no-such-block", talk.advise, Advise("c", PAGE_4K, ()))
    assert len(reason) < 200, "it does not name a thousand blocks"


def test_refusals_have_names() -> None:
    assert SourceRefusal.of(BadVersion("x")).code == "bad-version"
    assert SourceRefusal.of(BadMessage("x")).code == "bad-message"
    assert all(SourceRefusal(code, "x").message().code == code for code in SOURCE_REFUSALS)
    with pytest.raises(ValueError, match="no refusal"):
        SourceRefusal("whatever", "x")


class Histories(RuleBasedStateMachine):
    """A supervisor says anything in any order: a stream is what was said last, a refusal changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = conversation()
        self.model: dict[int, tuple[str, bool]] = {}
        self.seen: set[int] = set()
        self.open: list[int] = []

    def number(self, place: int) -> int:
        """A stream that is there, or was, or never will be."""
        return [*sorted(self.seen), 7][place % (len(self.seen) + 1)]

    def before(self) -> tuple[object, ...]:
        kept = [(number, stream.phase, stream.window) for number, stream in self.talk.streams.items()]
        return kept, self.talk.open_requests, self.talk.open_bytes

    @rule(name=st.sampled_from((*OFFERS, "other")), page_size=st.sampled_from((0, 1, PAGE_4K, PAGE_2M, U64)))
    def advise(self, name: str, page_size: int) -> None:
        before = self.before()
        try:
            advised, ended = self.talk.advise(Advise(name, page_size, ("push",)))
        except SourceRefusal:
            assert self.before() == before
            return
        assert advised.stream not in self.seen
        assert [stream.number for stream in ended] == [n for n, (one, _) in self.model.items() if one == name]
        self.model = {n: told for n, told in self.model.items() if told[0] != name}
        self.model[advised.stream] = (name, False)
        self.seen.add(advised.stream)

    @rule(place=st.integers(0, 50), window=u64)
    def listen(self, place: int, window: int) -> None:
        number, before = self.number(place), self.before()
        try:
            assert self.talk.listen(Listen(number, window)).window == window
            self.model[number] = (self.model[number][0], True)
        except SourceRefusal:
            assert number not in self.model and self.before() == before

    @rule(place=st.integers(0, 50), request=st.integers(0, 3), ranges=ranges_of_any_kind)
    def request(self, place: int, request: int, ranges: list[Range]) -> None:
        number, before = self.number(place), self.before()
        name, heard = self.model.get(number, ("", False))
        try:
            stream, asked = self.talk.request(RequestRanges(request, number, True, pack_ranges(ranges)))
        except SourceRefusal as refusal:
            assert self.before() == before
            if heard and request and ranges:
                assert refusal.code == "limit" or not sound(ranges, self.talk.streams[number].page_size, size_of(name))
            return
        assert heard and request and asked == ranges and stream.number == number
        assert sound(ranges, stream.page_size, size_of(name))
        self.open.append(sum(length for _, length in ranges))

    @rule(place=st.integers(0, 50))
    def complete(self, place: int) -> None:
        number = self.number(place)
        try:
            self.talk.complete(Complete(number))
            del self.model[number]
        except SourceRefusal:
            assert number not in self.model

    @rule()
    def answer(self) -> None:
        if self.open:
            self.talk.answered(self.open.pop())

    @invariant()
    def agrees(self) -> None:
        told = {n: (s.offer.name, s.phase is Phase.LISTENING) for n, s in self.talk.streams.items()}
        assert told == self.model
        assert (self.talk.open_requests, self.talk.open_bytes) == (len(self.open), sum(self.open))
        assert self.talk.open_bytes <= MAX_OPEN_BYTES


def size_of(name: str) -> int:
    return OFFERS[name].size


TestHistories = Histories.TestCase


# --- bytes from anybody -----------------------------------------------------------------------------------------------

SAID: list[Message] = [
    Advise("small", PAGE_4K, ("zero", "push")),
    Listen(1000, 65536),
    RequestRanges(1, 1000, True, pack_ranges([PAGE, (0, PAGE_4K)])),
    RequestRanges(2, 1000, False, pack_range(0, SIZE + 7)),
    Complete(1001),
]


def hear(talk: SourceConversation, data: bytes) -> None:
    """What a loop does with a message, without the loop."""
    message: Message = decode(data, expect=FROM_SUPERVISOR)
    match message:
        case Advise():
            talk.advise(message)
        case Listen():
            talk.listen(message)
        case RequestRanges():
            _, ranges = talk.request(message)
            talk.answered(sum(length for _, length in ranges))
        case Complete():
            talk.complete(message)


def mangled(dice: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(dice.randrange(4)):
        place = dice.randrange(len(raw))
        match dice.randrange(4):
            case 0:
                raw[place] = dice.randrange(256)
            case 1:
                raw[place] ^= 1 << dice.randrange(8)
            case 2:
                del raw[place + 1 :]
            case _:
                raw[place:place] = dice.randbytes(dice.randrange(9))
    return bytes(raw)


def fuzz_supervisor(seed: int, rounds: int) -> int:
    """Mangled words to one conversation; says how many got through."""
    dice, talk, passed = random.Random(seed), conversation(), 0
    said = [encode(message) for message in SAID]
    for _ in range(rounds):
        with suppress(BadMessage, SourceRefusal):
            hear(talk, mangled(dice, dice.choice(said)))
            passed += 1
    assert len(talk.streams) <= len(OFFERS)
    return passed


def fuzz_source(seed: int, rounds: int) -> int:
    """Mangled Pages, as a supervisor looks at them."""
    dice, passed = random.Random(seed), 0
    said = [
        encode(Pages(1, 1, pack_range(*PAGE), b"\0", "")),
        encode(Pages(1, 2, pack_ranges([PAGE, (0, PAGE_4K), (3 * PAGE_4K, 2 * PAGE_4K)]), b"\0\1\2", "gone")),
    ]
    for _ in range(rounds):
        lengths = [PAGE_4K] * dice.choice((1, 1, 1, 0, 2))
        with suppress(BadMessage):
            message = decode(mangled(dice, dice.choice(said)), expect=(Pages,))
            for offset, length, kind, frame in check_pages(message, lengths, PAGE_4K, SIZE):
                assert 0 <= offset < offset + length <= SIZE + 7 and kind in (
                    RangeKind.DATA,
                    RangeKind.ZERO,
                    RangeKind.LOST,
                )
                assert frame < 0 or lengths[frame] == length
            passed += 1
    return passed


def test_mangled_words_of_a_supervisor() -> None:
    assert 1000 < fuzz_supervisor(1, 20_000) < 19_000, "some get through, some do not, or this proves little"


def test_mangled_pages_of_a_source() -> None:
    assert 1000 < fuzz_source(2, 20_000) < 19_000


def test_the_table_in_the_text_is_the_table_that_the_conversation_walks() -> None:
    table = (source_conversation.__doc__ or "").split("   ----------\n")[1].split("\n\n")[0]
    shown = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert shown == [
        [kind.__name__, ", ".join(phase.value for phase in allowed) or "-", after.value]
        for kind, (allowed, after) in source_conversation.RULES.items()
    ]


@pytest.mark.parametrize(
    "words", [("x" * 61, "", 0, 0, 0), ("live", "\33[2J", 0, 0, 0), ("live", "VM running", 2, 1, 0)]
)
def test_progress_that_a_terminal_must_not_see(words: tuple[str, str, int, int, int]) -> None:
    check_progress(Progress("live", "VM running", 1, 2, 9))
    with pytest.raises(BadMessage):
        check_progress(Progress(*words))
