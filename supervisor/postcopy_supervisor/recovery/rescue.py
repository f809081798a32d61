"""Rescue: blocks and clients whose supervisor, custodian and workers have all died are found again in the clients.

A living client holds its userfaultfd, and maps each of its blocks and their received maps. The ``records`` say which
process it is, where its regions are, and which files (device, inode) are the block's. A supervisor with the right to
look into its clients fetches them, and gets the same inventory that a custodian would have handed over. What follows is
an ordinary take-over: new workers wake every range.

What a client says is not believed. Its process is identified by pid and start time, files by device, inode and owner,
and a userfaultfd by what the kernel lets it do: it can register the client's regions, which another one cannot. A
received map that no client maps any more is made again from the pages that are present; see ``made_again``."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from postcopy_kernel import descriptors, memory, other_process, process
from postcopy_kernel.address_space import MappedRange, covered, mapped_ranges, owner_of
from postcopy_kernel.filecopy import settle, watched_stamp
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.filewatch import lease
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd, is_userfaultfd
from postcopy_protocol import received_map
from postcopy_protocol.codec import encode
from postcopy_protocol.copied_map import OWN, size_of
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M, page_count
from postcopy_protocol.messages import BlockNote, ClientNote, RegionGrant
from postcopy_protocol.sources import FileSource, QemuRamSource, Source

from .plan import QEMU_RAM, has_digests, is_copy
from .records import Left, LeftBlock

log = logging.getLogger("postcopy")

Kept = dict[str, tuple[bytes, tuple[int, ...]]]
File = tuple[int, int]
END_SECONDS = 5.0
RIGHTS = "a rescue needs root, or CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE"
NOTHING = "nothing is changed, they wait on"


@dataclass(slots=True)
class Found:
    """A living client of a dead service: its note, a pidfd, what it maps, and a pidfd of a back-end's front-end."""

    key: str
    note: ClientNote
    pidfd: int
    maps: list[MappedRange] = field(default_factory=list)
    front_end: tuple[int, ...] = ()


def living(left: Left, known: Collection[str]) -> list[Found]:
    """The clients of these records that live, without the ``known`` keys. The caller closes the pidfds."""
    found = []
    for key, client in left.clients.items():
        if key in known:
            continue
        if not client.record.started:  # it may live in a pid namespace that we do not see
            log.warning("client %d cannot be found again: its process has no pid here", client.note.client)
            continue
        with suppress(ProcessLookupError):
            found.append(Found(key, client.note, other_process.open_process(client.note.pid, client.record.started)))
    return found


def fetch(
    left: Left, clients: list[Found], kept: Kept, sources: Mapping[str, Source], figures_bytes: int, foreign: bool
) -> Kept:
    """What a custodian would have kept of ``clients`` and their blocks, beside what is ``kept`` already. ``foreign``:
    untrusted users may attach. Raises BadInput, and then holds nothing."""
    with ExitStack() as undo:
        rescue = _Rescue(left, sources, foreign, undo)
        for client in clients:
            rescue.look_at(client)
        for key in sorted(rescue.wanted_blocks() - kept.keys()):
            rescue.block(key)
        for client in clients:
            rescue.client(client, kept, figures_bytes)
        undo.pop_all()
        return rescue.kept


class _Rescue:
    """One attempt. ``undo`` closes what it has opened."""

    def __init__(self, left: Left, sources: Mapping[str, Source], foreign: bool, undo: ExitStack) -> None:
        self.kept: Kept = {}
        self._left, self._sources, self._foreign, self._undo = left, sources, foreign, undo
        self._clients: list[Found] = []
        self._places: list[tuple[ClientNote, int, list[MappedRange]]] = []
        """What can be looked for files: the client, a process (its own or its front-end's), what that maps."""

    def look_at(self, client: Found) -> None:
        """Read what a client maps, and forget the regions that it has unmapped since."""
        try:
            client.maps = mapped_ranges(client.note.pid)
            owner = owner_of(client.note.pid)
        except PermissionError:
            raise _not_permitted(client.note, "its memory cannot be looked at") from None
        except OSError:
            return  # it has just ended
        if owner not in (client.note.uid, 0):
            return log.warning(
                "client %d (pid %d) is user %d's now: it is left", client.note.client, client.note.pid, owner
            )
        regions = tuple(region for region in client.note.regions if self._is_mapped(client, region))
        released = tuple(region for region in client.note.released if self._is_mapped(client, region))
        client.note = replace(client.note, regions=regions, released=released)
        if regions or released:
            self._clients.append(client)
            self._places.append((client.note, client.note.pid, client.maps))
            self._look_at_front_end(client)
        else:
            log.warning(
                "client %d (pid %d) is not rescued: it maps no block that is known", client.note.client, client.note.pid
            )

    def _look_at_front_end(self, client: Found) -> None:
        """The front-end of a back-end maps the received map, which the back-end does not."""
        for pidfd in self._front_end(client):
            pid = self._left.clients[client.key].record.front_end
            with suppress(OSError):
                self._places.append((client.note, pid, mapped_ranges(pid)))
            client.front_end = (pidfd,)

    def _is_mapped(self, client: Found, region: RegionGrant) -> bool:
        block = self._left.blocks.get(f"block/{region.block}")
        if block is None:
            return False
        file = block.record.memory_device, block.record.memory_inode
        runs = [
            (at.start, at.end)
            for at in client.maps
            if region.mode in OWN or (at.file == file and at.start - at.offset == region.address - region.offset)
        ]
        return covered(runs, region.address, region.address + region.length)

    def wanted_blocks(self) -> set[str]:
        """Keys of the blocks that living clients map."""
        notes = (client.note for client in self._clients)
        return {f"block/{region.block}" for note in notes for region in (*note.regions, *note.released)}

    def block(self, key: str) -> None:
        """Open memory, received map and source of a block."""
        left = self._left.blocks[key]
        record, note = left.record, left.note
        pages = page_count(note.size, note.page_size)
        memory_fd = self._open((record.memory_device, record.memory_inode))
        if memory_fd < 0 and self._is_copied(note.block):
            memory_fd, map_fd = self._empty(note, pages)
            note, file = self._file(left, note, map_fd, pages)
            self.kept[key] = encode(note), (memory_fd, map_fd, *file)
            return
        if memory_fd < 0:
            raise BadInput(f"cannot rescue block {note.name}: no client maps its memory any more; {NOTHING}")
        if os.fstat(memory_fd).st_size != pages * note.page_size:
            raise BadInput(f"cannot rescue block {note.name}: its memory has another size; {NOTHING}")
        map_fd = self._open((record.map_device, record.map_inode))
        if map_fd < 0:
            map_fd = self._map_again(note, memory_fd, pages)
        note, file = self._file(left, note, map_fd, pages)
        self.kept[key] = encode(note), (memory_fd, map_fd, *file)

    def _is_copied(self, number: int) -> bool:
        """Do all clients of this block have memory of their own? Then a new one does as well."""
        regions = [region for client in self._clients for region in (*client.note.regions, *client.note.released)]
        return all(region.mode in OWN for region in regions if region.block == number)

    def _empty(self, note: BlockNote, pages: int) -> tuple[int, int]:
        """Memory and received map of a block without pages."""
        memory_fd = memory.create_memfd(f"postcopy-{note.name}", pages * note.page_size, note.page_size)
        return self._hold(memory_fd), self._new_map(note, pages)

    def _new_map(self, note: BlockNote, pages: int) -> int:
        size = -(-(pages + received_map.FLAGS) // 4096) * 4096
        return self._hold(memory.create_memfd(f"postcopy-{note.name}-map", size))

    def _hold(self, fd: int) -> int:
        self._undo.callback(os.close, fd)
        return fd

    def _open(self, file: File) -> int:
        """Open a file of ours that some client maps; -1: none does."""
        for note, pid, maps in self._places:
            for mapped in maps:
                if mapped.file != file:
                    continue
                try:
                    return self._hold(other_process.open_mapped(pid, mapped, file))
                except PermissionError:
                    raise _not_permitted(note, "its mapped files cannot be opened") from None
                except OSError as error:  # it ends, or maps something else by now
                    log.debug("client %d: %s", note.client, error)
        return -1

    def _map_again(self, note: BlockNote, memory_fd: int, pages: int) -> int:
        records = [client.note for client in self._left.clients.values()]
        users = [
            client for client in records if any(at.block == note.block for at in (*client.regions, *client.released))
        ]
        shared = any(at.mode == "shared" for client in users for at in (*client.regions, *client.released))
        foreign = self._foreign or any(client.uid != os.geteuid() for client in users)
        if note.page_size == PAGE_2M or (shared and foreign):
            lacks = "the presence of huge pages is not known" if note.page_size == PAGE_2M else "no page is proved ours"
            raise BadInput(
                f"cannot rescue block {note.name}: no client maps its received map any more, without which {lacks}; "
                f"{NOTHING}"
            )
        runs = [
            (first // note.page_size, last // note.page_size)
            for first, last in memory.data_runs(memory_fd, 0, pages * note.page_size)
        ]
        fd = self._new_map(note, pages)
        for at, states in made_again(runs, pages, shared=shared):
            os.pwrite(fd, states, at)
        log.warning(
            "block %s: its received map is lost; %s",
            note.name,
            "what is present is believed" if shared else "every page that is touched is placed again",
        )
        return fd

    def _file(self, left: LeftBlock, note: BlockNote, map_fd: int, pages: int) -> tuple[BlockNote, tuple[int, ...]]:
        """The note, and the descriptors of the file behind a local block. A file that was changed is noticed by
        ``plan.judge``, as at any take-over."""
        source = self._sources.get(note.name)
        if note.kind not in ("file", QEMU_RAM):
            return note, ()
        if not isinstance(source, FileSource | QemuRamSource):
            raise BadInput(f"cannot rescue block {note.name}: serve it from {note.source} again; {NOTHING}")
        try:
            fd = self._hold(os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise BadInput(
                f"cannot rescue block {note.name}: {source.path} cannot be opened: {error.strerror}; {NOTHING}"
            ) from None
        if is_copy(note):
            return self._copy_again(left, note, source.path, fd, map_fd, pages)
        facts = os.fstat(fd)
        if (facts.st_dev, facts.st_ino) != (left.record.file_device, left.record.file_inode):
            text = f"it was made from another file than the present {source.path}"
            raise BadInput(f"cannot rescue block {note.name}: {text}; {NOTHING}")
        leased = lease(fd)
        if not leased:
            watched_stamp(fd)  # for its effect: later stores through a mapping are seen
            _distrust(map_fd, pages)
        if change := Stamp.from_bytes(note.source_stamp).change(fd):
            raise BadInput(f"cannot rescue block {note.name} from {source.path}: {change}; {NOTHING}")
        if not has_digests(note):
            return note, (fd,)
        if not left.digests:
            raise BadInput(
                f"cannot rescue block {note.name}: the digests of {source.path} are lost with the service; {NOTHING}"
            )
        return note, (fd, self._hold(os.open(left.digests, os.O_RDONLY | os.O_CLOEXEC)))

    def _copy_again(
        self, left: LeftBlock, note: BlockNote, path: str, fd: int, map_fd: int, pages: int
    ) -> tuple[BlockNote, tuple[int, ...]]:
        """The copy had no name and is gone. It is made again if its original is what it was."""
        change = Stamp.from_bytes(left.record.original).change(fd) if left.record.original else "its stamp is not known"
        if change:
            raise BadInput(
                f"cannot rescue block {note.name}: its copy of {path} died with the service, and {change}; {NOTHING}"
            )
        try:
            served = settle(os.dup(fd), path, copy=True)
        except OSError as error:
            raise BadInput(
                f"cannot rescue block {note.name}: cannot copy {path}: {error.strerror}; {NOTHING}"
            ) from None
        if not served.leased:
            _distrust(map_fd, pages)
        return replace(note, source_stamp=bytes(served.stamp)), (self._hold(served.fd),)

    def client(self, client: Found, kept: Kept, figures_bytes: int) -> None:
        """Fetch a client's userfaultfd, and make figures for its next worker."""
        if client not in self._clients:
            return
        note = client.note
        try:
            fds = self._userfaultfd(client, {**kept, **self.kept})
        except PermissionError:
            raise _not_permitted(note, "its userfaultfd cannot be fetched") from None
        except OSError as error:
            return log.warning("client %d (pid %d) is not rescued: %s", note.client, note.pid, error)
        if fds < 0:
            return log.warning(
                "client %d (pid %d) is not rescued: it holds no userfaultfd of its regions any more",
                note.client,
                note.pid,
            )
        more = client.front_end
        if any(region.mode in OWN for region in note.regions):
            copied = self._copied_map(client, kept)
            if copied < 0:
                text = (
                    "client %d (pid %d) is not rescued: which pages it has given back is lost with its worker and face"
                )
                return log.warning(text, note.client, note.pid)
            more = *(client.front_end or (self._hold(os.dup(client.pidfd)),)), copied
        figures = self._of_worker(note.client, f"postcopy-c{note.client}", figures_bytes)
        if figures < 0:
            figures = self._hold(memory.create_memfd(f"postcopy-c{note.client}", figures_bytes))
        self.kept[client.key] = encode(note), (fds, self._hold(os.dup(client.pidfd)), figures, *more)

    def _of_worker(self, number: int, name: str, size: int) -> int:
        """A memfd that only the client's worker holds, if that has survived; -1: it is lost."""
        pid, started = self._left.workers.get(number, (0, 0))
        with ExitStack() as close, suppress(OSError):
            pidfd = other_process.open_process(pid, started)
            close.callback(os.close, pidfd)
            for there in other_process.memfds(pid, name):
                fd = other_process.fetch_descriptor(pidfd, there)
                if os.fstat(fd).st_size == size:
                    return self._hold(fd)
                os.close(fd)
        return -1

    def _copied_map(self, client: Found, kept: Kept) -> int:
        """What has become of each page in a client's own memory: its worker has that, and the program that speaks for
        it; -1: both have died."""
        number, record = client.note.client, self._left.clients[client.key].record
        memory_fd = {**kept, **self.kept}[f"block/{client.note.regions[0].block}"][1][0]
        size = size_of(os.fstat(memory_fd).st_size // self._page_size(client.note.regions[0].block))
        found = self._of_worker(number, f"postcopy-m{number}", size)
        for pidfd in client.front_end if found < 0 else ():
            with suppress(OSError):  # it has just ended
                for there in other_process.memfds(record.front_end, f"postcopy-m{number}"):
                    with suppress(OSError), ExitStack() as close:
                        fd = other_process.fetch_descriptor(pidfd, there)
                        close.callback(os.close, fd)
                        facts = os.fstat(fd)
                        if (facts.st_ino, facts.st_uid, facts.st_size) == (record.copied_inode, os.geteuid(), size):
                            return self._hold(memory.reopen(fd, writable=True))
        return found

    def _front_end(self, client: Found) -> tuple[int, ...]:
        """A pidfd of the front-end of a back-end, while it lives: it may resume."""
        record = self._left.clients[client.key].record
        with suppress(ProcessLookupError):
            return (self._hold(other_process.open_process(record.front_end, record.front_end_started)),)
        return ()

    def _userfaultfd(self, client: Found, kept: Kept) -> int:
        """A duplicate of the userfaultfd that has registered the client's regions; -1: it has none."""
        numbers = other_process.userfaultfds(client.note.pid)
        for number in numbers:
            fd = other_process.fetch_descriptor(client.pidfd, number)
            if is_userfaultfd(fd) and self._governs(Userfaultfd(fd), client.note, kept, alone=len(numbers) == 1):
                return self._hold(fd)
            os.close(fd)
        return -1

    def _governs(self, userfaultfd: Userfaultfd, note: ClientNote, kept: Kept, *, alone: bool) -> bool:
        """Can it register the regions? Another userfaultfd gets EBUSY, one of other memory EINVAL. A client whose
        blocks are all complete has registered none, and is believed if it has no other."""
        if not note.regions:
            return alone and userfaultfd.owner_lives()
        for region in note.regions:
            map_fd, guarded = kept[f"block/{region.block}"][1][1], received_map.GUARDED
            pages = os.fstat(kept[f"block/{region.block}"][1][0]).st_size // self._page_size(region.block)
            announced = region.mode not in OWN and os.pread(map_fd, 1, pages + guarded) == b"\x01"
            minor = RegisterMode.MINOR if announced else RegisterMode(0)
            try:
                userfaultfd.register(region.address, region.length, RegisterMode.MISSING | minor)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EINVAL, errno.ENOMEM, errno.EPERM):
                    raise
                return False
        return True

    def _page_size(self, block: int) -> int:
        return self._left.blocks[f"block/{block}"].note.page_size


def _not_permitted(note: ClientNote, what: str) -> BadInput:
    return BadInput(
        f"cannot rescue client {note.client} (pid {note.pid}): {what} (no permission); {RIGHTS}; "
        f"{NOTHING}: start serve --recover with these rights, or leave the clients with --abandon"
    )


def _distrust(map_fd: int, pages: int) -> None:
    """No lease is held any more: workers check the file before every page."""
    if os.pread(map_fd, 1, pages + received_map.TRUST) == bytes((received_map.LEASED,)):
        os.pwrite(map_fd, bytes((received_map.WATCHED,)), pages + received_map.TRUST)


def made_again(present: list[received_map.Run], pages: int, *, shared: bool) -> Iterator[tuple[int, bytes]]:
    """A received map that is lost, as pieces (offset, bytes) to be written over zeros. Pure.

    Where no client may write, nothing is believed: the block becomes guarded, so each page that is present is replaced
    by the same bytes before a client gets it. Where clients may write, what is present may be theirs, so it is
    received; pages that pollution had made before are not recognised any more."""
    if shared:
        for first, last in present:
            yield first, bytes((received_map.RECEIVED,)) * (last - first)
    flags = bytearray(received_map.FLAGS)
    flags[received_map.SHARED] = shared
    flags[received_map.GUARDED] = not shared
    flags[received_map.TRUST] = received_map.WATCHED
    yield pages, bytes(flags)


def end_survivors(left: Left, wanted: Collection[int]) -> None:
    """Kill workers of the dead service that still run, except these pids: of two workers that read one userfaultfd each
    would get a part of the messages."""
    pidfds = []
    for pid, started in left.workers.values():
        if pid in wanted:
            continue
        with suppress(OSError):
            pidfds.append(other_process.open_process(pid, started))
            process.pidfd_signal(pidfds[-1], signal.SIGKILL)
            log.info("worker process %d of the dead service is ended", pid)
    for pidfd in pidfds:
        process.pidfd_exited(pidfd, END_SECONDS)
    descriptors.close_all(pidfds)
