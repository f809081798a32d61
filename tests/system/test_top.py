"""``postcopy top`` in a real terminal (tmux), on a real supervisor with clients."""

from __future__ import annotations

import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import Service, environment, until

PATIENCE = 60.0


class Terminal:
    """A tmux server of our own with one window of 80x24."""

    def __init__(self, command: str) -> None:
        self._tmux = ["tmux", "-L", f"pc-{uuid.uuid4().hex[:12]}", "-f", "/dev/null"]
        self.run("new-session", "-d", "-x", "80", "-y", "24", command)

    def run(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], capture_output=True, timeout=30, env=environment(TERM="screen"))
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def shows(self, *texts: str) -> str:
        """Wait until all of them are on the screen at once: it is painted piece by piece."""

        def seen() -> str:
            screen = self.run("capture-pane", "-p")
            return screen if all(text in screen for text in texts) else ""

        return until(seen, " and ".join(texts), PATIENCE)

    def lost(self, text: str) -> None:
        """Wait until it is not on the screen any more."""
        until(lambda: text not in self.run("capture-pane", "-p"), f"no {text}", PATIENCE)

    def keys(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=30)


@pytest.fixture
def service(runtime_dir: Path, source_file: SourceFile) -> Iterator[Service]:
    with Service(runtime_dir, f"ram0={source_file(4 << 20)}", fault_around="4K") as service:
        yield service


def test_top_in_a_terminal(service: Service) -> None:
    clients = [service.client("ram0", mode) for mode in ("private", "shared")]
    for one in clients:
        one.do("[b.buf[at] for at in range(0, 1 << 20, 4096)]")
    words = [sys.executable, "-m", "postcopy", "top", "--interval", "0.2", "--runtime-dir", str(service.directory)]
    terminal = Terminal(shlex.join(words) + "; sleep 60")
    try:
        screen = terminal.shows("2 clients", "ram0", "25.0%", "█", "deaths")
        assert all(len(row) <= 80 for row in screen.splitlines())
        terminal.keys("Enter")
        pids = [str(client["worker_pid"]) for client in service.status()["clients"]]
        until(lambda: any(pid in terminal.shows("worker_pid") for pid in pids), "its worker", PATIENCE)
        terminal.keys("Escape")
        terminal.lost("worker_pid")  # or an Escape and what follows at once are another key
        terminal.keys("/")
        terminal.shows("name, state, block or pid")  # the box is open, so it takes the keys
        terminal.keys("-l", "nobody")
        terminal.lost("ram0:p")
        terminal.keys("Escape")
        terminal.shows("ram0:p")
        terminal.keys("q")
        terminal.lost("clients")
    finally:
        terminal.close()


def test_top_says_at_once_that_the_supervisor_is_gone_and_goes_on_with_the_next(service: Service) -> None:
    words = [sys.executable, "-m", "postcopy", "top", "--interval", "0.2", "--runtime-dir", str(service.directory)]
    terminal = Terminal(shlex.join(words) + "; sleep 60")
    try:
        terminal.shows("running")
        service.kill()
        terminal.shows("no supervisor is running")
        service.recover()
        terminal.shows(f"pid {service.process.pid}")
        terminal.keys("q")
    finally:
        terminal.close()


def test_top_without_a_terminal_is_one_line(service: Service) -> None:
    words = [sys.executable, "-m", "postcopy", "top", "--runtime-dir", str(service.directory)]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE, env=environment(), stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.startswith(b"postcopy: top needs a terminal")


def test_top_without_a_supervisor_is_3(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "postcopy", "top", "--runtime-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE, env=environment())
    assert done.returncode == 3
