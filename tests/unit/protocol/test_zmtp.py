"""ZMTP as we speak it: whatever pieces the bytes come in, and whatever else comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import (
    AT_ONCE,
    COMMAND,
    GREETING,
    GREETING_BYTES,
    LARGEST,
    LONG,
    MORE,
    Message,
    PlacedReader,
    Reader,
    command,
    frame,
    framed,
    opening,
)

# What libzmq 4.3.5 says when a DEALER connects to its ROUTER.
ROUTERS = bytes.fromhex("ff00000000000000017f") + b"\3\1NULL" + bytes(16) + bytes(32)
READY = command(b"READY", b"\x0bSocket-Type\0\0\0\6ROUTER")


def reader(said: bytes = ROUTERS + READY) -> Reader:
    made = Reader()
    assert made.feed(said) == []
    return made


@given(st.lists(st.binary(max_size=600), max_size=6), st.data())
def test_messages_in_pieces_of_any_size(messages: list[bytes], data: st.DataObject) -> None:
    stream = ROUTERS + READY + b"".join(map(frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    taken, heard = Reader(), list[Message]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        heard += taken.feed(stream[start:end])
    assert heard == messages and taken.ready and taken.answer == b""


@given(st.binary(max_size=300))
def test_noise_is_refused_and_nothing_else(noise: bytes) -> None:
    for before in (b"", GREETING[:40], ROUTERS, ROUTERS + READY):
        taken = Reader()
        try:
            taken.feed(before)
            taken.feed(noise)
        except BadMessage:
            continue


def test_an_opening_is_greeting_and_ready() -> None:
    said = opening(b"w7.2")
    assert len(GREETING) == GREETING_BYTES and said.startswith(GREETING)
    flags, length = said[GREETING_BYTES : GREETING_BYTES + 2]
    body = said[GREETING_BYTES + 2 :]
    assert (flags, length) == (COMMAND, len(body)) and body.startswith(b"\5READY")
    assert b"\x0bSocket-Type\0\0\0\6DEALER" in body and body.endswith(b"\x08Identity\0\0\0\4w7.2")


def test_parts_are_one_message_and_long_frames_are_frames() -> None:
    assert reader().feed(frame(b"ab", MORE) + frame(b"c")) == [[b"ab", b"c"]]
    assert reader().feed(frame(bytes(70000))) == [bytes(70000)]
    assert frame(bytes(256))[0] == LONG and frame(bytes(255))[0] == 0


def test_a_ping_is_answered_with_its_context() -> None:
    taken = reader()
    assert taken.feed(command(b"PING", b"\0\x64context") + frame(b"x")) == [b"x"]
    assert taken.answer == command(b"PONG", b"context")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        ROUTERS[:10] + b"\2\0" + ROUTERS[12:],  # an older ZMTP
        ROUTERS.replace(b"NULL\0", b"CURVE"),
        ROUTERS + frame(b"x"),  # a message before READY
        ROUTERS + command(b"ERROR", b"\4nope"),
        ROUTERS + READY + command(b"ERROR", b"\4nope"),
        ROUTERS + READY + b"\x80\0",  # flags that nobody has defined
        ROUTERS + READY + b"\5\0",  # a command in parts
        ROUTERS + READY + bytes((LONG,)) + (LARGEST + 1).to_bytes(8, "big"),
        ROUTERS + READY + frame(bytes(LARGEST), MORE) + frame(b"x", MORE),
    ],
)
def test_what_cannot_go_on(said: bytes) -> None:
    with pytest.raises(BadMessage):
        Reader().feed(said)


def placed(reader: PlacedReader, data: bytes) -> list[list[bytes]]:
    """Received in as many pieces as there is room for."""
    heard: list[list[bytes]] = []
    while data:
        space = reader.space()
        count = min(len(space), len(data))
        assert count, "there is always room for more, or it is refused"
        space[:count], data = data[:count], data[count:]
        heard += [[bytes(one) for one in message] for message in reader.filled(count)]
    return heard


@given(st.lists(st.lists(st.binary(max_size=600), min_size=1, max_size=4), max_size=6), st.data())
def test_placed_messages_in_pieces_of_any_size(messages: list[list[bytes]], data: st.DataObject) -> None:
    """In a buffer that hardly holds the largest of them."""
    wholes = [b"".join(map(bytes, framed(message))) for message in messages]
    stream = ROUTERS + READY + b"".join(wholes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    taken = PlacedReader(memoryview(bytearray(1 + max([len(ROUTERS + READY), *map(len, wholes)]))))
    heard = [
        message
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for message in placed(taken, stream[start:end])
    ]
    assert heard == messages and taken.ready and taken.take_answer() == b""


@given(st.lists(st.binary(max_size=600), min_size=1, max_size=5))
def test_both_readers_and_both_writers_agree(parts: list[bytes]) -> None:
    whole = b"".join(map(bytes, framed(parts)))
    assert whole == b"".join([frame(part, MORE) for part in parts[:-1]]) + frame(parts[-1])
    message = parts[0] if len(parts) == 1 else parts
    assert reader().feed(whole) == [message]


@given(st.binary(max_size=300))
def test_noise_is_refused_by_a_placed_reader(noise: bytes) -> None:
    for before in (b"", GREETING[:40], ROUTERS, ROUTERS + READY):
        taken = PlacedReader(memoryview(bytearray(1000)))
        try:
            placed(taken, before + noise)
        except BadMessage:
            continue


def test_a_placed_message_that_does_not_fit() -> None:
    for said in (frame(bytes(1000)), frame(bytes(400), MORE) * 3, frame(b"", MORE) * 1000):
        with pytest.raises(BadMessage):
            placed(PlacedReader(memoryview(bytearray(1000))), ROUTERS + READY + said)


def test_a_name_is_asked_for() -> None:
    for said, name in (
        (opening(b"w7.2"), b"w7.2"),
        (opening(), b""),
        (GREETING + command(b"READY"), b""),
        (GREETING + command(b"READY", b"\x08IDENTITY\0\0\0\1a\x01x\0\0\0\0"), b"a"),
    ):
        assert reader(said).identity == name
    for properties in (b"\x08Identity\0\0\0\2a", b"\x08Ident", b"\x08Identity\0\0\1\0" + bytes(256), b"\xff"):
        with pytest.raises(BadMessage):
            Reader().feed(GREETING + command(b"READY", properties))


def test_a_reader_gives_few_messages_at_once() -> None:
    taken, heard = reader(), list[Message]()
    heard += taken.feed(frame(b"") * 1000)
    assert (len(heard), taken.more, taken.idle) == (AT_ONCE, True, False)
    while len(heard) < 1000:
        more = taken.feed(b"")
        assert 0 < len(more) <= AT_ONCE
        heard += more
    assert taken.feed(b"") == [] and heard == [b""] * 1000
    assert (taken.more, taken.idle, taken.held) == (False, True, 0)


def test_a_placed_reader_gives_few_messages_at_once() -> None:
    taken = PlacedReader(memoryview(bytearray(1 << 16)))
    assert placed(taken, ROUTERS + READY) == []
    heard = placed(taken, frame(b"a") * 1000 + frame(b"b", MORE))
    assert len(heard) == AT_ONCE
    while len(heard) < 1000:
        assert taken.more
        heard += [list(map(bytes, message)) for message in taken.filled(0)]
    assert taken.filled(0) == [] and heard == [[b"a"]] * 1000
    assert placed(taken, frame(b"c")) == [[b"b", b"c"]]


def test_what_a_reader_holds() -> None:
    taken = reader()
    taken.feed(frame(b"12345", MORE) + frame(b"6", MORE) + b"\0\x09rest")
    assert (taken.held, taken.idle) == (12, False)
    taken.feed(b"12345")
    assert (taken.held, taken.idle) == (0, True)


def test_a_share_that_takes_everything_leaves_no_more() -> None:
    """Called again for nothing, a reader would be idle, and its connection would never be read again."""
    taken = reader()
    assert len(taken.feed(frame(b"x") * AT_ONCE)) == AT_ONCE
    assert (taken.more, taken.idle) == (False, True)
