"""What a page source is: an object with a name, a size, a page size and ``read``. All the rest is done for it.

Required: ``name``, ``size``, ``page_size``, ``read``. Beside them an object may have any of

* ``identity() -> str``: equal for two sources if and only if their contents are equal. It lets another source take
  over when this one is lost. Without it a digest of the size and of 64 samples is made, by ``read``, at the start.
* ``read_now(offset, length) -> bytes | None``: like ``read``, but called in the thread of the loop, so it must return
  at once; it raises BlockingIOError where it cannot, and ``read`` is called in another thread.
* ``read_into(offset, view: memoryview) -> bool``: like ``read_now``, but the bytes go into all of ``view``, memory that
  a supervisor on this machine sees as well (staging.py); False: all of them are zero. ``view`` may not be kept. What
  raises is read again in another way. A source that has it has ``read_now`` too.
* ``listening(stream: PushStream) -> None``: called in a thread of its own when a supervisor listens. It may push pages
  that nobody has asked for, until it returns.

Only ``read_now``, ``read_into`` and ``identity`` are called in the main thread; ``read`` may be called in several
threads at once. Whatever these functions raise, return or never return concerns the pages asked for, never the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from postcopy_protocol.errors import BadInput, PageLost, PostcopyError
from postcopy_protocol.geometry import PAGE_4K, PAGE_SIZES, page_count
from postcopy_protocol.return_path import MAX_RANGE_BYTES
from postcopy_protocol.source_conversation import Offer
from postcopy_protocol.sources import parse_block_name

from .answers import Answer, Buffer, answer_of, lost_answer, reason_of

SAMPLES = 64
"""Places of 4096 bytes, evenly spaced, that the default identity looks at."""


@runtime_checkable
class PageSource(Protocol):
    """A block that can be read. ``size``: its exact length in bytes. ``page_size``: the smallest piece that can be
    read, 4096 or 2097152; supervisors that want smaller pages are refused."""

    name: str
    size: int
    page_size: int

    def read(self, offset: int, length: int) -> Buffer | None:
        """Exactly ``length`` bytes from ``offset``; None when all of them are zero. ``offset`` is a multiple of
        ``page_size``, and so is ``length`` unless the range ends at ``size``. Raises PageLost(reason) for what cannot
        be supplied: when it was asked for several pages it is asked again for each of them."""


class StreamEnded(PostcopyError):
    """Nobody listens to this stream any more: stop pushing."""


class PushStream:
    """A supervisor that listens, as a source sees it: pages may be pushed to it that it has not asked for.

    Calls wait while as many bytes are on their way as the supervisor takes, and raise StreamEnded when it has gone,
    has everything, or has started anew (then ``listening`` is called anew as well).
    """

    def __init__(self, size: int, page_size: int, send: Callable[[Answer], None]) -> None:
        self.size = size
        self.page_size = page_size
        self._send = send
        self._changed = threading.Condition()
        self._window = 0
        self._ended = False

    def push(self, offset: int, data: Buffer | None, length: int = 0) -> None:
        """Pages from ``offset``: whole ones, unless they end at ``size``. None: ``length`` bytes of zeros."""
        length = length if data is None else len(data)
        padded = self._judged(offset, length)
        self._pass(padded, answer_of(data, offset, length, padded))

    def lost(self, offset: int, length: int, reason: str) -> None:
        """These pages cannot be supplied."""
        padded = self._judged(offset, length)
        self._pass(0, lost_answer(offset, padded, reason))

    def _judged(self, offset: int, length: int) -> int:
        """The length in whole pages. Raises BadInput."""
        end = page_count(self.size, self.page_size) * self.page_size
        padded = page_count(length, self.page_size) * self.page_size
        whole = length == padded or offset + length == self.size
        if offset % self.page_size or not whole or not 0 < padded <= MAX_RANGE_BYTES or not 0 <= offset <= end - padded:
            raise BadInput(f"{length} bytes at {offset} are no whole pages of {self.page_size} in {self.size} bytes")
        return padded

    def _pass(self, cost: int, answer: Answer) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._window >= cost)
            if self._ended:
                raise StreamEnded("nobody listens to this stream any more")
            self._window -= cost
        self._send(answer)

    # --- for the loop ---------------------------------------------------------------------------------------------

    def grant(self, window: int) -> None:
        with self._changed:
            self._window = window
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def offer_of(source: PageSource, identity: str = "") -> Offer:
    """What a source has to offer, judged. Raises BadInput for a source that cannot be one."""
    if not isinstance(source, PageSource):
        raise BadInput(f"{type(source).__name__} is no page source: it needs name, size, page_size and read")
    parse_block_name(source.name)
    if source.page_size not in PAGE_SIZES:
        raise BadInput(f"{source.name}: a page of {source.page_size} bytes; {' and '.join(map(str, PAGE_SIZES))} exist")
    if type(source.size) is not int or source.size < 1:
        raise BadInput(f"{source.name}: {source.size!r} is no size of a block")
    own = getattr(source, "identity", None)
    return Offer(source.name, source.size, source.page_size, identity or (own() if own else sampled_identity(source)))


def sampled_identity(source: PageSource) -> str:
    """A digest of the size and of SAMPLES places: the same for the same content, on every machine. Samples cannot
    prove that contents are equal; give an identity where that is not enough."""
    digest = blake2b(source.size.to_bytes(8, "little"), digest_size=16)
    for offset in sample_places(source.size):
        digest.update(_sample(source, offset))
    return f"sampled-{digest.hexdigest()}"


def sample_places(size: int) -> list[int]:
    """Offsets of SAMPLES pages of 4096 bytes, the first and the last among them (all pages, when there are fewer)."""
    last = page_count(size, PAGE_4K) - 1
    return sorted({last * place // (SAMPLES - 1) * PAGE_4K for place in range(SAMPLES)})


def _sample(source: PageSource, offset: int) -> bytes:
    start = offset - offset % source.page_size
    length = min(source.page_size, source.size - start)
    try:
        (page,) = answer_of(source.read(start, length), start, length, source.page_size).frames or (b"",)
    except PageLost:
        return b"lost"
    except Exception as error:
        raise PostcopyError(f"{source.name} cannot be identified: {reason_of(error)}") from error
    return bytes(page[offset - start :][:PAGE_4K]).ljust(PAGE_4K, b"\0")
