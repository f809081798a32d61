"""The walls around real workers: a handler function attacks from inside of one, and status says which walls stand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, refused, until, word

ATTACKS = """
import errno, os, signal, socket, subprocess

VICTIM = {victim}


def tcp():
    socket.create_connection(("127.0.0.1", {port}), 1)


TRIED = [
    lambda: open("{file}").read(),
    lambda: open("{file}", "w"),
    lambda: os.unlink("{file}"),
    lambda: subprocess.run(["true"]),
    os.fork,
    tcp,
    lambda: os.kill(VICTIM, 0),
    lambda: open(f"/proc/{{VICTIM}}/mem", "rb"),
    lambda: os.setuid(12345),
    lambda: socket.socket(socket.AF_UNIX).bind("{file}.sock"),
]


def make(offset, length):
    try:
        TRIED[offset // 4096]()
        found = "allowed"
    except OSError as error:
        found = errno.errorcode[error.errno]
    return found.encode().ljust(length, b"\\0")
"""


def attacker(directory: Path, port: int = 9) -> Path:
    file = directory / "file"
    file.write_text("secret")
    (directory / "attacks.py").write_text(ATTACKS.format(victim=os.getpid(), port=port, file=file))
    return file


def told(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(field + ":"))


def test_a_workers_walls(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert service.record(client)["walls"] == ["no-capabilities", "no-new-privileges", "landlock", "seccomp"]
        worker = service.worker(client)
        assert told(worker, "Seccomp") == "2" and told(worker, "NoNewPrivs") == "1"
        limits = Path(f"/proc/{worker}/limits").read_text().splitlines()
        assert next(line for line in limits if "core file" in line).split()[4:6] == ["0", "0"]
        assert int(next(line for line in limits if "open files" in line).split()[3]) < 128
        service.kill_worker(client)
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        assert len(service.record(client)["walls"]) == 4, "its successor too"


def test_no_walls(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", walls="off") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert service.record(client)["walls"] == ["no-capabilities", "no-new-privileges"]
        assert told(service.worker(client), "Seccomp") == "0"


def test_from_inside_of_a_worker(runtime_dir: Path, tmp_path: Path) -> None:
    file = attacker(tmp_path)
    with Service(
        runtime_dir, "ram0=handler:attacks:make?size=40K", cwd=tmp_path, walls="all", fault_around="4K"
    ) as service:
        client = service.client()
        found = client.do("[bytes(b.buf[n * 4096 : n * 4096 + 8]).rstrip(b'\\0').decode() for n in range(10)]")
        assert set(found) <= {"EPERM", "EACCES"}, found
    assert file.read_text() == "secret" and not Path(f"{file}.sock").exists()


def test_a_handler_may_open_files_unless_told_otherwise(runtime_dir: Path, tmp_path: Path) -> None:
    attacker(tmp_path)
    with Service(runtime_dir, "ram0=handler:attacks:make?size=40K", cwd=tmp_path, fault_around="4K") as service:
        client = service.client()
        assert client.do("bytes(b.buf[:8]).rstrip(b'\\0').decode()") == "allowed"
        assert client.do("bytes(b.buf[8 * 4096 : 8 * 4096 + 8]).rstrip(b'\\0').decode()") == "EPERM", "no capability"
        assert service.record(client)["walls"] == ["no-capabilities", "no-new-privileges"]


# --- cgroups ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the pids controller, or of the one hierarchy of version 2."""
    parent = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids").is_dir() else Path("/sys/fs/cgroup")
    made = parent / f"postcopy-test-{os.getpid()}"
    made.mkdir()
    yield made
    until(lambda: not (made / "cgroup.procs").read_text(), "it is empty")
    made.rmdir()


def test_workers_enter_their_cgroup(runtime_dir: Path, source_file: SourceFile, cgroup: Path) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", worker_cgroup=str(cgroup)) as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert str(service.worker(client)) in (cgroup / "cgroup.procs").read_text().split()
        assert str(service.pid) not in (cgroup / "cgroup.procs").read_text().split()
        assert "cgroup" in service.record(client)["walls"]
        service.kill_worker(client)
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        assert (cgroup / "cgroup.procs").read_text().split() == [str(service.worker(client))]


def test_a_cgroup_that_is_none(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    status, said = refused(runtime_dir, f"ram0={source_file(PAGE)}", options={"worker_cgroup": str(tmp_path)})
    assert status == 1 and "\n" not in said
    assert "--worker-cgroup" in said and "cgroup.procs" in said and "No such file" in said
