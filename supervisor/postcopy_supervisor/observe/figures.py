"""The figures of clients, as status and metrics show them: made from counters, and added up in one way.

A total is the sum over the clients, those that have left, and the supervisor itself. Two are not: ``requests`` of a
client go to the supervisor, and those of the totals from it; ``lost`` of a client are faults, of the totals pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from postcopy_protocol import counters

from ..parts import Parts


def blocked_s(page: Sequence[int]) -> float:
    """Seconds that threads waited for missing pages, all waits added up."""
    return round(counters.sum_ns(page) / 1e9, 6)


Figure = Callable[[Sequence[int]], int | float]


def _counter(index: int) -> Figure:
    return lambda page: page[index]


OF_CLIENTS: dict[str, Figure] = {
    "faults": counters.faults,
    "placed": counters.placed,
    "placed_around": _counter(counters.AROUND),
    "around_used": _counter(counters.AROUND_USED),
    "deduplicated": _counter(counters.DEDUPLICATED),
    "blocked_s": blocked_s,
    "requests": _counter(counters.REQUESTS),
    "wakes": _counter(counters.WAKES),
    "lost": _counter(counters.LOST),
    "failures": _counter(counters.FAILURES),
}


def of_clients(page: Sequence[int], restarts: int) -> dict[str, int | float]:
    """Figures of one client, or of many by their merged counters."""
    return {**{name: figure(page) for name, figure in OF_CLIENTS.items()}, "restarts": restarts}


def of_supervisor(parts: Parts) -> dict[str, int | float]:
    """What the supervisor and its own worker did: for remote blocks, exports and the background."""
    page, engine = parts.zero.counters, parts.paging.engine
    return {
        "faults": counters.faults(page) + parts.zero.faults,
        "placed": counters.placed(page) + parts.paging.placed,
        "deduplicated": engine.deduplicated,
        "requests": engine.requests,
        "wakes": page[counters.WAKES],
        "restarts": parts.pool.restarts_of(0),
    }


def summed(figures: Iterable[dict[str, int | float]]) -> dict[str, int | float]:
    """Their sum, by name."""
    total: dict[str, int | float] = {}
    for found in figures:
        for name, figure in found.items():
            total[name] = total.get(name, 0) + figure
    return total
