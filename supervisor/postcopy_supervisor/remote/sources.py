"""All page sources: their links over the one router, their messages, and the staging memories of local ones.

The router connects to all of them. Those with keys come over libzmq, which has CURVE."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from postcopy_kernel import memory
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.return_path import FROM_SOURCE, Staged, Staging
from postcopy_protocol.sources import Advice
from postcopy_wire.transport import Router

from ..blocks import RamBlock
from ..event_log import RecordEvent
from ..paging.fast_path import SourceFastPath, source_fast_path
from ..paging.paging import RemotePaging
from ..paging.source_link import FIRST_PING_SECONDS, AdvisedBlock, LinkState, SourceLink
from ..settings import Settings
from .advise import FRAME_LIMIT, SourceAccess, by_endpoint
from .staging import StagingMemory

log = logging.getLogger(__name__)

MESSAGE_LIMIT = FRAME_LIMIT + (64 << 10)
"""Bytes of a source's message on the wire: pages, the head before them, and what precedes each frame."""


OnSourceMessage = Callable[[bytes, list[memoryview]], object]
"""Takes the name of a link and the frames of a message; they are valid until it returns."""


class Sources:
    """The links, by the name that the router has for each."""

    def __init__(
        self,
        settings: Settings,
        access: SourceAccess,
        router: Router,
        advice: Mapping[str, Advice],
        blocks: Mapping[str, RamBlock],
        paging: RemotePaging,
        on_message: OnSourceMessage,
        event: RecordEvent,
    ) -> None:
        """Connects to every endpoint of ``settings``; ``advice`` and ``blocks`` by our names."""
        self.links: dict[bytes, SourceLink] = {}
        self.fast_paths: dict[bytes, SourceFastPath] = {}
        """By link name: ``source_fast_path.on_answer``. The main loop gives answers to it first."""
        self.staging: dict[bytes, StagingMemory] = {}  # by link name
        self.parked: deque[tuple[bytes, Staged]] = deque()
        """Pages that lie in slots and are not placed yet: they can wait there while there is other work."""
        self._paging, self._event = paging, event
        self._bad_messages: dict[str, int] = {}  # by endpoint: how many
        self._unshared: set[str] = set()
        for number, (endpoint, names) in enumerate(by_endpoint(settings.sources).items(), 1):
            name, ours = b"s%d" % number, [blocks[block] for block in names]
            advised = [_advised(block, names[block.name], advice[block.name]) for block in ours]
            link = paging.add_source(endpoint, advised, settings.source_timeout, partial(router.send, name))
            self.links[name] = link
            self.fast_paths[name] = source_fast_path(paging, link, ours)
            connected, prepare = partial(_connected, link), access.preparation(endpoint)
            router.connect(endpoint, name, partial(on_message, name), connected, MESSAGE_LIMIT, prepare)

    def on_message(self, name: bytes, frames: Sequence[memoryview]) -> bool:
        """Handle a message of a source with the bytes of pages behind it; True when pages have come."""
        link = self.links[name]
        try:
            message = decode(frames[0], expect=FROM_SOURCE)
            if isinstance(message, Staged):
                self.parked.append((name, message))
                return False
            if isinstance(message, Staging):
                self._on_staging(name, link, message)
                return False
            raw = frames[1:]
            arrived = link.on_message(message, [len(buffer) for buffer in raw], time.monotonic())
        except BadMessage as error:
            self._bad_message(link, error)
            return False
        if arrived is not None:
            self._paging.arrived(arrived, [memory.address_of(buffer) for buffer in raw])
        self._unstage_idle(name, link)
        return arrived is not None

    def place_parked(self) -> bool:
        """Place the pages that have waited longest in a slot; True when pages have come."""
        name, message = self.parked.popleft()
        try:
            return self._place_staged(name, message)
        except BadMessage as error:
            self._bad_message(self.links[name], error)
            return False

    def tick(self, now: float) -> float | None:
        """Returns when to call again, if that is soon."""
        for name, link in self.links.items():
            link.tick(now)
            self._unstage_idle(name, link)
        due = [link.flow.retry_at for link in self.links.values() if link.flow.deferred]
        if any(link.pings_often for link in self.links.values()):
            due.append(now + FIRST_PING_SECONDS)
        return min(due, default=None)

    def _place_staged(self, name: bytes, message: Staged) -> bool:
        """Place the pages in a slot and set it free in any case. Raises BadMessage."""
        staging, link = self.staging.get(name), self.links[name]
        if staging is None or staging.number != message.number:
            return False  # of an earlier staging memory, which is closed
        address = staging.address_of(message)
        try:
            arrived = link.on_staged(message, staging.slot_bytes, time.monotonic())
            if arrived is not None:
                self._paging.arrived(arrived, (address,))
        finally:
            staging.free(message.slot)
        return arrived is not None

    def _on_staging(self, name: bytes, link: SourceLink, offer: Staging) -> None:
        """Open an offered staging memory. If that fails, pages continue to come through the socket."""
        while self.parked:
            self.place_parked()
        self._unstage(name)
        if link.finished:
            return
        try:
            self.staging[name] = StagingMemory(offer)
        except (OSError, ValueError) as error:
            level = logging.DEBUG if link.endpoint in self._unshared else logging.INFO
            self._unshared.add(link.endpoint)
            log.log(level, "source %s: pages come through the socket: %s", link.endpoint, error)
        else:
            link.use_staging(offer.number)

    def _unstage_idle(self, name: bytes, link: SourceLink) -> None:
        """Close the staging memory of a source that is lost or has sent everything."""
        if link.finished or link.state is LinkState.PAUSED:
            self._unstage(name)

    def _unstage(self, name: bytes) -> None:
        staging = self.staging.pop(name, None)
        if staging is not None:
            staging.close()

    def _bad_message(self, link: SourceLink, error: Exception) -> None:
        """Reported when its count has doubled: a source that sends nonsense must not fill the log."""
        count = self._bad_messages[link.endpoint] = self._bad_messages.get(link.endpoint, 0) + 1
        if count & (count - 1) == 0:
            text = f"source {link.endpoint}: {error}; not used ({count} such messages)"
            self._event("source-nonsense", text, source=link.endpoint, cause=str(error))


def _advised(block: RamBlock, name: str, advice: Advice) -> AdvisedBlock:
    return AdvisedBlock(block.number, name, block.page_size, block.size, advice.identity)


def _connected(link: SourceLink) -> None:
    """The peer may be another program than before, and requests to the earlier one are gone."""
    link.ping(time.monotonic())
