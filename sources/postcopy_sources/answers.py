"""From what a source returns or raises to what is sent. Only here a source's data is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from postcopy_protocol.errors import PageLost, text_of
from postcopy_protocol.return_path import RangeKind, pack_range, pack_ranges, unpack_ranges

Buffer = bytes | bytearray | memoryview

Read = Callable[[int, int], Buffer | None]  # ``read`` or ``read_now`` of a source
ReadInto = Callable[[int, memoryview], bool]  # ``read_into`` of a source

KIND = {
    RangeKind.DATA: bytes([RangeKind.DATA]),
    RangeKind.ZERO: bytes([RangeKind.ZERO]),
    RangeKind.LOST: bytes([RangeKind.LOST]),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The fields of Pages that are the same for every supervisor, and its raw frames."""

    ranges: bytes
    kinds: bytes
    reason: str
    frames: tuple[Buffer, ...]


@lru_cache(16)
def zeros(length: int) -> bytes:
    return bytes(length)


def lost_answer(offset: int, length: int, reason: str) -> Answer:
    return Answer(pack_range(offset, length), KIND[RangeKind.LOST], reason, ())


def answer_of(data: Buffer | None, offset: int, wanted: int, length: int) -> Answer:
    """Data of ``wanted`` bytes as pages of ``length`` bytes, the rest zeros. Raises PageLost for unusable data."""
    if data is None:
        return Answer(pack_range(offset, length), KIND[RangeKind.ZERO], "", ())
    if isinstance(data, memoryview):
        data = bytes(data)
    if not isinstance(data, (bytes, bytearray)):
        raise PageLost(f"the source gave {type(data).__name__} instead of bytes")
    if len(data) != wanted:
        raise PageLost(f"the source gave {len(data)} bytes instead of {wanted}")
    if wanted < length:
        data = data + bytes(length - wanted)
    # Comparing stops at the first byte that differs: next to nothing for data, and zeros need not be sent.
    if data == zeros(length):
        return Answer(pack_range(offset, length), KIND[RangeKind.ZERO], "", ())
    return Answer(pack_range(offset, length), KIND[RangeKind.DATA], "", (data,))


def answer_of_page(data: Buffer | None, offset: int, length: int) -> Answer:
    """As ``answer_of`` of one whole page; unusable data is a lost page."""
    try:
        return answer_of(data, offset, length, length)
    except PageLost as error:
        return lost_answer(offset, length, reason_of(error))


def read_answer(read: Read, offset: int, length: int, size: int, page_size: int) -> Answer:
    """Read whole pages. Pages that cannot be read are lost, each for its own reason. Raises BlockingIOError, and what
    is no Exception: a signal that ends the loop may arrive in here."""
    try:
        return _read_whole(read, offset, length, size)
    except BlockingIOError:
        raise
    except Exception as error:  # the source's own: it concerns only these pages
        if length == page_size:
            return lost_answer(offset, length, reason_of(error))
    pages = [
        read_answer(read, place, page_size, size, page_size) for place in range(offset, offset + length, page_size)
    ]
    return joined(pages, range(offset, offset + length, page_size), page_size)


def _read_whole(read: Read, offset: int, length: int, size: int) -> Answer:
    wanted = min(length, size - offset)
    return answer_of(read(offset, wanted), offset, wanted, length)


def joined(pages: list[Answer], places: range, page_size: int) -> Answer:
    """Answers of single pages as one: neighbours of one kind become one range; data keeps one frame a page."""
    ranges, kinds = [], b""
    kinds_by_place = [(place, page.kinds) for place, page in zip(places, pages, strict=True)]
    for kind, run in _runs(kinds_by_place):
        ranges.append((run[0], len(run) * page_size))
        kinds += kind
    reasons = dict.fromkeys(page.reason for page in pages if page.reason)
    return Answer(pack_ranges(ranges), kinds, "; ".join(list(reasons)[:4]), tuple(f for p in pages for f in p.frames))


def _runs(kinds_by_place: list[tuple[int, bytes]]) -> list[tuple[bytes, list[int]]]:
    runs: list[tuple[bytes, list[int]]] = []
    for kind, group in groupby(kinds_by_place, key=lambda one: one[1]):
        places = [place for place, _ in group]
        if kind == KIND[RangeKind.DATA]:
            runs += [(kind, [place]) for place in places]
        else:
            runs.append((kind, places))
    return runs


def reason_of(error: BaseException) -> str:
    """One line for people."""
    text = text_of(error)
    if isinstance(error, PageLost):
        return text
    return f"the source raised {type(error).__name__}{': ' if text else ''}{text}"


def merged(answers: list[Answer]) -> Answer:
    """Answers for several ranges as one."""
    if len(answers) == 1:
        return answers[0]
    return Answer(
        b"".join([answer.ranges for answer in answers]),
        b"".join([answer.kinds for answer in answers]),
        "; ".join(list(dict.fromkeys(answer.reason for answer in answers if answer.reason))[:4]),
        tuple([frame for answer in answers for frame in answer.frames]),
    )


def expanded(answer: Answer) -> Answer:
    """The answer with zeros as bytes, for a supervisor without the feature ``zero``."""
    if RangeKind.ZERO not in answer.kinds:
        return answer
    given = iter(answer.frames)
    frames: list[Buffer] = []
    for (_, length), kind in zip(unpack_ranges(answer.ranges), answer.kinds, strict=True):
        if kind != RangeKind.LOST:
            frames.append(zeros(length) if kind == RangeKind.ZERO else next(given))
    return Answer(
        answer.ranges, answer.kinds.replace(KIND[RangeKind.ZERO], KIND[RangeKind.DATA]), answer.reason, tuple(frames)
    )
