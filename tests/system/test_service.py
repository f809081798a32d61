"""Under a service manager: the example unit, obeyed by a stand-in for systemd with a notify socket of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, ROOT, Puppet, environment, until, word

UNIT = ROOT / "client/postcopy/service_files/postcopy.service"
PROGRAM = "/usr/local/bin/postcopy"
SIZE = 256 * PAGE


def setting(name: str) -> str:
    """The one value of a line NAME=VALUE of the unit."""
    (value,) = [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(name + "=")]
    return value


class Manager:
    """What systemd does with this unit, as far as the program can see it."""

    def __init__(self, directory: Path, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self._socket.setblocking(False)
        self.said: list[str] = []
        self._environment = environment(
            NOTIFY_SOCKET=str(directory / "notify"),
            RUNTIME_DIRECTORY=str(directory / "run"),
            WATCHDOG_USEC="400000",
        )
        self.process: subprocess.Popen[bytes] | None = None

    def _run(self, line: str) -> subprocess.Popen[bytes]:
        words = shlex.split(line.replace("/srv/weights.bin", str(self._path)))
        assert words[0] == PROGRAM
        return subprocess.Popen([sys.executable, "-m", "postcopy", *words[1:]], env=self._environment)

    def hears(self, word: str) -> bool:
        while True:
            try:
                self.said += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return word in self.said

    def start(self) -> None:
        self.said.clear()
        self.process = self._run(setting("ExecStart"))
        until(lambda: self.hears("READY=1"), "it is ready", 30)

    def stop(self) -> None:
        """It reads on meanwhile: with a queue full of signs of life the word of the end would be lost."""
        assert self.process is not None
        stopping = self._run(setting("ExecStop"))
        until(lambda: self.hears("STOPPING=1"), "it says that it ends", 60)
        assert stopping.wait(60) == 0
        assert self.process.wait(60) == 0

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, source_file: SourceFile) -> Iterator[Manager]:
    manager = Manager(Path(os.path.realpath(tmp_path)), source_file(SIZE))
    try:
        yield manager
    finally:
        manager.close()


def test_restarts_that_no_client_notices(manager: Manager, tmp_path: Path) -> None:
    assert (setting("Type"), setting("KillMode"), setting("Restart")) == ("notify", "process", "on-failure")
    assert setting("RuntimeDirectoryPreserve") == "yes"
    manager.start()
    client = Puppet(tmp_path / "run")
    try:
        client.attach()
        assert client.do("words(b, [1])") == [word(PAGE)]
        until(lambda: manager.hears("WATCHDOG=1"), "it says that it lives")
        assert manager.process is not None
        manager.process.kill()
        assert manager.process.wait(10) == -signal.SIGKILL  # a failure: Restart=on-failure
        manager.start()
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        time.sleep(2.5)  # longer than the queue of a manager that does not read is: nobody waits for it
        manager.hears("")
        manager.stop()
        assert manager.hears("STOPPING=1")
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        manager.start()
        assert client.do("words(b, [1, 2, 3, 4])") == [word(page * PAGE) for page in (1, 2, 3, 4)]
    finally:
        manager.close()
        client.close()


STRICT = {
    "User": "postcopy",
    "CapabilityBoundingSet": "",
    "NoNewPrivileges": "yes",
    "DevicePolicy": "closed",
    "DeviceAllow": "/dev/userfaultfd rw",
    "ProtectSystem": "strict",
    "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
}


def test_the_unit_is_strict() -> None:
    """Whether or not systemd is here; where it is, by its own measure."""
    assert {name: setting(name) for name in STRICT} == STRICT
    if shutil.which("systemd-analyze") is not None:
        words = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(UNIT)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = tmp_path / "postcopy.service"
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
