"""Peers that send without end: the memory of supervisor and source stays bounded, and others are served meanwhile."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from postcopy_protocol.codec import encode
from postcopy_protocol.curve_keys import read_keys
from postcopy_protocol.return_path import Advise, Pong
from postcopy_protocol.zmtp import MORE, Reader, frame, opening
from tests.conftest import SourceFile
from tests.system.remote import Source, kinds
from tests.system.service import PAGE, Service, environment, until, word
from tests.wire.raw_source import RawSource

MOST_GROWTH = {"native": 64 << 20, "libzmq": 1 << 30}
"""With keys libzmq has the same bound. Without, it is so fast, and a frame of 2 bytes takes it 64, that it has this."""
FLOOD_SECONDS = 2.0
SIZE = 4 << 20
FLOODS = {
    "parts": frame(bytes(1000), MORE) * 200,
    "small parts": frame(bytes(40), MORE) * 5000,
    "no parts": frame(b"", MORE) * 50_000,
    "empty messages": frame(b"") * 100_000,
    "pongs": frame(encode(Pong(1))) * 20_000,
}

WORST = ("no parts", "empty messages")
"""For paths that share the code of another one."""


def memory(pid: int) -> int:
    """Bytes of its own memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


class Growth:
    """The most by which a process has grown."""

    def __init__(self, pid: int) -> None:
        self._pid, self._before = pid, memory(pid)
        self.bytes = 0

    def look(self) -> None:
        self.bytes = max(self.bytes, memory(self._pid) - self._before)

    def watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(0.005)


@pytest.mark.parametrize(
    ("flood", "tcp", "transport"),
    [
        *((flood, True, "native") for flood in FLOODS),
        *((flood, False, "native") for flood in WORST),
        *((flood, True, "libzmq") for flood in ("parts", *WORST)),
    ],
)
def test_a_source_that_sends_without_end(
    runtime_dir: Path, source_file: SourceFile, flood: str, tcp: bool, transport: str
) -> None:
    path = source_file(SIZE)
    with (
        RawSource(path, tcp=tcp) as source,
        Service(
            runtime_dir,
            f"ram0={source.endpoint}/ram0",
            f"ram1={path}",
            plain_tcp=True,
            background_rate="0",
            fault_around="4K",
            transport=transport,
        ) as service,
    ):
        remote = service.client("ram0")
        assert remote.do("words(b, [0])", 20) == [word(0)]
        growth = Growth(service.pid)
        source.flood = FLOODS[flood]
        until(lambda: source.flooded, "it floods", 20)
        growth.watch(FLOOD_SECONDS)
        begun = time.monotonic()
        local = service.client("ram1")
        assert local.do("words(b, [5])", 20) == [word(5 * PAGE)]
        took = time.monotonic() - begun
        growth.look()
        source.flood = b""
        assert growth.bytes < MOST_GROWTH[transport], growth.bytes >> 20
        assert took < 8, took  # half a second, on a machine with time
        if flood == "pongs":  # the way back is the same after all of them, and takes 15 s
            assert remote.do("words(b, [9])", 60) == [word(9 * PAGE)]


@pytest.mark.parametrize("flood", WORST)
def test_a_source_that_sends_without_end_before_the_start(
    runtime_dir: Path, source_file: SourceFile, flood: str
) -> None:
    path = source_file(SIZE)
    with RawSource(path, tcp=True) as source:
        source.flood = FLOODS[flood]
        command = [sys.executable, "-m", "postcopy_supervisor", f"ram0={source.endpoint}/ram0", "--plain-tcp"]
        asking = subprocess.Popen(
            [*command, "--runtime-dir", str(runtime_dir)], env=environment(), stderr=subprocess.PIPE
        )
        try:
            until(lambda: source.flooded or asking.poll() is not None, "it floods", 20)
            growth = Growth(asking.pid) if asking.poll() is None else None
            deadline = time.monotonic() + FLOOD_SECONDS
            while growth is not None and asking.poll() is None and time.monotonic() < deadline:
                with suppress(StopIteration, OSError):  # it has just ended
                    growth.look()
            assert growth is None or growth.bytes < MOST_GROWTH["native"]
        finally:
            asking.terminate()
            said = asking.communicate(timeout=40)[1]
        assert b"Traceback" not in said, said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def flooding(endpoint: str, data: bytes) -> Iterator[None]:
    """A peer that sends this again and again, also on the next connection when one is ended."""
    over = threading.Event()

    def send() -> None:
        host, port = endpoint.removeprefix("tcp://").split(":")
        while not over.wait(0.005):
            with suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
                connection.sendall(opening())
                reader = Reader()
                while not reader.ready:
                    reader.feed(connection.recv(4096))
                while not over.is_set():
                    connection.sendall(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join(10)


@pytest.mark.parametrize(
    ("flood", "transport"), [(flood, "native") for flood in FLOODS] + [(flood, "libzmq") for flood in WORST]
)
def test_a_peer_that_sends_to_a_source_without_end(
    runtime_dir: Path, source_file: SourceFile, flood: str, transport: str
) -> None:
    path, endpoint = source_file(SIZE), f"tcp://127.0.0.1:{free_port()}"
    options = ("--plain-tcp", "--transport", transport)
    with (
        Source(f"ram0={path}", listen=endpoint, options=options) as source,
        Service(runtime_dir, source.block(), plain_tcp=True, background_rate="0", fault_around="4K") as service,
    ):
        client = service.client("ram0")
        assert client.do("words(b, [0])", 20) == [word(0)]
        assert source.process is not None
        growth = Growth(source.process.pid)
        with flooding(endpoint, FLOODS[flood]):
            growth.watch(FLOOD_SECONDS)
            for page in (7, 70, 700):
                assert client.do(f"words(b, [{page}])", 20) == [word(page * PAGE)]
        growth.look()
        assert growth.bytes < MOST_GROWTH[transport], growth.bytes >> 20
        assert not kinds(service, "pause")


def test_a_peer_with_a_key_that_sends_without_end(source_file: SourceFile, tmp_path: Path) -> None:
    """libzmq sends a message only when its last part is there; the source is to end it long before it has all come."""
    for name in ("source", "peer"):
        done = subprocess.run([sys.executable, "-m", "postcopy", "keygen", str(tmp_path / name)], env=environment())
        assert not done.returncode
    path, endpoint = source_file(SIZE), f"tcp://127.0.0.1:{free_port()}"
    options = ("--curve-secret", str(tmp_path / "source.key_secret"), "--allow-key", str(tmp_path / "peer.key"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Source(f"ram0={path}", listen=endpoint, options=options) as source:
        assert source.process is not None
        growth = Growth(source.process.pid)
        ours = read_keys((tmp_path / "peer.key_secret").read_text(), "peer", secret=True)
        theirs = read_keys((tmp_path / "source.key").read_text(), "source", secret=False)
        peers = []
        for _ in range(2):
            peer = context.socket(zmq.DEALER)
            for option, value in (
                (zmq.LINGER, 0),
                (zmq.CURVE_PUBLICKEY, ours.public),
                (zmq.CURVE_SECRETKEY, ours.secret or b""),
                (zmq.CURVE_SERVERKEY, theirs.public),
            ):
                peer.setsockopt(option, value)
            peer.connect(endpoint)
            peers.append(peer)
        evil, honest = peers
        ended = evil.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for _ in range(4000):
            evil.send(bytes(60_000), zmq.SNDMORE)
        evil.send(b"end")
        deadline = time.monotonic() + 30
        while not ended.poll(5):
            growth.look()
            assert time.monotonic() < deadline, growth.bytes >> 20
        growth.watch(0.5)
        assert growth.bytes < MOST_GROWTH["native"], growth.bytes >> 20
        honest.send(encode(Advise("ram0", PAGE, ())))
        assert honest.poll(20_000)
        evil.disable_monitor()
        for peer in (*peers, ended):
            peer.close(0)
    context.term()


CURVE_FLOODS = {
    "parts": [b"x" * 1000] * 2000,
    "empty parts": [b""] * 3000,
    "large": [bytes(1 << 20)] * 4,
    "empty messages": [b""],
    "pongs": [encode(Pong(1))],
}


@pytest.mark.parametrize("flood", CURVE_FLOODS)
def test_a_source_with_a_key_that_sends_without_end(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, flood: str
) -> None:
    """It served well until then. Its key is taken over by a program that floods."""
    for pair in ("source", "supervisor"):
        done = subprocess.run([sys.executable, "-m", "postcopy", "keygen", str(tmp_path / pair)], env=environment())
        assert not done.returncode
    path, port = source_file(SIZE), free_port()
    options = ("--curve-secret", str(tmp_path / "source.key_secret"), "--allow-key", str(tmp_path / "supervisor.key"))
    source = Source(f"ram0={path}", listen=f"tcp://127.0.0.1:{port}", options=options)
    keys: Any = {
        "curve_secret": str(tmp_path / "supervisor.key_secret"),
        "source_key": str(tmp_path / "source.key"),
        "background_rate": "0",
        "fault_around": "4K",
    }
    with source, Service(runtime_dir, source.block(), f"ram1={path}", **keys) as service:
        client = service.client("ram0")
        assert client.do("words(b, [0])", 20) == [word(0)]
        source.end()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        ours = read_keys((tmp_path / "source.key_secret").read_text(), "source", secret=True)
        evil = context.socket(zmq.ROUTER)
        evil.curve_server, evil.linger, evil.sndhwm = True, 0, 100
        evil.curve_publickey, evil.curve_secretkey = ours.public, ours.secret or b""
        try:
            evil.bind(f"tcp://127.0.0.1:{port}")
            growth, sent, names = Growth(service.pid), 0, set()
            until(lambda: evil.poll(10), "the supervisor is here", 30)
            deadline = time.monotonic() + FLOOD_SECONDS
            while time.monotonic() < deadline:
                while evil.poll(0):
                    names.add(evil.recv_multipart()[0])
                for name in names:
                    with suppress(zmq.ZMQError):
                        evil.send_multipart([name, *CURVE_FLOODS[flood]], zmq.DONTWAIT)
                        sent += 1
                growth.look()
            begun = time.monotonic()
            assert service.client("ram1").do("words(b, [5])", 20) == [word(5 * PAGE)]
            assert time.monotonic() - begun < 8
            growth.look()
            assert sent > 3 and growth.bytes < MOST_GROWTH["native"], (sent, growth.bytes >> 20)
        finally:
            evil.close(0)
            context.term()
        source.start()
        assert client.do("words(b, [9])", 40) == [word(9 * PAGE)], "it goes on with the honest one"


def test_many_peers_do_not_take_a_supervisors_place(runtime_dir: Path, source_file: SourceFile) -> None:
    path, endpoint = source_file(SIZE), f"tcp://127.0.0.1:{free_port()}"
    with (
        Source(f"ram0={path}", listen=endpoint, options=("--plain-tcp",)) as source,
        Service(runtime_dir, source.block(), plain_tcp=True, background_rate="0", fault_around="4K") as service,
    ):
        client = service.client("ram0")
        assert client.do("words(b, [0])", 20) == [word(0)]
        peers = []
        try:
            for _ in range(400):
                peer = socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=20)
                peers.append(peer)
                peer.sendall(opening() + frame(encode(Advise("ram0", PAGE, ()))))
            for page in (8, 80, 800):
                assert client.do(f"words(b, [{page}])", 20) == [word(page * PAGE)]
            time.sleep(1.5)  # one more Ping
            assert client.do("words(b, [900])", 20) == [word(900 * PAGE)]
        finally:
            for peer in peers:
                peer.close()
        assert not kinds(service, "pause")
