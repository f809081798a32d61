"""The programs in ``examples/``, and the commands of README and tutorial, run as a user runs them: real processes, real
userfaultfd."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.service import ROOT, Service, environment, until

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

EXAMPLES = ROOT / "examples"
LONGEST = 79
PAGE = 4096


def run(*command: str | Path, within: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    """Run a Python program of this checkout to its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, env=environment(), timeout=within, check=False
    )


@contextmanager
def running(program: str, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start an example, end it by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def listens(path: Path) -> bool:
    """Does a process listen at this socket? A connection would be taken for a front-end."""
    lines = Path("/proc/net/unix").read_text("utf-8", "replace").splitlines()
    return any(line.endswith(f" {path}") and " 00010000 " in line for line in lines)


def cat(directory: Path, block: str, offset: int, length: int) -> subprocess.CompletedProcess[bytes]:
    where = ["--offset", str(offset), "--length", str(length), "--runtime-dir", str(directory)]
    return run("-m", "postcopy", "cat", block, *where)


def test_every_example_is_short_and_tested() -> None:
    programs = sorted(EXAMPLES.glob("*.py"))
    assert [path.name for path in programs] == [
        "handler.py",
        "kvm_clones.py",
        "numpy_lazy_file.py",
        "page_source.py",
        "vhost_user_back_end.py",
        "vm_memory.py",
    ]
    lines = {path.name: len(path.read_text().splitlines()) for path in programs}
    assert lines.pop("kvm_clones.py") < 3 * LONGEST, "it has a machine to build"
    assert lines.pop("vm_memory.py") < 2 * LONGEST, "it walks a kernel's list (test_qemu_guest.py)"
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_clones_of_a_machine_share_its_clean_memory() -> None:
    done = run(EXAMPLES / "kvm_clones.py", "--clones", "3", "--memory", "8M")
    assert (done.returncode, done.stdout[:17]) == (0, b"3 clones, 0 wrong"), done.stderr.decode()


def test_numpy_reads_the_end_of_a_large_file() -> None:
    done = run(EXAMPLES / "numpy_lazy_file.py")
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith(f"{(1 << 30) // 8} numbers are usable, 0.00%")
    assert lines[1] == f"sum of the last 1000: {sum(range(1000))}.0"
    assert lines[2].startswith("the first is 42.0 here, 0.0"), "little of the file has come"


def test_numpy_over_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "odd.bin"
    path.write_bytes(struct.pack("<3d", 1.0, 2.0, 4.0) + b"odd")
    done = run(EXAMPLES / "numpy_lazy_file.py", path)
    assert done.returncode == 0, done.stderr.decode()
    assert "sum of the last 3: 7.0" in done.stdout.decode()
    assert path.read_bytes().startswith(struct.pack("<d", 1.0)), "the write is private"


def test_a_page_source_supplies_its_pages_and_reports_a_lost_one(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "squares.sock"
    with (
        running("page_source.py", f"ipc://{path}"),
        Service(runtime_dir, f"squares=ipc://{path}/squares", background_rate=0),
    ):
        found = cat(runtime_dir, "squares", 8 * 123_456, 16)
        assert found.returncode == 0, found.stderr.decode()
        assert struct.unpack("<2q", found.stdout) == (123_456**2, 123_457**2)
        lost = cat(runtime_dir, "squares", 13 * PAGE, 8)
        assert lost.returncode == 1
        assert b"lost" in lost.stderr


def test_a_handler_makes_pages(runtime_dir: Path) -> None:
    with Service(runtime_dir, "made=handler:handler:make?size=1G", cwd=EXAMPLES):
        found = cat(runtime_dir, "made", 64 * 1000, 64)
        assert found.stdout == b"row 1000".ljust(63) + b"\n", found.stderr.decode()
        assert cat(runtime_dir, "made", 2 << 20, 8).stdout == bytes(8)
        assert cat(runtime_dir, "made", 512 << 20, 8).returncode == 1


def test_a_back_end_reads_memory_that_has_not_come(runtime_dir: Path, tmp_path: Path) -> None:
    content = bytes(range(256)) * 16 * 64
    (tmp_path / "ram").write_bytes(content)
    path = tmp_path / "back-end.sock"
    with (
        Service(runtime_dir, f"ram0={tmp_path / 'ram'}", fault_around="4K"),
        running("vhost_user_back_end.py", path) as back_end,
    ):
        until(lambda: listens(path), "the back-end listens")
        attached = run("-m", "postcopy", "attach", "vhost-user", path, "--block", "ram0", "--runtime-dir", runtime_dir)
        assert attached.returncode == 1, "the back-end hangs up in the end"
        assert b"post-copy has ended" in attached.stdout, attached.stderr.decode()
        assert back_end.wait(20) == 0
        assert back_end.stdout is not None
        assert back_end.stdout.read().decode() == f"sha256 {hashlib.sha256(content).hexdigest()}\n"


END_JOBS = "trap 'status=$?; kill $(jobs -p) 2>/dev/null || true; wait || true; exit $status' EXIT\n"
"""A script that fails must leave no supervisor behind."""


def pasted(page: str, heading: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the shell blocks of a page, from a heading on, as one script; its files are put into ``directory``."""
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text.partition(f"\n{heading}\n")[2], re.MULTILINE | re.DOTALL)
    script = "\n".join(blocks if page.startswith("docs") else blocks[:1])
    # What installs is left out; .venv stands for its result.
    script = re.sub(r"^(scripts/|\. \.venv|pip install).*$", "", script, flags=re.MULTILINE).replace(
        "/tmp/", f"{directory}/"
    )
    bin_directory = directory / "bin"
    bin_directory.mkdir()
    for name, module in (("postcopy", "-m postcopy "), ("python", "")):
        (bin_directory / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
    for program in bin_directory.iterdir():
        program.chmod(0o755)
    path = f"{bin_directory}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-c", END_JOBS + script],
        env=environment(PATH=path, POSTCOPY_RUNTIME_DIR=str(directory / "run")),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_quick_start_of_the_readme(tmp_path: Path) -> None:
    done = pasted("README.md", "## Use", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0000000" in done.stdout, "od has shown what cat has read"


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    done = pasted("docs/tutorial.md", "## 2. Serve a file", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "last number:" in done.stdout
    assert "restart" in done.stdout, "the events show that workers were killed"
