"""One page's life, as far as it is known: for ``postcopy status --story``.

Nothing is recorded for this on the way of a fault but one append to a ring for each request of a remote block. All
else is derived when somebody asks: the received map, the kernel's page cache, who stands in the engine, what is on its
way, the notes of pages that a client was denied, and the events that concern the page. What is not known is said.
"""

from __future__ import annotations

import time
from typing import Any

from postcopy_kernel import memory
from postcopy_protocol import counters
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M
from postcopy_protocol.received_map import MISSING

from ..blocks import RamBlock
from ..clients.attach_server import AttachServer, Client
from ..paging.flow_control import BACKGROUND, PAST, RangeRequest
from ..paging.paging import RemotePaging
from .event_log import History
from .status import shown_state

LOCAL = "a worker resolves pages of a local block alone: who touched this page, and when, is not recorded"
REMOTE = (
    f"of its source the last {PAST} requests are kept, each with the client that came first: who else waited for the "
    "page, and when each of them was woken, is not recorded"
)


def story(
    block: RamBlock, offset: int, reception: AttachServer, paging: RemotePaging, history: History
) -> dict[str, Any]:
    """What is known of the page at ``offset``. Raises BadInput when the block has none there."""
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
        "state": block.story(page),
        "present": present,
        "polluted": bool(present) and block.received[page] == MISSING,
        "told_lost": paging.wakers.was_denied(block.number, page),
        "waiting": paging.engine.waiters_of(block.number, page),
        "request": _request(block, first, paging),
        "clients": [_client(client, block, page, reception) for client in _who_maps(block, first, reception)],
        "life": _life(block, first, paging, history),
        "not_recorded": REMOTE if link is not None else LOCAL,
    }


def _request(block: RamBlock, offset: int, paging: RemotePaging) -> dict[str, Any] | None:
    """What is on its way with this page in it."""
    link = paging.links.get(block.number)
    found = link.flow.find_open(block.number, offset) if link is not None else None
    if found is None:
        return None
    wish, sent = found
    return {**_wish(wish), "state": "sent" if sent else "queued", "at": _wall(wish.sent) if wish.sent else None}


def _wish(wish: RangeRequest) -> dict[str, Any]:
    client = None if wish.client == BACKGROUND else wish.client
    return {"client": client, "offset": wish.offset, "length": wish.length, "attempts": wish.attempts}


def _wall(monotonic: float) -> float:
    """Seconds since the epoch."""
    return round(time.time() - (time.monotonic() - monotonic), 3)


def _who_maps(block: RamBlock, offset: int, reception: AttachServer) -> list[Client]:
    return [
        client
        for client in reception.clients.values()
        if any(
            region.block == block.number and region.offset <= offset < region.offset + region.length
            for region in [*client.regions, *client.released]
        )
    ]


def _client(client: Client, block: RamBlock, page: int, reception: AttachServer) -> dict[str, Any]:
    regions = [region for region in [*client.regions, *client.released] if region.block == block.number]
    return {
        "id": client.number,
        "name": client.name,
        "modes": sorted({region.mode for region in regions}),
        "state": shown_state(client, reception.workforce),
        "released": not any(region in client.regions for region in regions),
        "denied": client.words is not None and (block.number, page) in counters.denied(client.words),
    }


def _life(block: RamBlock, offset: int, paging: RemotePaging, history: History) -> list[dict[str, Any]]:
    """Requests that brought it, or did not, and events, in the order of time."""
    told = [event.document() for event in history if event.concerns(block.name, offset, offset + block.page_size)]
    link = paging.links.get(block.number)
    for wish, came in list(link.flow.finished) if link is not None else ():
        if wish.block == block.number and wish.offset <= offset < wish.offset + wish.length:
            took = {"answered_at": _wall(came), "took_ms": round((came - wish.sent) * 1e3, 3)} if came else {}
            who = "in the background" if wish.client == BACKGROUND else f"for client {wish.client}"
            text = f"asked of {link.endpoint if link else ''} {who}"
            told.append({"at": _wall(wish.sent), "kind": "asked", "detail": text, **_wish(wish), **took})
    return sorted(told, key=lambda one: float(one["at"]))
