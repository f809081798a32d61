"""The express road takes nothing that ``decode`` refuses, and takes it for the same: compared on what is right, on what
differs in a byte or two, and on noise."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from postcopy_protocol.codec import decode, encode, pack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Lost, Message, RequestPages, Wake
from postcopy_protocol.return_path import Pages, RangeKind, RequestRanges, pack_range, unpack_range
from postcopy_protocol.templates import (
    FIRST_REQUEST,
    OFFSET_BYTES,
    RANGE_BYTES,
    REQUEST_LIMIT,
    MessageTemplates,
    answer_parts,
    number_of,
    stream_part,
    template_of,
)

u64 = st.integers(0, 2**64 - 1)
streams = st.integers(1, 2**41)
numbers = st.integers(FIRST_REQUEST, REQUEST_LIMIT - 1)
changes = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=3)
tails = st.integers(-9, 9)


def mutated(data: bytes, changes: list[tuple[int, int]], tail: int) -> bytes:
    """Bytes changed, and some cut off or put behind."""
    made = bytearray(data)
    for at, value in changes:
        made[at % len(made)] = value
    return bytes(made[:tail] if tail < 0 else made + bytes(tail))


def decoded(data: bytes) -> Message | None:
    try:
        return decode(data, expect=(RequestPages, Wake, Lost, RequestRanges, Pages))
    except BadMessage:
        return None


@given(streams, numbers, u64, u64, st.booleans())
def test_a_road_says_what_encode_says(stream: int, number: int, offset: int, length: int, urgent: bool) -> None:
    asked, answer = MessageTemplates(stream).request(number, offset, length, urgent)
    packed = pack_range(offset, length)
    assert asked == encode(RequestRanges(number, stream, urgent, packed))
    assert answer == encode(Pages(stream, number, packed, bytes((RangeKind.DATA,)), ""))
    before, between, behind = answer_parts(stream)
    assert answer == before + number_of(asked) + between + asked[-RANGE_BYTES:] + behind


@given(streams, numbers, numbers, u64, u64, st.booleans(), changes, tails)
def test_a_request_known_by_its_stream_is_the_one_that_decode_gives(
    stream: int,
    number: int,
    other: int,
    offset: int,
    length: int,
    urgent: bool,
    changes: list[tuple[int, int]],
    tail: int,
) -> None:
    known = encode(RequestRanges(number, stream, urgent, pack_range(0, 4096)))
    data = mutated(encode(RequestRanges(other, stream, urgent, pack_range(offset, length))), changes, tail)
    if number_of(data) and stream_part(data) == stream_part(known):
        found = int.from_bytes(number_of(data), "big")
        taken = RequestRanges(found, stream, urgent, pack_range(*unpack_range(data, len(data) - RANGE_BYTES)))
        assert decoded(data) == taken
    elif not changes and not tail:
        raise AssertionError("the same request is not known again")


FORMS = (
    b"\x96\xcc\x01\xce\x00\x00\x00\x70",
    b"\x96\x01\xcc\x70\xce\x00\x01\x00",
    b"\xdc\x00\x06\xce\x00\x00\x00\x01",
    b"\x96\x01\x70\xcd\x01\x00",
    b"\x96\x01\x70\xcf" + bytes(8),
)


@given(st.sampled_from(FORMS), st.binary(min_size=1, max_size=64))
@example(FORMS[0], b"\x05\x07\xc3\xc4\x10" + bytes(16))
def test_the_number_is_never_taken_from_another_place(form: bytes, rest: bytes) -> None:
    """Of the many forms that msgpack has for one message, only ours is known."""
    assert number_of(form + rest) == b""


@given(st.binary(max_size=64))
def test_noise_has_no_number(data: bytes) -> None:
    number = number_of(data)
    assert not number or data[:4] == encode(RequestRanges(FIRST_REQUEST, 1, True, bytes(16)))[:4]


@given(
    st.sampled_from((RequestPages, Wake, Lost)),
    st.integers(0, 2**33),
    st.integers(0, 2**33),
    u64,
    u64,
    changes,
    tails,
)
def test_a_message_of_one_offset_is_known_by_its_head(
    kind: type[Message], worker: int, block: int, first: int, offset: int, changes: list[tuple[int, int]], tail: int
) -> None:
    def made(place: int) -> Message:
        packed = pack_offsets([place])
        return RequestPages(worker, block, packed) if kind is RequestPages else kind(block, packed)

    head = template_of(made(first), OFFSET_BYTES)
    data = mutated(encode(made(offset)), changes, tail)
    if data[:-OFFSET_BYTES] == head:
        assert decoded(data) == made(int.from_bytes(data[-OFFSET_BYTES:], "little"))
    elif not changes and not tail:
        raise AssertionError("the same message is not known again")
