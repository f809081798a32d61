"""A supervisor's blocks served onward: file -> supervisor -> page source -> supervisor -> client."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import postcopy
from postcopy.queries import Control

SourceFile = Callable[..., Path]


@contextmanager
def onward(service: str, endpoint: str, *names: str) -> Iterator[subprocess.Popen[bytes]]:
    """``postcopy source --from``, ended in order, which it must do."""
    command = [sys.executable, "-m", "postcopy_sources", "--from", service, *names, "--listen", endpoint]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as source:
        try:
            yield source
        finally:
            source.send_signal(signal.SIGTERM)
            assert source.wait(10) == 0, source.stderr.read().decode() if source.stderr else ""


@pytest.mark.parametrize("rate", ["0", "auto"])
def test_through_two_houses(runtime_dir: Path, source_file: SourceFile, rate: str) -> None:
    path = source_file(1 << 20 | 1234)
    endpoint = f"ipc://{runtime_dir}/s"
    with (
        postcopy.Supervisor({"ram0": path}, runtime_dir=runtime_dir / "a") as first,
        onward(str(first.runtime_dir), endpoint, "ram0"),
        postcopy.Supervisor(
            {"copy": f"{endpoint}/ram0"}, runtime_dir=runtime_dir / "b", background_rate=rate
        ) as second,
    ):
        command = [sys.executable, "-m", "postcopy", "verify", "copy", str(path), "--runtime-dir", second.runtime_dir]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        for directory in (first.runtime_dir, second.runtime_dir):
            with Control(directory) as control:
                status = control.status(audit=True)
            assert status["totals"]["polluted"] == 0
            assert status["blocks"][0]["received"] == status["blocks"][0]["pages"]


def test_only_what_is_asked_for_comes(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(4 << 20)
    endpoint = f"ipc://{runtime_dir}/s"
    with (
        postcopy.Supervisor({"ram0": path}, runtime_dir=runtime_dir / "a", fault_around="4K") as first,
        onward(str(first.runtime_dir), endpoint, "ram0"),
        postcopy.Supervisor({"ram0": f"{endpoint}/ram0"}, runtime_dir=runtime_dir / "b", background_rate="0"),
        Control(first.runtime_dir) as control,
    ):
        # The identity of the content is a digest of 64 samples: those pages are read, and no others.
        assert control.status()["blocks"][0]["received"] == 64


def test_a_house_that_is_not_there(runtime_dir: Path) -> None:
    command = [sys.executable, "-m", "postcopy_sources", "--from", str(runtime_dir), "ram0", "--listen", "ipc:///tmp/x"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"postcopy source: no supervisor is running in {runtime_dir}")
    assert len(ended.stderr.splitlines()) == 1
