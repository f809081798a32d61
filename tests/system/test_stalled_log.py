"""A log that is not read stops no service, and the end of a terminal does not end one."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, arguments, environment, until, word

SIZE = 1 << 20


@pytest.fixture
def full() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe that takes nothing more."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4095 + b"\n")
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read(reader: int, seconds: float) -> str:
    found, until = b"", time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            found += os.read(reader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
    return found.decode()


def test_a_supervisor_whose_log_is_not_read(runtime_dir: Path, source_file: SourceFile, full: tuple[int, int]) -> None:
    path, (_, writer) = source_file(SIZE), full
    command = arguments(runtime_dir, (f"ram0={path}",), {})
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stderr=writer)
    try:
        until((runtime_dir / "door").exists, "it listens", 40)
        process.send_signal(signal.SIGHUP)
        for number in range(20):
            client = Puppet(runtime_dir)
            client.attach()
            assert client.do(f"words(b, [{number}])", 30) == [word(number * PAGE)]
            client.close()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_what_was_logged_meanwhile_comes_when_there_is_room(
    runtime_dir: Path, source_file: SourceFile, full: tuple[int, int]
) -> None:
    path, (reader, writer) = source_file(SIZE), full
    command = arguments(runtime_dir, (f"ram0={path}",), {"log_format": "json"})
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stderr=writer)
    try:
        until((runtime_dir / "door").exists, "it listens", 40)
        client = Puppet(runtime_dir)
        client.attach()
        client.close()
        text = read(reader, 1.0)
        process.terminate()
        assert process.wait(30) == 0
        text += read(reader, 0.5)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    messages = [line["message"] for line in lines]
    assert any(message.startswith("ready: ") for message in messages)
    assert messages[-1] == "ended"
    assert all(line["level"] == "info" for line in lines), lines


def test_a_source_whose_log_is_not_read(source_file: SourceFile, full: tuple[int, int], tmp_path: Path) -> None:
    path, (_, writer) = source_file(SIZE), full
    place = tmp_path / "s"
    command = [sys.executable, "-m", "postcopy_sources", f"ram0={path}", "--listen", f"ipc://{place}"]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stderr=writer)
    try:
        until(place.exists, "it listens", 40)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
