"""``serve --record``: real faults, local and remote, into a file; and the file as a load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import postcopy
from postcopy import traces
from postcopy_protocol import trace
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PuppetError, Service, environment, until
from tests.system.test_load import loaded

SIZE = 1 << 20
PAGES = SIZE // 4096


def asked(*words: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "postcopy", *words]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment())
    assert done.returncode == status, done.stderr
    return done


def written_down(service: Service, records: int) -> None:
    """Wait for so many: a worker writes a fault down after it has released its client."""
    until(lambda: service.status()["record"]["records"] >= records, f"{records} faults are written down")


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_every_fault_is_in_the_file(runtime_dir: Path, source_file: SourceFile, tmp_path: Path, mode: str) -> None:
    path, target = source_file(SIZE), tmp_path / "trace"
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", record=str(target)) as service:
        client = service.client("ram0", mode)
        assert client.do(f"check(b, {str(path)!r}, 'random', 4096, 3)") == -1
        client.do("b.buf[0]")
        service.await_received(PAGES)
        written_down(service, PAGES)
        client.close()
        service.end()
        faults = traces.read(str(target)).faults
    assert sorted(fault.page for fault in faults) == list(range(PAGES))
    assert all(fault.kind == 0 and 0 < fault.latency < 20_000_000_000 for fault in faults)
    assert target.stat().st_mode & 0o777 == 0o600


def test_remote_faults_writes_and_a_killed_worker(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, target = source_file(SIZE), tmp_path / "trace"
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), background_rate=0, fault_around="4K", record=str(target)) as service,
    ):
        client = service.client("ram0", "private")
        client.do("[b.buf[at] for at in range(0, 10 * 4096, 4096)]")
        written_down(service, 10)
        service.kill_worker(client)
        client.do("b.buf.__setitem__(40 * 4096, 5)")
        written_down(service, 11)
        assert service.status()["record"]["lost"] == 0
        client.close()
        service.end()
    found = {fault.page: fault for fault in traces.read(str(target)).faults}
    assert set(range(10)) <= set(found) and found[3].kind == 3
    assert found[40].write and not found[3].write
    summary = json.loads(asked("trace", "summary", "--json", str(target)).stdout)
    assert summary["blocks"][0]["kinds"]["arrived"] >= 10
    assert b"client" in asked("trace", "show", "--limit", "2", str(target)).stdout
    assert b"no block ram1; it has ram0" in asked("trace", "show", str(target), "--block", "ram1", status=1).stderr
    assert b"overlap 100.0%" in asked("trace", "diff", str(target), str(target)).stdout
    played = loaded("--serve", str(path), "--replay", str(target), "--speed", "0", "--clients", "2")
    assert played["touches"] == 2 * len(traces.read(str(target)).faults)


def test_a_page_whose_function_fails_is_recorded_as_lost(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "def make(offset, length):\n    if offset >= 8192:\n        raise OSError('no')\n    return bytes(length)\n"
    )
    block, target = "ram0=handler:failing:make?size=16K", tmp_path / "trace"
    with Service(runtime_dir, block, cwd=tmp_path, fault_around="4K", record=str(target)) as service:
        client = service.client("ram0", "private")
        client.do("b.buf[4096]")
        with pytest.raises(PuppetError, match="PageLost"):
            client.do("b.ensure(8192, 1, 20)")
        client.close()
        service.end()
    assert {fault.page: trace.KINDS[fault.kind] for fault in traces.read(str(target)).faults} == {
        1: "placed",
        2: "lost",
    }


def test_a_replay_begins_when_its_trace_has_been_read(tmp_path: Path) -> None:
    """A long one takes seconds; no touch is late for it."""
    target, faults = tmp_path / "long", 200_000
    head = trace.Header(0.0, 0, (trace.Traced(1, "load", 4096, 4096),))
    records = b"".join(trace.pack(number, 1, 1, 0, 0, 100) for number in range(faults))
    target.write_bytes(head.encode() + records)
    played = loaded("--serve", "zero:4K", "--replay", str(target), "--touches", "3", "--clients", "1")
    assert played["touches"] == 3 and played["response_us"]["max"] < 400_000


def test_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    told = asked("trace", "diff", str(tmp_path / "x"), str(tmp_path / "x"), status=2).stderr
    assert b"no trace" in told and str(tmp_path / "x").encode() in told
    assert asked("load", "--serve", "zero:4K", "--replay", str(tmp_path / "x"), status=2).stderr.count(b"\n") == 1
    with pytest.raises(postcopy.PostcopyError, match="--record"):
        postcopy.Supervisor({"z": "zero:4K"}, record="/no/such/place")
