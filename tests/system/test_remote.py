"""Remote blocks with real processes: the same bytes as from a file, each page asked for once, urgent and in the
background, from one source or several."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.messages import ExportProgress
from tests.conftest import SourceFile
from tests.kernel.huge_pool import reserved
from tests.system.remote import Source, await_state, kinds, source_of
from tests.system.service import PAGE, Authenticator, Service, refused, until, word

ODD = 3 * (1 << 20) + 4099
MIB = 1 << 20
HUGE = 2 << 20


@pytest.mark.parametrize("rate", ["0", "auto"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_every_byte(runtime_dir: Path, source_file: SourceFile, mode: str, rate: str) -> None:
    path = source_file(ODD)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), background_rate=rate) as service:
        clients = [service.client("ram0", mode) for _ in range(2)]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        assert [client.answer() for client in clients] == [-1, -1]
        assert clients[0].do("behind(b)") == ""
        block = service.block()
        assert (block["size"], block["kind"], block["lost"]) == (ODD, "remote", 0)
        service.await_received(block["pages"])
        assert source_of(service)["state"] == "up" and source_of(service)["pages"] == block["pages"]


@pytest.mark.parametrize("window", ["4K", "256K", "auto"])
def test_in_order_with_fault_around(runtime_dir: Path, source_file: SourceFile, window: str) -> None:
    path = source_file(ODD)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": window}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        assert service.client().do(f"check(b, {str(path)!r}, 'forward', 4096)") == -1
        asked = source_of(service)["requests"]
        pages = service.block()["pages"]
        assert asked == pages if window == "4K" else asked < pages / 8


def test_local_and_remote_blocks_share_one_background_rate(runtime_dir: Path, source_file: SourceFile) -> None:
    """Each kind had a token bucket of its own: 2M gave 1.8 and 1.6 MiB/s."""
    rate, path = 2 * MIB, source_file(32 * MIB)
    with (
        Source(f"far={path}") as source,
        Service(runtime_dir, source.block("far"), f"near={path}", background_rate="2M") as service,
    ):

        def received() -> tuple[float, list[int]]:
            status = service.status()
            return status["uptime_s"], [block["received"] * PAGE for block in status["blocks"]]

        until(lambda: all(received()[1]), "both streams have begun")
        begun, before = received()
        until(lambda: received()[0] > begun + 4, "some seconds pass")
        ended, after = received()
    far, near = (have - had for had, have in zip(before, after, strict=True))
    assert far + near <= 1.15 * rate * (ended - begun)
    assert far + near >= 0.5 * rate * (ended - begun), "the rate is used"
    assert min(far, near) >= (far + near) / 4, "no block keeps the other from its turn"


def test_several_blocks_and_several_sources(runtime_dir: Path, source_file: SourceFile) -> None:
    paths = [source_file(MIB + PAGE * number + 1, number, f"{number}.bin") for number in range(4)]
    one = Source(f"x={paths[0]}", f"y={paths[1]}")
    two = Source(f"x={paths[2]}")
    local = f"file={paths[3]}"
    blocks = [one.block("x"), one.block("y"), two.block("x", "z"), local]
    with one, two, Service(runtime_dir, *blocks, source_timeout="1") as service:
        clients = [service.client(None) for _ in range(2)]
        for client, mode in zip(clients, ("private", "shared"), strict=True):
            for name in ("x", "y", "z", "file"):
                client.attach(name, mode, name)
            wanted = zip(("x", "y", "z", "file"), paths, strict=True)
            checks = [f"check({name}, {str(path)!r}, 'random')" for name, path in wanted]
            client.begin(f"[{', '.join(checks)}]")
        assert [client.answer() for client in clients] == [[-1] * 4] * 2
        assert len(service.status()["sources"]) == 2
        two.end()
        await_state(service, "paused", number=1)
        assert source_of(service, 0)["state"] == "up", "the loss of one is not that of the other"


@pytest.mark.hugetlb
@pytest.mark.parametrize("rate", ["0", "auto"])
def test_huge_pages(runtime_dir: Path, source_file: SourceFile, rate: str) -> None:
    path = source_file(2 * HUGE + 4099)
    options: dict[str, Any] = {"page_size": "2M", "background_rate": rate}
    with reserved(6), Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 65536, {seed})")
        assert [client.answer() for client in clients] == [-1, -1]
        service.await_received(3)
        assert source_of(service)["pages"] == 3


def test_each_page_is_asked_for_once_in_lockstep(runtime_dir: Path, source_file: SourceFile) -> None:
    """Eight clients at the same pages at the same time: one request a page, and everybody else deduplicated."""
    path = source_file(200 * PAGE)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 4]
        source.tell(signal.SIGSTOP)
        for client in clients:
            client.begin("words(b, list(range(200)))")
        until(lambda: service.status()["totals"]["deduplicated"] >= 7, "all stand at the first page")
        source.tell(signal.SIGCONT)
        assert [client.answer() for client in clients] == [[word(page * PAGE) for page in range(200)]] * 8
        document = service.status()
        assert (source_of(service)["requests"], source_of(service)["pages"]) == (200, 200)
        assert document["totals"]["faults"] >= 200 and document["totals"]["deduplicated"] >= 7


def test_zeros_travel_as_none(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(4 * MIB)
        file.write(b"here")
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block()) as service:
        assert service.client().do(f"check(b, {str(path)!r}, 'random')") == -1
        service.await_received(2048)
        assert source_of(service)["bytes"] <= 2 * MIB and source_of(service)["pages"] == 2048


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_workers_killed_in_the_middle(runtime_dir: Path, source_file: SourceFile, tmp_path: Path, mode: str) -> None:
    path, gate = source_file(16 * MIB), Authenticator(tmp_path, 4)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        clients = [service.client("ram0", mode) for _ in range(2)]
        for seed, client in enumerate(clients):
            client.begin(gate.order(path, 4096, seed))
        for life in range(1, 4):
            before = service.block()["received"]
            for client in clients:
                service.kill_worker(client)
                until(lambda c=client, life=life: service.record(c)["restarts"] == life, "a successor")  # type: ignore[misc]
            gate.open()
            until(lambda before=before: service.block()["received"] > before, "it goes on")  # type: ignore[misc]
        assert [client.answer(60) for client in clients] == [-1, -1]
        assert service.status()["totals"]["restarts"] == 6


def test_a_worker_killed_while_its_client_waits(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(16 * PAGE)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), background_rate="0") as service:
        client = service.client()
        source.tell(signal.SIGSTOP)
        client.begin("words(b, [7])")
        until(lambda: service.record(client)["requests"], "it has asked")
        service.kill_worker(client)
        until(lambda: service.record(client)["restarts"] == 1 and service.worker(client), "its successor is there")
        source.tell(signal.SIGCONT)
        assert client.answer() == [word(7 * PAGE)]


def test_background_fills_the_block_and_lets_the_clients_go(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(8 * MIB)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block()) as service:
        client = service.client()
        until(lambda: service.block()["complete"], "the background brings everything")
        until(lambda: service.record(client).get("released") == ["ram0"], "its client is released")
        until(lambda: "is complete" in source.log(), "the source is told")
        source.end()
        assert client.do(f"check(b, {str(path)!r})") == -1
        assert service.client("ram0", "shared").do(f"check(b, {str(path)!r})") == -1, "without its source"
        assert service.status()["totals"]["faults"] == 0


def test_the_rate_of_the_background(runtime_dir: Path, source_file: SourceFile) -> None:
    """2 MiB a second, and the first MiB at once: after three seconds about six or seven are there, of 32."""
    path = source_file(32 * MIB)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), background_rate="2M") as service:
        begun, before = time.monotonic(), service.block()["received"] * PAGE
        until(lambda: time.monotonic() - begun >= 3.0, "three seconds")
        came, took = service.block()["received"] * PAGE - before, time.monotonic() - begun
        assert 0.4 * took * 2 * MIB <= came <= 2 * took * 2 * MIB
        assert service.client().do(f"words(b, [{30 * 256}])") == [word(30 * MIB)], "who waits does not wait for it"


def test_background_stops_at_max_memory(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(32 * MIB)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), max_memory="8M") as service:
        until(lambda: service.events("memory"), "memory is said to be scarce")
        until(lambda: source_of(service)["in_flight"] == 0, "what was on its way has come")
        received = service.block()["received"]
        assert 1024 <= received <= 7168, "about 8 MiB, and what was on its way"
        assert service.client().do("words(b, [8000])") == [word(8000 * PAGE)]
        assert service.block()["received"] <= received + 64


def test_export_of_a_remote_block(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path = source_file(ODD)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), background_rate="0") as service:
        job = service.export(tmp_path / "out")
        assert isinstance(job, ExportProgress)
        until(lambda: service.progress(job.job).state != "running", "the export ends")
        assert service.progress(job.job).state == "done"
        assert (tmp_path / "out").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("waits", [False, True])
def test_the_end_while_pages_are_missing(runtime_dir: Path, source_file: SourceFile, waits: bool) -> None:
    path = source_file(64 * PAGE)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), background_rate="0") as service:
        client = service.client("ram0", "shared")
        assert client.do("words(b, [1])") == [word(PAGE)]
        if waits:
            source.tell(signal.SIGSTOP)
            client.begin("words(b, [60])")
            until(lambda: source_of(service)["in_flight"], "it has asked")
        service.audit()
        service.end()
        if not waits:
            assert client.do("words(b, [1])") == [word(PAGE)]
            client.begin("words(b, [60])")
        assert client.status() == -signal.SIGBUS
        source.tell(signal.SIGCONT)


def test_a_client_that_leaves_with_requests_open(runtime_dir: Path, source_file: SourceFile) -> None:
    """Others who wait for the same pages, and those who come later, get them."""
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K", "source_timeout": "1"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        leaver, stayer = service.client(), service.client("ram0", "shared")
        source.tell(signal.SIGSTOP)
        await_state(service, "paused")
        for client in (leaver, stayer):
            client.begin("words(b, [9])")
            until(lambda client=client: service.record(client)["requests"], "it has asked")  # type: ignore[misc]
        leaver.kill()
        until(lambda: len(service.status()["clients"]) == 1, "it has left")
        late = service.client()
        late.begin("words(b, [9])")
        source.tell(signal.SIGCONT)
        assert [stayer.answer(), late.answer()] == [[word(9 * PAGE)]] * 2


def test_one_remote_block_under_two_names(runtime_dir: Path, source_file: SourceFile) -> None:
    """Refused in one line, or served: never a block whose clients wait for ever."""
    with Source(f"ram0={source_file(PAGE)}") as source:
        status, said = refused(runtime_dir, source.block("ram0", "a"), source.block("ram0", "b"))
        assert status in (1, 2) and "\n" not in said and "a" in said and "b" in said


def test_a_source_that_has_no_such_block(runtime_dir: Path, source_file: SourceFile) -> None:
    """It has no such block, and says which it has; the supervisor ends with that line."""
    with Source(f"ram0={source_file(PAGE)}") as source:
        status, said = refused(runtime_dir, source.block("ram1"))
        assert status in (1, 2) and "no-such-block" in said and "ram0" in said
        assert not (runtime_dir / "door").exists()


def test_nobody_listens_yet(runtime_dir: Path, source_file: SourceFile) -> None:
    """It waits and says so, and is ready when the source comes."""
    path = source_file(16 * PAGE)
    source = Source(f"ram0={path}")
    try:
        service = Service(runtime_dir, source.block())
        until(lambda: f"waiting for the source at {source.endpoint}" in service.log(), "it says what it waits for")
        assert "ready" not in service.log() and service.process.poll() is None
        source.start()
        with service:
            assert service.client().do(f"check(b, {str(path)!r})") == -1
            assert kinds(service, "source", "pause") == ["source"]
    finally:
        source.close()


def test_nobody_ever_listens(runtime_dir: Path) -> None:
    service = Service(runtime_dir, f"ram0=ipc://{runtime_dir}/nobody/ram0")
    try:
        until(lambda: "waiting for the source" in service.log(), "it waits")
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0
        assert "Traceback" not in service.log() and not (runtime_dir / "door").exists()
    finally:
        service._drop()
