"""What an attacker does, as a user on no list, as an allowed user, as a page source, and as a peer on the network.

An attack is a function that makes one attempt. It runs in a process of its own, under its user's id, until its time is
over. An attempt may fail with OSError or PostcopyError: that the service refuses it is the aim.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import postcopy
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Hello, OfferUserfaultfd
from postcopy_protocol.return_path import Pages, pack_ranges
from postcopy_protocol.zmtp import frame, opening

STRANGER, ALLOWED = 54_321, 54_322
"""Uids: on no list; on the list of ``--allow-uid``."""
HELD = 512
"""Connections that an attack holds at once."""
MORE = 1
WAIT = 0.2
"""Seconds that an attempt waits for an answer."""


@dataclass
class Target:
    """What an attacker can know, and what it has kept so far."""

    runtime_dir: str
    network: dict[str, int]
    """TCP ports of the loopback interface: ``source``, ``metrics``, and ``rogue``, where the supervisor looks for the
    source of a block."""
    random: random.Random
    held: list[socket.socket] = field(default_factory=list)
    listener: socket.socket | None = None

    def door(self) -> socket.socket:
        """A connection to the attach socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(WAIT)
        try:
            connection.connect(f"{self.runtime_dir}/door")
        except BaseException:
            connection.close()
            raise
        return connection

    def tcp(self, name: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.network[name]), timeout=WAIT)

    def supervisor(self) -> socket.socket:
        """The next connection of the supervisor to its page source."""
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.network["rogue"]))
            self.listener.settimeout(WAIT)
        connection, _ = self.listener.accept()
        connection.settimeout(WAIT)
        connection.sendall(opening(kind=b"ROUTER"))
        return connection

    def hold(self, connection: socket.socket) -> None:
        """Keep a connection; the oldest is closed when there are too many."""
        self.held.append(connection)
        if len(self.held) > HELD:
            self.held.pop(0).close()


def connect_and_leave(target: Target) -> None:
    target.door().close()


def connect_and_hold(target: Target) -> None:
    target.hold(target.door())


def hello_at_once(target: Target) -> None:
    with target.door() as door:
        door.send(encode(Hello("attack", "native")))
        door.recv(65536)


def random_message(target: Target) -> None:
    """Bytes that begin like a message of ours, or not, with descriptors of several kinds."""
    chance = target.random
    known = [encode(Hello("attack", "native")), encode(OfferUserfaultfd())]
    body = bytearray(chance.choice(known) if chance.random() < 0.6 else chance.randbytes(chance.randrange(1, 200)))
    for _ in range(chance.randrange(4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    offered = []
    with contextlib.ExitStack() as stack:
        for _ in range(chance.randrange(4)):
            fd = chance.choice((_memfd, _pipe, _regular))()
            stack.callback(os.close, fd)
            offered.append(fd)
        with target.door() as door:
            door.send(known[0])
            socket.send_fds(door, [bytes(body)], offered)
            door.recv(65536)


def _memfd() -> int:
    return os.memfd_create("attack")


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _regular() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def attach_and_leave(target: Target) -> None:
    with postcopy.attach("local", target.runtime_dir, timeout=5.0) as block:
        assert block.buf[target.random.randrange(block.size)] >= 0


def attach_and_die(target: Target) -> None:
    """A client that ends without a word, a fault of a remote page on its way."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            block = postcopy.attach("remote", target.runtime_dir, timeout=5.0)
            block.prefetch()
        os._exit(0)
    os.waitpid(child, 0)


def attach_shared(target: Target) -> None:
    """Only the supervisor's own user may write a block."""
    with postcopy.attach("local", target.runtime_dir, "shared", timeout=5.0) as block:
        block.buf[: len(FORGED)] = FORGED


FORGED = b"written by a user that may only read"


def silent_scraper(target: Target) -> None:
    target.hold(target.tcp("metrics"))


def noisy_scraper(target: Target) -> None:
    with target.tcp("metrics") as scraper:
        scraper.sendall(target.random.choice((b"GET / HTTP/9\r\n\r\n", b"\0" * 4096, target.random.randbytes(512))))
        scraper.recv(65536)


def message_without_end(target: Target) -> None:
    """Parts with MORE until the peer ends the connection."""
    with target.tcp("source") as peer:
        peer.sendall(opening())
        part = frame(target.random.randbytes(target.random.choice((0, 1, 60_000))), MORE) * 16
        for _ in range(256):
            peer.sendall(part)


def empty_messages(target: Target) -> None:
    with target.tcp("source") as peer:
        peer.sendall(opening())
        for _ in range(64):
            peer.sendall(frame(b"") * 512)


def random_bytes(target: Target) -> None:
    with target.tcp("source") as peer:
        peer.sendall(opening() if target.random.random() < 0.5 else target.random.randbytes(64))
        peer.sendall(target.random.randbytes(4096))
        peer.recv(65536)


def silent_peer(target: Target) -> None:
    target.hold(target.tcp("source"))


def source_that_leaves(target: Target) -> None:
    target.supervisor().close()


def source_of_empty_messages(target: Target) -> None:
    with target.supervisor() as peer:
        for _ in range(256):
            peer.sendall(frame(b"") * 512)


def source_of_strange_pages(target: Target) -> None:
    """Pages of no stream, in messages as they should be."""
    head = encode(Pages(target.random.randrange(1 << 40), 1, pack_ranges([(0, 1 << 20)]), b"\1", ""))
    with target.supervisor() as peer:
        for _ in range(256):
            peer.sendall(frame(head, MORE) + frame(bytes(1 << 20)))


def source_of_random_bytes(target: Target) -> None:
    with target.supervisor() as peer:
        peer.sendall(target.random.randbytes(1 << 16))
        peer.recv(65536)


def source_message_without_end(target: Target) -> None:
    with target.supervisor() as peer:
        part = frame(target.random.randbytes(target.random.choice((0, 1, 60_000))), MORE) * 16
        for _ in range(256):
            peer.sendall(part)


@dataclass(frozen=True)
class Attack:
    attempt: Callable[[Target], None]
    uid: int

    @property
    def name(self) -> str:
        return self.attempt.__name__.replace("_", " ")

    @property
    def who(self) -> str:
        return {STRANGER: "user on no list", ALLOWED: "allowed user"}[self.uid]


ATTACKS = (
    Attack(connect_and_leave, STRANGER),
    Attack(connect_and_leave, ALLOWED),
    Attack(connect_and_hold, STRANGER),
    Attack(connect_and_hold, ALLOWED),
    Attack(hello_at_once, STRANGER),
    Attack(hello_at_once, ALLOWED),
    Attack(random_message, STRANGER),
    Attack(random_message, ALLOWED),
    Attack(attach_and_leave, ALLOWED),
    Attack(attach_and_die, ALLOWED),
    Attack(attach_shared, ALLOWED),
    Attack(silent_scraper, STRANGER),
    Attack(noisy_scraper, STRANGER),
    Attack(message_without_end, STRANGER),
    Attack(empty_messages, STRANGER),
    Attack(random_bytes, STRANGER),
    Attack(silent_peer, STRANGER),
    Attack(source_that_leaves, STRANGER),
    Attack(source_of_empty_messages, STRANGER),
    Attack(source_of_strange_pages, STRANGER),
    Attack(source_of_random_bytes, STRANGER),
    Attack(source_message_without_end, STRANGER),
)
"""A peer on the network, or a page source, needs no rights: it is the user on no list."""
