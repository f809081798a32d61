"""The service that is attacked, and its honest clients."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from postcopy_kernel.process import memory_figures
from tests.attack.attacks import ALLOWED
from tests.system.service import PuppetError, Service, alive, environment

MIB = 1 << 20
LARGEST = 512 * MIB
PAGE = 4096
BLOCKS = ("local", "remote")
PAUSE = 0.002
"""Least pause between two touches: an honest client is no load test. In a long run it is longer, because each page is
touched once."""
STUCK_AFTER = 20.0
TOUCH = """
pages = list(range(b.size // PAGE))
random.Random(seed).shuffle(pages)
def touch(seconds, pause):
    took, end = [], time.monotonic() + seconds
    while time.monotonic() < end and pages:
        place = pages.pop() * PAGE
        begun = time.perf_counter_ns()
        b.buf[place]
        took.append((time.perf_counter_ns() - begun) // 1000)
        time.sleep(pause)
    return took
"""


@dataclass
class Touches:
    """What each block's faults took, in us, in pieces of time, and which blocks' clients did not answer in time."""

    took: dict[str, list[list[int]]] = field(default_factory=lambda: {block: [] for block in BLOCKS})
    stuck: list[str] = field(default_factory=list)

    def figures(self, block: str) -> tuple[float, float]:
        """p50 and p99."""
        took = sorted(one for piece in self.took[block] for one in piece)
        return (took[len(took) // 2], took[len(took) * 99 // 100]) if took else (float("inf"), float("inf"))


class Installation:
    """Supervisor, and a page source on a TCP port: a context manager."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="attack-", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.directory.chmod(0o711)
        self.network = {name: _free_port() for name in ("source", "metrics", "rogue")}
        self._source_log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.source, rogue = self._serve("source", "remote"), self._serve("rogue", "rogue")
        self.service = self._stack.enter_context(
            Service(
                self.directory,
                f"local={self._file}",
                f"remote=tcp://127.0.0.1:{self.network['source']}/remote",
                f"rogue=tcp://127.0.0.1:{self.network['rogue']}/rogue",
                allow_uid=ALLOWED,
                metrics=f"127.0.0.1:{self.network['metrics']}",
                background_rate=0,
                plain_tcp=True,
            )
        )
        rogue.kill()  # in its place come those who attack as a source
        rogue.wait()

    def _serve(self, port: str, block: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "postcopy_sources", f"{block}={self._file}", "--plain-tcp"]
        command += ["--listen", f"tcp://127.0.0.1:{self.network[port]}"]
        program = subprocess.Popen(command, stderr=self._source_log, env=environment())
        self._stack.callback(program.wait, 20)
        self._stack.callback(program.terminate)
        return program

    def descriptors(self) -> int:
        """Open in supervisor and source."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (self.service.pid, self.source.pid))

    def log_bytes(self) -> int:
        return len(self.service.log()) + os.fstat(self._source_log.fileno()).st_size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


class Scene(Installation):
    """The installation that is attacked, with an honest client of each block; and ``neighbour``, another one on the
    same machine. An attack on that takes the same processor time away, and nothing else."""

    def __init__(self, chance: Random, seconds: float) -> None:
        """``seconds``: in which faults are measured, all together."""
        self._random = chance
        self._size = min(LARGEST, (int(3 * seconds / PAUSE) * PAGE // MIB + 1) * MIB)
        self._pause = max(PAUSE, 2.5 * seconds / (self._size // PAGE))
        place = tempfile.TemporaryDirectory(prefix="attacked-")
        super().__init__(Path(place.name) / "file")
        self._stack.enter_context(place)

    def _start(self) -> None:
        with self._file.open("wb") as file:
            for _ in range(self._size // MIB):
                file.write(self._random.randbytes(MIB))
        super()._start()
        self.neighbour = self._stack.enter_context(Installation(self._file))
        self.clients = {block: self.service.client(block) for block in BLOCKS}
        for client in self.clients.values():
            client.do(f"seed = {self._random.randrange(1 << 30)}")
            client.do(TOUCH)
        self._find()

    def _find(self) -> None:
        self._pids = {
            "supervisor": self.service.pid,
            "source": self.source.pid,
            **{f"worker of {block}": self.service.worker(client) for block, client in self.clients.items()},
        }

    def replaced(self) -> list[str]:
        """Programs that have ended since they were looked for; from now on their successors count."""
        gone = [name for name, pid in self._pids.items() if not alive(pid)]
        if gone:
            self._find()
        return gone

    def measure(self, seconds: float, touches: Touches) -> None:
        """Both clients touch missing pages for so long; what that took is added."""
        for client in self.clients.values():
            client.begin(f"touch({seconds}, {self._pause})")
        for block, client in self.clients.items():
            try:
                touches.took[block].append(client.answer(seconds + STUCK_AFTER))
            except (AssertionError, PuppetError) as error:
                touches.stuck.append(f"{block}: {error}")

    def memory(self) -> dict[str, int]:
        """Private bytes of every program of the service; a program that has ended is left out."""
        found = {}
        for name, pid in self._pids.items():
            with suppress(OSError):
                found[name] = memory_figures(pid)["private"]
        return found

    def wrong_blocks(self) -> int:
        """How many blocks do not equal the file, or cannot be read, as new clients see them."""
        wrong = 0
        for block in self.clients:
            for mode in ("private", "shared"):
                try:
                    wrong += self.service.client(block, mode).do(f"check(b, {str(self._file)!r})", 120.0) != -1
                except AssertionError:
                    wrong += 1
        return wrong


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
