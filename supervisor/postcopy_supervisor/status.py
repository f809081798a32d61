"""The status document: what the supervisor sees, as JSON. Its fields are the interface of ``postcopy status
--json``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from postcopy_protocol import stages, statistics
from postcopy_protocol.messages import VERSION

from .blocks import RamBlock
from .client_zero import ClientZero
from .fleet import RestartPolicy
from .history import History
from .link import Link
from .paging import Paging
from .reception import Client, Reception
from .workforce import Workforce

MAP_CELLS = 128
"""Stretches of the residency map of a block."""


def document(
    started: float,
    state: str,
    blocks: Sequence[RamBlock],
    reception: Reception,
    workforce: Workforce,
    zero: ClientZero,
    paging: Paging,
    history: History,
    recovered: int = 0,
    record: dict[str, Any] | None = None,
) -> bytes:
    """UTF-8 JSON."""
    paused = {number for number, link in paging.links.items() if link.state == "paused"}
    clients = [_client(client, workforce, blocks, paused) for client in reception.clients.values()]
    pages = [client.words.tolist() for client in reception.clients.values() if client.words is not None]
    total = statistics.merge([reception.past, zero.words.tolist(), *pages])
    told = {
        "protocol": VERSION,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - started, 3),
        "state": "paused" if paused and state == "running" else state,
        "recovered": recovered,
        "blocks": [_block(block, block_stages(block, reception, paging)) for block in blocks],
        "clients": clients,
        "sources": [_source(link) for link in dict.fromkeys(paging.links.values())],
        "totals": {
            "faults": statistics.faults(total) + zero.faults,
            "requests": paging.engine.requests,
            "deduplicated": total[statistics.DEDUPLICATED] + paging.engine.deduplicated,
            "placed": statistics.placed(total) + paging.placed,
            "placed_around": total[statistics.AROUND],
            "around_used": total[statistics.AROUND_USED],
            "blocked_s": blocked_s(total),
            "wakes": total[statistics.WAKES],
            "lost": total[statistics.LOST],
            "restarts": workforce.restarts,
            "polluted": sum(last - first for block in blocks for first, last in block.polluted),
            "repaired": history.counts.get("polluted", 0),
            "latency_us": statistics.summary(total),
        },
        "restart_policy": _policy(workforce.fleet.policy),
        "record": record,
        "events": history.document(),
    }
    return json.dumps(told).encode()


def _policy(policy: RestartPolicy) -> dict[str, Any]:
    return {
        "limit": policy.limit,
        "interval_s": policy.interval,
        "backoff_s": policy.backoff,
        "stable_s": policy.stable,
        "start_timeout_s": policy.start_deadline,
        "quarantine": "poison" if policy.poison else "wait",
    }


def blocked_s(words: Sequence[int]) -> float:
    """Seconds that threads stood at missing pages, all waits added up."""
    return round(statistics.sum_ns(words) / 1e9, 6)


def block_stages(block: RamBlock, reception: Reception, paging: Paging) -> memoryview:
    """All faults in a block, of clients that are here or have left, and what the supervisor did for them."""
    link = paging.links.get(block.number)
    found = [client.stages(block.number) for client in reception.clients.values() if block.number in client.touches]
    ours = [link.stages[block.number]] if link is not None else []
    return stages.merged([reception.past_stages[block.number], *ours, *(words for words in found if words is not None)])


def _block(block: RamBlock, staged: memoryview) -> dict[str, Any]:
    received_map, lost_map = block.tally(MAP_CELLS)
    received, lost = sum(received_map), sum(lost_map)
    return {
        "name": block.name,
        "size": block.size,
        "page_size": block.page_size,
        "source": str(block.source),
        "kind": block.kind,
        "pages": block.pages,
        "received": received,
        "lost": lost,
        "map": {"pages": -(-block.pages // MAP_CELLS), "received": received_map, "lost": lost_map if lost else []},
        "complete": block.complete,
        "stages_us": stages.told(staged),
        "polluted": [[first * block.page_size, (last - first) * block.page_size] for first, last in block.polluted],
    }


def _source(link: Link) -> dict[str, Any]:
    return {
        "endpoint": link.endpoint,
        "state": link.shown,
        "requests": link.requests,
        "pages": link.pages,
        "bytes": link.bytes,
        "in_flight": link.flow.in_flight,
        "waiting": link.flow.waiting,
        "latency_us": statistics.summary(link.words),
    }


def shown_state(client: Client, workforce: Workforce) -> str:
    """Of its worker, or of the client that needs none (any more, or yet)."""
    slot = workforce.fleet.slots.get(client.number)
    return slot.shown if slot is not None else ("running" if client.released else "starting")


def _client(client: Client, workforce: Workforce, blocks: Sequence[RamBlock], paused: set[int]) -> dict[str, Any]:
    names = {block.number: block.name for block in blocks}
    words = client.words.tolist() if client.words is not None else [0] * statistics.WORDS
    slot = workforce.fleet.slots.get(client.number)
    shown = shown_state(client, workforce)
    if shown == "running" and any(region.block in paused for region in client.regions):
        shown = "paused"
    seen = {(region.block, region.mode): None for region in [*client.regions, *client.released]}
    return {
        "id": client.number,
        "name": client.name,
        "kind": client.conversation.kind,
        "uid": client.uid,
        "pid": client.pid,
        "worker_pid": workforce.pid(client.number),
        "state": shown,
        "blocks": [
            {"name": names[block], "mode": mode, "stages_us": stages.told(client.stages(block))} for block, mode in seen
        ],
        "released": sorted({names[region.block] for region in client.released}),
        "faults": statistics.faults(words),
        "placed": statistics.placed(words),
        "placed_around": words[statistics.AROUND],
        "around_used": words[statistics.AROUND_USED],
        "deduplicated": words[statistics.DEDUPLICATED],
        "blocked_s": blocked_s(words),
        "requests": words[statistics.REQUESTS],
        "wakes": words[statistics.WAKES],
        "lost": words[statistics.LOST],
        "failures": words[statistics.FAILURES],
        "restarts": slot.restarts if slot is not None else 0,
        "denied": words[statistics.DENIED] + words[statistics.UNNOTED],
        "walls": statistics.walls(words[statistics.WALLS]),
        "latency_us": statistics.summary(words),
    }
