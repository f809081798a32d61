"""A summary of a trace, and the difference of two. Figures only; ``commands/trace.py`` prints them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

from postcopy_protocol import counters, trace
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.trace import Fault, Header

from .errors import BadInput


@dataclass(frozen=True, slots=True)
class Trace:
    """A file of ``serve --record``, with its faults in order of time."""

    path: str
    head: Header
    faults: list[Fault]

    def name(self, block: int) -> str:
        return next((known.name for known in self.head.blocks if known.number == block), f"#{block}")


def read(path: str) -> Trace:
    """Read a trace. Raises BadInput for a file that is not a trace, OSError."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        head, start = trace.read_header(data)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return Trace(path, head, sorted(trace.faults(data, start), key=lambda fault: fault.at))


@dataclass
class Tally:
    """Of one block in one trace."""

    faults: int = 0
    in_order: int = 0
    """Faults on the page after the client's previous fault."""
    kinds: Counter[str] = field(default_factory=Counter)
    pages: Counter[int] = field(default_factory=Counter)
    clients: set[int] = field(default_factory=set)
    writes: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * counters.WORDS)


def tally(found: Trace) -> dict[int, Tally]:
    """By block."""
    blocks: dict[int, Tally] = defaultdict(Tally)
    last: dict[tuple[int, int], int] = {}
    for fault in found.faults:
        block = blocks[fault.block]
        block.faults += 1
        block.in_order += last.get((fault.client, fault.block)) == fault.page - 1
        last[fault.client, fault.block] = fault.page
        block.kinds[trace.KINDS[fault.kind] if fault.kind < len(trace.KINDS) else "unknown"] += 1
        block.pages[fault.page] += 1
        block.clients.add(fault.client)
        block.writes += fault.write
        block.latency[counters.bucket(fault.latency)] += 1
        block.latency[counters.LONGEST_NS] = max(block.latency[counters.LONGEST_NS], fault.latency)
    return dict(blocks)


def summary(found: Trace) -> dict[str, Any]:
    """The figures of a trace, for text and JSON."""
    span = (found.faults[-1].at - found.faults[0].at) / 1e9 if found.faults else 0.0
    sizes = {known.number: known for known in found.head.blocks}
    blocks = []
    for number, block in sorted(tally(found).items()):
        known = sizes.get(number)
        pages = -(-known.size // known.page_size) if known is not None else 0
        blocks.append(
            {
                "block": found.name(number),
                "faults": block.faults,
                "clients": len(block.clients),
                "pages": len(block.pages),
                "share_of_block": round(len(block.pages) / pages, 6) if pages else None,
                "in_order": round(block.in_order / block.faults, 4),
                "writes": block.writes,
                "kinds": dict(sorted(block.kinds.items())),
                "latency_us": counters.summary(block.latency),
                "most_wanted": [[page, count] for page, count in block.pages.most_common(5)],
            }
        )
    told = {"file": found.path, "started": found.head.started, "faults": len(found.faults), "seconds": round(span, 6)}
    return {**told, "faults_per_s": round(len(found.faults) / span, 1) if span else None, "blocks": blocks}


def difference(first: Trace, second: Trace) -> dict[str, Any]:
    """Working sets compared block by block, by name; ``overlap``: common pages as a share of all pages."""
    one = {first.name(number): block for number, block in tally(first).items()}
    two = {second.name(number): block for number, block in tally(second).items()}
    blocks = []
    for name in sorted(one.keys() | two.keys()):
        left, right = one.get(name, Tally()), two.get(name, Tally())
        both, either = left.pages.keys() & right.pages.keys(), left.pages.keys() | right.pages.keys()
        blocks.append(
            {
                "block": name,
                "faults": [left.faults, right.faults],
                "pages": [len(left.pages), len(right.pages)],
                "in_both": len(both),
                "only": [len(left.pages) - len(both), len(right.pages) - len(both)],
                "overlap": round(len(both) / len(either), 4) if either else 1.0,
                "latency_us": [counters.summary(left.latency), counters.summary(right.latency)],
            }
        )
    return {"files": [first.path, second.path], "blocks": blocks}


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """The pages of 4096 bytes that a replay sends, out of a snapshot of so many bytes."""

    snapshot: str
    size: int
    pages: frozenset[int]


def replayed(known: WorkingSet, without: Trace, after: Trace | None, block: str = "") -> dict[str, Any]:
    """What a replay of the set is worth for the run of ``without``: ``coverage``, the share of its pages that are in
    the set; ``waste``, the share of the set that it did not need; how long clients waited for pages of the set. With a
    run that had the replay (``after``): what they still waited for, and the time that was saved. Raises BadInput."""
    ranges = (range(first, first + count) for first, count in _faulted(without, known, block))
    needed = frozenset(page for pages in ranges for page in pages)
    covered = needed & known.pages
    waited, in_set = _waited(without, known, block)
    document: dict[str, Any] = {
        "snapshot": known.snapshot,
        "set_pages": len(known.pages),
        "needed_pages": len(needed),
        "coverage": round(len(covered) / len(needed), 4) if needed else 1.0,
        "waste": round(1 - len(covered) / len(known.pages), 4) if known.pages else 0.0,
        "waited_s": round(waited, 6),
        "waited_for_set_s": round(in_set, 6),
    }
    if after is None:
        return document
    faults, left = len(_of(without, known, block)), len(_of(after, known, block))
    still, _ = _waited(after, known, block)
    document |= {"faults": [faults, left], "waited_with_replay_s": round(still, 6), "saved_s": round(waited - still, 6)}
    return document


def _of(found: Trace, known: WorkingSet, block: str) -> list[Fault]:
    """The faults on the block of the snapshot. Raises BadInput."""
    fitting = [one for one in found.head.blocks if (not block or one.name == block) and one.size == known.size]
    if len(fitting) != 1:
        why = "name one with --block" if fitting else f"it has no block of {known.size} bytes {block}".rstrip()
        raise BadInput(f"{found.path} does not fit {known.snapshot}: {why}")
    return [fault for fault in found.faults if fault.block == fitting[0].number]


def _faulted(found: Trace, known: WorkingSet, block: str) -> list[tuple[int, int]]:
    """(first, count) in pages of 4096 bytes of each fault."""
    each = {one.number: one.page_size // PAGE_4K for one in found.head.blocks}
    return [(fault.page * each[fault.block], each[fault.block]) for fault in _of(found, known, block)]


def _waited(found: Trace, known: WorkingSet, block: str) -> tuple[float, float]:
    """Seconds that clients waited, all together; and of these for pages of the set."""
    faults = _of(found, known, block)
    places = zip(faults, _faulted(found, known, block), strict=True)
    in_set = [fault for fault, (first, count) in places if not known.pages.isdisjoint(range(first, first + count))]
    return sum(fault.latency for fault in faults) / 1e9, sum(fault.latency for fault in in_set) / 1e9


def as_document(found: Trace, fault: Fault) -> dict[str, Any]:
    """One record for people and for JSON: ``at`` in seconds, ``latency_us`` in microseconds."""
    told = asdict(fault)
    kind = trace.KINDS[fault.kind] if fault.kind < len(trace.KINDS) else f"unknown ({fault.kind})"
    told |= {"at": fault.at / 1e9, "block": found.name(fault.block), "kind": kind}
    told["latency_us"] = told.pop("latency") / 1e3
    return told
