"""Serves sources at an endpoint until a signal comes: signals, the loop, the end in order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from postcopy_protocol.curve_keys import KeyPair
from postcopy_protocol.errors import BadInput
from postcopy_protocol.return_path import RESIDENT, features_at
from postcopy_protocol.sizes import format_size
from postcopy_protocol.source_conversation import Offer
from postcopy_wire.transport import chosen_transport

from .call_queue import CallQueue
from .connection import SEND_QUEUE
from .endpoint import Endpoint, check_endpoint
from .loop import Feed, Loop
from .readers import Readers
from .source import PageSource, offer_of

log = logging.getLogger(__name__)


class Ended(BaseException):
    """Raised by the handler of a signal that ends the loop."""


def serve(
    sources: Iterable[PageSource],
    listen: str,
    *,
    curve: KeyPair | None = None,
    allow: Sequence[bytes] = (),
    plain_tcp: bool = False,
    identity: str = "",
    readers: int = 4,
    read_timeout: float = 30.0,
    transport: str | None = None,
    feed: Feed | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (from the main thread), or forever.

    ``listen``: ``ipc:///PATH`` or ``tcp://HOST:PORT``; tcp needs ``curve`` (this source's key pair) and ``allow`` (the
    public keys of supervisors), or ``plain_tcp``. A read that takes longer than ``read_timeout`` seconds is lost;
    ``readers`` threads read. ``transport``: ``native`` or ``libzmq`` (default: ``$POSTCOPY_TRANSPORT``, else native).
    ``feed`` runs in the thread of the loop (see ``loop.Feed``).

    Raises BadInput for what cannot be served, PostcopyError for an endpoint where it cannot listen.

    Example::

        serve([FileSource("ram0", "weights.bin")], "ipc:///run/weights")
    """
    check_endpoint(listen, curve, allow, plain_tcp)
    known: dict[str, tuple[PageSource, Offer]] = {}
    for source in sources:
        offer = offer_of(source, identity)
        if offer.name in known:
            raise BadInput(f"the name {offer.name} is used twice: every block needs a name of its own")
        known[offer.name] = (source, offer)
    if not known:
        raise BadInput("there is nothing to serve: name a source")
    endpoint = Endpoint(listen, transport or chosen_transport(None, os.environ), curve, allow, SEND_QUEUE)
    with _signals(), endpoint, CallQueue() as calls, suppress(Ended):
        loop = Loop(known, endpoint.open, calls, Readers(readers, read_timeout), (*features_at(listen), RESIDENT), feed)
        log.info("ready: %s at %s", ", ".join(_described(offer) for _, offer in known.values()), endpoint.shown)
        loop.run()
    log.info("ended")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise Ended in the main thread; in another thread they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Ended:  # before the loop, or after it
        log.info("ended")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    # Only once: a second signal must not disturb the end that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Ended


def _described(offer: Offer) -> str:
    return f"{offer.name} ({format_size(offer.size)}, {offer.identity})"
