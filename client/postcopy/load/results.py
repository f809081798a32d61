"""The results of a load test as one JSON document: the figures of ``postcopy load --json`` and of every report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from postcopy_protocol import counters

from . import recorder
from .client_group import ClientGroup, ClientProcess
from .watch import Watch

PERCENTS = (50, 75, 90, 95, 99, 99.5, 99.9, 99.99, 99.999)
COUNTED = ("faults", "placed", "placed_around", "deduplicated", "requests", "wakes", "restarts", "lost", "polluted")


def results_of(group: ClientGroup, watch: Watch, seconds: float) -> dict[str, Any]:
    """Latencies in microseconds, times in seconds since the start."""
    done = [client.result for client in group.clients if client.result]
    latency = counters.merge(result["latency"] for result in done)
    faults = counters.merge(result["faults"] for result in done)
    touches = sum(client.touches for client in group.clients)
    found = {
        "clients": len(group.clients),
        "touches": touches,
        "first_touches": latency[counters.FAULTS],
        "faults": faults[counters.FAULTS],
        "present": max(0, touches - faults[counters.FAULTS]),
        "seconds": round(seconds, 6),
        "touches_per_s": round(touches / seconds, 1),
        "compared": sum(result["compared"] for result in done),
        "wrong": sum(result["wrong"] for result in done),
        "missed": sum(result["missed"] for result in done),
        "died": group.failures(),
        "latency_us": counters.summary(latency),
        "percentiles_us": _percentiles(latency),
        "fault_us": counters.summary(faults),
        "fault_percentiles_us": _percentiles(faults),
        "timeline": _timeline(done),
        "residency": watch.residency,
        "kills": watch.kills,
        "fairness": fairness([_rate(result) for result in done]),
        "supervisor": _supervisor(watch),
        "each": [_each(client) for client in group.clients],
    }
    if responses := [result["response"] for result in done if result.get("response")]:
        response = counters.merge(responses)
        found |= {"response_us": counters.summary(response), "response_percentiles_us": _percentiles(response)}
    return found


def fairness(shares: Sequence[float]) -> float:
    """Jain's index: 1.0 all shares are equal, 1/n one client has everything; 1.0 without clients."""
    squares = len(shares) * sum(share * share for share in shares)
    return round(sum(shares) ** 2 / squares, 4) if squares else 1.0


def _percentiles(histogram: Sequence[int]) -> list[list[float]]:
    """[percent, microseconds], for percentiles with at least one sample above them."""
    samples = counters.count(histogram)
    wanted = [percent for percent in PERCENTS if samples * (100 - percent) / 100 >= 1]
    return [[percent, round(counters.percentile(histogram, percent), 1)] for percent in wanted]


def _timeline(done: list[dict[str, Any]]) -> dict[str, Any]:
    width, bins = recorder.merged(done)
    last = max(bins, default=-1)
    rows = [bins.get(number, [0] * 4) for number in range(last + 1)]
    return {
        "bin_s": width / 1e9,
        "touches": [row[recorder.TOUCHES] for row in rows],
        "first_touches": [row[recorder.FIRSTS] for row in rows],
        "faults": [row[recorder.MISSING] for row in rows],
        "slowest_us": [round(row[recorder.SLOWEST] / 1e3, 1) for row in rows],
    }


def _rate(result: dict[str, Any]) -> float:
    """Touches a second of one client, from its own first to its own last."""
    taken = (result["ended"] - result["begun"]) / 1e9
    return float(result["touches"]) / taken if taken > 0 else 0.0


def _supervisor(watch: Watch) -> dict[str, Any]:
    """What the supervisor counted between the first and the last status, and why there was no later status."""
    before, after = watch.first["totals"], watch.last["totals"]
    counted = {name: after[name] - before.get(name, 0) for name in COUNTED if name in after}
    return {**counted, "trouble": watch.trouble}


def _each(client: ClientProcess) -> dict[str, Any]:
    figures = {"pid": client.pid, "mode": client.mode, "state": client.state, "touches": client.touches}
    if not client.result:
        return figures
    kept = ("touches", "first_touches", "compared", "wrong", "first_wrong", "missed", "seconds")
    result = {key: client.result[key] for key in kept}
    latencies = {"latency_us": counters.summary(client.result["latency"])}
    latencies["fault_us"] = counters.summary(client.result["faults"])
    faults = client.result["faults"][counters.FAULTS]
    return {**figures, **result, "faults": faults, "touches_per_s": round(_rate(client.result), 1), **latencies}
