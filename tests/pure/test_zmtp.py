"""ZMTP as a DEALER speaks it: whatever pieces the bytes come in, and whatever else comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import (
    COMMAND,
    GREETING,
    GREETING_BYTES,
    LARGEST,
    LONG,
    MORE,
    Message,
    Reader,
    command,
    frame,
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
