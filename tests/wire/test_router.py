"""Our router against libzmq and against bare sockets: who comes in, who is sought, who does not read, who lies."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import zmq

from postcopy_protocol.zmtp import GREETING, LARGEST, MORE, Message, Reader, command, frame, opening
from postcopy_wire import router as module
from postcopy_wire.libzmq import Libzmq
from postcopy_wire.router import FULL, KEPT_BYTES, NOBODY, SENT, Router

PATIENCE = 20.0
READY = command(b"READY", b"\x0bSocket-Type\0\0\0\6ROUTER")


class Service:
    """A router, and what it hears."""

    def __init__(self, path: Path, **limits: int) -> None:
        self.heard: list[tuple[bytes, Message]] = []
        self.gone: list[bytes] = []
        self.path = path
        self._strangers: list[socket.socket] = []
        self.router = Router(lambda name, message: self.heard.append((name, message)), self.gone.append, **limits)
        self.router.listen(str(path))

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, self.heard[-3:]
            self.router.turn(0.01)

    def next(self) -> tuple[bytes, Message]:
        self.until(lambda: self.heard)
        return self.heard.pop(0)

    def stranger(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._strangers.append(connection)
        connection.settimeout(PATIENCE)
        connection.connect(str(self.path))
        return connection

    def close(self) -> None:
        self.router.close()
        for connection in self._strangers:
            connection.close()

    def shown_out(self, connection: socket.socket) -> None:
        """Its connection is ended."""
        connection.settimeout(0)

        def ended() -> bool:
            try:
                return not connection.recv(1 << 16)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        self.until(ended)

    def known(self, name: bytes) -> socket.socket:
        """A bare socket that has said who it is, and has heard who we are."""
        connection = self.stranger()
        connection.sendall(opening(name))
        self.until(lambda: name in self.router.peers)
        reader = Reader()
        while not reader.ready:
            assert reader.feed(connection.recv(1 << 16)) == []
        return connection


@pytest.fixture
def path(runtime_dir: Path) -> Iterator[Path]:
    made = runtime_dir / "router"
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture
def service(path: Path) -> Iterator[Service]:
    made = Service(path, queue=20)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield made
    finally:
        made.destroy(0)


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.ROUTER, zmq.REQ])
def test_libzmq_comes_in(service: Service, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> None:
    peer = context.socket(kind)
    peer.setsockopt(zmq.ROUTING_ID, b"w1.1")
    if kind == zmq.ROUTER:
        peer.setsockopt(zmq.CONNECT_ROUTING_ID, b"us")
        peer.setsockopt(zmq.ROUTER_MANDATORY, 1)
    peer.connect(f"ipc://{service.path}")
    service.until(lambda: b"w1.1" in service.router.peers)
    before = {zmq.DEALER: [], zmq.ROUTER: [b"us"], zmq.REQ: []}[kind]  # type: ignore[index]
    envelope = [b""] if kind == zmq.REQ else []
    for body in (b"x", b"", bytes(255), bytes(256), bytes(100_000)):
        peer.send_multipart([*before, body])
        name, message = service.next()
        assert name == b"w1.1" and message == ([b"", body] if envelope else body)
        assert service.router.send_parts(name, [*envelope, body]) == SENT
        service.until(lambda: peer.poll(0))
        assert peer.recv_multipart() == [*before, body]
    peer.close()
    service.until(lambda: service.gone)
    assert service.gone == [b"w1.1"] and service.router.send(b"w1.1", b"x") == NOBODY


def test_who_says_no_name_gets_one_of_ours(service: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    peers = [context.socket(zmq.DEALER) for _ in range(3)]
    for number, peer in enumerate(peers):
        peer.connect(f"ipc://{service.path}")
        peer.send(b"%d" % number)
    names = {message: name for name, message in (service.next() for _ in peers)}
    assert len(set(names.values())) == 3 and all(name[:1] == b"\0" for name in names.values())
    for number, peer in enumerate(peers):
        assert service.router.send(names[b"%d" % number], b"to %d" % number) == SENT
        service.until(lambda: peer.poll(0))  # noqa: B023
        assert peer.recv() == b"to %d" % number
        peer.close()


def test_the_latest_has_the_name_and_ours_nobody_gets(service: Service, path: Path) -> None:
    first = service.known(b"w1.1")
    second = service.stranger()
    second.sendall(opening(b"w1.1") + frame(b"second"))
    assert service.next() == (b"w1.1", b"second")
    service.shown_out(first)
    assert service.gone == []  # nobody is gone: it is there
    service.router.connect(str(path.with_name("nobody")), b"s1", lambda frames: None, lambda: None, 1 << 16)
    thief = service.stranger()
    thief.sendall(opening(b"s1") + frame(b"mine") + opening(b"\0\0\0\0\0\0\0\0\1"))
    service.shown_out(thief)
    assert service.heard == [] and service.router.send(b"s1", b"x") == NOBODY
    zero = service.stranger()
    zero.sendall(opening(b"\0taken") + frame(b"hello"))
    assert service.next()[0] != b"\0taken"


def test_many_frames_and_pings(service: Service) -> None:
    peer = service.known(b"a")
    peer.sendall(frame(b"x", MORE) + frame(b"", MORE) + frame(b"y") + command(b"PING", b"\0\x64me") + frame(b"z"))
    assert service.next() == (b"a", [b"x", b"", b"y"])
    assert service.next() == (b"a", b"z")
    service.router.turn(0)
    assert peer.recv(1 << 16) == command(b"PONG", b"me")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING.replace(b"NULL\0", b"CURVE"),
        GREETING + frame(b"a word before READY"),
        GREETING + command(b"READY", b"\x08Identity\0\0\1\0" + bytes(256)),
        GREETING + command(b"READY", b"\x08Identity\0\0\0\7no"),
        opening(b"a") + b"\xff\0",
        opening(b"a") + b"\x02" + (LARGEST + 1).to_bytes(8, "big"),
        opening(b"a") + frame(b"", MORE) * 2000,
    ],
)
def test_who_speaks_nonsense_is_shown_out(service: Service, said: bytes) -> None:
    other = service.known(b"other")
    peer = service.stranger()
    peer.sendall(said)
    service.shown_out(peer)
    assert not service.router.strangers and b"a" not in service.router.peers
    other.sendall(frame(b"still here"))
    assert service.next() == (b"other", b"still here")


def test_who_does_not_read_is_not_waited_for(service: Service) -> None:
    """What is kept comes whole and in order; then it is full, and nobody else is concerned."""
    slow, other = service.known(b"slow"), service.known(b"other")
    words = list[bytes]()
    while (became := service.router.send(b"slow", word := b"%d," % len(words) * 3000)) == SENT:
        words.append(word)
    assert became == FULL and len(service.router.peers[b"slow"].outbox) == 20
    assert service.router.send_parts(b"slow", [b"head", bytes(4096)]) == FULL
    assert service.router.send(b"other", b"x") == SENT
    assert other.recv(100) == frame(b"x")
    expected, came = b"".join(map(frame, words)), bytearray()
    while len(came) < len(expected):
        service.router.turn(0)
        came += slow.recv(1 << 20)
    assert came == expected
    service.until(lambda: not service.router.peers[b"slow"].outbox)
    assert service.router.peers[b"slow"].kept == 0
    assert service.router.send_parts(b"slow", [b"head", bytes(4096)]) == SENT
    assert slow.recv(1 << 16) == frame(b"head", MORE) + frame(bytes(4096))


def test_what_is_kept_may_leave_at_the_end(service: Service) -> None:
    slow, dead = service.known(b"slow"), service.known(b"dead")
    sent = list[bytes]()
    while service.router.send(b"slow", word := b"%d," % len(sent) * 3000) == SENT:
        sent.append(word)
    while service.router.send(b"dead", bytes(9000)) == SENT:
        pass
    dead.close()
    came = bytearray()

    def read() -> None:
        while more := slow.recv(1 << 16):
            came.extend(more)

    reader = threading.Thread(target=read)
    reader.start()
    service.router.close(PATIENCE)
    reader.join(PATIENCE)
    assert came == b"".join(map(frame, sent))


def test_a_signal_ends_all_in_the_middle_of_a_goodbye(service: Service) -> None:
    """A source's signal handler raises, wherever its loop is."""
    service.known(b"a")
    peer = service.router.peers[b"a"]
    connection = peer.connection
    assert connection is not None

    def close() -> None:
        connection.close()
        raise KeyboardInterrupt

    peer.connection = cast(socket.socket, SimpleNamespace(fileno=connection.fileno, close=close))
    with pytest.raises(KeyboardInterrupt):
        peer.drop()
    service.router.close()
    assert service.router.peers == {} and service.gone == [b"a"]


def test_few_large_messages_are_full_too(service: Service) -> None:
    service.known(b"slow")
    buffer = bytearray(b"a" * (1 << 20))
    sent = 0
    while service.router.send_parts(b"slow", [b"head", buffer]) == SENT:
        sent += 1
    assert KEPT_BYTES >> 20 <= sent <= (KEPT_BYTES >> 20) + 2


def test_what_is_kept_does_not_change_under_us(service: Service) -> None:
    slow = service.known(b"slow")
    buffer = bytearray(b"a" * (1 << 20))
    assert service.router.send_parts(b"slow", [b"head", buffer]) == SENT
    buffer[:] = b"b" * len(buffer)
    came, expected = bytearray(), frame(b"head", MORE) + frame(b"a" * (1 << 20))
    while len(came) < len(expected):
        service.router.turn(0)
        came += slow.recv(1 << 20)
    assert came == expected


def test_who_goes_with_words_kept_for_it(service: Service) -> None:
    slow = service.known(b"slow")
    while service.router.send(b"slow", bytes(9000)) == SENT:
        pass
    slow.close()
    service.until(lambda: service.gone)
    assert service.router.send(b"slow", b"x") == NOBODY


def test_strangers_are_many_and_stay_long(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRANGERS", 3)
    crowd = [service.stranger() for _ in range(8)]
    service.until(lambda: not service.router.waiting())
    assert len(service.router.strangers) == 3
    monkeypatch.setattr(module, "STRANGE_SECONDS", 0.0)
    crowd.append(service.stranger())
    service.until(lambda: len(service.router.strangers) == 1)
    crowd[-1].sendall(opening(b"last"))
    service.until(lambda: b"last" in service.router.peers)


def test_no_descriptor_left(service: Service) -> None:
    """They wait in the backlog; who is there is heard, and nobody spins."""
    peer, late = service.known(b"there"), service.stranger()
    late.sendall(opening(b"late"))
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for _ in range(3):
            service.router.turn(0.01)
        assert not service.router.waiting(), "it would be looked at for ever"
        peer.sendall(frame(b"here"))
        assert service.next() == (b"there", b"here")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    service.until(lambda: b"late" in service.router.peers)


# --- sought -----------------------------------------------------------------------------------------------------------


class Found:
    """What is heard of a peer that is sought."""

    def __init__(self, service: Service, path: Path, capacity: int = 1 << 20) -> None:
        self.met = 0
        self.heard: list[list[bytes]] = []
        service.router.connect(str(path), b"s1", self._hear, self._meet, capacity)

    def _meet(self) -> None:
        self.met += 1

    def _hear(self, frames: list[memoryview]) -> None:
        self.heard.append([bytes(one) for one in frames])


def test_a_router_of_libzmq_is_sought_until_it_is_there_and_again(
    service: Service, path: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    there = path.with_name("source")
    found = Found(service, there)
    service.router.turn(0.05)
    assert service.router.send(b"s1", b"nobody hears this") == NOBODY
    for life in (1, 2):
        source = context.socket(zmq.ROUTER)
        source.setsockopt(zmq.LINGER, 0)
        source.bind(f"ipc://{there}")
        service.until(lambda: found.met == life)  # noqa: B023
        for frames in ([b"head", bytes(4096)], [b"word"], [b"h", b"", bytes(300_000), b"x" * 300], [b"", b"y" * 256]):
            assert service.router.send(b"s1", b"request") == SENT
            service.until(lambda: source.poll(0))  # noqa: B023
            name, word = source.recv_multipart()
            assert word == b"request"
            source.send_multipart([name, *frames])
            source.send_multipart([name, *frames])
            service.until(lambda: len(found.heard) == 2)
            assert found.heard == [frames, frames]
            found.heard.clear()
        source.close()
        service.until(lambda: service.router.send(b"s1", b"x") == NOBODY)
    there.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400\r\n" * 9,
        GREETING + READY + b"\x02" + (1 << 40).to_bytes(8, "big"),
        GREETING + READY + frame(bytes(70_000), MORE),
        GREETING + READY + frame(b"", MORE) * 4000,
        GREETING + READY + frame(b"x", MORE) + command(b"PING", b"\0\0"),
    ],
)
def test_somebody_else_is_found(service: Service, path: Path, said: bytes) -> None:
    """Given up, and sought again, but not at once; others are heard meanwhile."""
    there, other = path.with_name("source"), service.known(b"other")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(there))
        listener.listen(8)
        listener.setblocking(False)
        found = Found(service, there, 1 << 16)
        for _ in range(3):
            theirs = list[socket.socket]()

            def taken(theirs: list[socket.socket] = theirs) -> bool:
                try:
                    theirs.append(listener.accept()[0])
                except BlockingIOError:
                    return False
                return True

            service.until(taken)
            theirs[0].sendall(said)
            service.until(lambda: service.router.sought[b"s1"].connection is None)
            theirs[0].close()
        other.sendall(frame(b"here"))
        assert service.next() == (b"other", b"here")
        assert found.heard == []
    there.unlink()


def test_messages_in_pieces(service: Service, path: Path) -> None:
    """The buffer is as large as the largest message: what is left over is moved, and nothing is lost."""
    there = path.with_name("source")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(there))
        listener.listen(1)
        found = Found(service, there, (1 << 16) + 100)
        theirs, _ = listener.accept()
        theirs.sendall(GREETING + READY)
        service.until(lambda: found.met)
        sent = [[b"%d" % number, os.urandom(1 + number * 499 % 65_000)] for number in range(400)]
        stream = b"".join(frame(head, MORE) + frame(body) for head, body in sent)
        at = 0
        while at < len(stream):
            piece = stream[at : at + 1 + at % 70_001]
            theirs.sendall(piece)
            at += len(piece)
            service.until(lambda: not service.router.waiting())
        assert found.heard == sent
        theirs.close()
    there.unlink()


# --- libzmq beside it -------------------------------------------------------------------------------------------------


def test_libzmq_in_the_same_turns(service: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    bound, heard = context.socket(zmq.ROUTER), list[tuple[bytes, list[bytes]]]()
    bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    service.router.bridge(Libzmq(bound, lambda name, frames: heard.append((name, [bytes(one) for one in frames]))))
    peer, other = context.socket(zmq.DEALER), service.known(b"other")
    peer.setsockopt(zmq.ROUTING_ID, b"far")
    peer.connect(f"tcp://127.0.0.1:{port}")
    for number in range(200):
        peer.send_multipart([b"%d" % number, bytes(5000)])
        other.sendall(frame(b"%d" % number))
        service.router.turn(0)
    service.until(lambda: len(heard) == 200 and len(service.heard) == 200)
    assert heard == [(b"far", [b"%d" % number, bytes(5000)]) for number in range(200)]
    for number in range(50):  # each answer may eat the word that there is another message
        assert service.router.send_parts(b"far", [b"%d" % number, b"x"]) == SENT
        service.until(lambda: peer.poll(0))
        assert peer.recv_multipart() == [b"%d" % number, b"x"]
        peer.send(b"again")
        service.until(lambda: heard[-1] == (b"far", [b"again"]))
        heard.pop()
    assert service.router.send(b"nobody", b"x") == NOBODY
    peer.close()
