"""What is known of one page: for ``postcopy status --story``.

A fault pays for this only one append to a ring for each request of a remote block. Everything else is derived when
asked: the received map, the kernel's page cache, the waiters and the requests in flight, the notes of pages that a
client was denied, and the events that concern the page. The answer says what is not recorded."""

from __future__ import annotations

import time
from typing import Any

from postcopy_kernel import memory
from postcopy_protocol import counters
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M
from postcopy_protocol.received_map import MISSING

from ..blocks import RamBlock
from ..clients.client import Client, Clients
from ..event_log import EventLog
from ..paging.flow_control import BACKGROUND, PAST, RangeRequest
from ..paging.paging import RemotePaging
from ..parts import Parts
from ..pool.worker_pool import WorkerPool
from .status import shown_state

LOCAL = "a worker resolves pages of a local block alone: which client touched this page, and when, is not recorded"
REMOTE = (
    f"of its source the last {PAST} requests are kept, each with the client that came first: other waiters "
    "for the page, and when each of them was woken, are not recorded"
)


def page_history(parts: Parts, block: RamBlock, offset: int) -> dict[str, Any]:
    """What is known of the page at ``offset``. Raises BadInput when the block has none there."""
    paging = parts.paging
    if offset >= block.length:
        raise BadInput(f"block {block.name} has {block.length} bytes; there is no page at {offset}")
    page = offset // block.page_size
    first = page * block.page_size
    present = None if block.page_size == PAGE_2M else memory.is_present(block.memory, first)
    link = paging.links.get(block.number)
    return {
        "block": block.name,
        "offset": first,
        "page": page,
        "page_size": block.page_size,
        "kind": block.kind,
        "source": str(block.source),
        "source_state": link.shown if link is not None else None,
        "state": block.page_state(page),
        "present": present,
        "polluted": bool(present) and block.received[page] == MISSING,
        "told_lost": paging.wakers.was_denied(block.number, page),
        "waiting": paging.engine.waiters_of(block.number, page),
        "request": _request(block, first, paging),
        "clients": [_client(client, block, page, parts.pool) for client in _clients_at(block, first, parts.clients)],
        "life": _past(block, first, paging, parts.event_log),
        "not_recorded": REMOTE if link is not None else LOCAL,
    }


def _request(block: RamBlock, offset: int, paging: RemotePaging) -> dict[str, Any] | None:
    """The request in flight, or queued, that has this page in it."""
    link = paging.links.get(block.number)
    found = link.flow.find_open(block.number, offset) if link is not None else None
    if found is None:
        return None
    request, sent = found
    at = _wall_clock(request.sent) if request.sent else None
    return {**_range(request), "state": "sent" if sent else "queued", "at": at}


def _range(request: RangeRequest) -> dict[str, Any]:
    client = None if request.client == BACKGROUND else request.client
    return {"client": client, "offset": request.offset, "length": request.length, "attempts": request.attempts}


def _wall_clock(monotonic: float) -> float:
    """Seconds since the epoch."""
    return round(time.time() - (time.monotonic() - monotonic), 3)


def _clients_at(block: RamBlock, offset: int, clients: Clients) -> list[Client]:
    return [
        client
        for client in clients.by_number.values()
        if any(
            region.block == block.number and region.offset <= offset < region.offset + region.length
            for region in client.all_regions
        )
    ]


def _client(client: Client, block: RamBlock, page: int, pool: WorkerPool) -> dict[str, Any]:
    regions = [region for region in client.all_regions if region.block == block.number]
    return {
        "id": client.number,
        "name": client.name,
        "modes": sorted({region.mode for region in regions}),
        "state": shown_state(client, pool),
        "released": not any(region in client.regions for region in regions),
        "denied": client.counters is not None and (block.number, page) in counters.denied(client.counters),
    }


def _past(block: RamBlock, offset: int, paging: RemotePaging, event_log: EventLog) -> list[dict[str, Any]]:
    """Requests that had the page in them, answered or not, and events, in the order of time."""
    found = [event.document() for event in event_log if event.concerns(block.name, offset, offset + block.page_size)]
    link = paging.links.get(block.number)
    for request, came in list(link.flow.finished) if link is not None else ():
        if request.block == block.number and request.offset <= offset < request.offset + request.length:
            took = {"answered_at": _wall_clock(came), "took_ms": round((came - request.sent) * 1e3, 3)} if came else {}
            who = "in the background" if request.client == BACKGROUND else f"for client {request.client}"
            text = f"asked of {link.endpoint if link else ''} {who}"
            found.append({"at": _wall_clock(request.sent), "kind": "asked", "detail": text, **_range(request), **took})
    return sorted(found, key=lambda one: float(one["at"]))
