"""Advice of page sources before the start, and the security of the connections to them.

A remote block's size is not known before its source has been asked. So ``serve`` asks first, and waits (with a warning)
while no source listens at the endpoint. tcp needs CURVE keys, or an option that allows it to be plain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.return_path import MAX_RANGE_BYTES, Advise, Advised, SourceRefused, features_at
from postcopy_protocol.sources import Advice, RemoteSource, Source
from postcopy_wire.addresses import unknown_host
from postcopy_wire.curve import load_keys, preparation
from postcopy_wire.factory import open_router
from postcopy_wire.transport import PrepareSocket, Router

from ..settings import Settings

log = logging.getLogger(__name__)

ASK_SECONDS = 0.5
WARN_SECONDS = 5.0
FRAME_LIMIT = MAX_RANGE_BYTES + (64 << 10)
ADVICE_LIMIT = 64 << 10  # bytes of an answer here
SOURCE = b"source"


Stopped = Callable[[], str]
"""Why not to wait for a source any longer; empty: wait. It may raise AskedToEnd."""


class AskedToEnd(Exception):
    """The supervisor is to end in order while it waits for a source: that is no failure."""


class SourceAccess:
    """How sources are reached: the keys for tcp."""

    def __init__(self, settings: Settings) -> None:
        """Raises BadInput for keys that cannot be loaded."""
        self._settings = settings
        self._keys = load_keys(settings.curve_secret, settings.source_key) if settings.curve_secret else None

    def ask(self, known: Mapping[str, Advice], stopped: Stopped) -> dict[str, Advice]:
        """Advice on all remote blocks by our names; what is ``known`` is not asked for. Waits for sources that are
        absent. Raises BadInput when ``stopped`` gives a reason, or a source refuses a block."""
        advice = dict(known)
        unknown = {name: source for name, source in self._settings.sources.items() if name not in known}
        for endpoint, blocks in by_endpoint(unknown).items():
            found = self._ask(endpoint, sorted(set(blocks.values())), stopped)
            advice |= {name: found[theirs] for name, theirs in blocks.items()}
        return advice

    def preparation(self, endpoint: str) -> PrepareSocket | None:
        """What makes a libzmq socket ready for this endpoint; None where no keys are needed. Raises BadInput for a tcp
        endpoint without keys or ``--plain-tcp``."""
        return preparation(endpoint, self._keys, plain_tcp=self._settings.plain_tcp)

    def _ask(self, endpoint: str, names: Sequence[str], stopped: Stopped) -> dict[str, Advice]:
        prepare = self.preparation(endpoint)
        asking = Asking(endpoint, names, self._settings.page_size)
        router = open_router(self._settings.transport, lambda name, message: None)
        try:
            router.connect(endpoint, SOURCE, asking.on_frames, asking.on_connected, ADVICE_LIMIT, prepare)
            # A handshake that fails looks like an absent source: CURVE says nothing to a peer with the wrong key.
            return asking.run(router, ", or one of us has the wrong key" if prepare is not None else "", stopped)
        except zmq.ZMQError as error:
            raise BadInput(f"source {endpoint}: {error.strerror}") from None
        finally:
            router.close()


def by_endpoint(sources: Mapping[str, Source]) -> dict[str, dict[str, str]]:
    """Remote blocks by endpoint: our name of each, and its name there."""
    found: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, RemoteSource):
            found.setdefault(source.endpoint, {})[name] = source.block
    return found


class Asking:
    """The question to one source: what are these blocks?"""

    def __init__(self, endpoint: str, names: Sequence[str], page_size: int) -> None:
        self._endpoint, self._names, self._page_size = endpoint, names, page_size
        self._known: dict[str, Advice] = {}
        self._wrong: BadInput | None = None
        self._due = -1e9

    def on_connected(self) -> None:
        """Ask at once."""
        self._due = -1e9

    def on_frames(self, frames: Sequence[memoryview]) -> None:
        """An answer; a wrong one ends the question."""
        try:
            message = _advised(frames[0], self._endpoint, self._names)
            self._known[message.name] = Advice(message.size, message.identity)
        except BadInput as error:
            self._wrong = error

    def run(self, router: Router, doubt: str, stopped: Stopped) -> dict[str, Advice]:
        """Ask, and ask again, until all is known. Raises BadInput."""
        warned = time.monotonic() - WARN_SECONDS + 0.5
        while len(self._known) < len(self._names):
            if why := stopped():
                raise BadInput(f"the source at {self._endpoint} does not answer: {why}")
            now = time.monotonic()
            if now - warned >= WARN_SECONDS:
                warned = now
                reason = unknown_host(self._endpoint) or f"it does not answer yet{doubt}"
                log.warning("waiting for the source at %s: %s", self._endpoint, reason)
            if now - self._due >= ASK_SECONDS:
                self._due = now
                for name in self._names:
                    if name not in self._known:
                        advise = Advise(name, self._page_size, features_at(self._endpoint))
                        router.send(SOURCE, encode(advise))  # while there is no connection it is dropped
            router.turn(0.1)
            if self._wrong is not None:
                raise self._wrong
        return self._known


def _advised(frame: bytes | memoryview, endpoint: str, names: Sequence[str]) -> Advised:
    try:
        message = decode(frame, expect=(Advised, SourceRefused))
    except BadMessage as error:
        raise BadInput(f"the source at {endpoint} is no page source, or of another version: {error}") from None
    if isinstance(message, SourceRefused):
        raise BadInput(f"the source at {endpoint} refuses block {message.name} ({message.code}): {message.reason}")
    assert isinstance(message, Advised)
    if message.name not in names:
        raise BadInput(f"the source at {endpoint} offers a block {message.name} that was not requested")
    return message
