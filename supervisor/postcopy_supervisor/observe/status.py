"""The status document: what the supervisor sees, as JSON. Its fields are the interface of ``postcopy status --json``.

It is made in steps, one for each client, between which the main loop handles what has arrived (``queries``). So a
document shows a span of some tens of milliseconds. It lists the clients that are there when it is begun. A client that
leaves before its step is not listed; its figures are in the totals, once, because they stay readable while
referenced."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from postcopy_protocol import counters, stages
from postcopy_protocol.messages import VERSION

from ..blocks import RamBlock
from ..clients.client import Client, Clients
from ..paging.paging import RemotePaging
from ..paging.source_link import SourceLink
from ..parts import Parts
from ..pool.lifecycle import RestartPolicy
from ..pool.worker_pool import WorkerPool

MAP_CELLS = 128  # cells of the residency map of a block
NOTHING = counters.merge(())  # counters of a client that has none yet
AT_ONCE = 16  # short items of a list that are made in one step
Steps = Generator[None, None, str]  # steps of a fraction of a millisecond; the result is JSON


def document(parts: Parts) -> Steps:
    """The whole document."""
    paging, blocks = parts.paging, list(parts.blocks.values())
    paused = {number for number, link in paging.links.items() if link.state == "paused"}
    census = Census(parts.clients, parts.pool, blocks, paused)
    clients = yield from census.take()
    head = {
        "protocol": VERSION,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - parts.state.started, 3),
        "state": parts.shown_state,
        "recovered": parts.recoveries,
        "transport": parts.transport,
    }
    shown = []
    for block in blocks:
        yield
        shown.append(json.dumps((yield from _block(block, census.stages[block.number], paging))))
    events = yield from listed(parts.event_log.documents())
    tail = {
        "sources": [_source(link) for link in dict.fromkeys(paging.links.values())],
        "totals": _totals(census.total, parts),
        "restart_policy": _policy(parts.pool.policy),
        "record": parts.recorder.document() if parts.recorder is not None else None,
    }
    yield
    lists = f'"blocks": [{", ".join(shown)}], "clients": {clients}, "events": {events}'
    return f"{json.dumps(head)[:-1]}, {lists}, {json.dumps(tail)[1:]}"


def listed(items: Iterable[Any]) -> Steps:
    """A JSON list, AT_ONCE items in each step."""
    made = []
    for at, item in enumerate(items):
        if at % AT_ONCE == 0:
            yield
        made.append(json.dumps(item))
    return f"[{', '.join(made)}]"


class Census:
    """Describes client after client, and adds their figures to those of the clients that have left."""

    def __init__(self, clients: Clients, pool: WorkerPool, blocks: Sequence[RamBlock], paused: set[int]) -> None:
        self.total = list(clients.past)  # counters of all clients
        self.stages = {number: page.tolist() for number, page in clients.past_stages.items()}  # by block
        self._present = list(clients.by_number.values())
        self._clients, self._pool = clients, pool
        self._names = {block.number: block.name for block in blocks}
        self._paused = paused

    def take(self) -> Steps:
        """The list of clients."""
        made = []
        for client in self._present:
            yield
            page = client.counters[: counters.DENIED_AT].tolist() if client.counters is not None else NOTHING
            staged = {block: stages.snapshot(client.stages(block)) for block in client.touches}
            counters.join(self.total, page)
            for block, found in staged.items():
                stages.join(self.stages[block], found)
            if self._clients.by_number.get(client.number) is client:
                made.append(json.dumps(_client(client, page, staged, self._pool, self._names, self._paused)))
        return f"[{', '.join(made)}]"


def _totals(total: list[int], parts: Parts) -> dict[str, Any]:
    paging, zero = parts.paging, parts.zero
    counters.join(total, zero.counters)
    return {
        "faults": counters.faults(total) + zero.faults,
        "requests": paging.engine.requests,
        "deduplicated": total[counters.DEDUPLICATED] + paging.engine.deduplicated,
        "placed": counters.placed(total) + paging.placed,
        "placed_around": total[counters.AROUND],
        "around_used": total[counters.AROUND_USED],
        "blocked_s": blocked_s(total),
        "wakes": total[counters.WAKES],
        "lost": total[counters.LOST],
        "restarts": parts.pool.restarts,
        "polluted": sum(last - first for block in parts.blocks.values() for first, last in block.polluted),
        "repaired": parts.event_log.counts.get("polluted", 0),
        "latency_us": counters.summary(total),
    }


def _policy(policy: RestartPolicy) -> dict[str, Any]:
    return {
        "limit": policy.limit,
        "interval_s": policy.interval,
        "backoff_s": policy.backoff,
        "stable_s": policy.stable,
        "start_timeout_s": policy.start_deadline,
        "quarantine": "poison" if policy.poison else "wait",
    }


def blocked_s(page: Sequence[int]) -> float:
    """Seconds that threads waited for missing pages, all waits added up."""
    return round(counters.sum_ns(page) / 1e9, 6)


def _block(block: RamBlock, staged: list[int], paging: RemotePaging) -> Generator[None, None, dict[str, Any]]:
    link = paging.links.get(block.number)
    if link is not None:
        stages.join(staged, stages.snapshot(link.stages[block.number]))
    received_map, lost_map = yield from block.tally(MAP_CELLS)
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
        "stages_us": stages.summaries(stages.snapshot(staged)),
        "polluted": [[first * block.page_size, (last - first) * block.page_size] for first, last in block.polluted],
    }


def _source(link: SourceLink) -> dict[str, Any]:
    return {
        "endpoint": link.endpoint,
        "state": link.shown,
        "requests": link.requests,
        "pages": link.pages,
        "bytes": link.bytes,
        "in_flight": link.flow.in_flight,
        "waiting": link.flow.waiting,
        "latency_us": counters.summary(link.counters),
    }


def shown_state(client: Client, pool: WorkerPool) -> str:
    """State of its worker, or of a client that needs none (any more, or yet)."""
    slot = pool.slots.get(client.number)
    return slot.shown_state if slot is not None else ("running" if client.released else "starting")


def _client(
    client: Client,
    page: Sequence[int],
    staged: dict[int, list[counters.BucketRun]],
    pool: WorkerPool,
    names: dict[int, str],
    paused: set[int],
) -> dict[str, Any]:
    """``page`` and ``staged``: its figures."""
    slot = pool.slots.get(client.number)
    shown = shown_state(client, pool)
    if shown == "running" and any(region.block in paused for region in client.regions):
        shown = "paused"
    seen = {(region.block, region.mode): None for region in client.all_regions}
    return {
        "id": client.number,
        "name": client.name,
        "kind": client.conversation.kind,
        "uid": client.uid,
        "pid": client.pid,
        "worker_pid": pool.pid(client.number),
        "state": shown,
        "blocks": [
            {"name": names[block], "mode": mode, "stages_us": stages.summaries(staged[block])} for block, mode in seen
        ],
        "released": sorted({names[region.block] for region in client.released}),
        "faults": counters.faults(page),
        "placed": counters.placed(page),
        "placed_around": page[counters.AROUND],
        "around_used": page[counters.AROUND_USED],
        "deduplicated": page[counters.DEDUPLICATED],
        "blocked_s": blocked_s(page),
        "requests": page[counters.REQUESTS],
        "wakes": page[counters.WAKES],
        "lost": page[counters.LOST],
        "failures": page[counters.FAILURES],
        "restarts": slot.restarts if slot is not None else 0,
        "denied": page[counters.DENIED] + page[counters.UNNOTED],
        "fault_loop": counters.fault_loop_name(page[counters.FAULT_LOOP]),
        "walls": counters.sandbox_names(page[counters.SANDBOX]),
        "latency_us": counters.summary(page),
    }
