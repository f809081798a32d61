"""``postcopy gc``: removes the chunks of a store that no snapshot in it names, and what killed programs left.

One index that cannot be read stops it: what it names is not known. It does not run beside a pack, which may be about to
name a chunk that is there already."""

from __future__ import annotations

from dataclasses import dataclass

from postcopy_protocol.caibx import chunk_of_path
from postcopy_protocol.errors import PostcopyError
from postcopy_protocol.sidecar import SIDECAR_ENDING

from .packing import COLLECTING_MARK, PACKING_MARK
from .snapshots import check_writable, load, names_in
from .stores import LEFT_OVER, Store

_STEP = 1000


@dataclass(slots=True)
class Collected:
    """What was found. Bytes as they lie in the store."""

    snapshots: int = 0
    kept_chunks: int = 0
    removed_chunks: int = 0
    removed_bytes: int = 0
    removed_others: int = 0


def collect(store: Store, *, dry_run: bool = False) -> Collected:
    """Remove what is not needed (``dry_run``: only count it). Raises PostcopyError."""
    check_writable(store)
    if not dry_run:
        store.put(COLLECTING_MARK, b"postcopy gc\n", replace=True)
    try:
        return _collect(store, dry_run)
    finally:
        if not dry_run:
            store.delete([COLLECTING_MARK])


def _collect(store: Store, dry_run: bool) -> Collected:
    names = names_in(store)
    packing = sorted(entry.key for entry in store.list() if entry.key.endswith(PACKING_MARK))
    if packing:
        raise PostcopyError(
            f"{packing[0].removesuffix(PACKING_MARK)} is being packed into {store.shown}: wait for its end "
            f"(it was killed? pack it again, or remove {packing[0]} there)"
        )
    needed: set[bytes] = set()
    for name in names:
        needed.update(load(store, name).index.unique())
    found = Collected(len(names))
    batch: list[str] = []
    for entry in store.walk():
        chunk = chunk_of_path(entry.key)
        if chunk in needed:
            found.kept_chunks += 1
            continue
        if chunk is not None:
            found.removed_chunks += 1
            found.removed_bytes += entry.size
        elif LEFT_OVER in entry.key or _orphaned(entry.key, names):
            found.removed_others += 1
        else:
            continue
        batch.append(entry.key)
        if len(batch) == _STEP and not dry_run:
            store.delete(batch)
            batch.clear()
    if not dry_run:
        store.delete(batch)
    return found


def _orphaned(key: str, names: list[str]) -> bool:
    """Is it the sidecar of a snapshot that is gone?"""
    return "/" not in key and key.endswith(SIDECAR_ENDING) and key.removesuffix(SIDECAR_ENDING) not in names
