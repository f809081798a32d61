"""All page sources of the house: asked for advice at the start, linked to over the one router, heard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import zmq

from postcopy_kernel import memory
from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.return_path import FROM_SOURCE
from postcopy_protocol.sources import RemoteSource, Source

from .blocks import RamBlock
from .history import Tell
from .lanes import SourceLane, source_lane
from .link import FIRST_PING_SECONDS, Link, Stream
from .paging import Paging
from .remote import FRAME_LIMIT, Advice, ask_advice, load_keys, secure
from .settings import Settings


class Sources:
    """Links by the routing id that our router gives them."""

    def __init__(self, context: zmq.Context[Any], settings: Settings, event: Tell) -> None:
        """Raises BadInput for keys that cannot be loaded."""
        self.links: dict[bytes, Link] = {}
        self.lanes: dict[bytes, SourceLane] = {}
        """By the same id: where answers go first."""
        self._context = context
        self._settings = settings
        self._event = event
        self._keys = load_keys(settings.curve_secret, settings.source_key) if settings.curve_secret else None
        self._babble: dict[str, int] = {}
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
        router: zmq.Socket[bytes],
        advice: Mapping[str, Advice],
        blocks: Mapping[str, RamBlock],
        paging: Paging,
        send: Callable[[bytes, bytes], None],
    ) -> None:
        """One link for every endpoint."""
        self._paging = paging
        for number, (endpoint, names) in enumerate(_by_endpoint(self._settings.sources).items(), 1):
            # Nobody can guess it: with ROUTER_HANDOVER a stranger who could would take the source's place.
            identity = b"s%d-" % number + os.urandom(16).hex().encode()
            ours = [blocks[name] for name in names]
            streams = [Stream(b.number, names[b.name], b.page_size, b.size, advice[b.name].identity) for b in ours]
            link = Link(
                endpoint,
                streams,
                self._settings.source_timeout,
                partial(send, identity),
                partial(self._link_event, endpoint),
                paging.gave_up,
            )
            self.links[identity] = link
            self.lanes[identity] = source_lane(paging, link, ours)
            paging.links |= dict.fromkeys((block.number for block in ours), link)
            router.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
            secure(router, endpoint, self._keys, self._settings.plain_tcp)
            router.setsockopt(zmq.CONNECT_ROUTING_ID, identity)
            router.connect(endpoint)

    def heard(self, identity: bytes, head: zmq.Frame, rest: list[zmq.Frame]) -> bool:
        """A word of a source, with the bytes of pages behind it; True when pages have come."""
        link = self.links[identity]
        try:
            message = decode(head.buffer, expect=FROM_SOURCE)
            raw = [frame.buffer for frame in rest]
            arrived = link.heard(message, [len(buffer) for buffer in raw], time.monotonic())
        except BadMessage as error:
            self._nonsense(link, error)
            return False
        if arrived is not None:
            self._paging.arrived(arrived, [memory.address_of(buffer) for buffer in raw])
        return arrived is not None

    def tick(self, now: float) -> float | None:
        """Returns when to come again, if that is soon."""
        for link in self.links.values():
            link.tick(now)
        return now + FIRST_PING_SECONDS if any(link.hurries for link in self.links.values()) else None

    def _link_event(self, endpoint: str, kind: str, detail: str, **where: int | str) -> None:
        self._event(kind, detail, source=endpoint, **where)
        for link in self.links.values():
            if kind == "pause" and link.state == "paused":
                self._paging.source_lost(link)
            elif kind == "recover" and link.state == "up":
                self._paging.source_back(link)

    def _nonsense(self, link: Link, error: Exception) -> None:
        """Told when its number has doubled: a source that babbles must not drown everything else."""
        count = self._babble[link.endpoint] = self._babble.get(link.endpoint, 0) + 1
        if count & (count - 1) == 0:
            text = f"source {link.endpoint}: {error}; not used ({count} such words)"
            self._event("source-nonsense", text, source=link.endpoint, cause=str(error))


def _by_endpoint(sources: Mapping[str, Source]) -> dict[str, dict[str, str]]:
    """Remote blocks by endpoint: our name of each, and its name there."""
    found: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, RemoteSource):
            found.setdefault(source.endpoint, {})[name] = source.block
    return found
