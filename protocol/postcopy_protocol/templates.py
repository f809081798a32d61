"""The express road: the messages of a common fault, put together and known again without taking them apart.

One page that one client waits for is four messages: RequestPages and Wake with one offset, RequestRanges and Pages with
one range. A strict ``decode`` of each costs more than everything else that is done about it. So:

* **out**, a message is bytes made beforehand by ``encode``, with the numbers that differ put into their places;
* **in**, the bytes are not parsed but *compared*: with the one answer that is expected, or with a head of the same
  message that ``decode`` has taken before. What is not equal, byte for byte, goes to ``decode``. So nothing is taken
  here that is refused there, and whoever writes another msgpack than we do is only served more slowly.

Numbers of requests stand in five bytes of their own (``ce`` and 32 bits), which is what msgpack gives every number
from FIRST_REQUEST on: supervisors count from there.
"""

from __future__ import annotations

from .codec import encode
from .messages import Message
from .return_path import Pages, RangeKind, RequestRanges, pack_range

FIRST_REQUEST = 1 << 16
"""The first number of a request that takes four bytes."""
REQUEST_LIMIT = 1 << 32
OFFSET_BYTES = 8
"""Bytes of one packed offset, the end of RequestPages, Wake and Lost of one page."""
RANGE_BYTES = 16
"""Bytes of one packed range, the end of RequestRanges."""
NUMBER_BYTES = 4
"""Bytes of a request's number."""

_NO_RANGE = bytes(RANGE_BYTES)
_ASKED = encode(RequestRanges(FIRST_REQUEST, 0, True, _NO_RANGE))[:4]
"""Array, version, tag, and the mark of a number of four bytes, each in the one form that we write."""


def template_of(message: Message, width: int) -> bytes:
    """All of a message but its last ``width`` bytes, which are the whole bin that it ends with."""
    return encode(message)[:-width]


class MessageTemplates:
    """What a supervisor says to one stream of a source, and hears from it, of one range at a time."""

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
        """For an urgent request: what stands before its number, and between it and the range; in its answer what stands
        before the number, between it and the range, and behind that."""

    def request(self, request: int, offset: int, length: int, urgent: bool) -> tuple[bytes, bytes]:
        """RequestRanges of one range, and the Pages that answer it with all its bytes at once. ``request`` is from
        FIRST_REQUEST to REQUEST_LIMIT."""
        number, packed = request.to_bytes(NUMBER_BYTES, "big"), pack_range(offset, length)
        return (
            _ASKED + number + (self._next_urgent if urgent else self._next_range) + packed,
            self._answer + number + self._next_data + packed + self._data,
        )


def answer_parts(stream: int) -> tuple[bytes, bytes, bytes]:
    """What stands before the four bytes of the number, before the range, and behind it, in Pages with one range of
    data."""
    whole = encode(Pages(stream, FIRST_REQUEST, _NO_RANGE, bytes((RangeKind.DATA,)), ""))
    # Told from another message rather than counted: where the kind differs is where the part behind the range begins.
    other = encode(Pages(stream, FIRST_REQUEST, _NO_RANGE, bytes((RangeKind.LOST,)), ""))
    kind = next(at for at in range(len(whole) - 1, -1, -1) if whole[at] != other[at])
    behind = kind - 2  # the bin's mark and its length
    number = behind - RANGE_BYTES - 2 - NUMBER_BYTES
    return whole[:number], whole[number + NUMBER_BYTES : behind - RANGE_BYTES], whole[behind:]


def number_of(data: bytes) -> bytes:
    """The four bytes of the number of a RequestRanges that has it in four; else b""."""
    return data[4 : 4 + NUMBER_BYTES] if data[:4] == _ASKED else b""


def stream_part(data: bytes) -> bytes:
    """What of a RequestRanges with a number of four bytes and one range names stream and urgency: it is the same in
    all of them."""
    return data[:4] + data[4 + NUMBER_BYTES : -RANGE_BYTES]
