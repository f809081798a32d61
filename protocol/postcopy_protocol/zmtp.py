"""ZMTP 3, the wire protocol of ZeroMQ, as far as one machine needs it: no authentication (mechanism NULL). Sans-I/O.

The native transport speaks it without libzmq. libzmq costs each end a thread that passes everything on, twice a fault.
What it decides is little: a DEALER with one connection has nothing to choose, and a ROUTER looks up a name. The other
end may be libzmq and cannot tell the difference. Standards: ZeroMQ RFC 23 (ZMTP 3.0), RFC 37 (3.1), and RFC 28 (how a
ROUTER names its peers).

::

    greeting   64 bytes: signature, version, mechanism, as-server; each side sends its own at once
    READY      a command with the type of the socket and its routing id; then messages
    frame      flags, length (1 byte, or 8 with LONG), body; a message is its frames up to one without MORE
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import BadMessage

Buffer = bytes | bytearray | memoryview
Message = bytes | list[bytes]
"""A message of one frame, the common case, or the frames of one that has more."""

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame; others are not defined."""

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(1) + bytes(31)
LARGEST = 1 << 20
"""Default of the largest frame that is accepted, and of the frames of one message together, in bytes."""
MOST_PARTS = 1024
"""Frames of one message."""
AT_ONCE = 16
"""Messages that a reader gives at once: the others of a peer that sends many wait until it is asked again."""
_FLAGS = frozenset(range(8)) - {MORE | COMMAND, MORE | COMMAND | LONG}
_LONG = bytes((LONG,))
SHORT = [bytes((0, length)) for length in range(256)]
"""The header of a message of one frame, by the number of its bytes."""
_ROOM = 1 << 16
"""Bytes: when less is free at the end of a buffer, its contents are moved to its beginning."""
_SIGNATURE_END, _MAJOR, _MECHANISM = 9, 10, slice(12, 32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame with this body; without flags it is a whole message."""
    length = len(body)
    if length < 256:
        return (SHORT[length] if not flags else bytes((flags, length))) + body
    return bytes((flags | LONG,)) + length.to_bytes(8, "big") + body


def command(name: bytes, rest: bytes = b"") -> bytes:
    """A frame with a command."""
    return frame(bytes((len(name),)) + name + rest, COMMAND)


def framed(parts: Sequence[Buffer]) -> list[Buffer]:
    """A message with these frames, as buffers to be sent one after the other. The parts are not copied."""
    if len(parts) == 2 and len(parts[0]) < 256 <= len(parts[1]):  # the common case: the head and the pages of an answer
        head, body = parts
        return [bytes((MORE, len(head))) + head + _LONG + len(body).to_bytes(8, "big"), body]
    buffers: list[Buffer] = []
    last = len(parts) - 1
    for number, part in enumerate(parts):
        length, more = len(part), MORE if number < last else 0
        buffers.append(bytes((more, length)) if length < 256 else bytes((more | LONG,)) + length.to_bytes(8, "big"))
        buffers.append(part)
    return buffers


def opening(identity: bytes = b"", kind: bytes = b"DEALER") -> bytes:
    """The greeting and READY of a socket of this kind with this routing id."""
    properties = ((b"Socket-Type", kind), (b"Identity", identity))
    return GREETING + command(
        b"READY",
        b"".join([bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value for name, value in properties]),
    )


class Reader:
    """Parses the peer's bytes, in pieces of any size, from its greeting on. ``answer``: bytes to send back (pongs)."""

    def __init__(self, largest: int = LARGEST, *, until_ready: bool = False) -> None:
        """``until_ready``: what follows READY is left to ``take_rest``."""
        self.answer = b""
        self.ready = False
        """The peer has said READY."""
        self.identity = b""
        """The routing id that the peer asks for, if any."""
        self.largest = largest
        self.idle = False
        """The next bytes begin a message."""
        self.more = False
        """``feed`` is to be called again, with no data: more messages may be complete."""
        self.at_once, self.frames_at_once = AT_ONCE, MOST_PARTS
        """Messages, and frames, that one ``feed`` handles."""
        self._until_ready = until_ready
        self._greeted = False
        self._rest = b""
        self._parts: list[bytes] = []
        self._held = 0  # bytes in the parts

    def feed(self, data: bytes) -> Sequence[Message]:
        """The messages that are complete now. Raises BadMessage on what is no ZMTP; the connection is then useless."""
        if self.idle and len(data) > 1 and not data[0] and len(data) == 2 + data[1]:
            return [data[2:]]  # the common case: one short message
        self._rest += data
        self.idle = False
        if not self._greeted and not self._take_greeting():
            return []
        messages: list[Message] = []
        at = frames = 0
        self.more = False
        while (found := self._frame(at)) is not None:
            frames += 1
            flags, body, at = found
            if flags & COMMAND:
                if self._parts:
                    raise BadMessage("a command inside a message")
                self._command(body)
                if self._until_ready and self.ready:
                    break
            elif not self.ready:
                raise BadMessage("a message before READY")
            else:
                messages += self._part(body, flags)
            if len(messages) >= self.at_once or frames >= self.frames_at_once:
                self.more = True
                break
        self._rest = self._rest[at:]
        self.more = self.more and bool(self._rest)
        self.idle = self.ready and not self._rest and not self._parts
        return messages

    @property
    def held(self) -> int:
        """Bytes of messages that are not complete, or not given yet."""
        return len(self._rest) + self._held

    def take_answer(self) -> bytes:
        """Bytes to send back; they are returned once."""
        answer, self.answer = self.answer, b""
        return answer

    def take_rest(self) -> bytes:
        """The bytes after the last complete message; this reader forgets them."""
        rest, self._rest = self._rest, b""
        return rest

    def _part(self, body: bytes, flags: int) -> Sequence[Message]:
        """The message that ends with this frame, if one does."""
        if not self._parts and not flags & MORE:
            return [body]
        self._parts.append(body)
        self._held += len(body)
        if self._held > self.largest or len(self._parts) > MOST_PARTS:
            raise BadMessage(f"a message of more than {self.largest} bytes, or {MOST_PARTS} frames")
        if flags & MORE:
            return []
        parts, self._parts, self._held = self._parts, [], 0
        return [parts]

    def _take_greeting(self) -> bool:
        greeting = self._rest[:GREETING_BYTES]
        if greeting[:1] not in (b"", b"\xff"):
            raise BadMessage("the peer does not speak ZMTP")
        if len(greeting) < GREETING_BYTES:
            return False
        mechanism = greeting[_MECHANISM].rstrip(b"\0")
        if greeting[_SIGNATURE_END] != 0x7F or greeting[_MAJOR] < 3 or mechanism != b"NULL":
            raise BadMessage(f"the peer speaks ZMTP {greeting[_MAJOR]} with {mechanism!r}, not 3 with NULL")
        self._greeted = True
        self._rest = self._rest[GREETING_BYTES:]
        return True

    def _frame(self, at: int) -> tuple[int, bytes, int] | None:
        """(flags, body, where the next one begins) of the frame at a place; None when it is not complete."""
        rest = self._rest
        bounds = _bounds(rest, at, len(rest))
        if bounds is None:
            return None
        start, end = bounds
        if end - start > self.largest:
            raise BadMessage(f"a frame of {end - start} bytes, {self.largest} are accepted")
        return (rest[at], rest[start:end], end) if len(rest) >= end else None

    def _command(self, body: bytes) -> None:
        """READY comes once; PING is answered; commands of later versions are ignored."""
        name = body[1 : 1 + body[0]] if body else b""
        if name == b"READY" and not self.ready:
            self.identity = _identity(body[6:])
            self.ready = True
        elif name == b"PING" and self.ready and len(body) >= 7:
            if len(self.answer) < self.largest:
                self.answer += command(b"PONG", body[7:23])  # up to 16 bytes of context follow the time to live
        elif name == b"ERROR" or not self.ready:
            raise BadMessage(f"the peer refuses: {body[:64]!r}")


def _bounds(data: bytes | memoryview, at: int, end: int) -> tuple[int, int] | None:
    """Where the body of the frame at a place begins and ends, from its header; None when that is not complete."""
    if end - at < 2:
        return None
    flags = data[at]
    if flags not in _FLAGS:
        raise BadMessage(f"a frame with the flags {flags:#x}")
    if not flags & LONG:
        return at + 2, at + 2 + data[at + 1]
    start = at + 9
    if end < start:
        return None
    return start, start + int.from_bytes(data[at + 1 : start], "big")


def _identity(properties: bytes) -> bytes:
    """The routing id in the properties of a READY."""
    found, at = b"", 0
    while at < len(properties):
        value = at + 1 + properties[at] + 4
        end = value + int.from_bytes(properties[value - 4 : value], "big")
        if value > len(properties) or end > len(properties):
            raise BadMessage("a READY whose properties are cut short")
        if properties[at + 1 : value - 4].lower() == b"identity":
            found = properties[value:end]
        at = end
    if len(found) > 255:
        raise BadMessage("a routing id of more than 255 bytes")
    return found


class PlacedReader:
    """As Reader, for a peer that sends much: bytes stay where they were received. The frames of a message are views of
    them, valid until more is received."""

    def __init__(self, buffer: memoryview) -> None:
        """``buffer``: of bytes, as large as the largest message with the headers of its frames."""
        self._opening = Reader(len(buffer), until_ready=True)
        self._buffer = buffer
        self.ready = False
        """The peer has said READY."""
        self.more = False
        """``filled`` is to be called again, with 0: more messages may be complete."""
        self._begin = self._end = 0
        self.room: memoryview | None = buffer
        """Where the next bytes are to be received; None: ask ``space``."""

    def take_answer(self) -> bytes:
        """As ``Reader.take_answer``."""
        return self._opening.take_answer()

    def space(self) -> memoryview:
        """Where the next bytes are to be received. An incomplete message may be moved to make room."""
        buffer, begin, end = self._buffer, self._begin, self._end
        if begin == end:
            self._begin = self._end = 0
            self.room = buffer
            return buffer
        if begin and len(buffer) - end < _ROOM:
            buffer[: end - begin] = bytes(buffer[begin:end])
            self._begin, self._end = 0, end - begin
        return buffer[self._end :]

    def filled(self, count: int) -> list[list[memoryview]]:
        """``count`` bytes have been received into ``space()``: the messages that are complete. Raises BadMessage."""
        buffer = self._buffer
        if not self._end and count > 2 and buffer[0] == MORE and self.ready:
            # The common case: a short frame and a long one, the head and the pages of an answer, all of it here.
            head = 2 + buffer[1]
            start = head + 9
            if (
                start < count
                and buffer[head] == LONG
                and int.from_bytes(buffer[head + 1 : start], "big") == count - start
            ):
                return [[buffer[2:head], buffer[start:count]]]
        self.room = None
        end = self._end + count
        if not self.ready:
            self._opening.feed(bytes(self._buffer[self._begin : end]))
            self.ready = self._opening.ready
            rest = self._opening.take_rest() if self.ready else b""
            self._buffer[: len(rest)] = rest
            self._begin, end = 0, len(rest)
        self._end = end
        messages: list[list[memoryview]] = []
        parts: list[memoryview] = []
        at, frames, self.more = self._begin, 0, False
        while (body := self._body(at, end)) is not None:
            frames += 1
            flags, at = self._buffer[at], body[1]
            view = self._buffer[body[0] : at]
            if flags & COMMAND:
                if parts:
                    raise BadMessage("a command inside a message")
                self._opening._command(bytes(view))
            else:
                parts.append(view)
                if flags & MORE:
                    if len(parts) > MOST_PARTS:
                        break
                    continue
                messages.append(parts)
                parts = []
            self._begin = at
            if len(messages) == AT_ONCE or frames >= MOST_PARTS:
                self.more = True
                break
        if len(parts) > MOST_PARTS or self._end - self._begin == len(self._buffer):
            raise BadMessage(f"a message of more than {len(self._buffer)} bytes, or {MOST_PARTS} frames")
        return messages

    def _body(self, at: int, end: int) -> tuple[int, int] | None:
        """Where the body of the frame at a place begins and ends; None when it is not complete."""
        buffer = self._buffer
        bounds = _bounds(buffer, at, end)
        if bounds is not None and bounds[1] - self._begin > len(buffer):
            length = bounds[1] - bounds[0]
            raise BadMessage(f"a message with a frame of {length} bytes, {len(buffer)} are accepted in all")
        return bounds if bounds is not None and bounds[1] <= end else None
