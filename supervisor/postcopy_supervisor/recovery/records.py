"""Records in the runtime directory: how to find blocks and clients again when every process of the service has died.

One file for each key that the custodian keeps, renewed whenever that is. They hold no descriptor, only what identifies
one in a living client: ``rescue`` does that. A file is replaced by rename, so it is never half written."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from postcopy_kernel import other_process
from postcopy_kernel.address_space import pid_of
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import BlockNote, BlockRecord, ClientNote, ClientRecord
from postcopy_protocol.runtime_paths import RESCUE

from .plan import OTHER_VERSION, has_digests

log = logging.getLogger("postcopy")

BLOCK, CLIENT, WORKER, DIGEST = "block", "client", "worker", "digests"
MOST_BYTES = 1 << 20
RETRY_SECONDS = 1.0
ADVICE = "recover with that version, or start afresh with --abandon"
MOST_DIGESTS = 64 << 20  # bytes of them that are copied into the runtime directory
FILE = 2  # where in the descriptors of a block its file is
FRONT_END, COPIED = 3, 4  # where in those of a client the pidfd of its front-end, and its copied map, are


Note = TypeVar("Note", BlockNote, ClientNote, BlockRecord, ClientRecord)


@dataclass(frozen=True, slots=True)
class LeftBlock:
    """A block's record; ``digests``: the path of a copy of its digests, or nothing."""

    record: BlockRecord
    note: BlockNote
    digests: str = ""


@dataclass(frozen=True, slots=True)
class LeftClient:
    """A client's record."""

    record: ClientRecord
    note: ClientNote


@dataclass(frozen=True, slots=True)
class Left:
    """All records of this boot, by key. ``workers``: pid and start time of the last process of each worker."""

    blocks: dict[str, LeftBlock] = field(default_factory=dict)
    clients: dict[str, LeftClient] = field(default_factory=dict)
    workers: dict[int, tuple[int, int]] = field(default_factory=dict)


class Records:
    """The files of one runtime directory. Failures are logged once: the service goes on without them."""

    def __init__(self, directory: str, originals: Mapping[str, bytes]) -> None:
        """``originals``: stamps of the files of which blocks serve copies, by the blocks' keys."""
        self._directory = os.path.join(directory, RESCUE)
        self._boot = other_process.boot_id()
        self._failed = ""
        self._originals = originals
        self._unwritten: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._retry_at = 0.0
        self._begun = False

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        """Write the record of a key. Keys that are neither a block nor a client have none. Nothing is written before
        ``retain``: until a supervisor has taken everything over, what its predecessor left is true."""
        if not self._begun:
            self._unwritten[key] = meta, tuple(fds)
            return
        kind, _, _ = key.partition("/")
        self._unwritten.pop(key, None)
        try:
            if kind == CLIENT and len(fds) > 1:
                self._write(key, encode(self._client(meta, fds)))
            elif kind == BLOCK:
                self._write(key, encode(self._block(key, meta, fds)))
                self._keep_digests(key, meta, fds)
        except (OSError, BadMessage) as error:
            self._unwritten[key] = meta, tuple(fds)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._report(f"{error}")

    def _client(self, meta: bytes, fds: Sequence[int]) -> ClientRecord:
        note = decode(meta, expect=(ClientNote,))
        assert isinstance(note, ClientNote)
        front_end = 0
        if len(fds) > FRONT_END:
            with contextlib.suppress(OSError, ValueError):  # it has ended, or is in another pid namespace
                front_end = pid_of(fds[FRONT_END])
        copied = os.fstat(fds[COPIED]).st_ino if len(fds) > COPIED else 0
        return ClientRecord(meta, self._boot, _started(note.pid), front_end, _started(front_end), copied)

    def _block(self, key: str, meta: bytes, fds: Sequence[int]) -> BlockRecord:
        facts = [os.fstat(fd) for fd in fds[: FILE + 1]]
        files = [(fact.st_dev, fact.st_ino) for fact in facts] + [(0, 0)]
        original = self._originals.get(key) or self._original_before(key)
        return BlockRecord(meta, self._boot, *files[0], *files[1], *files[FILE], original)

    def _original_before(self, key: str) -> bytes:
        """What an earlier supervisor, which made the copy, has noted."""
        try:
            record = _decode(_read(self._path(key)), BlockRecord)
        except BadInput:
            return b""
        return record.original if record.boot == self._boot else b""

    def _keep_digests(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        note = decode(meta, expect=(BlockNote,))
        assert isinstance(note, BlockNote)
        if has_digests(note) and (size := os.fstat(fds[FILE + 1]).st_size) <= MOST_DIGESTS:
            self._write(key.replace(BLOCK, DIGEST), os.pread(fds[FILE + 1], size, 0))

    def _write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        fresh = path + ".new"
        try:
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            os.makedirs(self._directory, 0o700, exist_ok=True)
            file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            done = os.write(file, data)
        finally:
            os.close(file)
        if done < len(data):
            raise OSError(f"{fresh}: only {done} of {len(data)} bytes could be written")
        os.rename(fresh, path)
        self._failed = ""

    def _path(self, key: str) -> str:
        return os.path.join(self._directory, key.replace("/", "-"))

    def _report(self, why: str) -> None:
        if not self._failed:
            log.warning("no record can be written (%s): clients could not be rescued if every process died", why)
        self._failed = why

    def drop(self, key: str) -> None:
        """Remove the record of a key, with that of its worker."""
        kind, _, number = key.partition("/")
        self._unwritten.pop(key, None)
        for name in (key, f"{WORKER}/{number}" if kind == CLIENT else f"{DIGEST}/{number}"):
            with contextlib.suppress(OSError):
                os.unlink(self._path(name))

    def retain(self, keys: Collection[str]) -> None:
        """Write the records of these keys, and remove all others: an earlier supervisor has left them."""
        self._begun = True
        self.flush()
        wanted = {key.replace("/", "-") for key in keys}
        wanted |= {name.replace(BLOCK, DIGEST) for name in wanted} | {name.replace(CLIENT, WORKER) for name in wanted}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if name not in wanted:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self._directory, name))

    def flush(self) -> None:
        """Write what could not be written before, as on a full disk; once a second at most."""
        if not self._begun or not self._unwritten or time.monotonic() < self._retry_at:
            return
        for key, (meta, fds) in list(self._unwritten.items()):
            self.keep(key, meta, fds)

    def clear(self) -> None:
        """Remove all records and their directory: the service ends in order."""
        self._unwritten.clear()
        self.retain(())
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)


def _started(pid: int) -> int:
    """When a process was started; 0: it is not known."""
    try:
        return other_process.start_time(pid) if pid > 0 else 0
    except OSError:  # it ends, or /proc hides it
        return 0


def read(directory: str) -> Left:
    """The records in a runtime directory; those of an earlier boot are left out. Raises BadInput for those of another
    version, and where they cannot be read."""
    place, boot = os.path.join(directory, RESCUE), other_process.boot_id()
    blocks, clients, workers = dict[str, LeftBlock](), dict[str, LeftClient](), dict[int, tuple[int, int]]()
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return Left()
    for name in names:
        kind, _, number = name.partition("-")
        key, path = f"{kind}/{number}", os.path.join(place, name)
        if not number.isdecimal():
            continue  # one that was being written
        if kind == BLOCK and (block := _decode(_read(path), BlockRecord)).boot == boot:
            digests = os.path.join(place, f"{DIGEST}-{number}")
            note = _decode(block.note, BlockNote)
            blocks[key] = LeftBlock(block, note, digests if os.path.exists(digests) else "")
        elif kind == CLIENT and (client := _decode(_read(path), ClientRecord)).boot == boot:
            clients[key] = LeftClient(client, _decode(client.note, ClientNote))
        elif kind == WORKER and (worker := _worker(_read(path), boot)):
            workers[int(number)] = worker
    return Left(blocks, clients, workers)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise BadInput(f"the record {path} cannot be read: {error.strerror}") from None


def _decode(data: bytes, kind: type[Note]) -> Note:
    try:
        message = decode(data, expect=(kind,))
    except BadMessage as error:
        raise BadInput(f"{OTHER_VERSION} ({error}); {ADVICE}") from None
    assert isinstance(message, kind)
    return message


def _worker(text: bytes, boot: str) -> tuple[int, int] | None:
    """A worker's record is ``PID START BOOT``, in text; the custodian writes it."""
    words = text.split()
    if len(words) != 3 or words[2] != boot.encode() or not (words[0] + words[1]).isdigit():
        return None
    return int(words[0]), int(words[1])
