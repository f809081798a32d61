"""``postcopy inspect`` and ``postcopy diff``: what a snapshot is, and what differs between two."""

from __future__ import annotations

from typing import Any

from postcopy_protocol.caibx import ID_BYTES
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.sidecar import runs_of

from .snapshots import Snapshot


def described(snapshot: Snapshot, *, pages: bool = False) -> dict[str, Any]:
    """The document of ``inspect --json``. Sizes in bytes. ``pages``: with those of the working set, as [first, count]
    in the order of their first use."""
    index, sidecar = snapshot.index, snapshot.sidecar
    lengths = index.unique()
    document: dict[str, Any] = {
        "name": snapshot.name,
        "identity": snapshot.identity,
        "size": index.size,
        "chunk_size": index.largest,
        "digest": index.digest,
        "chunks": len(index),
        "unique_chunks": len(lengths),
        "unique_bytes": sum(lengths.values()),
        "pages": page_count(index.size, PAGE_4K),
        "sidecar": sidecar is not None,
        "zero_pages": sidecar.zero_pages if sidecar else None,
        "working_set": None,
    }
    if sidecar is not None and sidecar.working_set.runs:
        found = sidecar.working_set
        needed = found.pages_in(index)
        document["working_set"] = {"runs": found.runs, "pages": len(needed), "bytes": len(needed) * PAGE_4K}
        if pages:
            document["working_set"]["ranges"] = list(runs_of(needed, 0, len(needed) or 1))
    return document


def difference(first: Snapshot, second: Snapshot) -> dict[str, Any]:
    """The document of ``diff --json``: how many bytes of the second image lie in chunks that the first has not at that
    place (``changed_bytes``), and not at all (``new_bytes``)."""
    one, other = first.index, second.index
    at_place = set(zip(one.ends, _ids(first), strict=True))
    known = one.unique()
    changed = new_bytes = changed_chunks = 0
    new: set[bytes] = set()
    start = 0
    for end, chunk in zip(other.ends, _ids(second), strict=True):
        if (end, chunk) not in at_place:
            changed_chunks += 1
            changed += end - start
        if chunk not in known and chunk not in new:
            new.add(chunk)
            new_bytes += end - start
        start = end
    return {
        "sizes": [one.size, other.size],
        "chunks": [len(one), len(other)],
        "changed_chunks": changed_chunks,
        "changed_bytes": changed,
        "new_chunks": len(new),
        "new_bytes": new_bytes,
        "same": first.key == second.key or (changed == 0 and one.size == other.size),
        "comparable": one.digest == other.digest,
    }


def _ids(snapshot: Snapshot) -> list[bytes]:
    ids = snapshot.index.ids
    return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]
