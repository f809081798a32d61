"""A worker's channel against routers of libzmq and bare sockets, for both transports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from postcopy_protocol.zmtp import GREETING, MORE, command, frame
from postcopy_wire.channel import NativeChannel
from postcopy_wire.factory import open_channel
from postcopy_wire.transport import TRANSPORTS, Channel

PATIENCE = 20.0


class Router:
    """A ROUTER as the supervisor's is."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 0), (zmq.ROUTER_MANDATORY, 1), (zmq.ROUTER_HANDOVER, 1)):
            self.socket.setsockopt(option, value)
        self.socket.bind(f"ipc://{path}")

    def receive(self) -> list[bytes]:
        assert self.socket.poll(int(PATIENCE * 1000)), "nothing came"
        return self.socket.recv_multipart()

    def close(self) -> None:
        self.context.destroy(0)


@pytest.fixture
def path(runtime_dir: Path) -> Iterator[Path]:
    made = runtime_dir / "router"
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture
def router(path: Path) -> Iterator[Router]:
    made = Router(path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def channel(path: Path, transport: str) -> Iterator[Channel]:
    made = open_channel(transport, f"ipc://{path}", b"w1.1", b"hello", lambda: None)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    """A bare socket in the router's place."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
        made.listen(4)
        yield made


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def opened(channel: Channel) -> Channel:
    assert channel.connect()

    def connected() -> bool:
        assert channel.receive_now() == []
        return channel.connected

    until(connected)
    return channel


def next_message(channel: Channel) -> bytes:
    deadline = time.monotonic() + PATIENCE
    while not (messages := channel.receive_now()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (message,) = messages
    return message


def test_hello_then_messages_both_ways(router: Router, channel: Channel) -> None:
    made = opened(channel)
    assert router.receive() == [b"w1.1", b"hello"]
    for body in (b"", b"x", bytes(255), bytes(256), bytes(100_000)):
        made.send(body)
        assert router.receive() == [b"w1.1", body]
        router.socket.send_multipart([b"w1.1", body])
        assert next_message(made) == body


@pytest.mark.parametrize("size", [3, 300])
def test_the_last_frame_of_several_is_the_message(router: Router, channel: Channel, size: int) -> None:
    made = opened(channel)
    assert router.receive()[1] == b"hello"
    router.socket.send_multipart([b"w1.1", b"", b"envelope", bytes(size)])
    assert next_message(made) == bytes(size)


def test_a_router_that_comes_late_goes_and_comes_back(path: Path, channel: Channel) -> None:
    made, received = channel, list[bytes]()
    made.send(b"dropped: there is no connection")

    def read() -> None:
        while len(received) < 2:
            received.extend(made.receive())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for message in (b"one", b"two"):
        time.sleep(0.05)
        router = Router(path)
        assert router.receive() == [b"w1.1", b"hello"]
        router.socket.send_multipart([b"w1.1", message])
        until(lambda: message in received)  # noqa: B023
        made.send(b"still here")
        assert router.receive() == [b"w1.1", b"still here"]
        router.close()
    reader.join(PATIENCE)
    assert received == [b"one", b"two"]


def test_a_send_does_not_consume_the_wake_of_the_receiver(router: Router, channel: Channel) -> None:
    """A send of libzmq may find the message that the receiver waits for: the receiver's descriptor stays silent then.
    A receiver that is not woken would wait for the next message."""
    made, answered = opened(channel), list[bytes]()
    assert router.receive()[1] == b"hello"

    def read() -> None:
        while len(answered) < 2000:
            answered.extend(made.receive())

    def answer() -> None:
        for _ in range(2000):
            router.socket.send_multipart(router.receive())

    threads = [threading.Thread(target=act, daemon=True) for act in (read, answer)]
    for thread in threads:
        thread.start()
    for number in range(2000):
        made.send(b"%d" % number)
        if number % 8 == 7:
            until(lambda: len(answered) > number)  # noqa: B023
    for thread in threads:
        thread.join(PATIENCE)
    assert answered == [b"%d" % number for number in range(2000)]


def test_no_send_waits_for_a_router_that_does_not_read(path: Path, transport: str, listener: socket.socket) -> None:
    """As a stopped supervisor: what the socket does not accept is held, and arrives whole and in order when it
    reads."""
    held = list[int]()
    made = open_channel(transport, f"ipc://{path}", b"w1.1", b"hello", lambda: held.append(1))
    assert made.connect()
    theirs, _ = listener.accept()
    theirs.sendall(GREETING + command(b"READY", b"\x0bSocket-Type\0\0\0\6ROUTER"))
    until(lambda: made.receive_now() or made.connected)
    messages = [(b"%d " % number) * 40 for number in range(8000)]
    for message in messages:
        made.send(message)
    assert made.holds() and held
    arrived, expected = bytearray(), b"".join(map(frame, messages))
    theirs.settimeout(PATIENCE)
    while not arrived.endswith(expected[-4000:]):
        made.flush()
        arrived += theirs.recv(1 << 16)
    assert arrived.endswith(expected) and not made.holds()
    theirs.close()
    made.close()


def test_senders_in_many_threads_do_not_mix(router: Router, channel: Channel) -> None:
    made = opened(channel)
    assert router.receive()[1] == b"hello"
    over = threading.Event()

    def flush() -> None:
        while not over.wait(0.001):
            made.flush()

    def send(number: int) -> None:
        for count in range(300):
            made.send(b"%d.%d." % (number, count) + bytes([number]) * (200 + 40 * number))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)] + [threading.Thread(target=flush)]
    for thread in threads:
        thread.start()
    received = [router.receive()[1] for _ in range(1800)]
    over.set()
    for thread in threads:
        thread.join(PATIENCE)
    for number in range(6):
        body = bytes([number]) * (200 + 40 * number)
        assert sorted(
            message for message in received if message.endswith(body) and message.startswith(b"%d." % number)
        ) == sorted(b"%d.%d." % (number, count) + body for count in range(300))


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400\r\n" * 9,
        GREETING.replace(b"NULL\0", b"CURVE"),
        GREETING + command(b"READY") + frame(b"x", MORE) + command(b"PING", b"\0\0"),
    ],
    ids=["http", "curve", "command inside a message"],
)
def test_a_peer_that_is_no_router(listener: socket.socket, path: Path, said: bytes) -> None:
    """The native channel gives up the connection, and tries again, but not at once."""
    channel = NativeChannel(f"ipc://{path}", b"w1.1", b"hello", lambda: None)
    for turn in range(3):
        assert channel.connect() == (turn == 0) or b"READY" in said
        while channel.fileno() < 0 and not channel.connect():
            time.sleep(channel.retry_in)
        theirs, _ = listener.accept()
        theirs.sendall(said)
        while channel.fileno() >= 0:
            assert channel.receive_now() == []
        assert not channel.connected
        theirs.close()
    channel.close()


def test_a_peer_that_is_no_router_does_not_end_a_channel_of_libzmq(path: Path) -> None:
    """It goes on trying, and finds the router that comes later."""
    channel = open_channel("libzmq", f"ipc://{path}", b"w1.1", b"hello", lambda: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(4)
        channel.connect()
        theirs, _ = listener.accept()
        theirs.sendall(b"HTTP/1.1 400\r\n" * 9)
        assert channel.receive_now() == [] and not channel.connected
        theirs.close()
    router = Router(path)
    try:
        opened(channel)
        assert router.receive() == [b"w1.1", b"hello"]
    finally:
        channel.close()
        router.close()
