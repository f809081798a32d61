"""Message templates: the messages of a common fault, made and recognised without msgpack.

One page that one client waits for is four messages: RequestPages and Wake with one offset, RequestRanges and Pages with
one range. A strict ``decode`` of each costs more than all other work on it. So:

* **to send**, the bytes are made beforehand by ``encode``, and the numbers that differ are inserted;
* **to receive**, the bytes are not parsed but *compared*: with the one expected answer, or with the beginning of an
  equal message that ``decode`` accepted before. Bytes that are not equal go to ``decode``. So nothing is accepted here
  that ``decode`` refuses, and a peer that uses other msgpack formats is only served more slowly.

A request number takes five bytes (``ce`` and 32 bits). msgpack writes every number from FIRST_REQUEST on in that form,
so supervisors count from there.
"""

from __future__ import annotations

from .codec import encode
from .messages import Message
from .return_path import Pages, RangeKind, RequestRanges, pack_range

FIRST_REQUEST = 1 << 16
"""The first request number that takes four bytes."""
REQUEST_LIMIT = 1 << 32
OFFSET_BYTES = 8
"""Bytes of one packed offset, the end of RequestPages, Wake and Lost of one page."""
RANGE_BYTES = 16
"""Bytes of one packed range, the end of RequestRanges."""
NUMBER_BYTES = 4
"""Bytes of a request's number."""

_NO_RANGE = bytes(RANGE_BYTES)
_ASKED = encode(RequestRanges(FIRST_REQUEST, 0, True, _NO_RANGE))[:4]
"""Array, version, tag, and the mark of a number of four bytes, in the forms that ``encode`` uses."""


def template_of(message: Message, width: int) -> bytes:
    """All of a message except its last ``width`` bytes, which are the contents of its last field, a bin."""
    return encode(message)[:-width]


class MessageTemplates:
    """A supervisor's messages to and from one stream of a source, of one range each."""

    __slots__ = ("_answer", "_data", "_next_data", "_next_range", "_next_urgent", "urgent")

    def __init__(self, stream: int) -> None:
        urgent = encode(RequestRanges(FIRST_REQUEST, stream, True, _NO_RANGE))
        later = encode(RequestRanges(FIRST_REQUEST, stream, False, _NO_RANGE))
        self._next_urgent, self._next_range = (
            urgent[4 + NUMBER_BYTES : -RANGE_BYTES],
            later[4 + NUMBER_BYTES : -RANGE_BYTES],
        )
        self._answer, self._next_data, self._data = answer_parts(stream)
        self.urgent = (_ASKED, self._next_urgent, self._answer, self._next_data, self._data)
        """Parts of an urgent request: before its number, between number and range. Then parts of its answer: before the
        number, between number and range, behind the range."""

    def request(self, request: int, offset: int, length: int, urgent: bool) -> tuple[bytes, bytes]:
        """RequestRanges of one range, and the Pages that answer it with all its bytes. ``request`` is at least
        FIRST_REQUEST and below REQUEST_LIMIT."""
        number, packed = request.to_bytes(NUMBER_BYTES, "big"), pack_range(offset, length)
        return (
            _ASKED + number + (self._next_urgent if urgent else self._next_range) + packed,
            self._answer + number + self._next_data + packed + self._data,
        )


def answer_parts(stream: int) -> tuple[bytes, bytes, bytes]:
    """Parts of Pages with one range of data: before the four bytes of the number, between them and the range, and
    behind the range."""
    whole = encode(Pages(stream, FIRST_REQUEST, _NO_RANGE, bytes((RangeKind.DATA,)), ""))
    # Found by comparison, not counted: where the kind differs, the part behind the range begins.
    other = encode(Pages(stream, FIRST_REQUEST, _NO_RANGE, bytes((RangeKind.LOST,)), ""))
    kind = next(at for at in range(len(whole) - 1, -1, -1) if whole[at] != other[at])
    behind = kind - 2  # the bin's mark and its length
    number = behind - RANGE_BYTES - 2 - NUMBER_BYTES
    return whole[:number], whole[number + NUMBER_BYTES : behind - RANGE_BYTES], whole[behind:]


def number_of(data: bytes) -> bytes:
    """The four bytes of the number of a RequestRanges; b"" if the number is not of four bytes."""
    return data[4 : 4 + NUMBER_BYTES] if data[:4] == _ASKED else b""


def stream_part(data: bytes) -> bytes:
    """The part of a RequestRanges (four-byte number, one range) that names stream and urgency: equal for all such
    requests of a stream."""
    return data[:4] + data[4 + NUMBER_BYTES : -RANGE_BYTES]
