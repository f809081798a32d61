"""The status document: what the supervisor sees, as JSON. Its fields are the interface of ``postcopy status
--json``.

It is made in steps, one for each client, between which the house hears what has come (``desk.py``), so that a document
tells of some tens of milliseconds. It is about the clients that are there when it is begun. Who has left before its
turn is not listed; what it did is in the totals all the same, and once, because its figures can be read as long as
somebody has hold of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from postcopy_protocol import counters, stages
from postcopy_protocol.messages import VERSION

from ..blocks import RamBlock
from ..clients.attach_server import AttachServer, Client
from ..clients.client_zero import ClientZero
from ..paging.paging import RemotePaging
from ..paging.source_link import SourceLink
from ..pool.lifecycle import RestartPolicy
from ..pool.worker_pool import WorkerPool
from .event_log import History

MAP_CELLS = 128
"""Stretches of the residency map of a block."""
NOTHING = counters.merge(())
"""Figures of a client that has none yet."""
AT_ONCE = 16
"""Short items of a list in one step."""
Steps = Generator[None, None, str]
"""Steps of a fraction of a millisecond; what they make is JSON."""


def document(
    started: float,
    state: str,
    blocks: Sequence[RamBlock],
    reception: AttachServer,
    workforce: WorkerPool,
    zero: ClientZero,
    paging: RemotePaging,
    history: History,
    recovered: int = 0,
    record: dict[str, Any] | None = None,
) -> Steps:
    """The whole of it."""
    paused = {number for number, link in paging.links.items() if link.state == "paused"}
    census = Census(reception, workforce, blocks, paused)
    clients = yield from census.take()
    told = {
        "protocol": VERSION,
        "pid": os.getpid(),
        "uptime_s": round(time.monotonic() - started, 3),
        "state": "paused" if paused and state == "running" else state,
        "recovered": recovered,
    }
    shown = []
    for block in blocks:
        yield
        shown.append(json.dumps((yield from _block(block, census.stages[block.number], paging))))
    events = yield from listed(history.documents())
    ending = {
        "sources": [_source(link) for link in dict.fromkeys(paging.links.values())],
        "totals": _totals(census.total, blocks, workforce, zero, paging, history),
        "restart_policy": _policy(workforce.fleet.policy),
        "record": record,
    }
    yield
    lists = f'"blocks": [{", ".join(shown)}], "clients": {clients}, "events": {events}'
    return f"{json.dumps(told)[:-1]}, {lists}, {json.dumps(ending)[1:]}"


def listed(items: Iterable[Any]) -> Steps:
    """A list of them, some in each step."""
    told = []
    for at, item in enumerate(items):
        if at % AT_ONCE == 0:
            yield
        told.append(json.dumps(item))
    return f"[{', '.join(told)}]"


class Census:
    """Goes from client to client: tells of each, and adds their figures to those of the clients that have left."""

    def __init__(
        self, reception: AttachServer, workforce: WorkerPool, blocks: Sequence[RamBlock], paused: set[int]
    ) -> None:
        self.total = list(reception.past)
        """A statistics page."""
        self.stages = {number: words.tolist() for number, words in reception.past_stages.items()}
        """By block."""
        self._here = list(reception.clients.values())
        self._reception = reception
        self._workforce = workforce
        self._names = {block.number: block.name for block in blocks}
        self._paused = paused

    def take(self) -> Steps:
        """A list of clients."""
        told = []
        for client in self._here:
            yield
            words = client.words[: counters.DENIED_AT].tolist() if client.words is not None else NOTHING
            staged = {block: stages.snapshot(client.stages(block)) for block in client.touches}
            counters.join(self.total, words)
            for block, found in staged.items():
                stages.join(self.stages[block], found)
            if self._reception.clients.get(client.number) is client:
                told.append(json.dumps(_client(client, words, staged, self._workforce, self._names, self._paused)))
        return f"[{', '.join(told)}]"


def _totals(
    total: list[int],
    blocks: Sequence[RamBlock],
    workforce: WorkerPool,
    zero: ClientZero,
    paging: RemotePaging,
    history: History,
) -> dict[str, Any]:
    counters.join(total, zero.words)
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
        "restarts": workforce.restarts,
        "polluted": sum(last - first for block in blocks for first, last in block.polluted),
        "repaired": history.counts.get("polluted", 0),
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


def blocked_s(words: Sequence[int]) -> float:
    """Seconds that threads stood at missing pages, all waits added up."""
    return round(counters.sum_ns(words) / 1e9, 6)


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


def shown_state(client: Client, workforce: WorkerPool) -> str:
    """Of its worker, or of the client that needs none (any more, or yet)."""
    slot = workforce.fleet.slots.get(client.number)
    return slot.shown if slot is not None else ("running" if client.released else "starting")


def _client(
    client: Client,
    words: Sequence[int],
    staged: dict[int, list[counters.BucketRun]],
    workforce: WorkerPool,
    names: dict[int, str],
    paused: set[int],
) -> dict[str, Any]:
    """``words`` and ``staged``: what its figures were."""
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
            {"name": names[block], "mode": mode, "stages_us": stages.summaries(staged[block])} for block, mode in seen
        ],
        "released": sorted({names[region.block] for region in client.released}),
        "faults": counters.faults(words),
        "placed": counters.placed(words),
        "placed_around": words[counters.AROUND],
        "around_used": words[counters.AROUND_USED],
        "deduplicated": words[counters.DEDUPLICATED],
        "blocked_s": blocked_s(words),
        "requests": words[counters.REQUESTS],
        "wakes": words[counters.WAKES],
        "lost": words[counters.LOST],
        "failures": words[counters.FAILURES],
        "restarts": slot.restarts if slot is not None else 0,
        "denied": words[counters.DENIED] + words[counters.UNNOTED],
        "walls": counters.sandbox_names(words[counters.SANDBOX]),
        "latency_us": counters.summary(words),
    }
