"""The content of ``postcopy top``, from the newest status and the one before it. Pure: documents in, rows out.

A residency map is a row of cells, each for an equal part of the block: the more of it is received, the fuller the block
character. Cells with pages received since the previous status are *hot*; cells with lost pages are always marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from postcopy_protocol.display import printable
from postcopy_protocol.sizes import format_size

Status = dict[str, Any]
MISSING, HOT, RECEIVED, LOST = "missing", "hot", "received", "lost"
SHADES = "·▁▂▃▄▅▆▇█"
LOST_CELL = "X"


@dataclass(frozen=True, slots=True)
class Row:
    """One client. Rates are a second, since the previous status."""

    number: int
    name: str
    pid: int
    worker: int
    state: str
    blocks: str
    faults: int
    fault_rate: float
    placed_rate: float
    p50: float
    p99: float
    longest: float
    blocked: float
    """Time of all its threads in page faults, as a share of the time since the previous status."""
    restarts: int
    waiting: str
    """Faults that wait now, and the age of the oldest."""
    oldest: float

    def cells(self) -> tuple[str, ...]:
        """The cells of the table, in the order of COLUMNS."""
        return (
            str(self.number),
            self.name[:15],
            str(self.pid),
            self.state,
            self.blocks,
            number(self.fault_rate),
            number(self.placed_rate),
            micro(self.p50),
            micro(self.p99),
            f"{self.blocked:.0%}",
            str(self.restarts),
            self.waiting,
        )


COLUMNS = ("id", "client", "pid", "state", "blocks", "fault/s", "page/s", "p50", "p99", "waits", "deaths", "oldest")
KEYS = (
    "number",
    "name",
    "pid",
    "state",
    "blocks",
    "fault_rate",
    "placed_rate",
    "p50",
    "p99",
    "blocked",
    "restarts",
    "oldest",
)
"""Fields of Row that the columns sort by."""
LARGEST_FIRST = frozenset({"fault_rate", "placed_rate", "p50", "p99", "blocked", "restarts", "oldest"})


def rows(now: Status, before: Status | None) -> list[Row]:
    """All clients, in the order of the status."""
    was = {client["id"]: client for client in (before or {}).get("clients", ())}
    seconds = elapsed(now, before)
    return [_row(client, was.get(client["id"]), seconds) for client in now.get("clients", ())]


def elapsed(now: Status, before: Status | None) -> float:
    """Seconds between two statuses; 0.0 if they are not of the same supervisor."""
    if before is None or before.get("pid") != now.get("pid"):
        return 0.0
    return max(0.0, float(now.get("uptime_s", 0.0)) - float(before.get("uptime_s", 0.0)))


def _row(client: dict[str, Any], was: dict[str, Any] | None, seconds: float) -> Row:
    def rate(name: str) -> float:
        if was is None or seconds <= 0:
            return 0.0
        return max(0.0, float(client.get(name, 0) - was.get(name, 0)) / seconds)

    latency = client.get("latency_us", {})
    return Row(
        number=client["id"],
        name=printable(str(client.get("name", ""))),
        pid=client.get("pid", 0),
        worker=client.get("worker_pid") or 0,
        state=str(client.get("state", "")),
        blocks=" ".join(f"{block['name']}:{block['mode'][0]}" for block in client.get("blocks", ())),
        faults=client.get("faults", 0),
        fault_rate=rate("faults"),
        placed_rate=rate("placed"),
        p50=latency.get("p50", 0.0),
        p99=latency.get("p99", 0.0),
        longest=latency.get("max", 0.0),
        blocked=rate("blocked_s"),
        restarts=client.get("restarts", 0),
        waiting=waiting(client),
        oldest=client.get("oldest_wait_s", 0.0),
    )


def arranged(found: Iterable[Row], key: str, *, turned: bool = False, wanted: str = "") -> list[Row]:
    """The rows whose name, state, blocks or pid contain ``wanted``, sorted by ``key``."""
    text = wanted.lower()
    kept = [row for row in found if text in f"{row.name} {row.state} {row.blocks} {row.pid}".lower()]
    return sorted(kept, key=lambda row: (getattr(row, key), row.number), reverse=(key in LARGEST_FIRST) != turned)


def residency(block: dict[str, Any], was: dict[str, Any] | None, width: int) -> list[tuple[str, str]]:
    """(character, meaning) of each cell; at most ``width`` cells."""
    kept = block.get("map") or {"received": [], "lost": [], "pages": 1}
    received, lost = list(kept["received"]), list(kept["lost"]) or [0] * len(kept["received"])
    old = list((was or {}).get("map", {}).get("received", ())) or received
    width = min(width, len(received))
    cells = []
    for cell in range(width):
        low, high = cell * len(received) // width, (cell + 1) * len(received) // width
        room = max(1, min(block["pages"], high * kept["pages"]) - low * kept["pages"])
        have, had, gone = sum(received[low:high]), sum(old[low:high]), sum(lost[low:high])
        cells.append(_cell(have / room, have > had, gone))
    return cells


def _cell(share: float, hot: bool, lost: int) -> tuple[str, str]:
    if lost:
        return LOST_CELL, LOST
    if not share:
        return SHADES[0], MISSING
    shade = SHADES[-1] if share >= 1 else SHADES[max(1, min(len(SHADES) - 2, int(share * (len(SHADES) - 1))))]
    return shade, HOT if hot else RECEIVED


def share(block: dict[str, Any]) -> str:
    """The share of the block that is received."""
    pages = block.get("pages", 0)
    return f"{block.get('received', 0) / pages:.1%}" if pages else "-"


def headline(now: Status, before: Status | None, found: Sequence[Row]) -> str:
    """The first line."""
    totals = now.get("totals", {})
    up = int(now.get("uptime_s", 0))
    rate = sum(row.fault_rate for row in found)
    shown = [f"{now.get('state')}", f"pid {now.get('pid')}", f"up {up // 3600}:{up // 60 % 60:02}:{up % 60:02}"]
    shown += [f"{len(found)} clients", f"{number(rate)} faults/s"]
    shown += [f"{name} {totals.get(name, 0)}" for name in ("restarts", "lost", "polluted")]
    shown += [f"{name} {totals[name]}" for name in ("quarantined", "failures") if totals.get(name)]
    shown += [f"waiting {waiting(totals)}"] if totals.get("waiting") else []
    return "  ".join(shown)


def sources(now: Status, before: Status | None) -> list[str]:
    """One line for each source."""
    was = {source["endpoint"]: source for source in (before or {}).get("sources", ())}
    seconds, lines = elapsed(now, before), []
    for source in now.get("sources", ()):
        old = was.get(source["endpoint"], source)
        rate = (source["bytes"] - old["bytes"]) / seconds if seconds else 0.0
        latency = source["latency_us"]
        lines.append(
            f"{source['endpoint']}  {source['state']}  {format_size(int(rate))}/s  in flight {source['in_flight']}  "
            f"p50 {micro(latency['p50'])}  p99 {micro(latency['p99'])}{progress(source)}"
        )
    return lines


def progress(source: dict[str, Any]) -> str:
    """How far a source is that pages are still coming to; empty for another one."""
    if not (found := source.get("progress")):
        return ""
    size = found["received"] + found["left"]
    shown = [f"{found['phase']} {found['received'] / size:.0%}" if size else found["phase"]]
    if found["left"]:
        shown += [f"{format_size(found['left'])} left", f"{format_size(found['bytes_per_s'])}/s"]
    return "  ".join(["", *shown, *([found["origin"]] if found["origin"] else [])])


def details(client: dict[str, Any], row: Row) -> list[tuple[str, str]]:
    """Everything about one client, name and value."""
    shown = [(name, str(client.get(name))) for name in ("id", "name", "kind", "uid", "pid", "worker_pid", "state")]
    shown += [("blocks", ", ".join(f"{block['name']} ({block['mode']})" for block in client.get("blocks", ())))]
    shown += [("released", ", ".join(client.get("released", ())) or "-")]
    shown += [("faults", f"{client.get('faults', 0):,}  ({number(row.fault_rate)} a second)")]
    shown += [("pages placed", f"{client.get('placed', 0):,}  ({number(row.placed_rate)} a second)")]
    around = client.get("placed_around", 0)
    shown += [("fault-around", f"{around:,}, of them used {client.get('around_used', 0):,}")]
    for name in ("requests", "deduplicated", "wakes", "lost", "failures", "denied", "restarts"):
        shown.append((name, f"{client.get(name, 0):,}"))
    latency = ", ".join(f"{name} {micro(value)}" for name, value in client.get("latency_us", {}).items())
    shown += [("waiting", waiting(client))]
    shown += [("latency", latency), ("blocked", f"{client.get('blocked_s', 0.0):.3f} s in all, now {row.blocked:.0%}")]
    return shown


def waiting(figures: dict[str, Any]) -> str:
    """Faults that wait now, and the age of the oldest; of a client, a block, or all."""
    if not figures.get("waiting"):
        return "-"
    age = figures.get("oldest_wait_s", 0.0)
    return f"{figures['waiting']} {f'{age:.0f}s' if age < 1000 else f'{age / 60:.0f}m'}"


def number(value: float) -> str:
    """A rate, short."""
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    if value >= 1e4:
        return f"{value / 1e3:.0f}k"
    return f"{value:.0f}"


def micro(us: float) -> str:
    """Microseconds, short."""
    if us >= 1e6:
        return f"{us / 1e6:.1f}s"
    return f"{us / 1e3:.1f}ms" if us >= 1e3 else f"{us:.0f}us"
