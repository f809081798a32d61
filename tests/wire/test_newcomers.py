"""Connections of peers that are newcomers get a small share of a router's thread; trusted ones do not wait for them."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_protocol.zmtp import Message, command, frame, opening
from postcopy_wire.newcomers import SHARE
from postcopy_wire.router import NativeRouter

PATIENCE = 20.0
WORK = 0.0005  # seconds of the thread for each message


class House:
    """A router whose messages cost time, and its peers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.got: Counter[bytes] = Counter()
        self.router = NativeRouter(self.on_message, newcomers=True)
        self.router.listen(f"ipc://{path}")
        self.peers: list[socket.socket] = []

    def on_message(self, name: bytes, message: Message) -> None:
        self.got[name] += 1
        if message == b"trust me":
            self.router.trust(name)
        if message == b"nonsense":
            self.router.trust(name, False)
        until = time.thread_time() + WORK
        while time.thread_time() < until:
            pass

    def peer(self, name: bytes) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        self.peers.append(peer)
        peer.settimeout(PATIENCE)
        peer.connect(str(self.path))
        peer.send(opening(name))
        return peer

    def until(self, name: bytes, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.got[name] < count:
            assert time.monotonic() < deadline, self.got
            self.router.turn(0.01)

    def busy_share(self, seconds: float) -> float:
        """Of the thread's time, in so many seconds."""
        began, used = time.monotonic(), time.thread_time()
        while time.monotonic() - began < seconds:
            self.router.turn(0.01)
        return (time.thread_time() - used) / (time.monotonic() - began)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "s")
    yield made
    for peer in made.peers:
        peer.close()
    made.router.close()


def flood(house: House, *names: bytes) -> None:
    for name in names:
        peer = house.peer(name)
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                peer.send(frame(b"x") * 64)


def test_newcomers_get_a_share(house: House) -> None:
    flood(house, b"a", b"b", b"c")
    share = house.busy_share(1.0)
    assert 0 < share < 2 * SHARE
    assert all(house.got[name] for name in (b"a", b"b", b"c")), house.got


def test_a_trusted_peer_does_not_wait_for_newcomers(house: House) -> None:
    honest = house.peer(b"honest")
    honest.send(frame(b"trust me"))
    house.until(b"honest", 1)
    flood(house, *(b"s%d" % number for number in range(32)))
    house.busy_share(0.2)
    for count in range(2, 22):
        before = house.got.total()
        honest.send(frame(b"question"))
        house.until(b"honest", count)
        assert house.got.total() - before < 8, "one slice at most is before it"


def test_a_newcomer_becomes_trusted_in_a_flood(house: House) -> None:
    flood(house, *(b"s%d" % number for number in range(16)))
    honest = house.peer(b"honest")
    honest.send(frame(b"trust me"))
    house.until(b"honest", 1)
    honest.send(frame(b"question") * 200)
    began = house.got.total()
    house.until(b"honest", 201)
    assert house.got.total() - began < 400, "it is read before all newcomers"


def test_one_that_sends_nonsense_is_a_newcomer_again(house: House) -> None:
    """Also with messages that have been read already, and answers that wait."""
    peer = house.peer(b"once good")
    peer.send(frame(b"trust me") + frame(b"nonsense") + frame(b"x") * 300 + command(b"PING", b"\0\0"))
    share = house.busy_share(0.4)
    assert share < 3 * SHARE, share
    house.until(b"once good", 302)


def test_silence_and_leaving_cost_nothing(house: House) -> None:
    """Descriptors are used again: nothing of a newcomer that left is kept."""
    for _ in range(50):
        peer = house.peer(b"x")
        peer.send(frame(b"y") * 20)
        house.router.turn(0.01)
        peer.close()
    house.until(b"x", 1)
    deadline = time.monotonic() + PATIENCE
    while house.router.inbound or house.router.pending:
        assert time.monotonic() < deadline
        house.router.turn(0.01)
    assert house.busy_share(0.2) < 0.05
