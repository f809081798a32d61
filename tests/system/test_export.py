"""Exports: the supervisor is client zero, and writes a whole block from its own mapping while pages arrive."""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from postcopy_protocol.messages import ControlRefused, ExportProgress
from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, called, end_by_pidfd, until

SIZE = 24 * (1 << 20) + 4099

MODULE = """
import time
from postcopy_protocol.errors import PageLost

def slow(offset, length):
    time.sleep(0.2)
    return b"s" * length

def holes(offset, length):
    if offset <= 40 * 4096 < offset + length:
        raise PageLost("page 40 is gone")
    return b"h" * length

def fails(offset, length):
    if offset <= 40 * 4096 < offset + length:
        raise ValueError("page 40 fails")
    return b"h" * length

def hangs(offset, length):
    time.sleep(3600)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "pages.py").write_text(MODULE)
    return tmp_path


def begin(service: Service, path: Path, name: str = "ram0") -> int:
    answer = service.export(path, name)
    assert isinstance(answer, ExportProgress), answer
    return answer.job


def ended(service: Service, job: int, within: float = 30.0) -> ExportProgress:
    seen = [-1]

    def finished() -> bool:
        progress = service.progress(job)
        assert progress.written >= seen[-1] and progress.written <= progress.size
        seen.append(progress.written)
        return progress.state != "running"

    until(finished, f"export {job} ends", within)
    return service.progress(job)


def refusal(service: Service, path: Path | str, name: str = "ram0") -> str:
    answer = service.export(Path(path), name)
    assert isinstance(answer, ControlRefused), answer
    return answer.reason


def left(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name.startswith("out"))


def test_exactly_the_files_bytes(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, out = source_file(SIZE), tmp_path / "out"
    with Service(runtime_dir, f"ram0={path}") as service:
        job = ended(service, begin(service, out))
        assert (job.state, job.written, job.size, job.detail) == ("done", SIZE, SIZE, "")
        assert filecmp.cmp(path, out, shallow=False)
        service.await_received(service.block()["pages"])
        out.write_text("an older file is replaced")
        assert ended(service, begin(service, out)).state == "done"
        assert filecmp.cmp(path, out, shallow=False)
        assert left(tmp_path) == ["out"]


def test_while_clients_attach_and_touch(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, out = source_file(SIZE), tmp_path / "out"
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        job = begin(service, out)
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        late = service.client()
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert [client.answer() for client in clients] == [-1, -1]
        assert ended(service, job).state == "done"
        assert filecmp.cmp(path, out, shallow=False)


def test_worker_zero_killed_in_the_middle(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, out = source_file(SIZE), tmp_path / "out"
    with Service(runtime_dir, f"ram0={path}") as service:
        job = begin(service, out)
        zero = until(lambda: [pid for pid in service.people() if called(pid) == "postcopy-w0"], "worker zero works")[0]
        end_by_pidfd(zero, signal.SIGKILL, "postcopy-w0")
        assert ended(service, job).state == "done"
        assert filecmp.cmp(path, out, shallow=False)


def test_cancel_leaves_no_file(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, "ram0=handler:pages:slow?size=64M", cwd=module) as service:
        job = begin(service, module / "out")
        assert left(module) != ["out"]
        began = time.monotonic()
        service.progress(job, cancel=True)
        assert ended(service, job).state == "cancelled"
        assert time.monotonic() - began < 8, "long before its end"
        assert left(module) == []
        assert service.client().do(f"read(b, {60 << 20}, 2)") == "7373", "the service goes on"


def test_cancel_while_the_function_hangs(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, "ram0=handler:pages:hangs?size=1M", cwd=module) as service:
        job = begin(service, module / "out")
        until(lambda: service.status()["totals"]["faults"], "client zero waits")
        service.progress(job, cancel=True)
        assert ended(service, job).state == "cancelled"
        assert left(module) == []


@pytest.mark.parametrize("function", ["holes", "fails"])
def test_a_lost_page_fails_without_a_file(runtime_dir: Path, module: Path, function: str) -> None:
    with Service(runtime_dir, f"ram0=handler:pages:{function}?size=4M", cwd=module) as service:
        job = ended(service, begin(service, module / "out"))
        assert job.state == "failed" and "lost" in job.detail
        assert left(module) == []
        assert service.client().do(f"read(b, {41 * PAGE}, 2)") == "6868"
        assert ended(service, begin(service, module / "out")).state == "failed"


def test_what_cannot_be_exported_or_not_there(runtime_dir: Path, module: Path, source_file: SourceFile) -> None:
    (module / "directory").mkdir()
    with Service(runtime_dir, f"ram0={source_file(PAGE)}", "ram1=handler:pages:hangs?size=1M", cwd=module) as service:
        assert "no block ram7" in refusal(service, module / "out", "ram7")
        assert "No such file" in refusal(service, module / "nowhere" / "out")
        assert "directory" in refusal(service, module / "directory")
        assert "absolute" in refusal(service, "out")
        job = begin(service, module / "out1", "ram1")
        assert "already" in refusal(service, module / "out2", "ram1")
        assert ended(service, begin(service, module / "out0")).state == "done", "another block may be"
        service.progress(job, cancel=True)
        assert ended(service, job).state == "cancelled"
        assert left(module) == ["out0"]


def test_an_asker_who_dies_has_its_export_cancelled(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, "ram0=handler:pages:slow?size=1G", cwd=module) as service:
        begin(service, module / "out")
        assert left(module)
        until(lambda: not left(module), "cancelled after 10 s without a question", 40)


def test_the_end_cancels_an_export(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, "ram0=handler:pages:hangs?size=1M", cwd=module) as service:
        begin(service, module / "out")
        until(lambda: service.status()["totals"]["faults"], "client zero waits")
        service.audit()
        service.end()
        assert left(module) == []


def test_what_is_no_file_is_not_replaced(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with Service(runtime_dir, f"ram0={source_file(PAGE)}") as service:
        assert "no regular file" in refusal(service, tmp_path / "out")
        assert (tmp_path / "out").is_fifo()
        assert left(tmp_path) == ["out"]


def test_a_full_disk(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, small = source_file(4 << 20), tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(small)], check=True)
    try:
        with Service(runtime_dir, f"ram0={path}") as service:
            job = ended(service, begin(service, small / "out"))
            assert job.state == "failed" and "No space left" in job.detail
            assert left(small) == []
            assert service.client().do(f"check(b, {str(path)!r})") == -1
    finally:
        subprocess.run(["umount", str(small)], check=True)
