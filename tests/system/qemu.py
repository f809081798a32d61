"""Real QEMUs for tests: a tiny guest that writes its memory without pause, and a monitor of few lines.

``versions()`` are those that are installed here: the system's, and one in ``$POSTCOPY_QEMU_NEW`` or ``.venv/qemu-new``,
unpacked by scripts/install.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import postcopy
from tests.system.service import ROOT, environment, until

FIRST = 1 << 20  # where the guest's loop begins
PAGE = 4096
MIB = 24  # of a VM
PAUSE = ("--mode", "pause")
SLOWLY = (*PAUSE, "--rate", "1M")
UNPACKED = Path(os.environ.get("POSTCOPY_QEMU_NEW", ROOT / ".venv" / "qemu-new"))


@dataclass(frozen=True)
class Qemu:
    """A QEMU to start: its version and the words before its options."""

    version: tuple[int, int]
    command: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def _new_command() -> tuple[str, ...]:
    root = str(UNPACKED)
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    loader = (f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries)
    places = [f"{root}/usr/share/qemu", f"{root}/usr/share/seabios", f"{root}/usr/lib/ipxe/qemu"]
    return (*loader, f"{root}/usr/bin/qemu-system-x86_64", *(word for place in places for word in ("-L", place)))


@cache
def versions() -> list[Qemu]:
    """The QEMUs of this machine, the oldest first."""
    found = []
    for command in (("qemu-system-x86_64",), _new_command()):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
            major, minor = said.split("version ")[1].split(".")[:2]
            found.append(Qemu((int(major), int(minor)), command))
    return sorted(found, key=lambda one: one.version)


def installed(*, new: bool) -> Qemu:
    """The system's QEMU, or the newer one. Skips the test where there is none of that age."""
    found = [one for one in versions() if (one.version >= (10, 2)) == new]
    if not found:
        pytest.skip(f"there is no QEMU {'from' if new else 'before'} 10.2: scripts/install --test")
    return found[-1]


def boot_sector(end: int) -> bytes:
    """A guest: in rounds, it writes the number of the round to the first word of every page from 1 MiB to ``end``."""
    real = bytes.fromhex("fa31c08ed80f0116407c0f20c00c010f22c0ea187c0800")
    loop = bytes.fromhex("66b810008ed88ec031c040bf00001000890781c70010000081ff") + struct.pack("<I", end)
    code = real.ljust(0x18, b"\x90") + loop + bytes.fromhex("72f0ebe8")
    assert len(code) <= 0x40
    pointer = struct.pack("<HI", 23, 0x7C48)
    table = bytes(8) + bytes.fromhex("ffff0000009acf00") + bytes.fromhex("ffff00000092cf00")
    return (code.ljust(0x40, b"\0") + pointer.ljust(8, b"\0") + table).ljust(510, b"\0") + b"\x55\xaa"


class Vm:
    """A running VM of ``mib`` MiB in a directory of its own. ``guest``: it boots the sector above, and writes up to
    ``written`` (default: everything). ``memory``: the backend ``m``."""

    def __init__(
        self,
        qemu: Qemu,
        directory: Path,
        *more: str,
        mib: int = MIB,
        memory: str = "",
        guest: bool = True,
        written: int = 0,
    ) -> None:
        self.directory, self.size, self.qemu = directory, mib << 20, qemu
        directory.mkdir(exist_ok=True)
        disk = directory / "boot"
        disk.write_bytes(boot_sector(written or self.size).ljust(1440 << 10, b"\0"))
        self.qmp = str(directory / "qmp")
        self.monitor = str(directory / "mon")
        backend = memory or f"memory-backend-memfd,size={mib}M,id=m"
        options = ["-nodefaults", "-no-user-config", "-display", "none", "-m", f"{mib}M", "-accel", "tcg"]
        options += ["-object", backend, "-machine", "pc,memory-backend=m"]
        options += ["-drive", f"if=floppy,format=raw,readonly=on,file={disk}", "-boot", "a"] if guest else []
        for path in (self.qmp, self.monitor):
            options += ["-qmp", f"unix:{path},server=on,wait=off"]
        self._log = (directory / "qemu.log").open("wb")
        self.process = subprocess.Popen([*qemu.command, *options, *more], stdout=self._log, stderr=self._log)
        try:
            self._socket = self._connect()
            self._file = self._socket.makefile("rb")
            self._read()
            self.execute("qmp_capabilities")
            if guest and "-S" not in more:
                until(lambda: self.word(FIRST) > 1, "the guest writes", 60)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(60)

        def connected() -> bool:
            assert self.process.poll() is None, (self.directory / "qemu.log").read_text()
            with contextlib.suppress(OSError):
                made.connect(self.monitor)
                return True
            return False

        until(connected, "QEMU listens", 60)
        return made

    def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command; underscores in argument names stand for hyphens."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode() + b"\n")
        while True:
            answer = self._read()
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line, f"QEMU ended with {self.process.wait(10)}: {(self.directory / 'qemu.log').read_text()}"
        return dict(json.loads(line))

    @property
    def status(self) -> str:
        return str(self.execute("query-status")["status"])

    def save(self) -> bytes:
        """Its main memory as QEMU sees it: exact only while the VM stands still."""
        path = self.directory / "truth"
        self.execute("pmemsave", val=0, size=self.size, filename=str(path))
        return path.read_bytes()

    def word(self, address: int) -> int:
        path = self.directory / "word"
        self.execute("pmemsave", val=address, size=4, filename=str(path))
        return int.from_bytes(path.read_bytes(), "little")

    def lives(self) -> bool:
        """Does the guest write?"""
        before = self.word(FIRST)
        until(lambda: self.word(FIRST) != before, "the guest writes on", 30)
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._log.close()
        for one in ("_socket", "_file"):
            if hasattr(self, one):
                getattr(self, one).close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sweep(memory: bytes) -> list[int]:
    """The rounds that the pages of a guest show, each run of equal ones once: at one moment the guest is at one place,
    so there are at most two, and the second is one less."""
    rounds: list[int] = []
    for address in range(FIRST, len(memory), PAGE):
        (found,) = struct.unpack_from("<I", memory, address)
        if not rounds or rounds[-1] != found:
            rounds.append(found)
    return rounds


@contextlib.contextmanager
def qemu_source(directory: Path, *options: str, status: int | None = 0) -> Iterator[subprocess.Popen[bytes]]:
    """``postcopy source qemu``; its log is in ``directory/source.log``. ``status`` None: it was killed."""
    command = [sys.executable, "-m", "postcopy_sources", "qemu", "--listen", f"ipc://{directory}/s", *options]
    with (directory / "source.log").open("ab") as log:
        process = subprocess.Popen(command, stderr=log, env=environment())
    try:
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        ended = process.wait(60)
        assert status is None or ended == status, (directory / "source.log").read_text()
    finally:
        process.kill()
        process.wait(10)


def options(vm: Vm, directory: Path, *more: str) -> tuple[str, ...]:
    """Of a source that starts the migration of this VM."""
    return ("--migration", f"unix:{directory}/mig", "--qmp", vm.qmp, *more)


def memory(directory: Path, name: str = "ram0") -> bytes:
    """The VM's memory as a client of the supervisor in ``r`` sees it."""
    with postcopy.attach(name, runtime_dir=directory / "r") as block:
        return bytes(block.buf)


def refused(place: Path, *words: str) -> str:
    """The one line that a source ends with."""
    command = [sys.executable, "-m", "postcopy_sources", "qemu", "--listen", f"ipc://{place}/s", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment())
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.splitlines()[-1]


def await_line(directory: Path, text: str, within: float = 60.0) -> str:
    """The log of the source, when it has this text."""
    path = directory / "source.log"
    deadline = time.monotonic() + within
    while text not in (said := path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"no {text!r} in: {said}"
        time.sleep(0.02)
    return said
