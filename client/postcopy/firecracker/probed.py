"""The two sides of a probe: the handler that is probed, and the simulated machines that use it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from postcopy_kernel.programs import command, environment

from ..errors import PostcopyError
from ..vhost_user.channel import is_listening

START_SECONDS = 60.0
"""For a program to start, on a busy machine; or ``timeout``, if that is more."""


class Ended(PostcopyError):
    """A process has ended that was needed."""


class Overdue(PostcopyError):
    """An answer has not come in time: threads of the machine wait for pages."""


class Handler:
    """The handler's processes. ``words`` is its command, with {socket} and {memory}."""

    def __init__(self, words: Sequence[str], path: str, memory: str, timeout: float) -> None:
        self.socket = path
        self.timeout = timeout
        self._words = [word.replace("{socket}", path).replace("{memory}", memory) for word in words]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = path + ".log"

    def start(self) -> None:
        """Start it and wait until it listens. Raises Ended, and OSError when the command cannot be started."""
        with suppress(FileNotFoundError):
            os.unlink(self.socket)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        limit = time.monotonic() + max(self.timeout, START_SECONDS)
        while not is_listening(self.socket):
            if self._process.poll() is not None:
                status = self._process.returncode
                raise Ended(f"{self._words[0]} ended with status {status} before it listened{self._last_words()}")
            if time.monotonic() > limit:
                raise Ended(f"{self._words[0]} does not listen at {self.socket} after {START_SECONDS:g} s")
            time.sleep(0.02)

    def ready(self, fresh: bool = False) -> None:
        """Start it where it has ended, or (``fresh``) once more."""
        if fresh or self._process is None or self._process.poll() is not None or not is_listening(self.socket):
            self.end()
            self.start()

    def _last_words(self) -> str:
        lines = Path(self._log).read_text("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f": {said[-1][:200]}" if said else ""

    def processes(self) -> list[int]:
        """The handler's process and all that it has started in its session."""
        session, found = self._process.pid if self._process else 0, []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
        return found

    def signal(self, number: int) -> None:
        """To every process of its session, which is ours to signal: we have started it."""
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, number)

    def userfaultfds(self) -> int:
        """How many userfaultfds its processes hold."""
        count = 0
        for pid in self.processes():
            with suppress(OSError):
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    with suppress(OSError):
                        count += os.readlink(entry.path) == "anon_inode:[userfaultfd]"
        return count

    def end(self) -> None:
        """Kill it and wait for its end."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait()
        while left := [pid for pid in self.processes() if _lives(pid)]:
            self.signal(signal.SIGKILL)
            time.sleep(0.01 * len(left))
        self._process = None


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


class SimulatedMachine:
    """A process of ``simulated``. Its answers are waited for ``timeout`` seconds."""

    def __init__(self, path: str, memory: str, profile: dict[str, Any], timeout: float) -> None:
        self.timeout = timeout
        words = command("postcopy.firecracker.simulated", path, memory, json.dumps(profile))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(), bufsize=0)
        self._forgotten = False
        try:
            self.answer(max(timeout, START_SECONDS))
        except BaseException:
            self.end()
            raise

    def begin(self, order: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.encode() + b"\n")
        except BrokenPipeError:
            raise Ended(self._why()) from None

    def answer(self, within: float = 0.0) -> Any:
        """The answer to the oldest order. Raises Overdue and Ended."""
        if self._forgotten:
            return {"wrong": {}, "first_reads": [], "removals": []}
        stdout = self._process.stdout
        assert stdout is not None
        data, limit = b"", time.monotonic() + (within or self.timeout)
        while not data.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise Overdue(f"a machine waits for a page for {self.timeout:g} s")
            piece = stdout.read(1 << 16)
            if not piece:
                raise Ended(self._why())
            data += piece
        return json.loads(data)

    def do(self, order: str) -> Any:
        if not self._forgotten:
            self.begin(order)
        return self.answer()

    def forget(self) -> None:
        """It was ended on purpose: nothing is asked of it."""
        self._forgotten = True

    def _why(self) -> str:
        status = self._process.wait()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"a machine ended with {how}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
