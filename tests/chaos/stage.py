"""Everybody on the stage, and who starts them again: supervisor, source, the line between them, client programs.

``Stage`` is what a service manager is to the service: a supervisor that died is started with ``--recover``, a source
that died is started anew. It finds everybody by an environment variable that all inherit, never by name alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from postcopy.errors import PostcopyError
from postcopy.queries import Control
from tests.system.service import alive, environment
from tests.wire.networks import HERE, Networks, inside, ip, two_networks
from tests.wire.relay import Relay

ROOT = Path(__file__).resolve().parents[2]
LOCAL, REMOTE = "ram0", "ram1"
READY_WITHIN = 60.0
END_WITHIN = 60.0
MARK = "POSTCOPY_CHAOS_ID"


@dataclass(slots=True)
class Client:
    """A program in its seat."""

    seat: int
    mode: str
    process: subprocess.Popen[bytes]
    out: Path
    errors: Path
    killed: bool = False
    stopped: bool = False


class Watcher(threading.Thread):
    """Asks the supervisor for its status again and again; ``document`` is the latest, ``seen`` when it was asked."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="watcher", daemon=True)
        self.document: dict[str, Any] = {}
        self.seen = 0.0
        self._directory = directory
        self._over = threading.Event()
        self.asking = threading.Lock()
        """Held while it asks: whoever holds it finds no connection of ours at the supervisor."""

    def run(self) -> None:
        while not self._over.wait(0.2):
            with self.asking:
                self._ask()

    def _ask(self) -> None:
        asked = time.monotonic()
        with contextlib.suppress(PostcopyError, OSError), Control(self._directory, timeout=3.0) as control:
            self.document = control.status()
            self.seen = asked

    def close(self) -> None:
        self._over.set()
        self.join(15)


class Stage:
    """One round's processes. ``directory`` is for logs and what else a person may want to see afterwards."""

    def __init__(
        self, directory: Path, files: tuple[Path, Path], options: tuple[str, ...], *, namespaces: bool = False
    ) -> None:
        """``namespaces``: source and supervisor live in two networks, with tcp over a wire between them."""
        self.directory, self.files, self.options = directory, files, options
        self._stack = contextlib.ExitStack()
        self.networks: Networks | None = self._stack.enter_context(two_networks()) if namespaces else None
        self.identity = f"{os.getpid()}-{directory.name}"
        self.environment = environment(**{MARK: self.identity})
        paths = self.environment["PYTHONPATH"]
        self.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "sources"), paths])
        self.runtime = Path(tempfile.mkdtemp(prefix="pcx-", dir="/tmp"))
        self._tmpfs = self._mount()
        self.clients: dict[int, Client] = {}
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.faces: list[subprocess.Popen[bytes]] = []
        self.source: subprocess.Popen[bytes] | None = None
        self.relay: Relay | None = None
        self.lives = Counter[str]()
        self.upgrading = False
        """The supervisor was asked to make room for its successor."""
        self._logs: list[IO[bytes]] = []
        self.watcher = Watcher(self.place)

    @property
    def place(self) -> Path:
        """The runtime directory."""
        return self.runtime / "run"

    def _mount(self) -> bool:
        """The runtime directory lies on a tmpfs of its own, so that it can be filled; False where we may not mount."""
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0711", "postcopy-chaos", str(self.runtime)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    # --- starting -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The service, ready for clients."""
        self.start_source()
        with self._where("source"):
            self.relay = Relay(*self._ends())
        self.start_supervisor()
        self.watcher.start()
        limit = time.monotonic() + READY_WITHIN
        while not self.calm(0.0):
            if time.monotonic() > limit or self.supervisor is None or self.supervisor.poll() is not None:
                raise RuntimeError(f"the supervisor does not come up: {self.log('supervisor')[-2000:]}")
            time.sleep(0.05)

    def _ends(self) -> tuple[str, str]:
        """Where the line between supervisor and source is, and where it leads."""
        if self.networks is not None:
            return f"tcp:{HERE}:7000", f"tcp:{HERE}:7001"
        return f"unix:{self.runtime}/line", f"unix:{self.runtime}/source"

    def _where(self, who: str) -> contextlib.AbstractContextManager[None]:
        """Whatever is started in this context is on that side of the wire."""
        if self.networks is None:
            return contextlib.nullcontext()
        return inside(self.networks.source if who == "source" else self.networks.clients)

    def start_source(self) -> None:
        self.lives["source"] += 1
        listen = [f"ipc://{self.runtime}/source"] if self.networks is None else [f"tcp://{HERE}:7001", "--plain-tcp"]
        words = [f"{REMOTE}={self.files[1]}", "--listen", *listen]
        self.source = self._start("source", "postcopy_sources", *words, "--die-with-parent", str(os.getpid()))

    def blocks(self) -> list[str]:
        """NAME=SOURCE of both."""
        assert self.relay is not None
        return [f"{LOCAL}={self.files[0]}", f"{REMOTE}={self.relay.endpoint}/{REMOTE}"]

    def start_supervisor(self) -> None:
        self.lives["supervisor"] += 1
        self.upgrading = False
        words = [*self.blocks(), "--runtime-dir", str(self.place), *self.options, "--die-with-parent", str(os.getpid())]
        if self.networks is not None:
            words.append("--plain-tcp")
        if self.lives["supervisor"] > 1:
            words.append("--recover")
        self.supervisor = self._start("supervisor", "postcopy_supervisor", *words)

    def face_of(self, block: int) -> str:
        """Where the machines with a copy of this block connect."""
        return f"{self.directory}/face-{block}"

    def start_face(self, block: int) -> None:
        """The page-fault handler of simulated Firecrackers."""
        words = ["--listen", self.face_of(block), "--block", (LOCAL, REMOTE)[block], "--runtime-dir", str(self.place)]
        face = self._start(f"face-{block}", "postcopy", "attach", "firecracker", *words, "--timeout", "90")
        self.faces[block:] = [face, *self.faces[block + 1 :]]

    def _start(self, name: str, module: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log, self._where(name):
            return subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self.environment,
                cwd=self.directory,
            )

    def seat(self, seat: int, job: dict[str, Any]) -> None:
        """A new program takes a seat."""
        self.lives[f"seat {seat}"] += 1
        life = self.lives[f"seat {seat}"]
        out, errors = (self.directory / f"client-{seat}.{life}.{end}" for end in ("out", "err"))
        job = {**job, "seat": seat, "runtime_dir": str(self.place), "blocks": [LOCAL, REMOTE]}
        job |= {"faces": [self.face_of(block) for block in (0, 1)], "files": [str(file) for file in self.files]}
        module = "tests.chaos.program" if job["mode"] in ("private", "shared") else "tests.chaos.machine"
        with out.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self.environment,
                cwd=ROOT,
            )
        self.clients[seat] = Client(seat, job["mode"], process, out, errors)

    # --- who is there -------------------------------------------------------------------------------------------------

    def people(self) -> dict[int, str]:
        """Pids of everybody on the stage with the names that they gave themselves."""
        found, mark = {}, f"{MARK}={self.identity}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or mark not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if alive(int(entry.name)):
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
        return found

    def custodians(self) -> list[int]:
        return [pid for pid, name in self.people().items() if name == "postcopy-cust"]

    def workers(self) -> dict[int, int]:
        """Workers of clients that sit here: client number (of the supervisor) -> pid."""
        found = {}
        for pid, name in self.people().items():
            number = name.removeprefix("postcopy-w")
            if number != name and number.isdigit() and number != "0":
                found[int(number)] = pid
        return found

    def seat_of(self, number: int) -> int:
        """The seat of the supervisor's client ``number``; 0 when it is none of ours, or a fork's child."""
        records = self.watcher.document.get("clients", [])
        pid = next((record["pid"] for record in records if record["id"] == number), 0)
        return next((seat for seat, client in self.clients.items() if client.process.pid == pid), 0)

    def calm(self, since: float) -> bool:
        """Has the supervisor that lives answered after ``since`` that all is well, and is there one custodian?"""
        document = self.watcher.document
        return bool(
            self.watcher.seen > since
            and self.supervisor is not None
            and self.supervisor.poll() is None
            and document.get("pid") == self.supervisor.pid
            and document.get("state") == "running"
            and self.source is not None
            and self.source.poll() is None
            and len(self.custodians()) == 1
        )

    def in_words(self) -> str:
        """How the service looked last."""
        age = time.monotonic() - self.watcher.seen
        return f"last status {age:.0f} s ago: {self.watcher.document.get('state')}, custodians {self.custodians()}"

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # --- the line ---------------------------------------------------------------------------------------------------

    def take_down(self) -> None:
        """The wire between the networks goes dead and nobody is told; without networks the line breaks and refuses."""
        if self.networks is not None:
            ip("-n", self.networks.source, "link", "set", "line", "down")
        elif self.relay is not None:
            self.relay.refuse()

    def bring_up(self) -> None:
        if self.networks is not None:
            ip("-n", self.networks.source, "link", "set", "line", "up")
        elif self.relay is not None:
            self.relay.accept()

    # --- the runtime directory ----------------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Leave no byte on the tmpfs of the runtime directory; False where it is none."""
        if not self._tmpfs:
            return False
        with contextlib.suppress(OSError), (self.runtime / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(65536)):
                pass
        return True

    def empty(self) -> None:
        (self.runtime / "ballast").unlink(missing_ok=True)

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> list[str]:
        """The orderly end; returns what was not in order."""
        told = []
        self.watcher.close()
        for face in self.faces:
            face.send_signal(signal.SIGINT)
            if (status := face.wait(END_WITHIN)) not in (0, 130):
                told.append(f"a face ended with {status} on SIGINT")
        for name, process in (("supervisor", self.supervisor), ("source", self.source)):
            if process is None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(END_WITHIN)
            except subprocess.TimeoutExpired:
                told.append(f"the {name} does not end on SIGTERM")
                continue
            if status:
                told.append(f"the {name} ended with {status} on SIGTERM")
        return told

    def close(self) -> None:
        """Whatever still lives ends here, by pidfd."""
        with contextlib.suppress(RuntimeError):
            self.watcher.close()
        if self.relay is not None:
            self.relay.close()
        limit = time.monotonic() + 10
        while (left := self.people()) and time.monotonic() < limit:
            for pid in left:
                with contextlib.suppress(OSError):
                    pidfd = os.pidfd_open(pid)
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.close(pidfd)
            time.sleep(0.05)
        for process in (
            self.supervisor,
            self.source,
            *self.faces,
            *(client.process for client in self.clients.values()),
        ):
            if process is not None:
                process.wait(10)
        if self._tmpfs:
            subprocess.run(["umount", str(self.runtime)], capture_output=True, check=False)
        shutil.rmtree(self.runtime, ignore_errors=True)
        self._stack.close()


def descriptors(pid: int) -> Counter[str]:
    """What the descriptors of a process refer to, numbers left out: two sockets are two of one kind."""
    found = Counter[str]()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            kind, _, _ = target.partition(":[")
            found[kind if kind in ("socket", "pipe") else target] += 1
    return found
