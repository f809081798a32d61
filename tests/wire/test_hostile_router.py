"""Bad bytes at the router, and peers with a false name. They run as our own user; still, no program fails."""

from __future__ import annotations

import filecmp
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_protocol.codec import decode, encode, pack_offsets
from postcopy_protocol.messages import AskProgress, ControlRefused, ExportProgress, Fetched, Hello, Report, WorkerHello
from postcopy_wire.transport import TRANSPORTS
from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, until, word

SIZE = 4 << 20


@pytest.fixture(params=TRANSPORTS)
def served(
    runtime_dir: Path, source_file: SourceFile, request: pytest.FixtureRequest
) -> Iterator[tuple[Service, Puppet, Path]]:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", transport=request.param) as service:
        client = service.client("ram0", "shared")
        yield service, client, path
        assert service.status()["state"] == "running"
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1


def test_bad_messages_are_refused(served: tuple[Service, Puppet, Path]) -> None:
    service, _, _ = served
    for frames in ([b"junk"], [b"\x93\x01\x3c"], [encode(Hello("x", "native"))], [b"\x93\x63\x3c\xc2"], [b"a", b"b"]):
        with service.dealer() as dealer:
            dealer.send_multipart(frames)
            assert dealer.poll(5000), frames
            assert isinstance(decode(dealer.recv(), expect=(ControlRefused,)), ControlRefused)


def test_thousands_of_random_frames(served: tuple[Service, Puppet, Path]) -> None:
    service, client, _ = served
    chance = random.Random(3)
    with service.dealer() as dealer:
        for number in range(5000):
            frames = [chance.randbytes(chance.randrange(0, 60)) for _ in range(chance.randrange(1, 5))]
            dealer.send_multipart(frames)
            if number % 100 == 0:
                page = number // 100
                assert client.do(f"words(b, [{page}])", 5) == [word(page * PAGE)]
        service.status()


def test_huge_frames(served: tuple[Service, Puppet, Path]) -> None:
    service, client, _ = served
    for size in (1 << 20, 64 << 20):
        with service.dealer() as dealer:
            dealer.send(bytes(size))
            dealer.poll(300)
        assert service.status()["state"] == "running"
    assert client.do("words(b, [9])", 5) == [word(9 * PAGE)]


def test_bytes_that_are_no_zeromq(served: tuple[Service, Puppet, Path]) -> None:
    service, _, _ = served
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), greeting, greeting[:20], b"\xff" * 4096):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.connect(str(service.directory / "private/router"))
            stream.send(data)
            service.status()


def test_false_messages_of_workers(served: tuple[Service, Puppet, Path]) -> None:
    service, client, _ = served
    number = service.record(client)["id"]
    false = [
        WorkerHello(999, 1, os.getpid()),
        WorkerHello(number, 77, os.getpid()),
        WorkerHello(number, 1, 1),
        Report(999, "outside", 999, 5, "false"),
        Report(number, "no-such-kind", 1, 1 << 63, "x" * 4000),
        Report(number, "lost", 1, 0, "\n\x1b[31mred"),
        Fetched(1, 0, SIZE, b""),
        Fetched(1, 1 << 60, 1 << 60, b""),
        Fetched(999, 0, PAGE, b""),
        Fetched(1, 0, SIZE, pack_offsets(range(0, SIZE, PAGE))),
        Fetched(1, 0, PAGE, b"odd"),
        AskProgress(999, True),
    ]
    with service.dealer() as dealer:
        for message in false:
            dealer.send(encode(message))
        service.status()
    service.kill_worker(client, signal.SIGKILL)
    assert client.do("words(b, [11])", 10) == [word(11 * PAGE)]
    assert service.status()["totals"]["restarts"] == 1


def test_false_answers_spoil_no_export(served: tuple[Service, Puppet, Path], tmp_path: Path) -> None:
    service, _, path = served
    started = service.export(tmp_path / "out")
    assert isinstance(started, ExportProgress)
    with service.dealer() as dealer:
        while (progress := service.progress(started.job)).state == "running":
            dealer.send(encode(Fetched(1, 0, SIZE, b"")))
    assert progress.state == "done"
    assert filecmp.cmp(path, tmp_path / "out", shallow=False)


def test_a_stolen_name(served: tuple[Service, Puppet, Path], tmp_path: Path) -> None:
    """ROUTER_HANDOVER gives a name to the latest: a thief of worker zero's gets its orders at first."""
    service, client, path = served
    name = b"w%d.1" % service.record(client)["id"]
    with service.dealer(name) as thief, service.dealer(b"other") as other:
        thief.send(b"mine")
        other.send(b"mine")
        assert client.do("words(b, [700])", 5) == [word(700 * PAGE)]
        assert service.status()["state"] == "running"
    with service.dealer(b"w0.1") as thief:
        thief.send(b"mine")
        started = service.export(tmp_path / "out")
        assert isinstance(started, ExportProgress)
        thief.poll(500)
    until(lambda: service.progress(started.job).state != "running", "the export ends", 40)
    assert service.progress(started.job).state == "done"
    assert filecmp.cmp(path, tmp_path / "out", shallow=False)


def test_a_crowd_at_the_router(served: tuple[Service, Puppet, Path]) -> None:
    service, client, _ = served
    streams = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(200)]
    try:
        for stream in streams:
            stream.connect(str(service.directory / "private/router"))
        assert service.status()["state"] == "running"
        assert client.do("words(b, [800])", 5) == [word(800 * PAGE)]
    finally:
        for stream in streams:
            stream.close()
