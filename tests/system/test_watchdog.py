"""Workers that live and answer nothing, wherever they stand still: killed, and their clients served by a successor."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from postcopy_protocol.messages import ExportProgress
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service, alive, called, end_by_pidfd, until, word

STOPPING = """
import os, signal
from pathlib import Path

def make(offset, length):
    return b"".join((at // 8).to_bytes(8, "little") for at in range(offset, offset + length, 8))

mark = Path(__file__).with_name("stopped")
worker = Path("/proc/self/comm").read_text().startswith("postcopy-w")  # not the process that serve asks at its start
try:
    if worker:
        mark.touch(exist_ok=False)
except FileExistsError:
    worker = False
if worker:
    mark.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def worker_of(service: Service) -> int:
    """The pid of worker zero, which runs."""
    names = {pid: called(pid) for pid in service.people()}
    served = {record["worker_pid"] for record in service.status()["clients"]}
    return next((pid for pid, name in names.items() if name.startswith("postcopy-w") and pid not in served), 0)


def test_a_remote_clients_worker_that_is_stopped(runtime_dir: Path, source_file: SourceFile) -> None:
    """Once before it can read the fault, once when it has asked and does not hear the answer."""
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        stopped = [service.kill_worker(clients[0], signal.SIGSTOP)]
        source.tell(signal.SIGSTOP)
        clients[1].begin("words(b, [20])")
        until(lambda: service.record(clients[1])["requests"], "it has asked")
        stopped.append(service.kill_worker(clients[1], signal.SIGSTOP))
        source.tell(signal.SIGCONT)
        clients[0].begin("words(b, [10])")
        assert [client.answer(40) for client in clients] == [[word(10 * PAGE)], [word(20 * PAGE)]]
        assert not any(alive(pid) for pid in stopped)
        assert len(service.events("watchdog")) == 2


def test_worker_zero_that_is_stopped(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path = source_file(8 << 20)
    with Service(runtime_dir, f"ram0={path}", f"ram1={path}") as service:
        first = service.export(tmp_path / "first")
        assert isinstance(first, ExportProgress)
        until(lambda: service.progress(first.job).state == "done", "worker zero has worked")
        zero = worker_of(service)
        end_by_pidfd(zero, signal.SIGSTOP, "postcopy-w")
        second = service.export(tmp_path / "second", "ram1")
        assert isinstance(second, ExportProgress)
        until(lambda: service.progress(second.job).state != "running", "the export ends", 40)
        assert service.progress(second.job).state == "done"
        assert (tmp_path / "second").read_bytes() == path.read_bytes()
        assert not alive(zero) and service.events("watchdog")


def test_a_worker_that_is_stopped_before_its_first_word(runtime_dir: Path, tmp_path: Path) -> None:
    """A module that stops the first worker that imports it."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    source = f"ram0=handler:stopping:make?size={64 * PAGE}"
    with Service(runtime_dir, source, cwd=tmp_path, start_timeout=3) as service:
        client = service.client(None)
        client.do("b = attach()", 60)
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        stopped = int((tmp_path / "stopped").read_text())
        assert not alive(stopped)
        (event,) = [event for event in service.status()["events"] if event["kind"] == "restart"]
        assert event["pid"] == stopped and event["cause"] == "watchdog: says nothing for 3 s"
