"""A worker's channel against routers of libzmq: there, gone, stopped, somebody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from postcopy_protocol.zmtp import GREETING, command, frame
from postcopy_wire.channel import Channel

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

    def hear(self) -> list[bytes]:
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


@pytest.fixture
def channel(path: Path) -> Iterator[Channel]:
    made = Channel(f"ipc://{path}", b"w1.1", b"hello", lambda: None)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    """Somebody at the router's place who is no libzmq."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
        made.listen(4)
        yield made


def opened(channel: Channel) -> Channel:
    assert channel.connect()
    while not channel.connected:
        assert channel.receive_now() == []
    return channel


def test_hello_then_messages_both_ways(router: Router, channel: Channel) -> None:
    made = opened(channel)
    assert router.hear() == [b"w1.1", b"hello"]
    for body in (b"", b"x", bytes(255), bytes(256), bytes(100_000)):
        made.send(body)
        assert router.hear() == [b"w1.1", body]
        router.socket.send_multipart([b"w1.1", body])
        heard: list[bytes] = []
        while not heard:
            heard = made.receive_now()
        assert heard == [body]


def test_a_router_that_comes_late_goes_and_comes_back(path: Path, channel: Channel) -> None:
    made, heard = channel, list[bytes]()
    made.send(b"nobody hears this")

    def read() -> None:
        while len(heard) < 2:
            heard.extend(made.receive())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for word in (b"one", b"two"):
        time.sleep(0.05)
        router = Router(path)
        assert router.hear() == [b"w1.1", b"hello"]
        router.socket.send_multipart([b"w1.1", word])
        deadline = time.monotonic() + PATIENCE
        while word not in heard:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        made.send(b"still here")
        assert router.hear() == [b"w1.1", b"still here"]
        router.close()
    reader.join(PATIENCE)
    assert heard == [b"one", b"two"]


def test_a_router_that_does_not_read_is_not_waited_for(path: Path, listener: socket.socket) -> None:
    """As a stopped supervisor: what the socket does not take is held, and comes whole and in order when it reads."""
    bells = list[int]()
    made = Channel(f"ipc://{path}", b"w1.1", b"hello", lambda: bells.append(1))
    assert made.connect()
    theirs, _ = listener.accept()
    theirs.sendall(GREETING + command(b"READY"))
    while not made.connected:
        made.receive_now()
    words = [(b"%d " % number) * 40 for number in range(4000)]
    for word in words:
        made.send(word)
    assert made.holds() and bells
    came, expected = bytearray(), b"".join(map(frame, words))
    theirs.settimeout(PATIENCE)
    while not came.endswith(expected[-4000:]):
        made.flush()
        came += theirs.recv(1 << 16)
    assert came.endswith(expected) and not made.holds()
    theirs.close()
    made.close()


def test_senders_in_many_threads_do_not_mix(router: Router, channel: Channel) -> None:
    made = opened(channel)
    assert router.hear()[1] == b"hello"
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
    heard = [router.hear()[1] for _ in range(1800)]
    over.set()
    for thread in threads:
        thread.join(PATIENCE)
    for number in range(6):
        body = bytes([number]) * (200 + 40 * number)
        assert sorted(word for word in heard if word.endswith(body) and word.startswith(b"%d." % number)) == sorted(
            b"%d.%d." % (number, count) + body for count in range(300)
        )


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400\r\n" * 9, GREETING.replace(b"NULL\0", b"CURVE")], ids=["http", "curve"]
)
def test_somebody_else_listens_there(listener: socket.socket, channel: Channel, said: bytes) -> None:
    """Given up, and tried again, but not at once."""
    for turn in range(3):
        assert channel.connect() == (turn == 0)
        while channel.fileno() < 0 and not channel.connect():
            time.sleep(channel.retry_in)
        theirs, _ = listener.accept()
        theirs.sendall(said)
        while channel.fileno() >= 0:
            assert channel.receive_now() == []
        assert not channel.connected
        theirs.close()
