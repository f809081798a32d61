"""Chunks from other hosts: ``peers:tcp://A/ram0,tcp://B/ram0,store:...``. One thread talks to all hosts of a block.

A chunk from a host is a chunk like any other: its digest must be its id, or it is not used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.return_path import FROM_SOURCE, MAX_RANGE_BYTES
from postcopy_protocol.sources import RemoteSource
from postcopy_wire.curve import Keys, preparation
from postcopy_wire.factory import open_router
from postcopy_wire.transport import SENT

from ..call_queue import CallQueue
from .compression import WrongChunk, check
from .pace import SHORTEST_PATIENCE
from .peer_conversation import LARGEST, PeerConversation
from .peer_policy import Outcome, PeerPolicy

TURN_SECONDS = 0.25
ADVISE_SECONDS, REFUSED_SECONDS = 1.0, 30.0
"""Between two tries to use a host; of one that cannot be used."""
REPORTED_FAILURES = 3
"""In a row, after which a host is reported as away."""
OPTIONS = ("--peer-secret FILE --peer-key FILE", "--plain-peers")
_CAPACITY = MAX_RANGE_BYTES + (128 << 10)

log = logging.getLogger(__name__)

Answer = tuple[Outcome, bytearray | None]


class _Link:
    """One host."""

    def __init__(self, name: bytes, source: RemoteSource, size: int) -> None:
        self.name, self.source = name, source
        self.talk = PeerConversation(source.block, size)
        self.waiting: dict[int, Future[Answer]] = {}
        self.advised_at = -1e9
        self.reported = ""


class Peers:
    """The other hosts of one block of ``size`` bytes, the nearest first. Raises BadInput, which names
    ``options``, for tcp without keys."""

    def __init__(
        self,
        block: str,
        hosts: Sequence[RemoteSource],
        size: int,
        keys: Keys | None = None,
        *,
        plain_tcp: bool = False,
        options: tuple[str, str] = OPTIONS,
        transport: str = "native",
    ) -> None:
        self.policy = PeerPolicy(len(hosts))
        self._block = block
        self._lock = threading.Lock()
        self._calls = CallQueue()
        self._router = open_router(transport, lambda name, message: None)
        self._links = [_Link(b"p%d" % number, host, size) for number, host in enumerate(hosts)]
        self._ended = False
        for number, link in enumerate(self._links):
            prepare = preparation(link.source.endpoint, keys, plain_tcp=plain_tcp, options=options)
            connected, heard = partial(self._advise, number), partial(self._on_frames, number)
            self._router.connect(link.source.endpoint, link.name, heard, connected, _CAPACITY, prepare)
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def chunk(
        self, chunk: bytes, offset: int, length: int, digest: str, store_ready: bool, deadline: float
    ) -> bytes | None:
        """A chunk of the block, checked; None: ask the store. Waits until ``deadline`` at most; any thread may call."""
        tried: set[int] = set()
        while offset % PAGE_4K == 0 and length <= LARGEST:
            with self._lock:
                now = time.monotonic()
                number = self.policy.choose(tried, store_ready, now)
                if number is None or deadline - now < SHORTEST_PATIENCE:
                    return None
                patience = min(self.policy.sent(number), deadline - now)
            tried.add(number)
            data = self._ask(number, chunk, offset, length, digest, patience)
            if data is not None:
                return data
        return None

    def _ask(self, number: int, chunk: bytes, offset: int, length: int, digest: str, patience: float) -> bytes | None:
        began, future = time.monotonic(), Future[Answer]()
        self._calls.call_soon(partial(self._send, number, offset, length, future))
        data = None
        try:
            outcome, found = future.result(patience)
            if found is not None:
                data = bytes(memoryview(found)[:length])
                check(data, chunk, digest)
        except TimeoutError:
            outcome = Outcome.LATE
            self._calls.call_soon(partial(self._forget, number, future))
        except WrongChunk:
            outcome, data = Outcome.WRONG, None
        self._ended_with(number, outcome, time.monotonic() - began, chunk)
        return data

    def _ended_with(self, number: int, outcome: Outcome, took: float, chunk: bytes) -> None:
        with self._lock:
            peer = self.policy.peers[number]
            before = peer.failures
            self.policy.ended(number, outcome, took, time.monotonic())
            after = peer.failures
        host = self._links[number].source
        if outcome is Outcome.WRONG:
            log.warning("%s: %s gave other bytes for chunk %s: not used", self._block, host, chunk.hex()[:16])
        elif before < REPORTED_FAILURES <= after:
            cause = "it does not answer in time" if outcome is Outcome.LATE else "there is no connection"
            log.warning("%s: %s is away: %s; others are asked", self._block, host, cause)
        elif after == 0 and before >= REPORTED_FAILURES:
            log.warning("%s: %s is back", self._block, host)

    def _run(self) -> None:
        self._router.watch(self._calls.wakeup, self._run_calls)
        while not self._ended:
            self._router.turn(TURN_SECONDS)
            now = time.monotonic()
            for number, link in enumerate(self._links):
                pause = REFUSED_SECONDS if link.talk.refused else ADVISE_SECONDS
                if not link.talk.up and now - link.advised_at > pause:
                    self._advise(number)

    def _run_calls(self) -> None:
        for call in self._calls.take():
            call()

    def _send(self, number: int, offset: int, length: int, future: Future[Answer]) -> None:
        link = self._links[number]
        if link.talk.up:
            request, message = link.talk.request(offset, length)
            if self._router.send(link.name, encode(message)) == SENT:
                link.waiting[request] = future
                return
            link.talk.forget(request)
        _answer(future, Outcome.FAILED)

    def _forget(self, number: int, future: Future[Answer]) -> None:
        link = self._links[number]
        for request in [request for request, one in link.waiting.items() if one is future]:
            del link.waiting[request]
            link.talk.forget(request)

    def _advise(self, number: int) -> None:
        link = self._links[number]
        link.advised_at = time.monotonic()
        message = link.talk.connected()
        self._set_up(number)
        self._router.send(link.name, encode(message))  # without a connection it is dropped

    def _on_frames(self, number: int, frames: Sequence[memoryview]) -> None:
        link = self._links[number]
        try:
            message, request, data = link.talk.heard(decode(frames[0], expect=FROM_SOURCE), frames[1:])
        except BadMessage as error:
            message, request, data = None, 0, None
            link.talk.refuse(str(error))
        if message is not None:
            self._router.send(link.name, encode(message))
        self._set_up(number)
        future = link.waiting.pop(request, None)
        if future is not None:
            _answer(future, Outcome.ABSENT if data is None else Outcome.SERVED, data)
        if link.talk.refused and link.talk.refused != link.reported:
            link.reported = link.talk.refused
            log.warning("%s: %s is not asked: %s", self._block, link.source, link.reported)

    def _set_up(self, number: int) -> None:
        link = self._links[number]
        self.policy.peers[number].up = link.talk.up
        for request in link.talk.lost():
            if (future := link.waiting.pop(request, None)) is not None:
                _answer(future, Outcome.FAILED)

    def served(self) -> dict[str, int]:
        """How many chunks each host gave."""
        return {str(link.source): peer.served for link, peer in zip(self._links, self.policy.peers, strict=True)}

    def close(self) -> None:
        """End the connections. Readers that wait go on to the store."""
        self._ended = True
        self._calls.call_soon(lambda: None)
        self._thread.join(4 * TURN_SECONDS)
        with suppress(OSError):
            self._router.close()
        self._calls.__exit__()


def _answer(future: Future[Answer], outcome: Outcome, data: bytearray | None = None) -> None:
    """It may be given up already."""
    if not future.done():
        future.set_result((outcome, data))
