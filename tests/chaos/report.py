"""What a run has shown, as a table and as a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chaos.monkey import WEIGHTS
from tests.chaos.store import STORE_KINDS
from tests.chaos.tally import Tally

KINDS = (*WEIGHTS, *STORE_KINDS)
NOTHING = ("wrong bytes", "stuck clients", "leaks")
"""What must be 0."""


def line(tally: Tally, seconds: float) -> str:
    """Progress, after every round."""
    counts = tally.counts
    faults = counts["local faults"] + counts["remote faults"]
    nothing = ", ".join(f"{counts[name]} {name}" for name in NOTHING)
    return (
        f"{seconds:6.0f} s: round {tally.rounds}, {sum(tally.kills.values())} acts, {faults} missing pages served, "
        f"{counts['bytes checked'] >> 20} MiB checked, {nothing}"
    )


def document(tally: Tally, seed: int, clients: int, seconds: float, evidence: str) -> dict[str, Any]:
    counts = dict(sorted(tally.counts.items()))
    return {
        "seed": seed,
        "clients": clients,
        "seconds": round(seconds, 1),
        "rounds": tally.rounds,
        "by_kind": {kind: tally.kills[kind] for kind in KINDS if tally.kills[kind]},
        "acts": sum(tally.kills.values()),
        "kills": sum(number for kind, number in tally.kills.items() if " kill" in kind),
        "recoveries": {kind: _recovery(tally.recoveries[kind]) for kind in WEIGHTS if tally.recoveries.get(kind)},
        "slowest_touch_s": round(tally.slowest_touch, 3),
        "counts": counts,
        "not_nothing": [name for name in NOTHING if tally.counts[name]],
        "findings": tally.findings,
        "evidence": evidence,
    }


def _recovery(seconds: list[float]) -> dict[str, float]:
    seconds = sorted(seconds)
    return {"number": len(seconds), "p50_s": round(seconds[len(seconds) // 2], 3), "slowest_s": round(seconds[-1], 3)}


def print_table(document: dict[str, Any]) -> None:
    """For people."""
    print(f"\n{document['seconds']:.0f} s, {document['rounds']} rounds, seed {document['seed']}\n")
    print(f"{'act':24}{'times':>8}{'recoveries':>12}{'p50 s':>9}{'slowest s':>11}")
    for kind, number in document["by_kind"].items():
        found = document["recoveries"].get(kind)
        tail = f"{found['number']:12}{found['p50_s']:9.3f}{found['slowest_s']:11.3f}" if found else ""
        print(f"{kind:24}{number:8}{tail}")
    print(f"{'all':24}{document['acts']:8}")
    print(f"{'of them SIGKILL':24}{document['kills']:8}\n")
    print(
        "(a recovery: how long a program concerned stood, from the act on, at the next missing page that it was given)"
    )
    for name, number in document["counts"].items():
        print(f"{name:24}{number:14}")
    print(f"{'slowest touch':24}{document['slowest_touch_s']:14.3f} s\n")
    for finding in document["findings"]:
        print(f"FOUND {finding}")
    if document["evidence"]:
        print(f"evidence: {document['evidence']}")
    if not document["findings"] and not document["not_nothing"]:
        print("0 wrong bytes, 0 stuck clients, 0 leaks")


def available_memory() -> int:
    """Bytes that the machine can still give (MemAvailable)."""
    rows = Path("/proc/meminfo").read_text("ascii").splitlines()
    return next((int(row.split()[1]) << 10 for row in rows if row.startswith("MemAvailable:")), 0)
