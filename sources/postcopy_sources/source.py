"""What a page source is: an object with a name, a size, a page size and ``read``.

Required: ``name``, ``size``, ``page_size``, ``read``. An object may also have any of:

* ``identity() -> str``: equal for two sources if and only if their contents are equal. With it another source can take
  over when this one is lost. Without it, a digest of the size and of 64 samples is made by ``read`` at the start.
* ``read_now(offset, length) -> bytes | None``: as ``read``, but it runs in the thread of the loop, so it must return at
  once. Where it cannot, it raises BlockingIOError, and ``read`` is called in another thread.
* ``read_background(offset, length) -> bytes | None``: as ``read``, called in its place for pages that no client waits
  for. For a source that has reason to let them wait longer.
* ``read_into(offset, view: memoryview) -> bool``: as ``read_now``, but the bytes go into all of ``view``, memory that a
  supervisor on this machine sees too (staging.py). False: all of them are zero. ``view`` must not be kept. After any
  exception the pages are read in another way. A source that has it has ``read_now`` too.
* ``listening(stream: PushStream) -> None``: runs in a thread of its own when a supervisor listens. It may push pages
  that were not asked for, until it returns.
* ``when_ready(offset, length, urgent, call)``: with ``read_now``, for pages that come to the source at their own time.
  When ``read_now`` has raised BlockingIOError, this is called in the thread of the loop. It calls ``call``, in that
  thread too, when ``read_now`` would not raise it. Such pages have no ``read_timeout``; ``read`` is not called.

Only ``read_now``, ``read_into`` and ``identity`` run in the main thread; ``read`` and ``read_background`` may run in
several threads at once.
What these functions raise or return, and that they hang, concerns only the pages that were asked for, never the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol, runtime_checkable

from postcopy_protocol.errors import BadInput, PageLost, PostcopyError
from postcopy_protocol.geometry import PAGE_4K, PAGE_SIZES, page_count
from postcopy_protocol.source_conversation import Offer
from postcopy_protocol.sources import parse_block_name

from .answers import Buffer, answer_of, reason_of

WhenReady = Callable[[int, int, bool, Callable[[], object]], object]

SAMPLES = 64
"""Places of 4096 bytes, evenly spaced, that the default identity looks at."""


@runtime_checkable
class PageSource(Protocol):
    """A block that can be read. ``size``: its exact length in bytes. ``page_size``: the smallest piece that can be
    read, 4096 or 2097152; a supervisor with smaller pages is refused.

    Example::

        class Counting:
            name, size, page_size = "ram0", 1 << 20, 4096

            def read(self, offset, length):
                return bytes([offset // 4096 % 256]) * length
    """

    name: str
    size: int
    page_size: int

    def read(self, offset: int, length: int) -> Buffer | None:
        """Return exactly ``length`` bytes from ``offset``, or None when all of them are zero. ``offset`` is a multiple
        of ``page_size``, and so is ``length`` unless the range ends at ``size``. Raises PageLost(reason) for what
        cannot be supplied: if several pages were asked for, each of them is then asked for alone."""


@runtime_checkable
class ReadsNow(Protocol):
    """A source that reads at once what it has in memory (``FileSource.read_now``)."""

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """As ``read``, in the thread of the loop. Raises BlockingIOError where that would wait."""


@runtime_checkable
class ReadsBackground(Protocol):
    """A source that reads differently where no client waits (``SnapshotSource.read_background``)."""

    def read_background(self, offset: int, length: int) -> Buffer | None:
        """As ``read``."""


@runtime_checkable
class ReadsInto(Protocol):
    """A source that reads at once into shared memory."""

    def read_into(self, offset: int, view: memoryview, /) -> bool:
        """As ``read_now``, into all of ``view``. False: all of it is zeros."""


@runtime_checkable
class WaitsForPages(Protocol):
    """A source whose pages come at their own time."""

    def when_ready(self, offset: int, length: int, urgent: bool, call: Callable[[], object], /) -> object:
        """Call ``call`` when ``read_now`` would not raise BlockingIOError."""


def offer_of(source: PageSource, identity: str = "") -> Offer:
    """What a source offers. Raises BadInput for an object that is no source."""
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
    """A digest of the size and of SAMPLES places: the same for the same content, on every machine. Samples do not prove
    that contents are equal; give an identity where that is not enough."""
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
