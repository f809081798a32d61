"""Blocks of 2 MiB pages. The pages are reserved for a test and given back after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import postcopy
from postcopy_kernel.memory import REMOVE, Mapping, create_memfd, huge_pages
from tests.conftest import SourceFile
from tests.kernel.huge_pool import reserved
from tests.system.remote import Source
from tests.system.service import PAGE, PuppetError, Service, end_by_pidfd, refused, until, word
from tests.system.test_rescue import kill_all

pytestmark = pytest.mark.hugetlb
HUGE = 2 << 20
POOL = 6


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    with reserved(POOL):
        yield


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("size", [1, 2 * HUGE, 2 * HUGE + 4099])
def test_every_byte_in_huge_pages(runtime_dir: Path, source_file: SourceFile, size: int, mode: str) -> None:
    path = source_file(size)
    with Service(runtime_dir, f"ram0={path}", page_size="2M") as service:
        clients = [service.client("ram0", mode) for _ in range(2)]
        assert clients[0].do("[b.size, b.page_size, len(b.buf)]") == [size, HUGE, size]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 65536, {seed})")
        assert [client.answer() for client in clients] == [-1, -1]
        assert clients[0].do("behind(b)") == ""
        block = service.block()
        assert (block["page_size"], block["pages"]) == (HUGE, -(-size // HUGE))
        service.await_received(block["pages"])
        until(lambda: service.status()["totals"]["placed"] == block["pages"], "each is placed once, and counted")


def test_one_touch_brings_one_huge_page(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(3 * HUGE)
    with Service(runtime_dir, f"ram0={path}", page_size="2M") as service:
        client = service.client()
        assert client.do(f"words(b, [{HUGE // PAGE + 5}])") == [word(HUGE + 5 * PAGE)]
        service.await_received(1)
        client.do(f"write(b, {HUGE}, 'ffff')")  # a copy of its own: one more page of the pool
        assert service.client().do(f"words(b, [{HUGE // PAGE}])") == [word(HUGE)]


def test_private_copies_are_reserved_or_refused(
    runtime_dir: Path, source_file: SourceFile, caplog: pytest.LogCaptureFixture
) -> None:
    """A write that finds the pool empty would be SIGBUS."""
    path = source_file(3 * HUGE)
    data = path.read_bytes()
    with Service(runtime_dir, f"ram0={path}", page_size="2M"):
        writer = postcopy.attach("ram0", runtime_dir)
        reader = postcopy.attach("ram0", runtime_dir)
        assert "block ram0 is read-only here: private writes need 3 more huge pages of 2M, 0 are free" in caplog.text
        for offset in range(0, writer.size, HUGE):
            writer.buf[offset] ^= 0xFF
        assert bytes(reader.buf) == data
        with pytest.raises(TypeError, match="read-only"):
            reader.buf[0] = 1
        assert writer.buf[HUGE] == data[HUGE] ^ 0xFF
        writer.close()
        with postcopy.attach("ram0", runtime_dir) as again:  # the pages of the closed one are free again
            again.buf[0] ^= 0xFF
        reader.close()


def test_everything_dies_and_clients_of_huge_pages_are_rescued(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(3 * HUGE)
    with Service(runtime_dir, f"ram0={path}", page_size="2M", on_orphan="poison", orphan_timeout=1) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        assert [client.do("words(b, [0])") for client in clients] == [[word(0)]] * 2
        kill_all(service)
        with pytest.raises(PuppetError, match="Bad address"):
            clients[0].do(f"syscall_read(b, {HUGE})")
        assert [client.do("words(b, [1])") for client in clients] == [[word(PAGE)]] * 2
        service.recover()
        assert clients[1].do(f"words(b, [{2 * HUGE // PAGE}])") == [word(2 * HUGE)]
        late = service.client()
        assert late.do(f"check(b, {str(path)!r}, 'random')") == -1


def test_a_worker_killed_over_a_huge_page(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(3 * HUGE)
    with Service(runtime_dir, f"ram0={path}", page_size="2M") as service:
        for place, mode in enumerate(("private", "shared")):
            client = service.client("ram0", mode)
            pid = service.kill_worker(client, signal.SIGSTOP)
            client.begin(f"words(b, [{place * HUGE // PAGE + 7}])")
            assert not client.answered(0.2)
            end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
            assert client.answer() == [word(place * HUGE + 7 * PAGE)]


def test_a_pool_that_is_too_small(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(POOL * HUGE + 1)
    status, said = refused(runtime_dir, f"ram0={path}", options={"page_size": "2M"})
    assert status == 1 and "\n" not in said
    assert f"needs {POOL + 1} huge pages" in said and f"{POOL} are free" in said and "vm.nr_hugepages" in said
    assert not (runtime_dir / "door").exists()


def test_a_pool_that_others_took(runtime_dir: Path, source_file: SourceFile) -> None:
    """The whole block is reserved at serve, so a second supervisor is refused, and the first can place every page."""
    path = source_file(4 * HUGE)
    with Service(runtime_dir / "a", f"ram0={path}", page_size="2M") as service:
        status, said = refused(runtime_dir / "b", f"ram0={path}", options={"page_size": "2M"})
        assert status == 1 and "2 are free" in said
        assert service.client("ram0", "shared").do(f"check(b, {str(path)!r})") == -1


def test_a_pool_that_is_empty_while_running(runtime_dir: Path, source_file: SourceFile) -> None:
    """A punched hole gives up its reservation. When others have taken the page, COPY says EEXIST though nothing is
    there: whoever touches it waits, without spinning, until the pool has a page again; nobody else notices."""
    path = source_file(POOL * HUGE)
    with Service(runtime_dir, f"ram0={path}", page_size="2M", restart_limit=20) as service:
        client, other = service.client("ram0", "shared"), service.client("ram0", "shared")
        seen = [number * HUGE // PAGE for number in range(POOL - 1)]  # not all: a block that is whole is released
        assert client.do(f"words(b, {seen})") == other.do(f"words(b, {seen})") == [word(page * PAGE) for page in seen]
        worker = service.worker(client)
        other.do(f"b.mapping.advise({REMOVE}, {2 * HUGE}, {HUGE})")
        assert huge_pages().available == 1
        taken = create_memfd("taken", HUGE, HUGE)
        try:
            with Mapping.of(taken, HUGE, reserve=True):
                assert huge_pages().available == 0
                client.begin(f"words(b, [{2 * HUGE // PAGE + 1}])")
                until(lambda: service.events("no-memory"), "the worker tells of it")
                assert "ENOSPC" in service.events("no-memory")[0]
                before = cpu_ticks(worker)
                assert not client.answered(1.0)
                assert cpu_ticks(worker) - before < 30, "it waits, ever longer"
                assert other.do("words(b, [5])") == [word(5 * PAGE)]
                assert service.worker(client) == worker and service.status()["totals"]["lost"] == 0
        finally:
            os.close(taken)
        assert client.answer() == [word(2 * HUGE + PAGE)]
        assert other.do(f"check(b, {str(path)!r})") == -1


def test_a_pool_that_is_empty_while_a_source_sends(runtime_dir: Path, source_file: SourceFile) -> None:
    """The same, where the supervisor places: it waits for the pool as little as anybody else."""
    path = source_file(POOL * HUGE)
    options: dict[str, Any] = {"page_size": "2M", "background_rate": "0", "fault_around": "4K"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        client, other = service.client("ram0", "shared"), service.client("ram0", "shared")
        seen = [number * HUGE // PAGE for number in range(POOL - 1)]
        assert client.do(f"words(b, {seen})") == other.do(f"words(b, {seen})") == [word(page * PAGE) for page in seen]
        other.do(f"b.mapping.advise({REMOVE}, {2 * HUGE}, {HUGE})")
        taken = create_memfd("taken", HUGE, HUGE)
        try:
            with Mapping.of(taken, HUGE, reserve=True):
                assert huge_pages().available == 0
                client.begin(f"words(b, [{2 * HUGE // PAGE + 1}])")
                until(lambda: service.events("no-memory"), "the supervisor tells of it")
                before = cpu_ticks(service.pid)
                assert not client.answered(1.0)
                assert cpu_ticks(service.pid) - before < 50, "it is tried again, ever later"
                assert other.do("words(b, [5])") == [word(5 * PAGE)]
                assert service.status()["totals"]["lost"] == 0 and len(service.events("no-memory")) == 1
        finally:
            os.close(taken)
        assert client.answer() == [word(2 * HUGE + PAGE)]
        assert other.do(f"check(b, {str(path)!r})") == -1


def cpu_ticks(pid: int) -> int:
    """CPU that the process has used, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_end_poisons_huge_holes_and_gives_the_pool_back(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(3 * HUGE)
    with Service(runtime_dir, f"ram0={path}", page_size="2M") as service:
        client, toucher = service.client(), service.client("ram0", "shared")
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        service.audit()
        service.end()
        assert client.do("words(b, [4])") == [word(4 * PAGE)]
        toucher.begin(f"words(b, [{HUGE // PAGE}])")
        assert toucher.status() == -signal.SIGBUS
