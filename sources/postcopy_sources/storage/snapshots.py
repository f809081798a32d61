"""One snapshot in a store: its index and its sidecar, read and published."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Protocol

from postcopy_protocol.caibx import INDEX_ENDING, LARGEST_INDEX, Index, format_index, parse_index
from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.sidecar import LARGEST_SIDECAR, SIDECAR_ENDING, Sidecar, format_sidecar, parse_sidecar

from .stores import Missing, Refused, Store, StoreFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``key``: SHA-256 of the index file, which identifies the content. ``sidecar``: None where none fits the index."""

    name: str
    index: Index
    key: bytes
    sidecar: Sidecar | None

    @property
    def identity(self) -> str:
        """What a page source says of the content. Every copy of this index has it."""
        return f"caibx-{self.key.hex()[:40]}"


class Keep(Protocol):
    """Where copies of indexes are kept on this host."""

    def keep_file(self, name: str, data: bytes) -> None: ...
    def kept_file(self, name: str) -> bytes | None: ...


def load(store: Store, name: str, keep: Keep | None = None) -> Snapshot:
    """Read a snapshot. With ``keep`` the copy that is there is used while the store fails. Raises StoreFailed, BadInput
    for an index that is damaged."""
    index_file = name + INDEX_ENDING
    place = f"{store.shown}/{index_file}"
    try:
        data = store.get(index_file, LARGEST_INDEX)
        if keep is not None:
            keep.keep_file(place, data)
    except Refused:
        raise
    except Missing:
        raise Missing(f"there is no snapshot {name} in {store.shown}: {index_file} is not there") from None
    except StoreFailed as error:
        if keep is None or (kept := keep.kept_file(place)) is None:
            raise
        log.warning("%s; the copy of the index on this host is used", error)
        data = kept
    index = _parsed(store, index_file, data)
    key = hashlib.sha256(data).digest()
    return Snapshot(name, index, key, load_sidecar(store, name, key))


def _parsed(store: Store, index_file: str, data: bytes) -> Index:
    try:
        return parse_index(data)
    except BadInput as error:
        raise BadInput(f"{index_file} in {store.shown} cannot be used: {error}") from None


def load_sidecar(store: Store, name: str, key: bytes = b"") -> Sidecar | None:
    """The sidecar of the index with this ``key`` (of any, without). None: there is none that can be used, which costs
    speed and nothing else."""
    try:
        sidecar = parse_sidecar(store.get(name + SIDECAR_ENDING, LARGEST_SIDECAR))
    except Missing:
        return None
    except (BadInput, StoreFailed) as error:
        log.warning("snapshot %s: its sidecar is not used: %s", name, error)
        return None
    if key and sidecar.index != key:
        log.warning("snapshot %s: its sidecar is not used: it belongs to another index", name)
        return None
    return sidecar


def publish(store: Store, name: str, index: Index, zeros: bytes) -> Snapshot:
    """Give the image its name, after all its chunks are in the store. The working set of an earlier snapshot of that
    name is kept. Raises StoreFailed."""
    data = format_index(index)
    key = hashlib.sha256(data).digest()
    earlier = load_sidecar(store, name)
    sidecar = Sidecar(key, index.size, zeros, *([earlier.working_set] if earlier else []))
    store.settle()
    store.put(name + SIDECAR_ENDING, format_sidecar(sidecar), replace=True)
    store.put(name + INDEX_ENDING, data, replace=True)
    return Snapshot(name, index, key, sidecar)


def names_in(store: Store) -> list[str]:
    """The names of all snapshots in a store."""
    return sorted(entry.key.removesuffix(INDEX_ENDING) for entry in store.list() if entry.key.endswith(INDEX_ENDING))


def check_writable(store: Store) -> None:
    """Raises PostcopyError for a store that can only be read."""
    if not store.writable:
        raise PostcopyError(f"{store.shown} can only be read: name the bucket (s3://, gs://, az://) or a directory")
