"""RAM blocks: one memfd and one received map each, their source, and which pages are present."""

from __future__ import annotations

import logging
import mmap
import os
import stat
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from postcopy_kernel import memory
from postcopy_kernel.filecopy import settle
from postcopy_kernel.filedigest import PageDigests
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.filewatch import give_up_lease, hear_of_lease, lease_wanted
from postcopy_kernel.memory import DONTFORK, DONTNEED, Mapping
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd
from postcopy_protocol import received_map
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M, page_count
from postcopy_protocol.messages import BlockGrant, BlockNote
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import (
    Advice,
    FileSource,
    HandlerSource,
    QemuRamSource,
    RemoteSource,
    Source,
    StoreSource,
    ZeroSource,
)

from . import qemu_ram
from .recovery.plan import COPY, DIGESTS, QEMU_RAM, KeptBlock, has_digests

log = logging.getLogger(__name__)

LARGEST_BLOCK = 16 << 40  # bytes: what a process can map several times over (47 bits of addresses)
MAP_PIECE = 1 << 20
AUDIT_RUNS = 1000  # runs of present pages looked at in one step of an audit: some milliseconds
SHORT_RUNS = 100  # ... and in a step of an audit on demand, which has no pause between its steps
TALLY_PAGES = 128 << 10  # pages counted in one step
COPY_SECONDS = 0.002
"""After this time a worker that did not see the new mark has finished its COPY of the unchanged file."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A source as it was when first served: its exact ``size``, and for a file its descriptor, its stamp and whether we
    hold a lease. ``detail`` is COPY for the copy of a file, DIGESTS where pages are compared with digests; of a block
    that is a part of a file, its place comes before that. ``original`` is the stamp of the file that was copied.
    ``part``: bytes of a block that is a part of a file."""

    kind: str
    detail: str
    size: int
    descriptor: int = -1
    stamp: Stamp | None = None
    leased: bool = False
    digests: PageDigests | None = None
    original: Stamp | None = None
    part: int = 0


def open_source(name: str, source: Source, *, copy: bool = False) -> Opened:
    """Open what SOURCE names. Raises BadInput with one line that says what is wrong with it."""
    match source:
        case FileSource(path):
            return _open_file(name, path, copy)
        case HandlerSource(module, function, size):
            return Opened("handler", f"{module}:{function}", size)
        case ZeroSource(size):
            return Opened("zero", "", size)
        case QemuRamSource(path):
            return _open_qemu_ram(name, source, _open_file(name, path, copy))
        case RemoteSource() | StoreSource():
            raise BadInput(f"block {name}: its source {source} has not been asked")


def _open_file(name: str, path: str, copy: bool) -> Opened:
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # O_NONBLOCK: opening a fifo must not wait
    except OSError as error:
        raise BadInput(f"block {name}: cannot open {path}: {error.strerror}") from None
    found = os.fstat(descriptor)
    wrong = ""
    if not stat.S_ISREG(found.st_mode):
        wrong = "is not a regular file"
    elif found.st_size == 0:
        wrong = "is empty; a block has at least one byte"
    elif found.st_size > LARGEST_BLOCK:
        wrong = f"has {format_size(found.st_size)}; a block has at most {format_size(LARGEST_BLOCK)}"
    if wrong:
        os.close(descriptor)
        raise BadInput(f"block {name}: {path} {wrong}")
    try:
        served = settle(descriptor, path, copy=copy)
    except OSError as error:
        raise BadInput(f"block {name}: cannot copy {path}: {error.strerror}") from None
    detail = COPY if copy else ""
    if served.digests is not None:
        detail = DIGESTS
        log.info("block %s: %s is in memory and open for writing: each page is compared with its digest", name, path)
    return Opened(
        "file", detail, served.stamp.size, served.fd, served.stamp, served.leased, served.digests, served.original
    )


def _open_qemu_ram(name: str, source: QemuRamSource, opened: Opened) -> Opened:
    """The part of a file that is one block, found in the file as it is served."""
    try:
        block = qemu_ram.block_of(opened.descriptor, source)
        assert block.mapped is not None
    except BadInput as error:
        os.close(opened.descriptor)
        raise BadInput(f"block {name}: {error}") from None
    detail = f"{block.mapped.bitmap}:{block.mapped.pages}:{opened.detail}"
    return replace(opened, kind=QEMU_RAM, detail=detail, part=block.size)


class RamBlock:
    """One served block. ``pages`` of ``page_size`` bytes; the last ``pages * page_size - size`` bytes are zeros."""

    def __init__(
        self,
        number: int,
        name: str,
        source: Source,
        page_size: int,
        advice: Advice | None = None,
        kept: KeptBlock | None = None,
        *,
        guarded: bool = False,
        copy: bool = False,
    ) -> None:
        """``advice``: the advice of a remote block's source; ``kept``: what the previous supervisor left; ``guarded``:
        untrusted users may attach; ``copy``: serve a copy of a file."""
        self.number, self.name, self.source, self.page_size = number, name, source, page_size
        self.identity = advice.identity if advice else ""
        if kept is not None:
            note = kept.note
            stamp = Stamp.from_bytes(note.source_stamp) if kept.file >= 0 else None
            digests = PageDigests(kept.fds[3]) if has_digests(note) else None
            part = note.size if note.kind == QEMU_RAM else 0
            size = note.source_size if part else note.size
            self.opened = Opened(note.kind, note.detail, size, kept.file, stamp, digests=digests, part=part)
        else:
            self.opened = Opened("remote", "", advice.size) if advice else open_source(name, source, copy=copy)
        self.size = self.opened.part or self.opened.size
        self.pages = page_count(self.size, page_size)
        self.length = self.pages * page_size
        if not self.size:
            raise BadInput(f"block {name}: its source offers 0 bytes: a block has at least one")
        if self.size > LARGEST_BLOCK:
            raise BadInput(f"block {name}: {format_size(self.size)} is too large; at most {format_size(LARGEST_BLOCK)}")
        self.memory, self.map_fd = kept.fds[:2] if kept is not None else self._make()
        self.mapping = self._map()
        self.received = mmap.mmap(self.map_fd, 0)
        # Clients get separate open file descriptions, so that a flag set by one (O_APPEND) has no effect here.
        self.read_only = memory.reopen(self.memory, writable=False)
        self.read_write = memory.reopen(self.memory, writable=True)
        self.map_read_only = memory.reopen(self.map_fd, writable=False)
        was_guarded = self.guarded
        if kept is not None:
            self._finish_interrupted()
        self.guard_raised = kept is not None and guarded and not was_guarded
        """Clients and workers of the previous supervisor do not know of foreign users yet."""
        self.received[self.pages + received_map.GUARDED] = was_guarded or guarded  # foreign users keep descriptors
        self._lease(kept is not None)
        self.complete = False
        self.polluted: tuple[tuple[int, int], ...] = ()
        self._audit: Iterator[tuple[int, int]] | None = None
        self._strange: list[tuple[int, int]] = []

    def _make(self) -> tuple[int, int]:
        """Memory and received map, empty."""
        try:
            return (
                memory.create_memfd(f"postcopy-{self.name}", self.length, self.page_size),
                memory.create_memfd(f"postcopy-{self.name}-map", -(-(self.pages + received_map.FLAGS) // 4096) * 4096),
            )
        except OSError as error:
            raise BadInput(f"block {self.name}: no memory of {format_size(self.length)}: {error.strerror}") from None

    def _map(self) -> Mapping:
        """Our own mapping, which is never read. All huge pages are reserved here, so that placing one cannot fail."""
        huge = self.page_size == PAGE_2M
        try:
            mapping = Mapping.of(self.memory, self.length, reserve=huge)
        except OSError as error:
            if not huge:
                raise BadInput(f"block {self.name}: cannot map {format_size(self.length)}: {error.strerror}") from None
            raise BadInput(
                f"block {self.name}: needs {self.pages} huge pages of 2M, {memory.huge_pages().available} are free; "
                f"reserve them: sysctl vm.nr_hugepages={self.pages}"
            ) from None
        mapping.advise(DONTFORK)
        return mapping

    def _lease(self, kept: bool) -> None:
        """A lease on the file; a ``kept`` one that was about to be given up is given up now."""
        descriptor = self.opened.descriptor
        if descriptor < 0:
            return
        if not kept:
            if not self.opened.leased:
                self.received[self.pages + received_map.TRUST] = received_map.WATCHED
            return
        hear_of_lease(descriptor)
        if self.received[self.pages + received_map.TRUST] != received_map.LEASED:
            give_up_lease(descriptor)

    def register(self, core: Userfaultfd) -> None:
        """From now on our own touch of a missing page is a message on the core userfaultfd."""
        core.register(self.mapping.address, self.length, self.register_mode)

    @property
    def guarded(self) -> bool:
        """May a user attach, or have attached, whom we do not trust? It may make pages of zeros at any moment."""
        return self.received[self.pages + received_map.GUARDED] == 1

    @property
    def register_mode(self) -> RegisterMode:
        """How every mapping of it is registered, our own too: in a guarded block each page is announced (MINOR) before
        it can be read."""
        return RegisterMode.MISSING | RegisterMode.MINOR if self.guarded else RegisterMode.MISSING

    @property
    def kind(self) -> str:
        """``local`` or ``remote``."""
        return "remote" if self.opened.kind == "remote" else "local"

    def shared_granted(self) -> None:
        """A client may write from now on, so page contents no longer prove where a page came from."""
        self.received[self.pages + received_map.SHARED] = 1

    def look_at_source(self, *, written: bool) -> None:
        """Mark a file that was truncated or written since it is served; workers check the mark before every page. The
        listener's thread calls this, so only its wake-up lies between the change and the mark. ``written``: inotify
        says so, which is certain even where size and times are as before."""
        opened = self.opened
        if opened.stamp is not None and (written or opened.stamp.change(opened.descriptor)):
            self.received[self.pages + received_map.TRUST] = received_map.CHANGED

    def yield_lease(self) -> None:
        """A program wants to write to the file: let it, and check the file's size before every page from now on."""
        descriptor = self.opened.descriptor
        if (
            descriptor < 0
            or self.received[self.pages + received_map.TRUST] != received_map.LEASED
            or not lease_wanted(descriptor)
        ):
            return
        self.received[self.pages + received_map.TRUST] = received_map.WATCHED
        time.sleep(COPY_SECONDS)
        give_up_lease(descriptor)

    def grant(self, first: int) -> tuple[BlockGrant, tuple[int, ...]]:
        """A worker's grant, and its descriptors, which begin at place ``first`` of the worker's list."""
        fds = (self.memory, self.map_fd) + ((self.opened.descriptor,) if self.opened.descriptor >= 0 else ())
        fds += (self.opened.digests.fd,) if self.opened.digests is not None else ()
        opened = self.opened
        return (
            BlockGrant(
                block=self.number,
                name=self.name,
                size=self.size,
                page_size=self.page_size,
                pages=self.pages,
                kind=opened.kind,
                detail=opened.detail,
                source_size=opened.size,
                source_stamp=bytes(opened.stamp or b""),
                memory=first,
                received=first + 1,
                source=first + 2 if opened.descriptor >= 0 else -1,
            ),
            fds,
        )

    def note(self) -> BlockNote:
        """What a later supervisor has to know of it."""
        opened = self.opened
        return BlockNote(
            block=self.number,
            name=self.name,
            source=str(self.source),
            size=self.size,
            page_size=self.page_size,
            kind=opened.kind,
            detail=opened.detail,
            identity=self.identity,
            source_size=opened.size,
            source_stamp=bytes(opened.stamp or b""),
        )

    def _map_pieces(self) -> Iterator[tuple[int, bytes]]:
        """The written parts of the received map; the rest is MISSING, and reading it would allocate memory."""
        for start, end in memory.data_runs(self.map_fd, 0, self.pages):
            for at in range(start, end, MAP_PIECE):
                yield at, os.pread(self.map_fd, min(end - at, MAP_PIECE), at)

    def counts(self) -> tuple[int, int]:
        """(received, lost) pages by the map."""
        received = lost = 0
        for _, piece in self._map_pieces():
            received += piece.count(received_map.RECEIVED)
            lost += piece.count(received_map.LOST)
        return received, lost

    def tally(self, cells: int) -> Generator[None, None, tuple[list[int], list[int]]]:
        """(received, lost) pages of each of at most ``cells`` equal stretches of the block, the last may be shorter. In
        steps, because a large block has many pages to count."""
        stretch = -(-self.pages // cells)
        received, lost = [0] * -(-self.pages // stretch), [0] * -(-self.pages // stretch)
        counted = 0
        for at, piece in self._map_pieces():
            first = at
            while first < at + len(piece):
                cell = first // stretch
                end = min((cell + 1) * stretch, at + len(piece))
                received[cell] += piece.count(received_map.RECEIVED, first - at, end - at)
                lost[cell] += piece.count(received_map.LOST, first - at, end - at)
                counted += end - first
                first = end
                if counted >= TALLY_PAGES:
                    counted = 0
                    yield
        return received, lost

    def promote_interrupted(self) -> None:
        """Pages that are present and still marked PLACING: a worker ended between its COPY and its mark. The kernel
        shows a page only when it is filled, so they are received. Those of a guarded block may be a foreign user's, and
        are replaced when they are touched."""
        if self.page_size == PAGE_2M or self.guarded:
            return
        for at, piece in self._map_pieces():
            for start, stop in received_map.runs_of(piece, received_map.PLACING):
                for page in range(at + start, at + stop):
                    if memory.is_present(self.memory, page * self.page_size):
                        self.received[page] = received_map.RECEIVED

    def _finish_interrupted(self) -> None:
        """Pages that were being placed when the previous supervisor died. Only the supervisor places pages of a remote
        block, so absent ones are missing again there, and the background stream may request them."""
        self.promote_interrupted()
        if self.kind == "remote":
            for at, piece in self._map_pieces():
                for start, stop in received_map.runs_of(piece, received_map.PLACING):
                    self.received[at + start : at + stop] = bytes(stop - start)

    def is_placing(self) -> bool:
        """Is a page marked PLACING: is a worker at work, or has one died at it?"""
        return any(received_map.PLACING in piece for _, piece in self._map_pieces())

    def lost_pages(self) -> list[int]:
        """Pages that are marked lost."""
        return [
            page
            for at, piece in self._map_pieces()
            for start, stop in received_map.runs_of(piece, received_map.LOST)
            for page in range(at + start, at + stop)
        ]

    def present_runs(self) -> Iterator[tuple[int, int]]:
        """Runs of pages that the kernel says are in the block. Not for hugetlb, which claims data everywhere."""
        for start, end in memory.data_runs(self.memory, 0, self.length):
            yield start // self.page_size, -(-end // self.page_size)

    def hole_runs(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of missing pages, from the kernel for 4K pages and from the map for huge ones."""
        if self.page_size == PAGE_2M:
            for page in range(self.pages):
                if self.received[page] != received_map.RECEIVED:
                    yield page * self.page_size, self.page_size
            return
        for start, end in memory.hole_runs(self.memory, 0, self.length):
            yield start, end - start

    def look_complete(self) -> bool:
        """Is every page received, and does the kernel confirm it?"""
        if not self.complete and self.counts()[0] == self.pages:
            self.complete = next(self.hole_runs(), None) is None
        return self.complete

    def audit(self) -> Iterator[None]:
        """Find pages that this service did not place, from the beginning, in short steps."""
        self._audit = None
        while not self.audit_step(SHORT_RUNS):
            yield

    def audit_step(self, runs: int = AUDIT_RUNS) -> bool:
        """A part of an audit, short even for a block of many scattered pages; True: the block is done. Presence is
        asked first and the map read after it: our own workers store PLACING before a page can appear."""
        if self.page_size == PAGE_2M:
            return True
        if self._audit is None:
            self._audit, self._strange = self.present_runs(), []
        for start, stop in islice(self._audit, runs):
            found = received_map.polluted(os.pread(self.map_fd, stop - start, start), [(0, stop - start)])
            self._strange += [(first + start, last + start) for first, last in found]
            runs -= 1
        if runs == 0:
            return False
        self._audit, self.polluted = None, tuple(self._strange)
        return True

    def page_state(self, page: int) -> str:
        """State of a page by the received map."""
        return ("missing", "placing", "received", "lost")[self.received[page]]

    def forget_own_pages(self) -> None:
        """Drop our own page-table entries and poison marks; what is in the block stays."""
        self.mapping.advise(DONTNEED)

    def close(self) -> None:
        self.received.close()
        self.mapping.close()
        for fd in (self.memory, self.map_fd, self.read_only, self.read_write, self.map_read_only):
            os.close(fd)
        if self.opened.descriptor >= 0:
            os.close(self.opened.descriptor)
        if self.opened.digests is not None:
            os.close(self.opened.digests.fd)
