"""The wakers: which workers are sent Wake or Lost for which pages, and SIGBUS taken back when a lost page arrives.

A release goes only to the workers whose clients wait. One message carries all pages of one worker, block and
outcome."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from postcopy_kernel import crashpoints
from postcopy_protocol import received_map
from postcopy_protocol.codec import encode, pack_offsets
from postcopy_protocol.messages import Lost, Wake

from ..blocks import RamBlock
from ..event_log import RecordEvent
from .engine import Release
from .placer import event_fields
from .ports import BlockClients, OwnWaiter, WorkerSender

OWN = 0  # the waiter that is the supervisor itself
LOST_BYTE = bytes((received_map.LOST,))


class Wakers:
    """Sends releases, and remembers which pages clients were denied."""

    def __init__(
        self,
        blocks: dict[int, RamBlock],
        workers: WorkerSender,
        own: OwnWaiter,
        clients: BlockClients,
        event: RecordEvent,
    ) -> None:
        self.send = crashpoints.before("page.marked", workers.send)  # ``WorkerPool.send``
        self.release_own = own.release
        self.awaited: dict[int, set[int]] = {}  # by block: pages that were lost and are requested, or pushed, again
        self._blocks, self._clients, self._event = blocks, clients, event
        self._denied: dict[int, set[int]] = {}  # by block

    def release(self, releases: Iterable[Release]) -> None:
        """Let these waiters run."""
        pages_of: dict[tuple[int, int, bool], list[int]] = {}
        for release in releases:
            if release.waiter == OWN:
                self.release_own(self._blocks[release.block], release.page, release.lost)
            else:
                pages_of.setdefault((release.waiter, release.block, release.lost), []).append(release.page)
        for (worker, number, lost), pages in pages_of.items():
            if lost:
                self._denied.setdefault(number, set()).update(pages)
            offsets = _offsets(self._blocks[number], pages)
            self.send(worker, encode(Lost(number, offsets) if lost else Wake(number, offsets)))

    def was_denied(self, block: int, page: int) -> bool:
        """Was a client sent Lost for this page since its source last came back?"""
        return page in self._denied.get(block, ())

    def await_lost(self, block: RamBlock) -> set[int]:
        """A source is back and may have its lost pages again: mark them missing. Returns the pages to request."""
        pages = self._denied.pop(block.number, set()) | set(block.lost_pages())
        for page in pages:
            if block.received[page] == received_map.LOST:
                block.received[page] = received_map.MISSING  # LOST is stored only for absent pages
        self.awaited.setdefault(block.number, set()).update(pages)
        return pages

    def await_arrived(self, block: RamBlock, first: int, end: int) -> None:
        """Pages arrive unasked; ``unpoison`` is to reach the clients that were denied lost ones among them."""
        if LOST_BYTE in block.received[first:end]:
            pages = {page for page in range(first, end) if block.received[page] == received_map.LOST}
            self.awaited.setdefault(block.number, set()).update(pages)

    def unpoison(self, block: RamBlock, first: int, end: int) -> None:
        """Lost pages among these were received after all: send Wake to every worker of the block, which takes SIGBUS
        back by CONTINUE."""
        awaited = self.awaited.get(block.number)
        if not awaited:
            return
        back = {page for page in awaited if first <= page < end and block.received[page] == received_map.RECEIVED}
        awaited -= back
        if not awaited:
            del self.awaited[block.number]
        if back:
            first, end = min(back), max(back) + 1
            message = encode(Wake(block.number, _offsets(block, sorted(back))))
            for worker in self._clients.with_block(block.number):
                self.send(worker, message)
            text = f"block {block.name}: {len(back)} lost pages from page {first} are there again"
            self._event("healed", text, **event_fields(block, first, end), cause="a source has them again")


def _offsets(block: RamBlock, pages: Sequence[int]) -> bytes:
    return pack_offsets([page * block.page_size for page in pages])
