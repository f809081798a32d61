"""All page sources of the house: asked for advice at the start, linked to over the one router, heard.

The router connects to all of them; those behind tcp come over libzmq, which has CURVE.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import zmq

from postcopy_kernel import memory
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.return_path import FROM_SOURCE, Staged, Staging
from postcopy_protocol.sources import RemoteSource, Source
from postcopy_wire.transport import Router

from ..blocks import RamBlock
from ..observe.event_log import Tell
from ..paging.fast_path import SourceFastPath, source_fast_path
from ..paging.paging import Paging
from ..paging.source_link import FIRST_PING_SECONDS, SourceLink, Stream
from ..settings import Settings
from .advise import FRAME_LIMIT, Advice, ask_advice, load_keys, secure
from .staging import StagingMemory

log = logging.getLogger(__name__)

MESSAGE_LIMIT = FRAME_LIMIT + (64 << 10)
"""Bytes of a source's message on the wire: pages, the word before them, and what stands before each frame."""


class Sources:
    """Links by the routing id that our router gives them."""

    def __init__(self, settings: Settings, event: Tell) -> None:
        """Raises BadInput for keys that cannot be loaded."""
        self.links: dict[bytes, SourceLink] = {}
        self.lanes: dict[bytes, SourceFastPath] = {}
        """By the same id: where answers go first."""
        self.staging: dict[bytes, StagingMemory] = {}
        """By the same id: where a source on this machine lays its pages."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._settings = settings
        self._event = event
        self._keys = load_keys(settings.curve_secret, settings.source_key) if settings.curve_secret else None
        self.parked: deque[tuple[bytes, Staged]] = deque()
        """What lies in slots and is not placed yet: it can wait there while anything else is to be done."""
        self._babble: dict[str, int] = {}
        self._unshared: set[str] = set()
        self._paging: Paging

    def ask(self, known: Mapping[str, Advice], stopped: Callable[[], str]) -> dict[str, Advice]:
        """What the sources of remote blocks say of them, by our names; waits for sources that are not there yet, until
        ``stopped`` says why not. What is ``known`` is not asked for."""
        advice = dict(known)
        unknown = {name: source for name, source in self._settings.sources.items() if name not in known}
        for endpoint, blocks in _by_endpoint(unknown).items():
            told = ask_advice(
                self._context,
                endpoint,
                sorted(set(blocks.values())),
                self._settings.page_size,
                self._keys,
                self._settings.plain_tcp,
                stopped,
            )
            advice |= {name: told[theirs] for name, theirs in blocks.items()}
        return advice

    def connect(
        self,
        router: Router,
        advice: Mapping[str, Advice],
        blocks: Mapping[str, RamBlock],
        paging: Paging,
        said: Callable[[bytes, list[memoryview]], object],
    ) -> None:
        """One link for every endpoint. ``said`` is told the name of a link and the frames that its source says; they
        hold until it returns."""
        self._paging = paging
        for number, (endpoint, names) in enumerate(_by_endpoint(self._settings.sources).items(), 1):
            link_name = b"s%d" % number
            ours = [blocks[name] for name in names]
            streams = [Stream(b.number, names[b.name], b.page_size, b.size, advice[b.name].identity) for b in ours]
            link = SourceLink(
                endpoint,
                streams,
                self._settings.source_timeout,
                partial(router.send, link_name),
                partial(self._link_event, endpoint),
                paging.gave_up,
            )
            self.links[link_name] = link
            self.lanes[link_name] = source_fast_path(paging, link, ours)
            paging.links |= dict.fromkeys((block.number for block in ours), link)
            prepare = partial(secure, endpoint=endpoint, keys=self._keys, plain_tcp=self._settings.plain_tcp)
            met = partial(_met, link)
            router.connect(endpoint, link_name, partial(said, link_name), met, MESSAGE_LIMIT, prepare)

    def close(self) -> None:
        """After the router: nobody is heard any more."""
        self._context.term()

    def heard(self, identity: bytes, frames: Sequence[memoryview]) -> bool:
        """A word of a source, with the bytes of pages behind it; True when pages have come."""
        link = self.links[identity]
        try:
            message = decode(frames[0], expect=FROM_SOURCE)
            if isinstance(message, Staged):
                self.parked.append((identity, message))
                return False
            if isinstance(message, Staging):
                return self._offered_staging(identity, link, message)
            raw = frames[1:]
            arrived = link.heard(message, [len(buffer) for buffer in raw], time.monotonic())
        except BadMessage as error:
            self._nonsense(link, error)
            return False
        if arrived is not None:
            self._paging.arrived(arrived, [memory.address_of(buffer) for buffer in raw])
        return arrived is not None

    def place_parked(self) -> bool:
        """Place what lies in the slot that has waited longest; True when pages have come."""
        identity, message = self.parked.popleft()
        try:
            return self._staged(identity, message)
        except BadMessage as error:
            self._nonsense(self.links[identity], error)
            return False

    def _staged(self, identity: bytes, message: Staged) -> bool:
        """Place what lies in a slot, and set that free, whatever becomes of it. Raises BadMessage."""
        staging, link = self.staging.get(identity), self.links[identity]
        if staging is None or staging.number != message.number:
            return False  # of one that we had before: its slots are nobody's any more
        address = staging.address_of(message)
        try:
            arrived = link.staged(message, staging.slot_bytes, time.monotonic())
            if arrived is not None:
                self._paging.arrived(arrived, (address,))
        finally:
            staging.free(message.slot)
        return arrived is not None

    def _offered_staging(self, identity: bytes, link: SourceLink, message: Staging) -> bool:
        """Open it; where that cannot be, pages go on coming through the socket."""
        while self.parked:
            self.place_parked()
        self._unstage(identity)
        if link.finished:
            return False
        try:
            self.staging[identity] = StagingMemory(message)
        except (OSError, ValueError) as error:
            level = logging.DEBUG if link.endpoint in self._unshared else logging.INFO
            self._unshared.add(link.endpoint)
            log.log(level, "source %s: pages come through the socket: %s", link.endpoint, error)
        else:
            link.use_staging(message.number)
        return False

    def _unstage(self, identity: bytes) -> None:
        staging = self.staging.pop(identity, None)
        if staging is not None:
            staging.close()

    def tick(self, now: float) -> float | None:
        """Returns when to come again, if that is soon."""
        for identity, link in self.links.items():
            link.tick(now)
            if link.finished:
                self._unstage(identity)
        due = [link.flow.again_at for link in self.links.values() if link.flow.deferred]
        if any(link.hurries for link in self.links.values()):
            due.append(now + FIRST_PING_SECONDS)
        return min(due, default=None)

    def _link_event(self, endpoint: str, kind: str, detail: str, **where: int | str) -> None:
        self._event(kind, detail, source=endpoint, **where)
        for identity, link in self.links.items():
            if kind == "pause" and link.state == "paused":
                self._unstage(identity)
                self._paging.source_lost(link)
            elif kind == "recover" and link.state == "up":
                self._paging.source_back(link)

    def _nonsense(self, link: SourceLink, error: Exception) -> None:
        """Told when its number has doubled: a source that babbles must not drown everything else."""
        count = self._babble[link.endpoint] = self._babble.get(link.endpoint, 0) + 1
        if count & (count - 1) == 0:
            text = f"source {link.endpoint}: {error}; not used ({count} such words)"
            self._event("source-nonsense", text, source=link.endpoint, cause=str(error))


def _met(link: SourceLink) -> None:
    """The source at the other end may be another one than before, and who was asked before is gone."""
    link.met(time.monotonic())


def _by_endpoint(sources: Mapping[str, Source]) -> dict[str, dict[str, str]]:
    """Remote blocks by endpoint: our name of each, and its name there."""
    found: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, RemoteSource):
            found.setdefault(source.endpoint, {})[name] = source.block
    return found
