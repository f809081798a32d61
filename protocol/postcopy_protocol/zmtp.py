"""ZMTP 3, the wire of ZeroMQ, as far as one end of a connection needs it that is a DEALER. Sans-I/O.

A worker speaks ZeroMQ without libzmq. On the road of a remote fault libzmq costs a worker a thread that hands all
over, twice a fault; what it does is little: a DEALER with one connection, no authentication (the mechanism
NULL) and messages of one frame has nothing to decide. The other end is a ROUTER of libzmq, and cannot tell the
difference. The text of the standard: ZeroMQ RFC 23 (ZMTP 3.0) and 37 (3.1).

    greeting   64 bytes: signature, version, mechanism, as-server; each side sends its own at once
    READY      a command with the type of the socket and its routing id; then messages
    frame      flags, length (1 byte, or 8 where LONG is set), body; a message is its frames up to one without MORE
"""

from __future__ import annotations

from .errors import BadMessage

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame; others are not defined."""

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(1) + bytes(31)
LARGEST = 1 << 20
"""Bytes of the largest frame that is taken, as in the supervisor's router."""
_SHORT = [bytes((0, length)) for length in range(256)]
_SIGNATURE_END, _MAJOR, _MECHANISM = 9, 10, slice(12, 32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame with this body; with no flags it is a whole message."""
    length = len(body)
    if length < 256:
        return (_SHORT[length] if not flags else bytes((flags, length))) + body
    return bytes((flags | LONG,)) + length.to_bytes(8, "big") + body


def command(name: bytes, rest: bytes = b"") -> bytes:
    """A frame with a command."""
    return frame(bytes((len(name),)) + name + rest, COMMAND)


def opening(identity: bytes) -> bytes:
    """What a DEALER with this routing id says first. Messages may follow at once: the other end reads in order."""
    properties = ((b"Socket-Type", b"DEALER"), (b"Identity", identity))
    return GREETING + command(
        b"READY",
        b"".join([bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value for name, value in properties]),
    )


class Reader:
    """Takes the other end's bytes apart, in pieces of any size, from its greeting on. ``answer``: what is to be sent
    back because of what it said (pongs)."""

    def __init__(self) -> None:
        self.answer = b""
        self.ready = False
        """It has said READY."""
        self._greeted = False
        self._rest = b""
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now: the frames of each joined, since ours have one. Raises BadMessage on what
        is no ZMTP: the connection is of no use any more."""
        if not self._rest and self.ready and len(data) > 1 and not data[0] and len(data) == 2 + data[1]:
            return [data[2:]]  # one short message, which is the rule
        self._rest += data
        if not self._greeted and not self._take_greeting():
            return []
        messages: list[bytes] = []
        at = 0
        while (found := self._frame(at)) is not None:
            flags, body, at = found
            if flags & COMMAND:
                self._command(body)
            elif not self.ready:
                raise BadMessage("a message before READY")
            else:
                self._parts.append(body)
                if not flags & MORE:
                    messages.append(b"".join(self._parts))
                    self._parts = []
                elif sum(map(len, self._parts)) > LARGEST:
                    raise BadMessage(f"a message of more than {LARGEST} bytes")
        self._rest = self._rest[at:]
        return messages

    def _take_greeting(self) -> bool:
        greeting = self._rest[:GREETING_BYTES]
        if greeting[:1] not in (b"", b"\xff"):
            raise BadMessage("the other end does not speak ZMTP")
        if len(greeting) < GREETING_BYTES:
            return False
        mechanism = greeting[_MECHANISM].rstrip(b"\0")
        if greeting[_SIGNATURE_END] != 0x7F or greeting[_MAJOR] < 3 or mechanism != b"NULL":
            raise BadMessage(f"the other end speaks ZMTP {greeting[_MAJOR]} with {mechanism!r}, not 3 with NULL")
        self._greeted = True
        self._rest = self._rest[GREETING_BYTES:]
        return True

    def _frame(self, at: int) -> tuple[int, bytes, int] | None:
        """(flags, body, where the next one begins) of the frame at a place; None when not all of it is there."""
        rest = self._rest
        if len(rest) < at + 2:
            return None
        flags = rest[at]
        head = at + (9 if flags & LONG else 2)
        if flags & ~(MORE | LONG | COMMAND) or (flags & COMMAND and flags & MORE):
            raise BadMessage(f"a frame with the flags {flags:#x}")
        if len(rest) < head:
            return None
        length = int.from_bytes(rest[at + 1 : head], "big")
        if length > LARGEST:
            raise BadMessage(f"a frame of {length} bytes, {LARGEST} are taken")
        end = head + length
        return (flags, rest[head:end], end) if len(rest) >= end else None

    def _command(self, body: bytes) -> None:
        """READY once; PING is answered, whatever else ZMTP may come to know is not for us."""
        name = body[1 : 1 + body[0]] if body else b""
        if name == b"READY" and not self.ready:
            self.ready = True
        elif name == b"PING" and self.ready and len(body) >= 7:
            self.answer += command(b"PONG", body[7:23])  # behind the time to live: up to 16 bytes of context
        elif name == b"ERROR" or not self.ready:
            raise BadMessage(f"the other end refuses: {body[:64]!r}")
