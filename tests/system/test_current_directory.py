"""Every command, run where others may write: no module of that directory is imported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import environment, until

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

OURS = ("postcopy", *(f"postcopy_{wing}" for wing in "kernel protocol sources supervisor wire workers".split()))
OTHERS = ("zmq", "msgpack", "prctl", "typer", "rich", "numpy", "sitecustomize", "usercustomize", "prometheus_client")
WITHOUT = {"sys", "builtins", "__main__", "antigravity", "this"}


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A directory with a file for every module of Python and of ours, which notes that it was run."""
    place = tmp_path / "strange"
    place.mkdir()
    for name in {*sys.stdlib_module_names, *OURS, *OTHERS} - WITHOUT:
        text = f"open({str(tmp_path / 'run')!r}, 'a').write({name!r} + ' ')\nraise ImportError('strange {name}')\n"
        (place / f"{name}.py").write_text(text)
    return place


def start(words: tuple[str, ...], place: Path) -> subprocess.Popen[bytes]:
    """A command by its installed script, which has no current directory on its path."""
    script = Path(sys.executable).parent / "postcopy"
    return subprocess.Popen(
        [script, *words],
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def check(strange: Path) -> None:
    run = strange.parent / "run"
    assert not run.exists(), f"run from the current directory: {run.read_text()}"


@pytest.mark.parametrize("words", [("load", "--serve", "FILE", "--clients", "2", "--seconds", "0.3"), ("doctor",)])
def test_commands_that_end(strange: Path, source_file: SourceFile, words: tuple[str, ...]) -> None:
    path = str(source_file(1 << 20))
    with start(tuple(path if word == "FILE" else word for word in words), strange) as program:
        _, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    check(strange)


@pytest.mark.parametrize("words", [("serve", "ram0=FILE"), ("source", "ram0=FILE")])
def test_programs_that_serve(strange: Path, runtime_dir: Path, source_file: SourceFile, words: tuple[str, ...]) -> None:
    """With a client, so that there is a worker too."""
    words = tuple(word.replace("FILE", str(source_file(1 << 20))) for word in words)
    socket = runtime_dir / "door" if words[0] == "serve" else strange.parent / "s"
    options = ("--runtime-dir", str(runtime_dir)) if words[0] == "serve" else ("--listen", f"ipc://{socket}")
    program = start((*words, *options), strange)
    try:
        until(lambda: socket.exists() or program.poll() is not None, "it serves")
        if words[0] == "serve":
            with start(("cat", "ram0", "--length", "1", *options), strange) as client:
                _, errors = client.communicate(timeout=30)
            assert client.returncode == 0, errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, signal.SIGTERM)
        _, errors = program.communicate(timeout=30)
    assert program.returncode == 0, errors
    check(strange)
