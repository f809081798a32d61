"""The driver of remote blocks: page source programs at an endpoint of their own, killed and started anew.

``with Source(f"ram0={path}") as source`` is a source that is ready; ``source.block("ram0")`` is what ``serve`` takes
for it. Its socket lies in a directory of its own: a source that is killed leaves it behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.system.service import ROOT, Service, environment, stands, until

READY_WITHIN = 40.0


class Source:
    """A source program at one endpoint; ``prefix`` is put before its command line (``ip netns exec NAME``)."""

    def __init__(
        self, *blocks: str, listen: str = "", prefix: tuple[str, ...] = (), options: tuple[str, ...] = ()
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pcs-", dir="/tmp"))
        self.endpoint = listen or f"ipc://{self.directory}/s"
        self._blocks, self._prefix, self._options = blocks, prefix, options
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None

    def block(self, name: str = "ram0", ours: str = "") -> str:
        """NAME=SOURCE for serve: this source's block ``name`` under the name ``ours``."""
        return f"{ours or name}={self.endpoint}/{name}"

    def start(self, *blocks: str) -> None:
        """Start it (again), with the blocks that are given or those of before; returns when it is ready."""
        assert self.process is None, "it runs already"
        self._blocks = blocks or self._blocks
        begun = len(self.log())
        command = [sys.executable, "-m", "postcopy_sources", *self._blocks, "--listen", self.endpoint, *self._options]
        paths = environment()
        paths["PYTHONPATH"] = os.pathsep.join([str(ROOT / "sources"), paths["PYTHONPATH"]])
        self.process = subprocess.Popen(
            [*self._prefix, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log, env=paths
        )
        until(lambda: self._ready(begun), "the source is ready", READY_WITHIN)

    def _ready(self, begun: int) -> bool:
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"the source ended with {status}: {self.log()}"
        return "ready" in self.log()[begun:]

    def log(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode("utf-8", "replace")

    def tell(self, number: int) -> None:
        """SIGSTOP and SIGCONT: it stands still and goes on."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            pid = self.process.pid
            until(lambda: stands(pid), "it stands still")

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it by this signal and wait for it."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(number)
        process.wait(40)

    def __enter__(self) -> Source:
        try:
            if self.process is None:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = self.log()
        if error is not None:
            print(f"--- log of the source ---\n{said[-3000:]}", file=sys.stderr)
        self.close()
        assert error is not None or "Traceback" not in said, said

    def close(self) -> None:
        if self.process is not None:
            self.end()
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def source_of(service: Service, number: int = 0) -> dict[str, Any]:
    """What the status says of a source."""
    found = service.status()["sources"][number]
    assert isinstance(found, dict)
    return found


def await_state(service: Service, state: str, within: float = 40.0, number: int = 0) -> None:
    until(lambda: source_of(service, number)["state"] == state, f"the source is {state}", within)


def kinds(service: Service, *wanted: str) -> list[str]:
    """The kinds of all events that are among ``wanted``, oldest first."""
    return [event["kind"] for event in service.status()["events"] if event["kind"] in wanted]
