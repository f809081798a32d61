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
from postcopy_protocol.messages import REFUSALS, VERSION
from postcopy_protocol.version import PACKAGE

from ..blocks import RamBlock
from ..clients.client import Client, Clients
from ..clients.worker_zero import NUMBER as ZERO
from ..paging.source_link import SourceLink
from ..parts import Parts
from ..pool.lifecycle import RestartPolicy
from ..pool.worker_pool import WorkerPool
from ..waits import Waits
from . import figures

MAP_CELLS = 128  # cells of the residency map of a block
NOTHING = counters.merge(())  # counters of a client that has none yet
AT_ONCE = 16  # short items of a list that are made in one step
SUMMED = (*figures.OF_CLIENTS, "restarts", "state")  # what the totals need of each client
Steps = Generator[None, None, str]  # steps of a fraction of a millisecond; the result is JSON


def document(parts: Parts) -> Steps:
    """The whole document."""
    paging, blocks = parts.paging, list(parts.blocks.values())
    paused = {number for number, link in paging.links.items() if link.state == "paused"}
    census = Census(parts.clients, parts.pool, parts.waits, blocks, paused)
    clients = yield from census.take()
    head = {
        "protocol": VERSION,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - parts.state.started, 3),
        "state": parts.shown_state,
        "recovered": parts.recoveries,
        "transport": parts.transport,
        "version": PACKAGE,
    }
    shown = []
    for block in blocks:
        yield
        shown.append((yield from _block(block, census.stages[block.number], parts)))
    events = yield from listed(parts.event_log.documents())
    tail = {
        "sources": [_source(link) for link in dict.fromkeys(paging.links.values())],
        "left": {"clients": parts.clients.left, **census.left()},
        "supervisor": {**figures.of_supervisor(parts), **_waiting(parts.waits.of_client(ZERO, time.monotonic()))},
        "totals": _totals(census, shown, parts),
        "restart_policy": _policy(parts.pool.policy),
        "record": parts.recorder.document() if parts.recorder is not None else None,
    }
    yield
    lists = f'"blocks": [{", ".join(map(json.dumps, shown))}], "clients": {clients}, "events": {events}'
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

    def __init__(
        self, clients: Clients, pool: WorkerPool, waits: Waits, blocks: Sequence[RamBlock], paused: set[int]
    ) -> None:
        self.total = list(clients.past)  # counters of all clients
        self.listed: list[dict[str, Any]] = []
        self._left = list(clients.past)  # of those that are not listed
        self._waits = waits
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
            if self._clients.by_number.get(client.number) is not client:
                counters.join(self._left, page)
                continue
            shown = _client(client, page, staged, self._pool, self._names, self._paused)
            shown |= _waiting(self._waits.of_client(client.number, time.monotonic()))
            self.listed.append({name: shown[name] for name in SUMMED})
            made.append(json.dumps(shown))
        return f"[{', '.join(made)}]"

    def left(self) -> dict[str, int | float]:
        """Figures of the clients that are not listed."""
        restarts = self._pool.restarts - self._pool.restarts_of(ZERO) - sum(one["restarts"] for one in self.listed)
        return figures.of_clients(self._left, restarts)


def _waiting(found: tuple[int, float]) -> dict[str, Any]:
    return {"waiting": found[0], "oldest_wait_s": round(found[1], 3)}


def _totals(census: Census, blocks: list[dict[str, Any]], parts: Parts) -> dict[str, Any]:
    """The sums of what the other lists say; see ``figures``."""
    listed, left, ours = census.listed, census.left(), figures.of_supervisor(parts)
    counted = [{name: one[name] for name in left} for one in listed]
    total = figures.summed((*counted, left, ours))
    counters.join(census.total, parts.zero.counters)
    return {
        **total,
        "requests": ours["requests"],
        "blocked_s": round(total["blocked_s"], 6),
        "lost": sum(block["lost"] for block in blocks),
        "lost_faults": total["lost"],
        "polluted": sum(length // block["page_size"] for block in blocks for _, length in block["polluted"]),
        "repaired": parts.event_log.counts.get("polluted", 0),
        "quarantined": sum(one["state"] == "quarantined" for one in listed),
        "refused": {code: parts.refused.get(code, 0) for code in REFUSALS if parts.refused.get(code, 0)},
        **_waiting(parts.waits.total(time.monotonic())),
        "latency_us": counters.summary(census.total),
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


def _block(block: RamBlock, staged: list[int], parts: Parts) -> Generator[None, None, dict[str, Any]]:
    link = parts.paging.links.get(block.number)
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
        **_waiting(parts.waits.of_block(block.number, time.monotonic())),
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
        "progress": _progress(link),
    }


def _progress(link: SourceLink) -> dict[str, Any] | None:
    """What a source says of itself that pages are still coming to."""
    if (said := link.progress) is None:
        return None
    words = {"phase": said.phase, "origin": said.origin}
    return words | {"received": said.received, "left": said.size - said.received, "bytes_per_s": said.rate}


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
        **figures.of_clients(page, pool.restarts_of(client.number)),
        "denied": page[counters.DENIED] + page[counters.UNNOTED],
        "fault_loop": counters.fault_loop_name(page[counters.FAULT_LOOP]),
        "walls": counters.sandbox_names(page[counters.SANDBOX]),
        "latency_us": counters.summary(page),
    }
