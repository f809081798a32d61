"""Directories that are removed or renamed under a running supervisor: clients and workers come all the same."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, until, word

HANDLER = "def make(offset, length):\n    return bytes([offset // 4096 % 250 + 1]) * length\n"


def make_again(service: Service, directory: Path) -> None:
    """Wait until the supervisor has made its sockets again, and a custodian is there for its successor."""
    until(lambda: (directory / "private" / "custodian").exists() and (directory / "door").exists(), "sockets again")
    until(lambda: any(str(directory) in text for text in service.events("runtime-dir")), "an event names it")


def pages(client: Puppet, *numbers: int) -> bool:
    return bool(client.do(f"words(b, {list(numbers)})") == [word(page * PAGE) for page in numbers])


@pytest.mark.parametrize("how", ["removed", "renamed", "emptied"])
@pytest.mark.parametrize("transport", ["native", "libzmq"])
def test_the_runtime_directory(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, how: str, transport: str
) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", transport=transport) as service:
        old = service.client()
        assert pages(old, 1)
        match how:
            case "removed":
                shutil.rmtree(runtime_dir)
            case "renamed":
                runtime_dir.rename(tmp_path / "moved")
            case "emptied":
                (runtime_dir / "door").unlink()
        make_again(service, runtime_dir)
        new = service.client()
        assert pages(old, 2) and pages(new, 3)
        for page, client in enumerate((old, new), 10):
            service.kill_worker(client)
            assert pages(client, page)
        assert service.status()["totals"]["restarts"] == 2


def test_a_later_supervisor_finds_the_custodian(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client()
        shutil.rmtree(runtime_dir)
        make_again(service, runtime_dir)
        service.kill()
        service.recover()
        assert pages(client, 7)


def test_the_directory_in_which_serve_was_started(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, place = source_file(64 * PAGE), tmp_path / "place"
    place.mkdir()
    with Service(runtime_dir, f"ram0={path}", "z=zero:64K", cwd=place, fault_around="4K") as service:
        client = service.client()
        assert pages(client, 1)
        place.rmdir()
        service.kill_worker(client)
        assert pages(client, 2)
        late = service.client()
        late.attach("z", called="z")
        assert pages(late, 3) and late.do("z.buf[5]") == 0


def test_a_handlers_directory_with_its_module(runtime_dir: Path, tmp_path: Path) -> None:
    """Workers that have imported the module go on. Later ones cannot, and say so; no worker ends of it."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "made.py").write_text(HANDLER)
    with Service(runtime_dir, "ram0=handler:made:make?size=64K", cwd=place, fault_around="4K") as service:
        client = service.client()
        assert client.do("b.buf[0]") == 1
        shutil.rmtree(place)
        assert client.do("b.buf[4096]") == 2
        late = service.client()
        late.begin("b.buf[8192]")
        assert late.status() == -signal.SIGBUS
        until(lambda: any("made" in text for text in service.events("handler-failed")), "an event names the module")
        assert client.do("b.buf[12288]") == 4
        assert service.status()["totals"]["restarts"] == 0


def test_renamed_and_made_by_another_supervisor(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    """The path is the other's now: the first says so, goes on for its clients, and takes nothing away at its end."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as first:
        client = first.client()
        first.process.send_signal(signal.SIGSTOP)  # or it makes its sockets again before the other comes
        runtime_dir.rename(tmp_path / "moved")
        with Service(runtime_dir, "z=zero:64K") as second:
            first.process.send_signal(signal.SIGCONT)
            until(lambda: "already served by process" in first.log(), "it says why")
            assert pages(client, 5)
            client.close()
            first.process.send_signal(signal.SIGTERM)
            assert first.wait() == 0
            assert second.client("z").do("b.buf[5]") == 0, "its sockets are there"
