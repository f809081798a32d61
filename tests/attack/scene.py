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

from postcopy_kernel.process import memory_figures
from tests.attack.attacks import ALLOWED
from tests.system.service import PuppetError, Service, alive, environment

MIB = 1 << 20
SIZE = 256 * MIB
PAGE = 4096
PAUSE = 0.004
"""Between two touches: an honest client is no load test."""
STUCK_AFTER = 20.0
TOUCH = """
def touch(block, seconds, seed, pause):
    chance, took, end = random.Random(seed), [], time.monotonic() + seconds
    while time.monotonic() < end:
        page = chance.randrange(block.size // PAGE)
        begun = time.perf_counter_ns()
        block.buf[page * PAGE]
        took.append((time.perf_counter_ns() - begun) // 1000)
        time.sleep(pause)
    return took
"""


@dataclass
class Touches:
    """Fault p50 and p99 in us for each block, and which blocks' clients did not answer in time."""

    figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    count: int = 0
    stuck: list[str] = field(default_factory=list)


class Scene:
    """Supervisor, page source on a TCP port, a client of each block: a context manager."""

    def __init__(self, chance: Random) -> None:
        self._random = chance
        self._stack = ExitStack()

    def __enter__(self) -> Scene:
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
        self._file = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="attacked-"))) / "file"
        with self._file.open("wb") as file:
            for _ in range(SIZE // MIB):
                file.write(self._random.randbytes(MIB))
        self.network = {"source": _free_port(), "metrics": _free_port()}
        self._source_log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        endpoint = f"tcp://127.0.0.1:{self.network['source']}"
        command = [
            sys.executable,
            "-m",
            "postcopy_sources",
            f"remote={self._file}",
            "--listen",
            endpoint,
            "--plain-tcp",
        ]
        self._source = subprocess.Popen(command, stderr=self._source_log, env=environment())
        self._stack.callback(self._end_source)
        self.service = self._stack.enter_context(
            Service(
                self.directory,
                f"local={self._file}",
                f"remote={endpoint}/remote",
                allow_uid=ALLOWED,
                metrics=f"127.0.0.1:{self.network['metrics']}",
                background_rate=0,
                plain_tcp=True,
            )
        )
        self.clients = {block: self.service.client(block) for block in ("local", "remote")}
        for client in self.clients.values():
            client.do(TOUCH)
        self._find()

    def _find(self) -> None:
        self._pids = {
            "supervisor": self.service.pid,
            "source": self._source.pid,
            **{f"worker of {block}": self.service.worker(client) for block, client in self.clients.items()},
        }

    def replaced(self) -> list[str]:
        """Programs that have ended since they were looked for; from now on their successors count."""
        gone = [name for name, pid in self._pids.items() if not alive(pid)]
        if gone:
            self._find()
        return gone

    def measure(self, seconds: float) -> Touches:
        """Both clients touch random pages, most of them missing, for so long."""
        touches = Touches()
        for client in self.clients.values():
            client.begin(f"touch(b, {seconds}, {self._random.randrange(1 << 30)}, {PAUSE})")
        for block, client in self.clients.items():
            try:
                took = sorted(client.answer(seconds + STUCK_AFTER))
            except (AssertionError, PuppetError) as error:
                touches.stuck.append(f"{block}: {error}")
                touches.figures[block] = (float("inf"), float("inf"))
                continue
            touches.count += len(took)
            touches.figures[block] = (took[len(took) // 2], took[len(took) * 99 // 100])
        return touches

    def memory(self) -> dict[str, int]:
        """Private bytes of every program of the service; a program that has ended is left out."""
        found = {}
        for name, pid in self._pids.items():
            with suppress(OSError):
                found[name] = memory_figures(pid)["private"]
        return found

    def descriptors(self) -> int:
        """Open in supervisor and source."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (self.service.pid, self._source.pid))

    def log_bytes(self) -> int:
        return len(self.service.log()) + os.fstat(self._source_log.fileno()).st_size

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

    def _end_source(self) -> None:
        self._source.terminate()
        self._source.wait(20)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
