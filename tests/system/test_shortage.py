"""No memory for pages that a source has sent: who waits for them waits, and the supervisor does everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.messages import AskStatus, ExportProgress
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service, until, word

SIZE = 4 << 20
LAST = SIZE // PAGE - 1
STARVED = """
import errno, fcntl, os, sys

ioctl, flag = fcntl.ioctl, os.environ["TEST_STARVED"]

def starved(descriptor, request, *rest):
    if request == UFFDIO_COPY and os.path.exists(flag):
        raise OSError(errno.ENOMEM, "no memory")
    return ioctl(descriptor, request, *rest)

fcntl.ioctl = starved
from postcopy_kernel.userfaultfd import UFFDIO_COPY
from postcopy_supervisor.__main__ import main
sys.exit(main())
"""


class StarvedHouse(Service):
    """Its supervisor can place nothing while the file ``flag`` is there. Its workers, programs of their own, can."""

    def start(self, *, program: tuple[str, ...] = (), **more: Any) -> None:
        super().start(program=("-c", STARVED), **more)


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of a kernel without memory: a cgroup at its limit would stop the whole supervisor as well, at the next
    page of its own heap."""
    flag = tmp_path / "starved"
    monkeypatch.setenv("TEST_STARVED", str(flag))
    return flag


@pytest.mark.parametrize("rate", ["0", "auto"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_no_memory_for_remote_pages(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, flag: Path, mode: str, rate: str
) -> None:
    far, near = source_file(SIZE), source_file(64 * PAGE, 1, "near.bin")
    with Source(f"ram0={far}") as source:
        flag.touch()
        with StarvedHouse(runtime_dir, source.block(), f"disk={near}", background_rate=rate) as service:
            clients = [service.client("ram0", mode) for _ in range(3)]
            for number, client in enumerate(clients):
                client.begin(f"words(b, [{number}, {LAST - number}])")
            job = service.export(tmp_path / "out")
            assert isinstance(job, ExportProgress)
            until(lambda: service.events("no-memory"), "the shortage is told")
            everybody_else(service)
            service.kill_worker(clients[0])
            until(lambda: service.record(clients[0])["restarts"] == 1 and service.worker(clients[0]), "it is replaced")
            clients[2].kill()
            until(lambda: not service.record(clients[2]), "who dies while it waits is forgotten")
            assert not clients[0].answered(1.0) and not clients[1].answered()
            assert len(service.events("no-memory")) == 1 and service.block("ram0")["received"] == 0
            flag.unlink()
            for number, client in enumerate(clients[:2]):
                assert client.answer() == [word(number * PAGE), word((LAST - number) * PAGE)]
                assert client.do(f"check(b, {str(far)!r}, 'random', 4096)") == -1
            until(lambda: service.progress(job.job).state == "done", "the export goes on as well")
            assert (tmp_path / "out").read_bytes() == far.read_bytes()
            until(lambda: idle(service), "nothing is open at the source")
            assert service.status()["totals"]["lost"] == 0


def idle(service: Service) -> bool:
    """Is the source asked for nothing? What was asked for twice may still be on its way when all has come."""
    state = service.status()["sources"][0]
    return bool(state["waiting"] == state["in_flight"] == 0)


def everybody_else(service: Service) -> None:
    """Answers, attaches, reads, and all of it soon."""
    slowest = max(timed(lambda: service.ask(AskStatus(False))) for _ in range(50))
    assert slowest < 2.0, "status waits for memory"
    newcomer = service.client("disk")
    assert newcomer.do("words(b, [5, 9])") == [word(5 * PAGE, 1), word(9 * PAGE, 1)]
    service.kill_worker(newcomer)
    assert newcomer.do("words(b, [40])") == [word(40 * PAGE, 1)]
    newcomer.do("b.close()")


def timed(act: Callable[[], object]) -> float:
    begun = time.monotonic()
    act()
    return time.monotonic() - begun


def test_a_source_that_dies_in_a_shortage(runtime_dir: Path, source_file: SourceFile, flag: Path) -> None:
    path = source_file(SIZE)
    with Source(f"ram0={path}") as source, StarvedHouse(runtime_dir, source.block(), background_rate="0") as service:
        client = service.client()
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        flag.touch()
        client.begin(f"words(b, [{LAST}])")
        until(lambda: service.events("no-memory"), "the shortage is told")
        source.end()
        flag.unlink()
        assert not client.answered(1.5)
        source.start()
        assert client.answer() == [word(LAST * PAGE)]
        assert client.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1


def test_a_supervisor_that_dies_in_a_shortage(runtime_dir: Path, source_file: SourceFile, flag: Path) -> None:
    """Its successor has no memory either, for a while."""
    path = source_file(SIZE)
    with Source(f"ram0={path}") as source, StarvedHouse(runtime_dir, source.block(), background_rate="0") as service:
        client = service.client()
        flag.touch()
        client.begin(f"words(b, [{LAST}])")
        until(lambda: service.events("no-memory"), "the shortage is told")
        service.kill()
        service.recover()
        service.await_ready()
        until(lambda: service.events("no-memory"), "the shortage is told")
        assert not client.answered(0.5)
        flag.unlink()
        assert client.answer() == [word(LAST * PAGE)]
        assert client.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
