"""The record of one client, and the table of all clients."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from postcopy_kernel import crashpoints, descriptors
from postcopy_kernel.userfaultfd import Userfaultfd
from postcopy_protocol import counters, stages
from postcopy_protocol.attach_conversation import AttachConversation
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import ClientNote, Message, RegionGrant, Unmap

from ..pool.custodian_client import CustodianClient


@dataclass(slots=True)
class Client:
    """One client: its connection (None once it has ended), its userfaultfd, its regions, its figures."""

    number: int
    connection: socket.socket | None
    uid: int
    pid: int
    pidfd: int
    conversation: AttachConversation
    since: float  # when it connected, or when its last message was handled (monotonic)
    writable: frozenset[str] = frozenset()  # see ``admission.Peer``
    userfaultfd: Userfaultfd | None = None
    figures_fd: int = -1
    figures: memoryview | None = None
    """All that its workers write: the counters, and the latencies of stages by block where there is room for them."""
    counters: memoryview | None = None
    regions: list[RegionGrant] = field(default_factory=list)
    released: list[RegionGrant] = field(default_factory=list)
    """Regions of complete blocks: no worker serves them any more."""
    attaching: list[RegionGrant] = field(default_factory=list)
    """Regions whose ``Mapped`` is answered when a worker serves them."""
    unmapping: list[Unmap] = field(default_factory=list)  # answered when the worker that served the region has ended
    leaving: bool = False
    back_end: bool = False
    """A vhost-user back-end or a VM: ``pid``, ``pidfd`` and memory are its own, the connection is its front-end's."""
    front_end: int = -1  # a pidfd of that
    copied_map: int = -1
    """Where its memory is its own: what has become of its pages, see ``copied_map`` in the protocol."""
    quarantined: bool = False
    restarts: int = 0  # of its workers, once it has left
    unread: int = 0  # answers with descriptors since it had last read everything
    failures_reported: int = 0
    """Of the pages that could not be made for it (``counters.FAILURES``), those whose report has arrived."""

    @property
    def speaker(self) -> int:
        """A pidfd of the process whose connection it is, or was; -1 if it is not known."""
        return self.front_end if self.back_end else self.pidfd

    @property
    def name(self) -> str:
        return self.conversation.name

    def map_figures(self) -> memoryview:
        """Map the figures; returns the counters. An older supervisor may have made the memory shorter."""
        length = min(stages.END, os.fstat(self.figures_fd).st_size)
        self.figures = memoryview(mmap.mmap(self.figures_fd, length))
        self.counters = page = self.figures[: counters.PAGE_BYTES].cast("Q")
        return page

    def stages(self, block: int) -> memoryview | None:
        """Latencies of the stages of its faults in a block; None where they are not kept."""
        at = stages.position(block)
        if self.figures is None or at is None or len(self.figures) < stages.END:
            return None
        return self.figures[at : at + stages.BYTES].cast("Q")

    @property
    def all_regions(self) -> list[RegionGrant]:
        return [*self.regions, *self.released]

    @property
    def touches(self) -> set[int]:
        """Numbers of the blocks that it has, or had, mapped."""
        return {region.block for region in self.all_regions}

    @property
    def key(self) -> str:
        """The custodian's key of its descriptors."""
        return f"client/{self.number}"

    @property
    def kept(self) -> tuple[int, ...]:
        """The descriptors that the custodian keeps."""
        userfaultfd = self.userfaultfd.fd if self.userfaultfd is not None else -1
        fds = userfaultfd, self.pidfd, self.figures_fd
        return (*fds, *(fd for fd in (self.front_end, self.copied_map) if fd >= 0))

    def note(self) -> bytes:
        """What a later supervisor has to know of it."""
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


MOST_ENDED = 64
"""Clients that have ended of which the first figures are kept."""


class Clients:
    """All clients, by number and by connection, and the figures of those that have left."""

    def __init__(
        self,
        blocks: Iterable[int],
        custodian: CustodianClient,
        first_number: int = 1,
        names: dict[int, str] | None = None,
    ) -> None:
        """``names``: gets the name of each client that is attached."""
        self._names = names if names is not None else {}
        self.by_number: dict[int, Client] = {}
        self.by_connection: dict[socket.socket, Client] = {}
        self.by_pidfd: dict[int, Client] = {}
        self.by_user: Counter[int] = Counter()  # how many each user has
        self.unread: Counter[int] = Counter()
        """Answers with descriptors that clients of each user may not have read."""
        self._left_unread: list[tuple[socket.socket, int, int]] = []  # with user and number of such answers
        self.pending: dict[int, Client] = {}  # without a userfaultfd; the one that was silent for longest is first
        self._ended: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self.past = counters.merge(())
        self.past_restarts = self.left = 0
        """``left``: clients that were attached and are not any more."""
        self.figures_turn = threading.Lock()
        """Held while figures move from the clients to ``past``. A scrape that reads both meanwhile would count them
        twice or not at all, and a counter that goes down is a restart to Prometheus."""
        self.past_stages = {number: stages.scratch() for number in blocks}
        self._custodian, self._next_number = custodian, first_number

    def take_number(self) -> int:
        number, self._next_number = self._next_number, self._next_number + 1
        return number

    def add(self, client: Client) -> None:
        self.by_number[client.number] = self.by_pidfd[client.pidfd] = client
        self._count(client.uid, 1)
        if client.connection is not None:
            self.by_connection[client.connection] = client
        if client.userfaultfd is None:
            self.pending[client.number] = client

    def _count(self, uid: int, more: int) -> None:
        self.by_user[uid] += more
        if not self.by_user[uid]:
            del self.by_user[uid], self.unread[uid]

    def leaves_unread(self, client: Client, connection: socket.socket) -> bool:
        """A connection is to be closed. True: its peer has not read descriptors, which the kernel counts until it does
        or closes its end. So the connection is kept, and counts as a client of its user."""
        if not client.unread or client.uid == os.geteuid() or not descriptors.unread_bytes(connection):
            return False
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        self._left_unread.append((connection, client.uid, client.unread))
        self._count(client.uid, 1)
        client.unread = 0
        return True

    def take_read(self) -> Iterator[tuple[socket.socket, int]]:
        """The kept connections whose peers have read everything since, with their users. The caller closes them."""
        for entry in list(self._left_unread):
            connection, uid, unread = entry
            if not descriptors.unread_bytes(connection):
                self._left_unread.remove(entry)
                self.unread[uid] -= unread
                self._count(uid, -1)
                yield connection, uid

    def count_unread(self, client: Client, more: int) -> None:
        client.unread += more
        self.unread[client.uid] += more

    def heard(self, client: Client, now: float) -> None:
        """Note that a message of it is handled."""
        client.since = now
        if self.pending.pop(client.number, None) is not None:
            self.pending[client.number] = client

    def keep(self, client: Client) -> None:
        """Renew the custodian's note. Done before a change is answered, and before a worker is forked for it."""
        assert client.userfaultfd is not None
        self.pending.pop(client.number, None)
        self._names[client.number] = client.name
        self._custodian.keep(client.key, client.note(), client.kept)

    def set_quarantined(self, number: int, quarantined: bool) -> None:
        """Note for a later supervisor that a client is quarantined, or no longer."""
        client = self.by_number.get(number)
        if client is not None and client.quarantined != quarantined:
            client.quarantined = quarantined
            self.keep(client)

    def with_block(self, block: int) -> list[int]:
        """Numbers of the clients that have regions of a block."""
        return [
            number
            for number, client in self.by_number.items()
            if any(region.block == block for region in client.regions)
        ]

    def drop(self, client: Client, restarts: int = 0) -> None:
        """Forget a client, and add its figures to those of the clients that have left."""
        if client.number not in self.by_number:
            return
        figures = client.counters.tolist() if client.counters is not None else ()
        with self.figures_turn:
            del self.by_number[client.number]
            client.restarts = restarts
            self.past_restarts += restarts
            self.left += client.userfaultfd is not None
            if figures:
                self.past = counters.merge((self.past, figures))
                for block in client.touches:
                    staged = client.stages(block)
                    if staged is not None:
                        self.past_stages[block] = stages.merged((self.past_stages[block], staged))
        self.pending.pop(client.number, None)
        self._names.pop(client.number, None)
        self.by_pidfd.pop(client.pidfd, None)
        self.count_unread(client, -client.unread)
        self._count(client.uid, -1)
        if client.userfaultfd is None:
            return  # the custodian has nothing of it
        self._custodian.drop(client.key)
        if client.counters is not None:
            self._ended[client.number] = client.uid, client.counters[: counters.HISTOGRAM].tobytes()
            if len(self._ended) > MOST_ENDED:
                self._ended.popitem(last=False)

    def figures_of(self, number: int) -> tuple[int, memoryview | None]:
        """The user of a client that lives or has just ended, and its counters before the histogram, if known."""
        client = self.by_number.get(number)
        if client is not None:
            return client.uid, client.counters
        uid, figures = self._ended.get(number, (-1, b""))
        return uid, memoryview(figures).cast("Q") if figures else None

    def tell_all(self, message: Message) -> None:
        for client in list(self.by_number.values()):
            if client.connection is not None:
                send(client.connection, message)


def send(connection: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> bool:
    """Send without waiting; False when the client is gone or does not read."""
    try:
        descriptors.send_message(connection, encode(message), fds)
        crashpoints.at("door." + type(message).__name__)
    except OSError:
        return False
    return True
