"""The whole service over each transport, and with one transport in the supervisor and the other in the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy_wire.transport import TRANSPORTS
from tests.conftest import SourceFile
from tests.system.remote import Source, await_state
from tests.system.service import PAGE, Service, until, word

SIZE = 1024 * PAGE
SLOW: dict[str, Any] = {"background_rate": "0", "fault_around": "4K", "source_timeout": "1"}


def uses_libzmq(pid: int) -> bool:
    """libzmq has threads of its own."""
    names = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm"))
    return any(name.startswith("ZMQbg") for name in names)


@pytest.fixture
def source(source_file: SourceFile, transport: str) -> Iterator[Source]:
    """Of a file of SIZE, with the transport of the test."""
    with Source(f"ram0={source_file(SIZE)}", options=("--transport", transport)) as source:
        yield source


@pytest.fixture
def path(source: Source, tmp_path: Path) -> Path:
    return tmp_path / "source.bin"


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("theirs", TRANSPORTS)
def test_every_byte_with_each_pair_of_transports(
    runtime_dir: Path, source: Source, path: Path, transport: str, theirs: str
) -> None:
    """``theirs`` is the supervisor's and its workers'."""
    with Service(runtime_dir, source.block(), transport=theirs, **SLOW) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for pid in (service.pid, *map(service.worker, clients)):
            # The supervisor has asked for advice over libzmq, and keeps that context.
            assert uses_libzmq(pid) == (theirs == "libzmq") or pid == service.pid
        assert source.process is not None and uses_libzmq(source.process.pid) == (transport == "libzmq")
        for client in clients:
            assert client.do(f"check(b, {str(path)!r}, 'random', 4096)", 60) == -1


def test_a_source_is_lost_and_returns(runtime_dir: Path, source: Source, transport: str) -> None:
    with Service(runtime_dir, source.block(), transport=transport, **SLOW) as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        source.end()
        await_state(service, "paused")
        client.begin("words(b, [2, 3])")
        assert not client.answered(0.5)
        source.start()
        assert client.answer() == [word(2 * PAGE), word(3 * PAGE)]
        await_state(service, "up")


def test_a_worker_is_killed(runtime_dir: Path, source: Source, transport: str) -> None:
    """Its successor uses the same transport, and asks again for what the client waits for."""
    with Service(runtime_dir, source.block(), transport=transport, **SLOW) as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        source.end()
        await_state(service, "paused")
        client.begin("words(b, [2])")
        until(lambda: service.record(client)["requests"] >= 2, "it asks")
        service.kill_worker(client)
        source.start()
        assert client.answer() == [word(2 * PAGE)]
        assert uses_libzmq(service.worker(client)) == (transport == "libzmq")
        assert service.status()["transport"] == transport


def test_a_supervisor_is_killed_and_recovered(runtime_dir: Path, source: Source, transport: str) -> None:
    """A client that waits while there is no supervisor gets its page from the next one."""
    with Service(runtime_dir, source.block(), transport=transport, **SLOW) as service:
        client = service.client("ram0", "shared")
        assert client.do("words(b, [1])") == [word(PAGE)]
        worker = service.worker(client)
        service.kill()
        client.begin("words(b, [2, 3])")
        assert not client.answered(0.3)
        service.recover()
        assert client.answer() == [word(2 * PAGE), word(3 * PAGE)]
        assert service.worker(client) == worker
        service.kill_worker(client)
        assert client.do("words(b, [4])") == [word(4 * PAGE)]
        assert uses_libzmq(service.worker(client)) == (transport == "libzmq")


def test_workers_keep_their_transport_when_the_next_supervisor_has_another(
    runtime_dir: Path, source: Source, transport: str
) -> None:
    (other,) = {*TRANSPORTS} - {transport}
    with Service(runtime_dir, source.block(), transport=transport, **SLOW) as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.kill()
        service.recover(transport=other)
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        assert uses_libzmq(service.worker(client)) == (transport == "libzmq")
        service.kill_worker(client)
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        assert uses_libzmq(service.worker(client)) == (other == "libzmq")


def test_the_environment_chooses(runtime_dir: Path, source_file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line overrides it."""
    monkeypatch.setenv("POSTCOPY_TRANSPORT", "libzmq")
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert uses_libzmq(service.pid) and uses_libzmq(service.worker(client))
        started = service.export(runtime_dir / "out")
        until(lambda: service.progress(started.job).state == "done", "the export ends")  # type: ignore[attr-defined]
        (runtime_dir / "out").unlink()
    with Service(runtime_dir, f"ram0={path}", transport="native") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert not uses_libzmq(service.worker(client))
