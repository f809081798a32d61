"""A client in C, written from protocol/README.md alone: it reads what the file holds, in both modes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, until

SOURCE = Path(__file__).with_name("c_client") / "client.c"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "client"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(path), str(SOURCE)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    return path


def run(program: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([str(program), *words], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def fnv1a(data: bytes) -> str:
    """The hash as the program prints it."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return f"{value:016x}"


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("size", [1, PAGE, 64 * PAGE + 7])
def test_it_reads_every_byte(runtime_dir: Path, source_file: SourceFile, program: Path, size: int, mode: str) -> None:
    path = source_file(size, 3)
    with Service(runtime_dir, f"ram0={path}") as service:
        status, said, errors = run(program, str(runtime_dir / "door"), "ram0", mode)
        assert status == 0, errors
        assert said.split() == [fnv1a(path.read_bytes()), str(size)], said
        service.await_received(-(-size // PAGE))
        until(lambda: not service.status()["clients"], "it has left")


def test_it_hears_refusals(runtime_dir: Path, source_file: SourceFile, program: Path) -> None:
    with Service(runtime_dir, f"ram0={source_file(PAGE)}"):
        status, said, errors = run(program, str(runtime_dir / "door"), "ram7", "private")
        assert (status, said) == (1, "") and "no block ram7" in errors and "\n" not in errors
        status, _, errors = run(program, str(runtime_dir / "door"), "ram0", "neither")
        assert status in (1, 2) and errors
    status, _, errors = run(program, str(runtime_dir / "door"), "ram0", "private")
    assert status == 1 and errors


def test_it_is_served_beside_python_clients(runtime_dir: Path, source_file: SourceFile, program: Path) -> None:
    path = source_file(2048 * PAGE, 3)
    wanted = fnv1a(path.read_bytes()[: 64 * PAGE])
    with Service(runtime_dir, f"ram0={path}", f"ram1={source_file(64 * PAGE, 3, 'small.bin')}") as service:
        client = service.client()
        client.begin(f"check(b, {str(path)!r}, 'random', 4096)")
        status, said, errors = run(program, str(runtime_dir / "door"), "ram1", "shared")
        assert status == 0 and said.split()[0] == wanted, errors
        assert client.answer() == -1
