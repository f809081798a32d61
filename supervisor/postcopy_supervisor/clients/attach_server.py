"""The attach server: what clients ask for on the attach socket, checked and done.

The numbers in a message are checked by ``AttachConversation``, descriptors by ``identity``. A client's userfaultfd gets
its handshake and its registrations here."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Protocol

from postcopy_kernel import crashpoints, descriptors, memory
from postcopy_kernel.log_queue import about
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd, is_userfaultfd
from postcopy_protocol import counters, messages
from postcopy_protocol.attach_conversation import AttachConversation, Refusal
from postcopy_protocol.codec import pack_offsets
from postcopy_protocol.copied_map import OWN, size_of
from postcopy_protocol.errors import BadMessage

from ..admission import Peer, may_write
from ..blocks import RamBlock
from ..listener import Listener
from ..pool.worker_pool import WorkerPool
from ..recovery.plan import KeptClient
from ..recovery.watchers import Orphans
from .client import Client, Clients, send
from .identity import check_back_end, may_resume, unidentified
from .losses import Losses
from .release import ClientRelease

log = logging.getLogger(__name__)

MOST_PENDING = 256
"""Connections without a userfaultfd; or an eighth of the descriptor limit, if that is more. Beyond it one that keeps
silent is closed for the next."""
SILENT_SECONDS = 1.0
"""Counted from our last answer: honest clients in a crowd wait for the supervisor, and must not be closed for that."""
DESCRIPTORS_PER_CLIENT = 8
MOST_LISTED = 700  # blocks in the answer to ListBlocks: as many as fit into a packet with names of 64 characters
LEAST_CLIENTS = 16  # of one user, however few descriptors there are
UNREAD_SHARE = 8
"""One user's clients leave at most this share of the descriptor limit unread: answers, with two descriptors each."""
SPARE_DESCRIPTORS = 24
"""Reserved for the supervisor itself: an export, a new custodian, questions, libzmq for sources behind tcp."""


class FiguresReader(Protocol):
    """Reads the figures that workers write: the recorder."""

    def add(self, client: int, figures: int) -> None: ...


class AttachServer:
    """Answers clients. ``device``: /dev/userfaultfd, or -1; ``figures_bytes``: size of a client's figures. Only the
    main thread calls it."""

    def __init__(
        self,
        blocks: Mapping[str, RamBlock],
        clients: Clients,
        pool: WorkerPool,
        watcher: Listener,
        release: ClientRelease,
        losses: Losses,
        device: int,
        figures_bytes: int,
        recorder: FiguresReader | None,
        orphans: Orphans,
    ) -> None:
        self._blocks = blocks
        self._by_number = {block.number: block for block in blocks.values()}
        self._clients, self._pool, self._watcher, self._release = clients, pool, watcher, release
        self._losses = losses
        self._device, self._figures_bytes, self._recorder = device, figures_bytes, recorder
        self._orphans = orphans
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def on_connect(self, connection: socket.socket, peer: Peer, at: float) -> None:
        """A peer had connected ``at`` this time. Messages sent before that have been handled."""
        try:
            self._close_a_silent_one(at)
            self._check_room(peer.uid)
            pidfd = descriptors.peer_pidfd(connection, at)
        except (Refusal, OSError) as error:
            refusal = error if isinstance(error, Refusal) else unidentified(error)
            self._watcher.count_refusal(peer.uid, refusal)
            send(connection, refusal.message())
            return self._watcher.close_connection(connection, peer.uid)
        number, now = self._clients.take_number(), time.monotonic()
        client = Client(number, connection, peer.uid, peer.pid, pidfd, AttachConversation(), now, peer.writable)
        self._clients.add(client)
        self._watcher.watch_process(pidfd)
        self._watcher.watch_connection(connection, peer.uid)

    def _close_a_silent_one(self, at: float) -> None:
        pending = self._clients.pending
        if len(pending) >= max(MOST_PENDING, self._limit // 8):
            oldest = next(iter(pending.values()))
            if at - oldest.since > SILENT_SECONDS:
                self._release.remove(oldest, "silent while others connect")

    def _check_room(self, uid: int) -> None:
        """Do one more client's descriptors fit, and does its user leave room for others? Raises Refusal."""
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # prlimit may have changed it
        unfinished = len(self._clients.by_number) - len(self._pool.slots) + 1  # they will take more than they have
        used = descriptors.count_descriptors() + max(1, unfinished + 1) * DESCRIPTORS_PER_CLIENT
        if used + SPARE_DESCRIPTORS > self._limit:
            raise Refusal("limit", f"no room for another client: {self._limit} descriptors (ulimit -n)")
        most = max(LEAST_CLIENTS, self._limit // (2 * DESCRIPTORS_PER_CLIENT))
        if uid != os.geteuid() and self._clients.by_user[uid] + self._watcher.closer.held(uid) >= most:
            text = f"user {uid} has {most} clients and connections, which is half of what fits"
            raise Refusal("limit", f"{text} into {self._limit} descriptors (ulimit -n)")

    def on_message(
        self, connection: socket.socket, uid: int, message: messages.Message | BadMessage | None, fds: tuple[int, ...]
    ) -> None:
        """Handle a message, or the end (None) of a connection. Descriptors that are not kept are closed."""
        client = self._clients.by_connection.get(connection)
        kept = False
        try:
            if client is None or client.leaving:
                return
            if message is None:
                return self._release.on_hang_up(client)
            if isinstance(message, BadMessage):
                raise Refusal.of(message)
            client.conversation.on_message(message, len(fds))
            self._clients.heard(client, time.monotonic())
            crashpoints.at("door." + type(message).__name__)
            kept = self._dispatch(client, message, fds)
        except Refusal as refusal:
            assert client is not None
            what, peer = "client %d (%s, pid %d) is refused: %s", about("refused", f"process {client.pid}")
            log.info(what, client.number, client.name, client.pid, refusal, extra=peer)
            self._watcher.count_refusal(client.uid, refusal)
            self._send(client, refusal.message())
            if refusal.fatal and client.userfaultfd is None:
                self._release.remove(client, "does not follow the protocol")
        finally:
            if not kept:
                self._watcher.closer.close(uid, *fds)

    def _dispatch(self, client: Client, message: messages.Message, fds: tuple[int, ...]) -> bool:
        """Do what a message asks for; True: its descriptors are kept."""
        match message:
            case messages.Hello():
                self._send(client, messages.Welcome(client.number), (self._device,) if self._device >= 0 else ())
            case messages.OfferUserfaultfd():
                self._take_userfaultfd(client, fds[0])
                return True
            case messages.OfferBackEnd():
                self._take_back_end(client, *fds)
                return True
            case messages.Resume():
                self._resume(client, message)
            case messages.OpenBlock():
                self._open(client, message)
            case messages.Mapped():
                self._map(client, message)
            case messages.Unmap():
                self._unmap(client, message)
            case messages.ListBlocks():
                self._send(client, messages.Blocks(tuple(self._listed(client))))
            case messages.AskLoss():
                self._send(client, self._losses.answer(client, message))
            case messages.AskOrphanPolicy():
                with self._orphans.policy() as (policy, lifeline):
                    self._send(client, policy, lifeline)
            case messages.Goodbye():
                self._release.remove(client, "left")
        return False

    def _send(self, client: Client, message: messages.Message, fds: tuple[int, ...] = ()) -> None:
        if fds and client.connection is not None:
            self._check_unread(client, client.connection)
            self._clients.count_unread(client, 1)
        self._release.send(client, message, fds)

    def _check_unread(self, client: Client, connection: socket.socket) -> None:
        """The kernel lets our user have no more descriptors in messages that are not read than it may have open. A
        client that reads nothing must not use them up. Raises Refusal."""
        if not descriptors.unread_bytes(connection):
            self._clients.count_unread(client, -client.unread)
        elif client.uid != os.geteuid() and self._clients.unread[client.uid] >= self._limit // UNREAD_SHARE:
            raise Refusal("limit", f"user {client.uid} does not read its answers, in which there are descriptors")

    def _take_userfaultfd(self, client: Client, fd: int) -> None:
        if not is_userfaultfd(fd):
            client.conversation.refuse_userfaultfd()
            raise Refusal("bad-descriptor", "the descriptor that came with OfferUserfaultfd is no userfaultfd")
        userfaultfd = Userfaultfd(fd)
        try:
            userfaultfd.handshake()
        except OSError as error:
            client.conversation.refuse_userfaultfd()
            raise Refusal(
                "bad-descriptor", f"userfaultfd handshake: {error.strerror}; send it before UFFDIO_API"
            ) from None
        self._accept(client, userfaultfd)

    def _take_back_end(self, client: Client, fd: int, pidfd: int) -> None:
        """The client is the back-end's process from now on: its lifetime, its pid, its memory."""
        try:
            pid = check_back_end(client.uid, fd, pidfd)
        except Refusal:
            client.conversation.refuse_userfaultfd()
            raise
        self._watcher.forget_process(client.pidfd)
        del self._clients.by_pidfd[client.pidfd]
        client.pid, client.pidfd, client.front_end, client.back_end = pid, pidfd, client.pidfd, True
        self._clients.by_pidfd[pidfd] = client
        self._watcher.watch_process(pidfd)
        self._accept(client, Userfaultfd(fd))

    def _accept(self, client: Client, userfaultfd: Userfaultfd) -> None:
        client.userfaultfd = userfaultfd
        client.figures_fd = memory.create_memfd(f"postcopy-c{client.number}", self._figures_bytes)
        self._map_figures(client)
        self._clients.keep(client)
        self._send(client, messages.UserfaultfdAccepted())

    def _map_figures(self, client: Client) -> memoryview:
        page = client.map_figures()
        if self._recorder is not None:
            self._recorder.add(client.number, client.figures_fd)
        return page

    def adopt(self, kept: KeptClient) -> None:
        """Continue a client without a connection, until it resumes or its process ends."""
        note, (fd, pidfd, figures, *more) = kept.note, kept.fds
        conversation = AttachConversation()
        conversation.name, conversation.kind = note.name, note.kind
        client = Client(note.client, None, note.uid, note.pid, pidfd, conversation, time.monotonic())
        client.userfaultfd, client.figures_fd = Userfaultfd(fd), figures
        page = self._map_figures(client)
        client.regions, client.released = list(note.regions), list(note.released)
        client.quarantined, client.back_end = note.quarantined, note.back_end
        client.failures_reported = page[counters.FAILURES]
        client.front_end, client.copied_map = [*more, -1, -1][:2]
        self._clients.add(client)
        self._pool.skip_incarnations(client.number, page[counters.INCARNATION])
        self._clients.keep(client)
        self._watcher.watch_process(pidfd)
        for region in self._newly_guarded(client):
            with contextlib.suppress(OSError):  # its memory is gone, and soon it is too
                client.userfaultfd.register(region.address, region.length, self._by_number[region.block].register_mode)

    def _newly_guarded(self, client: Client) -> list[messages.RegionGrant]:
        return [
            region for region in client.regions if region.mode not in OWN and self._by_number[region.block].guard_raised
        ]

    def start_workers(self) -> None:
        """Start workers for adopted clients whose workers ended while there was no supervisor, and replace those that
        place pages as if there were no foreign users."""
        for client in self._clients.by_number.values():
            if client.regions and client.number not in self._pool.slots:
                self._pool.start(client.number, client.quarantined)
            elif self._newly_guarded(client):
                self._reassign(client)

    def _resume(self, peer: Client, message: messages.Resume) -> None:
        """The same process has connected again: its connection becomes that of the client it was before."""
        client = self._clients.by_number.get(message.client)
        if client is None or client is peer or client.leaving or not may_resume(client, peer):
            peer.conversation.refuse_resume()
            raise Refusal("denied", f"client {message.client} is not known here, or is another process")
        connection, conversation = peer.connection, peer.conversation
        assert connection is not None
        self._release.disconnect(client)
        client.connection, client.conversation, peer.connection = connection, conversation, None
        self._clients.count_unread(client, -client.unread)
        client.unread, peer.unread = peer.unread, 0
        client.writable = peer.writable
        self._clients.by_connection[connection] = client
        for region in client.all_regions:
            if (block := self._by_number.get(region.block)) is not None:
                conversation.opened(block.number, region.mode, block.pages, block.page_size)
        conversation.resumed(client.all_regions)
        self._release.remove(peer, f"is client {client.number}, which resumes")
        self._send(client, messages.Resumed(pack_offsets(sorted({region.block for region in client.released}))))

    def _open(self, client: Client, message: messages.OpenBlock) -> None:
        block = self._blocks.get(message.name)
        if block is None:
            raise Refusal("no-such-block", f"no block {message.name} here; there are {', '.join(sorted(self._blocks))}")
        shared = message.mode == "shared"
        if shared:
            if not may_write(client.writable, block.name):
                text = f"user {client.uid} may attach block {block.name} only private"
                raise Refusal("denied", f"{text} (serve --shared-uid {client.uid} allows shared)")
            block.shared_granted()
        if message.mode in OWN and client.copied_map < 0:
            client.copied_map = memory.create_memfd(f"postcopy-m{client.number}", size_of(block.pages))
        if client.connection is not None:
            self._check_unread(client, client.connection)  # what is refused is not opened
        client.conversation.opened(block.number, message.mode, block.pages, block.page_size)
        answer = messages.BlockOpened(block.number, block.name, block.size, block.page_size, block.pages)
        fds = block.read_write if shared else block.read_only, block.map_read_only
        if message.mode not in OWN:
            return self._send(client, answer, fds)
        copied = memory.reopen(client.copied_map, writable=False)
        try:
            self._send(client, answer, (*fds, copied))
        finally:
            os.close(copied)

    def _listed(self, client: Client) -> Iterator[messages.Listed]:
        for block in islice(self._blocks.values(), MOST_LISTED):
            shared = may_write(client.writable, block.name)
            yield messages.Listed(block.name, block.size, block.page_size, shared)

    def _map(self, client: Client, message: messages.Mapped) -> None:
        block = self._by_number[message.block]
        mode = client.conversation.blocks[message.block].mode
        region = messages.RegionGrant(message.block, mode, message.address, message.length, message.offset)
        if region in client.regions:  # said again after a take-over
            if region not in client.attaching:
                self._send(client, messages.Attached(region.block, region.address))
            return
        if block.complete and mode not in OWN:
            client.released.append(region)
            self._clients.keep(client)
            self._send(client, messages.Attached(region.block, region.address))
            return self._send(client, messages.Released(region.block))
        assert client.userfaultfd is not None
        try:
            # A back-end registers its memory itself, MISSING only: that does not take MINOR away (Linux 6.18).
            if mode in OWN:  # its registration again: the kernel then checks what the range is
                client.userfaultfd.register(region.address, region.length, RegisterMode.MISSING)
            elif not client.back_end or block.guarded:
                client.userfaultfd.register(region.address, region.length, block.register_mode)
        except OSError as error:
            client.conversation.withdraw(message.block, message.address)
            raise Refusal("bad-range", _register_error(error, region)) from None
        client.regions.append(region)
        client.attaching.append(region)
        self._clients.keep(client)
        self._reassign(client)

    def _unmap(self, client: Client, message: messages.Unmap) -> None:
        for regions in (client.regions, client.attaching, client.released):
            regions[:] = [region for region in regions if region.address != message.address]
        self._clients.keep(client)
        if client.number not in self._pool.slots:
            return self._send(client, messages.Unmapped(message.block, message.address))
        # The old worker must be gone before the client may map something else at this address.
        client.unmapping.append(message)
        self._reassign(client)

    def _reassign(self, client: Client) -> None:
        self._pool.reassign(client.number, bool(client.regions))

    def on_worker_ready(self, number: int) -> None:
        client = self._clients.by_number.get(number)
        if client is None:
            return
        self._answer_unmaps(client)
        attaching, client.attaching = client.attaching, []
        for region in attaching:
            self._send(client, messages.Attached(region.block, region.address))

    def on_worker_gone(self, number: int) -> None:
        client = self._clients.by_number.get(number)
        if client is None:
            return
        if client.leaving:
            return self._release.close(client)
        self._answer_unmaps(client)
        self._reassign(client)  # a region may have been attached while the last worker was leaving

    def _answer_unmaps(self, client: Client) -> None:
        unmapping, client.unmapping = client.unmapping, []
        for unmap in unmapping:
            self._send(client, messages.Unmapped(unmap.block, unmap.address))


def _register_error(error: OSError, region: messages.RegionGrant) -> str:
    where = f"{region.length} bytes at {region.address:#x} cannot be registered: "
    reasons = {
        errno.EBUSY: "another userfaultfd has them",
        errno.EPERM: "the mapping is shared and of a read-only descriptor",
        errno.EINVAL: "they are not all mapped memory of a block",
        errno.ENOMEM: "the process has ended",
    }
    return where + reasons.get(error.errno or 0, error.strerror or "unknown")
