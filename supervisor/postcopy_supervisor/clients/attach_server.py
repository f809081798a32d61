"""Clients: who comes to the door, what they are given, and how everything of them is taken away again.

A client's lies cost that client only. It is identified by the kernel (SO_PEERCRED, SO_PEERPIDFD), its numbers are
checked by the law of the door, its descriptors are looked at before any ioctl, and its userfaultfd is shaken hands
with and registered by us.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from postcopy_kernel import address_space, crashpoints, descriptors, memory, process
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd, is_userfaultfd, stuck_faults
from postcopy_protocol import counters, stages
from postcopy_protocol.attach_conversation import AttachConversation, Refusal
from postcopy_protocol.codec import encode, pack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import (
    Attached,
    BlockOpened,
    ClientNote,
    Goodbye,
    Hello,
    Mapped,
    Message,
    OfferBackEnd,
    OfferUserfaultfd,
    OpenBlock,
    RegionGrant,
    Released,
    Resume,
    Resumed,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)

from ..blocks import RamBlock
from ..listener import Listener
from ..pool.custodian_client import CustodianClient
from ..pool.worker_pool import WorkerPool
from ..recovery.plan import KeptClient

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0
"""A visitor who has not offered a userfaultfd by then is shown out."""
MOST_STRANGERS = 256
"""Or an eighth of our descriptors, if that is more: beyond it a visitor who keeps silent makes room for the next."""
SILENT_SECONDS = 1.0
"""Counted from our last answer to what was heard: an honest crowd waits for us, not we for it."""
DESCRIPTORS_PER_CLIENT = 8
SPARE_DESCRIPTORS = 24
"""For the house's own work: an export, a custodian started anew, questions, libzmq for sources behind tcp."""


@dataclass(slots=True)
class Client:
    """One client: its connection (None once it has ended), its memory's userfaultfd, its regions, its figures."""

    number: int
    connection: socket.socket | None
    uid: int
    pid: int
    pidfd: int
    conversation: AttachConversation
    since: float
    """When it was let in or last understood (monotonic)."""
    userfaultfd: Userfaultfd | None = None
    statistics: int = -1
    words: memoryview | None = None
    figures: memoryview | None = None
    """All that its workers write: the statistics page (``words``), and stages by block where there is room for them."""
    regions: list[RegionGrant] = field(default_factory=list)
    released: list[RegionGrant] = field(default_factory=list)
    opened: dict[int, str] = field(default_factory=dict)
    attaching: list[RegionGrant] = field(default_factory=list)
    unmapping: list[Unmap] = field(default_factory=list)
    leaving: bool = False
    back_end: bool = False
    """A vhost-user back-end: ``pid``, ``pidfd`` and memory are its own, the connection is its front-end's."""
    quarantined: bool = False

    @property
    def name(self) -> str:
        return self.conversation.name

    def see_figures(self) -> memoryview:
        """Map them; the statistics page. A supervisor of before may have made them shorter."""
        length = min(stages.END, os.fstat(self.statistics).st_size)
        self.figures = memoryview(mmap.mmap(self.statistics, length))
        self.words = words = self.figures[: counters.PAGE_BYTES].cast("Q")
        return words

    def stages(self, block: int) -> memoryview | None:
        """Of its faults in a block; None where they are not kept."""
        at = stages.position(block)
        if self.figures is None or at is None or len(self.figures) < stages.END:
            return None
        return self.figures[at : at + stages.BYTES].cast("Q")

    @property
    def touches(self) -> set[int]:
        """Numbers of the blocks that it has, or had, mapped."""
        return {region.block for region in (*self.regions, *self.released)}

    @property
    def key(self) -> str:
        """Its key at the custodian."""
        return f"client/{self.number}"

    def note(self) -> bytes:
        """For a successor of this supervisor."""
        return encode(
            ClientNote(
                client=self.number,
                name=self.name,
                kind=self.conversation.kind,
                uid=self.uid,
                pid=self.pid,
                quarantined=self.quarantined,
                back_end=self.back_end,
                regions=tuple(self.regions),
                released=tuple(self.released),
            )
        )


class AttachServer:
    """All clients, by number and by connection. Only the main thread calls it."""

    def __init__(
        self,
        blocks: dict[str, RamBlock],
        custody: CustodianClient,
        porter: Listener,
        device: int,
        allowed: frozenset[int],
        limit: int,
        event: Callable[[str, str], None],
    ) -> None:
        self.clients: dict[int, Client] = {}
        self.workforce: WorkerPool
        self.left: Callable[[int], None] = lambda number: None
        self.figures_bytes = stages.END
        """More where faults are recorded: a ring for them stands behind the stages."""
        self.figures_made: Callable[[int, int], None] = lambda number, descriptor: None
        self._blocks = blocks
        self._by_number = {block.number: block for block in blocks.values()}
        self._custody = custody
        self._porter = porter
        self._device = device
        self._allowed = allowed
        self.allowed_groups: frozenset[int] = frozenset()
        self._limit = limit
        self._event = event
        self._by_connection: dict[socket.socket, Client] = {}
        self.next_number = 1
        self._estimate = limit  # the first visitor is counted
        self.past = counters.merge(())
        self.past_stages = {number: stages.scratch() for number in self._by_number}
        """Of clients that have left."""

    # --- the door -----------------------------------------------------------------------------------------------------

    def visit(self, connection: socket.socket, at: float) -> None:
        """Somebody had connected ``at`` this time: all that was said before it has been heard."""
        try:
            who = descriptors.peer_credentials(connection)
            if who.uid not in self._allowed and not self._allowed_by_group(connection, who.gid):
                raise Refusal("denied", f"user {who.uid} may not attach here (serve --allow-uid {who.uid} allows it)")
            strangers = [client for client in self.clients.values() if client.userfaultfd is None]
            if len(strangers) >= max(MOST_STRANGERS, self._limit // 8):
                oldest = min(strangers, key=lambda client: client.since)
                if at - oldest.since > SILENT_SECONDS:
                    self.remove(oldest, "said nothing while others came")
            if not self._room():
                raise Refusal("limit", f"no room for another client: {self._limit} descriptors (ulimit -n)")
            pidfd = descriptors.peer_pidfd(connection)
        except (Refusal, OSError) as error:
            refusal = error if isinstance(error, Refusal) else _unknown(error)
            self._send(connection, refusal.message())
            connection.close()
            return
        client = Client(self.next_number, connection, who.uid, who.pid, pidfd, AttachConversation(), time.monotonic())
        self.next_number += 1
        self.clients[client.number] = self._by_connection[connection] = client
        self._porter.watch_process(pidfd)
        self._porter.watch_visitor(connection)

    def _allowed_by_group(self, connection: socket.socket, own: int) -> bool:
        """Groups as they were when it connected; what it does to itself later changes nothing."""
        if not self.allowed_groups:
            return False
        return own in self.allowed_groups or not self.allowed_groups.isdisjoint(descriptors.peer_groups(connection))

    def _room(self) -> bool:
        """Do one more client's descriptors fit? Counting costs, so it is done only where the estimate says no."""
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # prlimit may have moved it
        self._estimate += DESCRIPTORS_PER_CLIENT
        if self._estimate + SPARE_DESCRIPTORS <= self._limit:
            return True
        unfinished = sum(client.number not in self.workforce.fleet.slots for client in self.clients.values()) + 1
        self._estimate = descriptors.count_descriptors() + unfinished * DESCRIPTORS_PER_CLIENT
        return self._estimate + SPARE_DESCRIPTORS <= self._limit

    def said(self, connection: socket.socket, message: Message | BadMessage | None, fds: tuple[int, ...]) -> None:
        """A visitor has spoken; what it sent beside its words is ours to close."""
        client = self._by_connection.get(connection)
        taken = False
        try:
            if client is None or client.leaving:
                return
            if message is None:
                return self._hung_up(client)
            if isinstance(message, BadMessage):
                raise Refusal.of(message)
            client.conversation.on_message(message, len(fds))
            client.since = time.monotonic()
            crashpoints.at("door." + type(message).__name__)
            taken = self._grant(client, message, fds)
        except Refusal as refusal:
            assert client is not None
            log.info("client %d (%s, pid %d) is refused: %s", client.number, client.name, client.pid, refusal)
            self._say(client, refusal.message())
            if refusal.fatal and client.userfaultfd is None:
                self.remove(client, "does not speak our language")
        finally:
            if not taken:
                descriptors.close_all(fds)

    def _grant(self, client: Client, message: Message, fds: tuple[int, ...]) -> bool:
        """Do what a message asks; True: its descriptors are kept."""
        match message:
            case Hello():
                self._say(client, Welcome(client.number), (self._device,) if self._device >= 0 else ())
            case OfferUserfaultfd():
                self._take_userfaultfd(client, fds[0])
                return True
            case OfferBackEnd():
                self._take_back_end(client, *fds)
                return True
            case Resume():
                self._resume(client, message)
            case OpenBlock():
                self._open(client, message)
            case Mapped():
                self._map(client, message)
            case Unmap():
                self._unmap(client, message)
            case Goodbye():
                self.remove(client, "left")
        return False

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
        """The client is the back-end's process from now on: its life, its pid, its memory."""
        try:
            pid = _judge_back_end(client.uid, fd, pidfd)
        except Refusal:
            client.conversation.refuse_userfaultfd()
            raise
        self._porter.forget_process(client.pidfd)
        os.close(client.pidfd)
        client.pid, client.pidfd, client.back_end = pid, pidfd, True
        self._porter.watch_process(pidfd)
        self._accept(client, Userfaultfd(fd))

    def _accept(self, client: Client, userfaultfd: Userfaultfd) -> None:
        client.userfaultfd = userfaultfd
        client.statistics = memory.create_memfd(f"postcopy-c{client.number}", self.figures_bytes)
        client.see_figures()
        self.figures_made(client.number, client.statistics)
        self._keep(client)
        self._say(client, UserfaultfdAccepted())

    def _keep(self, client: Client) -> None:
        """The custodian's note, anew: before any change is answered, and before a worker is forked for it."""
        assert client.userfaultfd is not None
        fds = (client.userfaultfd.fd, client.pidfd, client.statistics)
        self._custody.keep(client.key, client.note(), fds)

    # --- clients of a supervisor before us ----------------------------------------------------------------------------

    def adopt(self, kept: KeptClient) -> None:
        """A client goes on without a connection, until it resumes or its process ends."""
        note, (fd, pidfd, figures) = kept.note, kept.fds
        conversation = AttachConversation()
        conversation.name, conversation.kind = note.name, note.kind
        client = Client(note.client, None, note.uid, note.pid, pidfd, conversation, time.monotonic())
        client.userfaultfd, client.statistics = Userfaultfd(fd), figures
        words = client.see_figures()
        self.figures_made(client.number, figures)
        client.regions, client.released = list(note.regions), list(note.released)
        client.quarantined, client.back_end = note.quarantined, note.back_end
        self.clients[client.number] = client
        self.workforce.used(client.number, words[counters.INCARNATION])
        self._keep(client)
        self._porter.watch_process(pidfd)

    def begin_without_worker(self) -> None:
        """Adopted clients whose workers have ended while nobody was there get one."""
        for client in self.clients.values():
            if client.regions and client.number not in self.workforce.fleet.slots:
                self.workforce.start(client.number, client.quarantined)

    def quarantine(self, number: int, quarantined: bool) -> None:
        """The client is, or is not any more, in quarantine: a successor should know."""
        client = self.clients.get(number)
        if client is not None and client.quarantined != quarantined:
            client.quarantined = quarantined
            self._keep(client)

    def _resume(self, stranger: Client, message: Resume) -> None:
        """The same process comes again: the stranger's connection becomes the client's it was before."""
        client = self.clients.get(message.client)
        if client is None or client is stranger or client.leaving or not _is_same(client, stranger):
            stranger.conversation.refuse_resume()
            raise Refusal("denied", f"client {message.client} is not known here, or not you")
        connection, conversation = stranger.connection, stranger.conversation
        assert connection is not None
        self._disconnect(client)
        client.connection, client.conversation, stranger.connection = connection, conversation, None
        self._by_connection[connection] = client
        for region in (*client.regions, *client.released):
            if (block := self._by_number.get(region.block)) is not None:
                conversation.opened(block.number, region.mode, block.pages, block.page_size)
        conversation.resumed([*client.regions, *client.released])
        self.remove(stranger, f"is client {client.number}, which resumes")
        self._say(client, Resumed(pack_offsets(sorted({region.block for region in client.released}))))

    def _open(self, client: Client, message: OpenBlock) -> None:
        block = self._blocks.get(message.name)
        if block is None:
            raise Refusal("no-such-block", f"no block {message.name} here; there are {', '.join(sorted(self._blocks))}")
        client.conversation.opened(block.number, message.mode, block.pages, block.page_size)
        client.opened[block.number] = message.mode
        shared = message.mode == "shared"
        if shared:
            block.shared_granted()
        answer = BlockOpened(block.number, block.name, block.size, block.page_size, block.pages)
        self._say(client, answer, (block.read_write if shared else block.read_only, block.map_read_only))

    # --- regions ------------------------------------------------------------------------------------------------------

    def _map(self, client: Client, message: Mapped) -> None:
        block = self._by_number[message.block]
        mode = client.conversation.blocks[message.block].mode
        foreign = client.uid != os.geteuid() and not client.back_end  # a back-end registers as it likes
        region = RegionGrant(message.block, mode, message.address, message.length, message.offset, foreign)
        if block.complete:
            client.released.append(region)
            self._keep(client)
            self._say(client, Attached(region.block, region.address))
            return self._say(client, Released(region.block))
        assert client.userfaultfd is not None
        how = RegisterMode.MISSING | RegisterMode.MINOR if foreign else RegisterMode.MISSING
        try:
            if not client.back_end:
                client.userfaultfd.register(region.address, region.length, how)
        except OSError as error:
            client.conversation.withdraw(message.block, message.address)
            raise Refusal("bad-range", _why_not(error, region)) from None
        client.regions.append(region)
        client.attaching.append(region)
        self._keep(client)
        self._reassign(client)

    def _unmap(self, client: Client, message: Unmap) -> None:
        for regions in (client.regions, client.attaching, client.released):
            regions[:] = [region for region in regions if region.address != message.address]
        self._keep(client)
        if client.number not in self.workforce.fleet.slots:
            return self._say(client, Unmapped(message.block, message.address))
        # The old worker must be gone before the client may map something else at this address.
        client.unmapping.append(message)
        self._reassign(client)

    def _reassign(self, client: Client) -> None:
        """The client's regions have changed: a worker for them, or none if there are none."""
        if client.number not in self.workforce.fleet.slots:
            if client.regions:
                self.workforce.start(client.number)
        elif client.regions:
            self.workforce.renew(client.number)
        else:
            self.workforce.leave(client.number)

    def worker_ready(self, number: int) -> None:
        client = self.clients.get(number)
        if client is None:
            return
        self._answer_unmaps(client)
        attaching, client.attaching = client.attaching, []
        for region in attaching:
            self._say(client, Attached(region.block, region.address))

    def worker_gone(self, number: int) -> None:
        client = self.clients.get(number)
        if client is None:
            return
        if client.leaving:
            return self._close(client)
        self._answer_unmaps(client)
        self._reassign(client)  # something may have been attached while the last worker was leaving

    def _answer_unmaps(self, client: Client) -> None:
        unmapping, client.unmapping = client.unmapping, []
        for unmap in unmapping:
            self._say(client, Unmapped(unmap.block, unmap.address))

    def release(self, block: RamBlock) -> None:
        """The end phase of a block that is whole: its clients run at native speed from here on.

        Every page is in the page cache, so no touch can fault, and none can vanish but by a shared client's own will
        (punching a hole is writing zeros, which it may). UNREGISTER wakes whoever still waits.
        """
        for client in list(self.clients.values()):
            mine = [region for region in client.regions if region.block == block.number]
            if not mine or client.leaving or any(region in client.attaching for region in mine):
                continue
            assert client.userfaultfd is not None
            self._heal(client, block, mine)
            for region in mine:
                try:
                    client.userfaultfd.unregister(region.address, region.length)
                except OSError as error:
                    log.debug("client %d: unregister: %s", client.number, error)  # it is ending, or has unmapped it
                client.regions.remove(region)
                client.released.append(region)
            self._keep(client)
            self._say(client, Released(block.number))
            self._reassign(client)

    def _heal(self, client: Client, block: RamBlock, regions: list[RegionGrant]) -> None:
        """Pages for which this client got SIGBUS, because its handler failed or it had none, while another client's
        worker was luckier: they are there now, and CONTINUE takes the poison away. Its worker is about to leave, so
        the notes are ours to strike."""
        assert client.userfaultfd is not None and client.words is not None
        for page in [page for number, page in counters.denied(client.words) if number == block.number]:
            offset = page * block.page_size
            for region in regions:
                if region.offset <= offset < region.offset + region.length:
                    try:
                        client.userfaultfd.continue_(region.address + offset - region.offset, block.page_size)
                    except OSError as error:
                        log.debug("client %d: heal: %s", client.number, error)
            counters.allow(client.words, block.number, page)

    # --- the end of a client ------------------------------------------------------------------------------------------

    def process_ended(self, pidfd: int) -> None:
        """A pidfd was readable. Its client may have left since, and the number be the next client's."""
        for client in list(self.clients.values()):
            if client.pidfd == pidfd and process.pidfd_exited(pidfd):
                return self.remove(client, "its process has ended")

    def _hung_up(self, client: Client) -> None:
        """The connection has ended. The process may be ending too (then its pidfd says so in a moment), or it lives on
        with its memory: it is served as long as it lives."""
        self._disconnect(client)
        if client.userfaultfd is None or not (client.regions or client.attaching):
            self.remove(client, "hung up")

    def tick(self, at: float) -> None:
        """``at``: when the tick was made. What was said before it has been heard, however late it is by now."""
        for client in list(self.clients.values()):
            if client.userfaultfd is None and at - client.since > SILENCE_SECONDS:
                self.remove(client, f"said nothing useful for {SILENCE_SECONDS:.0f} s")
            elif client.connection is None and not client.leaving and client.back_end and _has_let_go(client):
                self.remove(client, "the back-end has let go of its memory")
            elif client.connection is None and not client.leaving and client.regions and _is_void(client):
                self.remove(client, "its memory is gone (exec)")

    def wake_resting(self) -> None:
        """Clients whose quarantine lets missing pages wait have no worker: whoever waits is woken now and then, to find
        the page if somebody else has brought it, or to wait on."""
        for number in self.workforce.resting:
            client = self.clients.get(number)
            if client is None or client.userfaultfd is None:
                continue
            with contextlib.suppress(OSError):  # its memory has just gone; no descriptor is left to look with
                if stuck_faults(client.userfaultfd.fileno())[1]:
                    for region in client.regions:
                        client.userfaultfd.wake(region.address, region.length)

    def remove(self, client: Client, why: str) -> None:
        """Everything of the client goes: worker first, then descriptors."""
        if client.leaving:
            return
        client.leaving = True
        log.info("client %d (%s, pid %d): %s", client.number, client.name or "unnamed", client.pid, why)
        self._disconnect(client)
        if client.number in self.workforce.fleet.slots:
            self.workforce.leave(client.number)
        else:
            self._close(client)

    def _disconnect(self, client: Client) -> None:
        if client.connection is not None:
            self._porter.forget_visitor(client.connection)
            self._by_connection.pop(client.connection, None)
            client.connection.close()
            client.connection = None

    def _close(self, client: Client) -> None:
        self.clients.pop(client.number, None)
        self.left(client.number)
        self._custody.drop(client.key)
        self._porter.forget_process(client.pidfd)
        os.close(client.pidfd)
        if client.words is not None:
            self.past = counters.merge((self.past, client.words.tolist()))
            for block in client.touches:
                staged = client.stages(block)
                if staged is not None:
                    self.past_stages[block] = stages.merged((self.past_stages[block], staged))
            os.close(client.statistics)
        if client.userfaultfd is not None:
            client.userfaultfd.close()

    # --- words --------------------------------------------------------------------------------------------------------

    def _say(self, client: Client, message: Message, fds: tuple[int, ...] = ()) -> None:
        if client.connection is not None and not self._send(client.connection, message, fds):
            self._hung_up(client)

    @staticmethod
    def _send(connection: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> bool:
        try:
            descriptors.send_message(connection, encode(message), fds)
            crashpoints.at("door." + type(message).__name__)
        except OSError:  # gone, or it does not read: a client that does not listen is not waited for
            return False
        return True

    def tell_all(self, message: Message) -> None:
        for client in list(self.clients.values()):
            if client.connection is not None:
                self._send(client.connection, message)

    # --- what a worker is told ----------------------------------------------------------------------------------------

    def with_block(self, block: int) -> list[int]:
        """Clients that have regions of a block."""
        return [
            number for number, client in self.clients.items() if any(region.block == block for region in client.regions)
        ]

    def grants(self, number: int) -> tuple[Client, list[RamBlock]]:
        """A client and the blocks that its regions show."""
        client = self.clients[number]
        numbers = sorted({region.block for region in client.regions})
        return client, [self._by_number[block] for block in numbers]


def _is_same(client: Client, visitor: Client) -> bool:
    """Is the visitor this client's process? A process that lives shares its number with nobody. For a back-end, whose
    pid is its own, any front-end of its front-end's user may speak that has found none speaking."""
    same = (client.pid, client.uid) == (visitor.pid, visitor.uid)
    if client.back_end:
        same = client.uid == visitor.uid and client.connection is None and visitor.conversation.kind == "vhost-user"
    return same and client.userfaultfd is not None and not process.pidfd_exited(client.pidfd)


def _unknown(error: OSError) -> Refusal:
    """We cannot find out who has connected."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Refusal("limit", "no room for another client: no descriptor is left (ulimit -n)")
    return Refusal("failed", f"who are you? {error.strerror}")


def _why_not(error: OSError, region: RegionGrant) -> str:
    where = f"{region.length} bytes at {region.address:#x} cannot be registered: "
    reasons = {
        errno.EBUSY: "another userfaultfd has them",
        errno.EPERM: "the mapping is shared and of a read-only descriptor",
        errno.EINVAL: "they are not all mapped memory of a block",
        errno.ENOMEM: "the process has ended",
    }
    return where + reasons.get(error.errno or 0, error.strerror or "unknown")


def _judge_back_end(uid: int, fd: int, pidfd: int) -> int:
    """The back-end's pid. Raises Refusal: what came is not a userfaultfd past its handshake, and a pidfd of a process
    that the front-end's user may speak for."""
    try:
        pid = address_space.pid_of(pidfd)
        owner = address_space.owner_of(pid)
        if process.pidfd_exited(pidfd):  # then the number may have been another's already
            raise ValueError("the process is gone")
    except (OSError, ValueError) as error:
        raise Refusal("bad-descriptor", f"the second descriptor of OfferBackEnd names no process: {error}") from None
    if uid not in (0, owner):
        raise Refusal("denied", f"process {pid} is user {owner}'s: a front-end of user {uid} may not speak for it")
    if pid == os.getpid():
        raise Refusal("bad-descriptor", "the second descriptor of OfferBackEnd names the supervisor")
    if not is_userfaultfd(fd):
        raise Refusal("bad-descriptor", "the first descriptor of OfferBackEnd is no userfaultfd")
    try:
        Userfaultfd(fd).wake(1 << 16, mmap.PAGESIZE)  # nobody waits there; what had no handshake says EINVAL
    except OSError as error:
        raise Refusal("bad-descriptor", f"the back-end's userfaultfd had no handshake: {error.strerror}") from None
    return pid


def _has_let_go(client: Client) -> bool:
    """Has a back-end without a front-end unmapped, or unregistered, all that it had? What was released need only be
    mapped. One whose address space we may not read is served to its end."""
    if process.pidfd_exited(client.pidfd):
        return True
    waited_for = [(region.address, region.length) for region in client.regions]
    try:
        if any(address_space.maps_memory_at(client.pid, region.address) for region in client.released):
            return False
        return not address_space.any_registered(client.pid, waited_for)
    except PermissionError:
        return False
    except OSError:
        return True


def _is_void(client: Client) -> bool:
    """Is the memory that the userfaultfd belongs to gone (exec, exit)? Asked without touching what stands at its
    addresses: a client that closed a block while no supervisor was there may have other memory at them by now."""
    if process.pidfd_exited(client.pidfd) or client.userfaultfd is None:
        return True
    return not client.back_end and not client.userfaultfd.owner_lives()
