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
NOTHING = statistics.merge(())
"""Figures of a client that has none yet."""
AT_ONCE = 16
"""Short items of a list in one step."""
Steps = Generator[None, None, str]
"""Steps of a fraction of a millisecond; what they make is JSON."""


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
        self, reception: Reception, workforce: Workforce, blocks: Sequence[RamBlock], paused: set[int]
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
            words = client.words[: statistics.DENIED_AT].tolist() if client.words is not None else NOTHING
            staged = {block: stages.taken(client.stages(block)) for block in client.touches}
            statistics.join(self.total, words)
            for block, found in staged.items():
                stages.join(self.stages[block], found)
            if self._reception.clients.get(client.number) is client:
                told.append(json.dumps(_client(client, words, staged, self._workforce, self._names, self._paused)))
        return f"[{', '.join(told)}]"


def _totals(
    total: list[int],
    blocks: Sequence[RamBlock],
    workforce: Workforce,
    zero: ClientZero,
    paging: Paging,
    history: History,
) -> dict[str, Any]:
    statistics.join(total, zero.words)
    return {
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
    return round(statistics.sum_ns(words) / 1e9, 6)


def _block(block: RamBlock, staged: list[int], paging: Paging) -> Generator[None, None, dict[str, Any]]:
    link = paging.links.get(block.number)
    if link is not None:
        stages.join(staged, stages.taken(link.stages[block.number]))
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
        "stages_us": stages.told(stages.taken(staged)),
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


def _client(
    client: Client,
    words: Sequence[int],
    staged: dict[int, list[statistics.Stretch]],
    workforce: Workforce,
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
            {"name": names[block], "mode": mode, "stages_us": stages.told(staged[block])} for block, mode in seen
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
