"""The plan of a recovery: compares what a dead supervisor left with its custodian with what its successor is to serve.

Pure: no process, socket or descriptor is touched, so a refusal has changed nothing. Every start has a ``Plan``; that of
a fresh start is empty.

What a client uses must be as it was: the same page size, size and kind of source. A file must be the same (device,
inode) and unchanged (size, time) since it was first served. The content of a remote block is compared later, when its
source gives its advice. A block without clients never causes a refusal: it is dropped and made again under another
number."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from postcopy_protocol.codec import decode
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import BlockNote, ClientNote
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import Advice, FileSource, HandlerSource, QemuRamSource, RemoteSource, Source, ZeroSource

SHARED = "house"
ZERO = "client/0"
CGROUPS = "cgroups"
LIFELINE = "lifeline"
"""The writing end of a pipe that supervisor and custodian hold: its end shows workers and clients' watchers that both
have died."""
WITHOUT_DEVICE, WITH_DEVICE = 2, 3
"""Number of descriptors under the key SHARED: quit eventfd, control page, and the device where there is one."""

Note = TypeVar("Note", BlockNote, ClientNote)
OTHER_VERSION = "what the last supervisor left is another version's"


COPY = "copy"
"""``detail`` of a block of kind ``file`` that serves a copy: no other program has its file."""
DIGESTS = "digests"
QEMU_RAM = "qemu-ram"  # the kind of a block that is a part of a file
"""``detail`` of a block whose file leaves no trace of a change: its fourth descriptor has digests of the pages."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What identifies a file; ``mtime_ns`` and ``size`` (bytes) show whether it was changed."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """A block of the previous supervisor. ``fds``: memory, received map, the file of a local block, and its digests."""

    note: BlockNote
    fds: tuple[int, ...]

    @property
    def file(self) -> int:
        """The file's descriptor; -1: it has none."""
        return self.fds[2] if len(self.fds) > 2 else -1


@dataclass(frozen=True, slots=True)
class KeptClient:
    """A client of the previous supervisor. ``fds``: userfaultfd, pidfd, statistics page; of a back-end also a pidfd of
    its front-end, of a VM then its copied map."""

    note: ClientNote
    fds: tuple[int, ...]

    @property
    def blocks(self) -> set[int]:
        return {region.block for region in (*self.note.regions, *self.note.released)}


@dataclass(frozen=True, slots=True)
class KeptWorker:
    """A worker that still runs."""

    worker: int
    incarnation: int
    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that was kept, decoded."""

    shared: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    blocks: tuple[KeptBlock, ...] = ()
    clients: tuple[KeptClient, ...] = ()
    workers: tuple[KeptWorker, ...] = ()
    lifeline: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the supervisor is built from. ``numbers``: those of all blocks to be served; ``blocks``: the adopted ones,
    by name; ``forgotten``: keys that the custodian is to drop; ``rescued``: clients that no custodian had."""

    numbers: Mapping[str, int]
    shared: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    blocks: Mapping[str, KeptBlock] = field(default_factory=dict)
    clients: tuple[KeptClient, ...] = ()
    workers: tuple[KeptWorker, ...] = ()
    forgotten: tuple[str, ...] = ()
    first_client: int = 1
    lifeline: tuple[int, ...] = ()
    rescued: frozenset[int] = frozenset()

    @property
    def recovers(self) -> bool:
        return bool(self.shared)

    @property
    def advice(self) -> dict[str, Advice]:
        """Advice that the sources of adopted remote blocks once gave."""
        notes = [block.note for block in self.blocks.values() if block.note.kind == "remote"]
        return {note.name: Advice(note.size, note.identity) for note in notes}


def read(kept: Mapping[str, tuple[bytes, tuple[int, ...]]], workers: Sequence[KeptWorker]) -> Inventory:
    """Decode what was kept: (note, descriptors) by key. Raises BadInput when it is of another version."""
    blocks, clients = list[KeptBlock](), list[KeptClient]()
    for key, (meta, fds) in kept.items():
        kind, _, _ = key.partition("/")
        if key in (SHARED, ZERO, CGROUPS, LIFELINE):
            continue
        if kind == "block":
            blocks.append(_block(meta, fds))
        elif kind == "client":
            clients.append(_client(meta, fds))
        else:
            raise BadInput(f"{OTHER_VERSION}: {key}")
    _, shared = kept.get(SHARED, (b"", ()))
    _, zero = kept.get(ZERO, (b"", ()))
    if len(shared) not in (0, WITHOUT_DEVICE, WITH_DEVICE) or (clients and not shared):
        raise BadInput(f"{OTHER_VERSION}: {SHARED}")
    _, lifeline = kept.get(LIFELINE, (b"", ()))
    return Inventory(shared, zero, tuple(blocks), tuple(clients), tuple(workers), lifeline)


def _block(meta: bytes, fds: tuple[int, ...]) -> KeptBlock:
    note = _note(meta, BlockNote)
    if len(fds) != descriptors_of(note):
        raise BadInput(f"{OTHER_VERSION}: block {note.name} with {len(fds)} descriptors")
    return KeptBlock(note, fds)


def descriptors_of(note: BlockNote) -> int:
    """How many descriptors are kept of a block: memory, received map, a file, its digests."""
    return 2 if note.kind not in ("file", QEMU_RAM) else 4 if has_digests(note) else 3


def _client(meta: bytes, fds: tuple[int, ...]) -> KeptClient:
    note = _note(meta, ClientNote)
    own = any(region.mode in OWN for region in note.regions)
    if len(fds) not in ((5,) if own else (3, 4) if note.back_end else (3,)):  # an older release kept three
        raise BadInput(f"{OTHER_VERSION}: client {note.client} with {len(fds)} descriptors")
    return KeptClient(note, fds)


def _note(meta: bytes, kind: type[Note]) -> Note:
    try:
        note = decode(meta, expect=(kind,))
    except BadMessage as error:
        raise BadInput(f"{OTHER_VERSION}: {error}") from None
    assert isinstance(note, kind)
    return note


def fresh(sources: Mapping[str, Source], first_client: int = 1) -> Plan:
    """A start with nothing to recover."""
    return Plan({name: number for number, name in enumerate(sources, 1)}, first_client=first_client)


def numbers_after(kept: Iterable[str], workers: Iterable[KeptWorker]) -> int:
    """The first client number that no client or worker of the previous supervisor has. Those may still send messages,
    and no new client may be mistaken for one of them."""
    used = [worker.worker for worker in workers]
    for key in kept:
        kind, _, number = key.partition("/")
        used += [int(number)] if kind == "client" and number.isdigit() else []
    return max(used, default=0) + 1


def judge(
    found: Inventory,
    sources: Mapping[str, Source],
    page_size: int,
    alive: Collection[int],
    kept_files: Mapping[int, FileFacts],
    named_files: Mapping[str, FileFacts],
) -> Plan:
    """The plan. ``alive``: numbers of the clients whose processes live; ``kept_files``: the file under each kept block,
    by number, as it was when first served; ``named_files``: what the command line names, as it is, missing where it
    cannot be opened. Raises BadInput, in one line, when a client would get other bytes than it had."""
    clients = tuple(client for client in found.clients if client.note.client in alive and client.blocks)
    adopted: dict[str, KeptBlock] = {}
    for kept in found.blocks:
        name, source = kept.note.name, sources.get(kept.note.name)
        users = sum(kept.note.block in client.blocks for client in clients)
        if source is None:
            why = "is not named on the command line"
        else:
            why = _difference(kept, source, page_size, kept_files.get(kept.note.block), named_files.get(name))
        if why and users:
            raise BadInput(
                f"cannot recover: block {name} {why}, which {users} clients use; nothing is changed, they go on: "
                "serve the same blocks, or do not take them over (--abandon)"
            )
        if not why:
            adopted[name] = kept
    numbers = _number(sources, adopted, max((kept.note.block for kept in found.blocks), default=0))
    kept_keys = {f"block/{kept.note.block}" for kept in adopted.values()}
    kept_keys |= {f"client/{client.note.client}" for client in clients}
    gone = [f"block/{kept.note.block}" for kept in found.blocks]
    gone += [f"client/{client.note.client}" for client in found.clients]
    return Plan(
        numbers,
        found.shared,
        found.zero,
        adopted,
        clients,
        found.workers,
        tuple(key for key in gone if key not in kept_keys),
        numbers_after(gone, found.workers),
        found.lifeline,
    )


def _number(sources: Mapping[str, Source], adopted: Mapping[str, KeptBlock], last: int) -> dict[str, int]:
    """Numbers of all blocks. Adopted ones keep theirs, which workers know; a used number is never given again."""
    numbers: dict[str, int] = {}
    for name in sources:
        if name in adopted:
            numbers[name] = adopted[name].note.block
        else:
            last += 1
            numbers[name] = last
    return numbers


def has_digests(note: BlockNote) -> bool:
    """Are pages of this block's file compared with digests?"""
    return note.detail.endswith(DIGESTS) and note.kind in ("file", QEMU_RAM)


def is_copy(note: BlockNote) -> bool:
    """Is a copy of its file served?"""
    return note.detail.endswith(COPY) and note.kind in ("file", QEMU_RAM)


def _difference(kept: KeptBlock, source: Source, page_size: int, was: FileFacts | None, now: FileFacts | None) -> str:
    """What has changed, or nothing."""
    note = kept.note
    if note.page_size != page_size:
        return f"has pages of {format_size(note.page_size)}, not of {format_size(page_size)}"
    match source:
        case FileSource(path) if note.kind == "file" and note.detail == COPY:
            return "" if note.source == str(source) else f"is a copy of {note.source}, not of {source}"
        case FileSource(path) if note.kind == "file":
            return _other_file(path, was, now)
        case QemuRamSource(path, block) if note.kind == QEMU_RAM and note.source.endswith(f"?block={block}"):
            if is_copy(note):
                return "" if note.source == str(source) else f"is a copy of {note.source}, not of {source}"
            return _other_file(path, was, now)
        case HandlerSource(module, function, size) if note.kind == "handler":
            wanted, had = (f"{module}:{function}", size), (note.detail, note.size)
        case ZeroSource(size) if note.kind == "zero":
            wanted, had = ("", size), ("", note.size)
        case RemoteSource() if note.kind == "remote":
            return ""
        case _:
            return f"comes from {note.source}, not from {source}"
    if wanted == had:
        return ""
    return f"has {had[1]} bytes of {note.source}, not {wanted[1]} of {source}"


def _other_file(path: str, was: FileFacts | None, now: FileFacts | None) -> str:
    if now is None:
        return f"cannot be compared with {path}, which cannot be opened"
    assert was is not None
    if (was.device, was.inode) != (now.device, now.inode):
        return f"was made from another file than the present {path}"
    if was.size != now.size:
        return f"had {was.size} bytes in {path}, which now has {now.size}"
    return "" if was.mtime_ns == now.mtime_ns else f"comes from {path}, which has been written to since"
