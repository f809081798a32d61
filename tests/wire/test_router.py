"""Both routers against libzmq and against bare sockets: peers that connect, that are connected to, that do not read,
that do not speak ZMTP."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import zmq

from postcopy_protocol.zmtp import GREETING, LARGEST, MORE, Message, Reader, command, frame, opening
from postcopy_wire import router as module
from postcopy_wire.connections import ALL_KEPT_BYTES, KEPT_BYTES, UNFINISHED_BYTES
from postcopy_wire.factory import open_router
from postcopy_wire.router import NativeRouter
from postcopy_wire.transport import FULL, NATIVE, SENT, TRANSPORTS, UNREACHABLE, Router

PATIENCE = 20.0
READY = command(b"READY", b"\x0bSocket-Type\0\0\0\6ROUTER")


class Service:
    """A router, and the messages that it received."""

    def __init__(self, path: Path, transport: str, *, newcomers: bool = False, **limits: int) -> None:
        self.received: list[tuple[bytes, Message]] = []
        self.gone: list[bytes] = []
        self.path = path
        self.endpoint = f"ipc://{path}"
        self._peers: list[socket.socket] = []
        self.router: Router = open_router(
            transport,
            lambda name, message: self.received.append((name, message)),
            self.gone.append,
            newcomers=newcomers,
            **limits,
        )
        assert self.router.listen(self.endpoint) == self.endpoint

    @property
    def native(self) -> NativeRouter:
        assert isinstance(self.router, NativeRouter)
        return self.router

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, self.received[-3:]
            self.router.turn(0.01)

    def next(self) -> tuple[bytes, Message]:
        self.until(lambda: self.received)
        return self.received.pop(0)

    def bare(self) -> socket.socket:
        """A bare socket that has connected and said nothing."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._peers.append(connection)
        connection.settimeout(PATIENCE)
        connection.connect(str(self.path))
        return connection

    def known(self, name: bytes) -> socket.socket:
        """A bare socket that the router knows by name."""
        connection = self.connect_as(name, b"hello")
        assert self.next() == (name, b"hello")
        return connection

    def connect_as(self, name: bytes, message: bytes) -> socket.socket:
        """A bare socket that says its name, and then a message when the router may hear it."""
        connection = self.bare()
        connection.sendall(opening(name))
        reader = Reader()
        while not reader.ready:
            self.router.turn(0.01)
            with suppress(BlockingIOError):
                reader.feed(connection.recv(1 << 16, socket.MSG_DONTWAIT))
        connection.sendall(frame(message))
        return connection

    def await_end(self, connection: socket.socket) -> None:
        """The router ends this connection."""
        connection.settimeout(0)

        def ended() -> bool:
            try:
                return not connection.recv(1 << 16)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        self.until(ended)

    def close(self) -> None:
        self.router.close()
        for connection in self._peers:
            connection.close()


@pytest.fixture
def path(runtime_dir: Path) -> Iterator[Path]:
    made = runtime_dir / "router"
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture(params=TRANSPORTS)
def service(path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    made = Service(path, request.param, queue=20)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def native_service(path: Path) -> Iterator[Service]:
    made = Service(path, NATIVE, queue=20)
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
def test_libzmq_connects(service: Service, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> None:
    peer = context.socket(kind)
    peer.setsockopt(zmq.ROUTING_ID, b"w1.1")
    if kind == zmq.ROUTER:
        peer.setsockopt(zmq.CONNECT_ROUTING_ID, b"us")
        peer.setsockopt(zmq.ROUTER_MANDATORY, 1)
    peer.connect(service.endpoint)
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
    service.until(lambda: service.router.send(b"w1.1", b"x") == UNREACHABLE)
    if isinstance(service.router, NativeRouter):
        assert service.gone == [b"w1.1"]


def test_a_peer_without_a_name_gets_one(service: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    peers = [context.socket(zmq.DEALER) for _ in range(3)]
    for number, peer in enumerate(peers):
        peer.connect(service.endpoint)
        peer.send(b"%d" % number)
    names = {message: name for name, message in (service.next() for _ in peers)}
    assert len(set(names.values())) == 3 and all(name[:1] == b"\0" for name in names.values())
    for number, peer in enumerate(peers):
        assert service.router.send(names[b"%d" % number], b"to %d" % number) == SENT
        service.until(lambda: peer.poll(0))  # noqa: B023
        assert peer.recv() == b"to %d" % number
        peer.close()


def test_the_latest_peer_has_the_name(service: Service) -> None:
    first = service.known(b"w1.1")
    second = service.connect_as(b"w1.1", b"second")
    assert service.next() == (b"w1.1", b"second")
    if isinstance(service.router, NativeRouter):  # libzmq leaves the connection open and does not use it
        service.await_end(first)
    assert service.gone == []  # the name is still there
    assert service.router.send(b"w1.1", b"x") == SENT
    assert second.recv(100) == frame(b"x")


def test_no_peer_takes_the_name_of_one_that_we_connect_to(service: Service, path: Path) -> None:
    """Neither to hear what is for that one nor to speak for it."""
    frames_received = list[object]()
    absent = f"ipc://{path.with_name('absent')}"
    service.router.connect(absent, b"s1", frames_received.append, lambda: None, 1 << 16)
    thief = service.bare()
    thief.sendall(opening(b"s1"))
    if isinstance(service.router, NativeRouter):
        service.await_end(thief)
    else:  # it has that name only among those that connect to us
        service.router.turn(0.1)
    assert service.received == frames_received == [] and service.router.send(b"s1", b"x") == UNREACHABLE


def test_names_that_begin_with_zero_are_the_routers(native_service: Service) -> None:
    zero = native_service.bare()
    zero.sendall(opening(b"\0taken") + frame(b"hello"))
    assert native_service.next()[0] != b"\0taken"


def test_many_frames_and_pings(service: Service) -> None:
    peer = service.known(b"a")
    peer.sendall(frame(b"x", MORE) + frame(b"", MORE) + frame(b"y") + command(b"PING", b"\0\x64me") + frame(b"z"))
    assert service.next() == (b"a", [b"x", b"", b"y"])
    assert service.next() == (b"a", b"z")
    service.router.turn(0)
    assert peer.recv(1 << 16) == command(b"PONG", b"me")


FATAL = [
    GREETING.replace(b"NULL\0", b"CURVE"),
    GREETING + frame(b"a message before READY"),
    GREETING + command(b"READY", b"\x08Identity\0\0\0\7no"),
    opening(b"a") + b"\x02" + (LARGEST + 1).to_bytes(8, "big"),
]
FATAL_FOR_NATIVE = [
    b"GET / HTTP/1.1\r\n\r\n",
    GREETING + command(b"READY", b"\x08Identity\0\0\1\0" + bytes(256)),
    opening(b"a") + b"\xff\0",
    opening(b"a") + frame(b"", MORE) * 2000,
]


def check_ended(service: Service, said: bytes) -> None:
    other = service.known(b"other")
    peer = service.bare()
    peer.sendall(said)
    service.await_end(peer)
    assert service.router.send(b"a", b"x") == UNREACHABLE
    other.sendall(frame(b"still here"))
    assert service.next() == (b"other", b"still here")


@pytest.mark.parametrize("said", FATAL)
def test_a_peer_that_does_not_speak_zmtp_is_ended(service: Service, said: bytes) -> None:
    check_ended(service, said)


@pytest.mark.parametrize("said", FATAL_FOR_NATIVE)
def test_what_libzmq_takes_for_an_older_protocol_is_ended_too(native_service: Service, said: bytes) -> None:
    check_ended(native_service, said)
    assert not native_service.native.pending and b"a" not in native_service.native.inbound


def test_no_send_waits_for_a_peer_that_does_not_read(service: Service) -> None:
    """What is kept arrives whole and in order; then it is full, and no other peer is concerned."""
    slow, other = service.known(b"slow"), service.known(b"other")
    messages = list[bytes]()
    while (result := service.router.send(b"slow", message := b"%d," % len(messages) * 3000)) == SENT:
        messages.append(message)
    assert result == FULL and len(messages) >= 20
    assert service.router.send_parts(b"slow", [b"head", bytes(4096)]) == FULL
    assert service.router.send(b"other", b"x") == SENT
    assert other.recv(100) == frame(b"x")
    expected, arrived = b"".join(map(frame, messages)), bytearray()
    while len(arrived) < len(expected):
        service.router.turn(0)
        arrived += slow.recv(1 << 20)
    assert arrived == expected
    service.until(lambda: service.router.send_parts(b"slow", [b"head", bytes(4096)]) == SENT)
    expected = frame(b"head", MORE) + frame(bytes(4096))
    arrived = bytearray()
    while len(arrived) < len(expected):
        arrived += slow.recv(1 << 16)
    assert arrived == expected


def test_an_outbox_is_empty_after_it_was_sent(native_service: Service) -> None:
    slow = native_service.known(b"slow")
    while native_service.router.send(b"slow", bytes(9000)) == SENT:
        pass
    peer = native_service.native.inbound[b"slow"]
    assert len(peer.outbox) == 20

    def empty() -> bool:
        slow.recv(1 << 20)
        return not peer.outbox

    native_service.until(empty)
    assert peer.kept == 0


def test_what_is_kept_is_sent_at_the_end(service: Service) -> None:
    slow, dead = service.known(b"slow"), service.known(b"dead")
    sent = list[bytes]()
    while service.router.send(b"slow", word := b"%d," % len(sent) * 3000) == SENT:
        sent.append(word)
    while service.router.send(b"dead", bytes(9000)) == SENT:
        pass
    dead.close()
    arrived = bytearray()

    def read() -> None:
        while more := slow.recv(1 << 16):
            arrived.extend(more)

    reader = threading.Thread(target=read)
    reader.start()
    service.router.close(4.0)
    reader.join(PATIENCE)
    assert arrived == b"".join(map(frame, sent))


def test_a_signal_in_the_middle_of_a_close_ends_the_router_in_order(native_service: Service) -> None:
    """A source's signal handler raises, wherever its loop is."""
    service = native_service
    service.known(b"a")
    peer = service.native.inbound[b"a"]
    connection = peer.connection
    assert connection is not None

    def close() -> None:
        connection.close()
        raise KeyboardInterrupt

    peer.connection = cast(socket.socket, SimpleNamespace(fileno=connection.fileno, close=close))
    with pytest.raises(KeyboardInterrupt):
        peer.drop()
    service.router.close()
    assert service.native.inbound == {} and service.gone == [b"a"]


def test_few_large_messages_are_full_too(native_service: Service) -> None:
    service = native_service
    service.known(b"slow")
    buffer = bytearray(b"a" * (1 << 20))
    sent = 0
    while service.router.send_parts(b"slow", [b"head", buffer]) == SENT:
        sent += 1
    assert KEPT_BYTES >> 20 <= sent <= (KEPT_BYTES >> 20) + 2


def test_what_is_kept_is_a_copy(service: Service) -> None:
    slow = service.known(b"slow")
    buffer = bytearray(b"a" * (1 << 20))
    assert service.router.send_parts(b"slow", [b"head", buffer]) == SENT
    buffer[:] = b"b" * len(buffer)
    arrived, expected = bytearray(), frame(b"head", MORE) + frame(b"a" * (1 << 20))
    while len(arrived) < len(expected):
        service.router.turn(0)
        arrived += slow.recv(1 << 20)
    assert arrived == expected


def test_a_peer_that_goes_while_messages_are_kept_for_it(service: Service) -> None:
    slow = service.known(b"slow")
    while service.router.send(b"slow", bytes(9000)) == SENT:
        pass
    slow.close()
    service.until(lambda: service.router.send(b"slow", b"x") == UNREACHABLE)


def test_pending_peers_are_few_and_do_not_stay_long(native_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service = native_service
    monkeypatch.setattr(module, "PENDING", 3)
    crowd = [service.bare() for _ in range(8)]
    service.until(lambda: not service.router.waiting())
    assert len(service.native.pending) == 3
    monkeypatch.setattr(module, "PENDING_SECONDS", 0.0)
    crowd.append(service.bare())
    service.until(lambda: len(service.native.pending) == 1)
    crowd[-1].sendall(opening(b"last"))
    service.until(lambda: b"last" in service.native.inbound)


def test_no_descriptor_is_free(native_service: Service) -> None:
    """New peers wait in the backlog; the others are served, and the loop does not spin."""
    service = native_service
    peer, late = service.known(b"there"), service.bare()
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
    service.until(lambda: b"late" in service.native.inbound)


# --- peers that the router connects to ----------------------------------------------------------------------------


class Found:
    """What a peer says that the router connects to."""

    def __init__(self, service: Service, path: Path, capacity: int = 1 << 20) -> None:
        self.connected = 0
        self.received: list[list[bytes]] = []
        service.router.connect(f"ipc://{path}", b"s1", self._on_frames, self._on_connected, capacity)

    def _on_connected(self) -> None:
        self.connected += 1

    def _on_frames(self, frames: list[memoryview]) -> None:
        self.received.append([bytes(one) for one in frames])


def test_a_router_of_libzmq_is_connected_to_and_again(
    service: Service, path: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    there = path.with_name("source")
    found = Found(service, there)
    service.router.turn(0.05)
    assert service.router.send(b"s1", b"dropped") == UNREACHABLE
    for life in (1, 2):
        source = context.socket(zmq.ROUTER)
        source.setsockopt(zmq.LINGER, 0)
        source.bind(f"ipc://{there}")
        service.until(lambda: found.connected == life)  # noqa: B023
        for frames in ([b"head", bytes(4096)], [b"word"], [b"h", b"", bytes(300_000), b"x" * 300], [b"", b"y" * 256]):
            assert service.router.send(b"s1", b"request") == SENT
            service.until(lambda: source.poll(0))  # noqa: B023
            name, message = source.recv_multipart()
            assert message == b"request"
            source.send_multipart([name, *frames])
            source.send_multipart([name, *frames])
            service.until(lambda: len(found.received) == 2)
            assert found.received == [frames, frames]
            found.received.clear()
        source.close()
        service.until(lambda: service.router.send(b"s1", b"x") == UNREACHABLE)
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
def test_a_peer_that_is_no_source(native_service: Service, path: Path, said: bytes) -> None:
    """The connection is given up and made again, but not at once; others are served meanwhile."""
    service = native_service
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
            service.until(lambda: service.native.outbound[b"s1"].connection is None)
            theirs[0].close()
        other.sendall(frame(b"here"))
        assert service.next() == (b"other", b"here")
        assert found.received == []
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
        service.until(lambda: found.connected)
        sent = [[b"%d" % number, os.urandom(1 + number * 499 % 65_000)] for number in range(400)]
        stream = b"".join(frame(head, MORE) + frame(body) for head, body in sent)
        at = 0
        while at < len(stream):
            piece = stream[at : at + 1 + at % 70_001]
            theirs.sendall(piece)
            at += len(piece)
            service.until(lambda: not service.router.waiting())
        service.until(lambda: len(found.received) >= len(sent))  # libzmq's thread may be late
        assert found.received == sent
        theirs.close()
    there.unlink()


# --- libzmq in the turns of the native router -------------------------------------------------------------------------


def test_tcp_peers_in_the_same_turns(native_service: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Peers that connect by tcp, beside those of Unix sockets."""
    service = native_service
    endpoint = service.router.listen("tcp://127.0.0.1:*")
    peer, other = context.socket(zmq.DEALER), service.known(b"other")
    peer.setsockopt(zmq.ROUTING_ID, b"far")
    peer.connect(endpoint)
    for number in range(200):
        peer.send_multipart([b"%d" % number, bytes(5000)])
        other.sendall(frame(b"%d" % number))
        service.router.turn(0)
    service.until(lambda: len(service.received) == 400)
    assert [message for name, message in service.received if name == b"far"] == [
        [b"%d" % number, bytes(5000)] for number in range(200)
    ]
    for number in range(50):  # each answer may consume the edge that reports another message
        assert service.router.send_parts(b"far", [b"%d" % number, b"x"]) == SENT
        service.until(lambda: peer.poll(0))
        assert peer.recv_multipart() == [b"%d" % number, b"x"]
        peer.send(b"again")
        service.until(lambda: service.received[-1] == (b"far", b"again"))
        service.received.pop()
    assert service.router.send(b"absent", b"x") == UNREACHABLE
    peer.close()


def test_a_tcp_router_is_connected_to_and_again(service: Service, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Without a connection it is unreachable; what was sent before is not delivered later."""
    connected, received = list[int](), list[list[bytes]]()
    source = context.socket(zmq.ROUTER)
    port = source.bind_to_random_port("tcp://127.0.0.1")
    service.router.connect(
        f"tcp://127.0.0.1:{port}",
        b"s1",
        lambda frames: received.append([bytes(one) for one in frames]),
        lambda: connected.append(1),
        1 << 20,
    )
    for life in (1, 2):
        service.until(lambda: len(connected) == life)  # noqa: B023
        assert service.router.send(b"s1", b"request") == SENT
        service.until(lambda: source.poll(0))  # noqa: B023
        name, message = source.recv_multipart()
        assert message == b"request"
        source.send_multipart([name, b"head", bytes(100_000)])
        service.until(lambda: received)
        assert received.pop() == [b"head", bytes(100_000)]
        source.close(0)
        service.until(lambda: service.router.send(b"s1", b"x") == UNREACHABLE)
        if life == 1:
            source = context.socket(zmq.ROUTER)
            for _ in range(100):
                try:
                    source.bind(f"tcp://127.0.0.1:{port}")
                    break
                except zmq.ZMQError:
                    time.sleep(0.05)


@pytest.mark.parametrize("ours", TRANSPORTS)
@pytest.mark.parametrize("theirs", TRANSPORTS)
def test_the_transports_speak_with_one_another(runtime_dir: Path, ours: str, theirs: str) -> None:
    """A router of each kind connects to one of each kind."""
    endpoint = f"ipc://{runtime_dir}/source"
    requests, answers, ready = list[Message](), list[list[bytes]](), list[int]()

    def answer(name: bytes, message: Message) -> None:
        requests.append(message)
        source.send_parts(name, [b"head", b"x" * 5000])

    source = open_router(theirs, answer)
    source.listen(endpoint)
    supervisor = open_router(ours, lambda name, message: None)
    supervisor.connect(
        endpoint,
        b"s1",
        lambda frames: answers.append([bytes(one) for one in frames]),
        lambda: ready.append(1),
        1 << 20,
    )
    deadline = time.monotonic() + PATIENCE
    sent = 0
    while len(answers) < 300:
        assert time.monotonic() < deadline
        if ready and sent == len(answers):
            assert supervisor.send(b"s1", b"%d" % sent) == SENT
            sent += 1
        source.turn(0.001)
        supervisor.turn(0.001)
    assert requests == [b"%d" % number for number in range(300)] and answers == [[b"head", b"x" * 5000]] * 300
    supervisor.close()
    source.close()
    (runtime_dir / "source").unlink()


def test_unfinished_messages_of_many_peers_are_bounded(native_service: Service) -> None:
    """The peer that holds most is dropped; those that hold little stay."""
    service = native_service
    honest = service.known(b"honest")
    honest.sendall(frame(b"begun", MORE))
    peers = [service.known(b"p%d" % number) for number in range(UNFINISHED_BYTES // (LARGEST // 2) + 3)]
    data = frame(bytes(LARGEST // 2), MORE)
    for peer in peers:
        peer.settimeout(0)
        left = memoryview(data)
        while left:
            with suppress(BlockingIOError):
                left = left[peer.send(left) :]
            service.router.turn(0)
    service.until(lambda: len(service.gone) >= 2)
    assert b"honest" not in service.gone and len(service.gone) < len(peers)
    honest.sendall(frame(b"end"))
    assert service.next() == (b"honest", [b"begun", b"end"])


def test_a_peer_that_does_not_read_is_dropped_when_all_keep_too_much(native_service: Service) -> None:
    service = native_service
    for number in range(ALL_KEPT_BYTES // KEPT_BYTES * 40):
        name = b"p%d" % number
        service.known(name)
        while service.router.send_parts(name, [b"head", bytes(1 << 20)]) == SENT:
            pass
        if service.gone:
            break
    assert service.gone
    assert service.native._kept.total <= ALL_KEPT_BYTES


def test_a_peer_that_sends_many_messages_has_its_share_of_a_turn(native_service: Service) -> None:
    service = native_service
    flood, other = service.known(b"flood"), service.known(b"other")
    flood.sendall(frame(b"x") * 5000)
    other.sendall(frame(b"y"))
    service.until(lambda: (b"other", b"y") in service.received)
    assert len(service.received) < 3000
    service.until(lambda: len(service.received) == 5001)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_tcp_message_without_end_is_ended(runtime_dir: Path, transport: str) -> None:
    received: list[Message] = []
    router = open_router(transport, lambda name, message: received.append(message))
    try:
        port = int(router.listen("tcp://127.0.0.1:0").rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port)) as peer,
            socket.create_connection(("127.0.0.1", port)) as two,
        ):
            for connection in (peer, two):
                connection.sendall(opening())
            peer.settimeout(0)
            data, sent = frame(bytes(60_000), MORE), 0
            deadline = time.monotonic() + PATIENCE
            with suppress(ConnectionError):
                while time.monotonic() < deadline:
                    with suppress(BlockingIOError):
                        sent += peer.send(data)  # a part of a frame, at times: it is cut all the same
                    router.turn(0)
                raise AssertionError(sent)
            two.sendall(frame(b"hello"))
            while b"hello" not in received:
                assert time.monotonic() < deadline
                router.turn(0.01)
    finally:
        router.close()


@pytest.mark.parametrize(("ours", "theirs"), [("native", "libzmq"), ("libzmq", "native"), ("native", "native")])
def test_both_transports_speak_tcp_with_one_another(runtime_dir: Path, ours: str, theirs: str) -> None:
    answers: list[list[bytes]] = []
    source = open_router(theirs, lambda name, message: source.send_parts(name, [b"head", bytes(3 << 20)]))
    asker = open_router(ours, lambda name, message: None)
    try:
        endpoint = source.listen("tcp://127.0.0.1:*")
        connected: list[bool] = []
        asker.connect(
            endpoint.replace("127.0.0.1", "localhost"),
            b"s",
            lambda frames: answers.append([bytes(one) for one in frames]),
            lambda: connected.append(True),
            4 << 20,
        )
        deadline = time.monotonic() + PATIENCE
        asked = False
        while not answers:
            assert time.monotonic() < deadline
            if connected and not asked:
                asked = asker.send(b"s", b"please") == SENT
            asker.turn(0.005)
            source.turn(0.005)
        assert answers == [[b"head", bytes(3 << 20)]]
    finally:
        asker.close()
        source.close()
