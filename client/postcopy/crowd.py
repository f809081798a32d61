"""A crowd of client processes for load test and demo: started, told what to do, listened to, and ended.

One thread, one selector. A client that dies is noticed by the end of its pipe and reported; nobody waits for it.
"""

from __future__ import annotations

import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

_GONE = 1 << 62
_END_WITHIN = 5.0
AT_ONCE = max(8, 2 * (os.cpu_count() or 1))
"""Clients that start at the same time."""


@dataclass
class Member:
    """One client process. ``state``: starting, ready, waiting, done, failed."""

    index: int
    mode: str
    process: subprocess.Popen[bytes]
    state: str = "starting"
    touches: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    _rest: bytes = b""

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                yield json.loads(line)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed")


class Crowd:
    """Client processes that run ``steps`` (see ``toucher``) on a block. A context manager: at its end all are gone.

    ``modes`` gives the mode of each, and so their number; ``verify`` says what touches are checked against (see
    ``load.truth``), or None.
    """

    def __init__(
        self,
        name: str,
        runtime_dir: str,
        modes: list[str],
        steps: list[dict[str, Any]],
        verify: str | None,
        seed: int = 1,
    ) -> None:
        self.members: list[Member] = []
        self._selector = selectors.DefaultSelector()
        self._slots = os.memfd_create("postcopy-crowd", os.MFD_CLOEXEC)
        os.ftruncate(self._slots, 8 * len(modes))
        job = {
            "name": name,
            "runtime_dir": runtime_dir,
            "steps": steps,
            "verify": verify,
            "seed": seed,
            "timeout": 60.0,
        }
        job |= {"clients": len(modes), "barrier": self._slots, "parent": os.getpid()}
        try:
            self._coming = deque(
                (index, mode, {**job, "index": index, "mode": mode}) for index, mode in enumerate(modes)
            )
            self._start_some()
        except BaseException:
            self.close()
            raise

    def _start_some(self) -> None:
        """Some at a time: hundreds of interpreters that start at once would let nobody attach for a minute."""
        while self._coming and sum(member.state == "starting" for member in self.members) < AT_ONCE:
            self._start(*self._coming.popleft())

    def _start(self, index: int, mode: str, job: dict[str, Any]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "postcopy.toucher", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._slots,),
        )
        assert process.stdout is not None
        member = Member(index, mode, process)
        self.members.append(member)
        self._selector.register(process.stdout, selectors.EVENT_READ, member)

    def until(
        self,
        state: str,
        progress: Callable[[int], None] = lambda touches: None,
        meanwhile: Callable[[], float] | None = None,
    ) -> None:
        """Listen until every living client is in ``state`` or over. ``progress`` hears the sum of touches;
        ``meanwhile`` is called at times, and says in how many seconds it wants to be called again."""
        while self._coming or any(member.state != state and not member.over for member in self.members):
            for key, _ in self._selector.select(meanwhile() if meanwhile is not None else None):
                self._hear(key.data)
            self._start_some()
            progress(sum(member.touches for member in self.members))

    def stop(self, within: float) -> None:
        """Let everybody come to an end at once; who has not said its result after so many seconds has failed."""
        for member in self.members:
            if not member.over:
                member.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + within
        while any(not member.over for member in self.members) and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                self._hear(key.data)
        for member in self.members:
            if not member.over:
                member.state, member.error = "failed", f"did not come to an end within {within:g} s"

    def go(self) -> int:
        """Let everybody who waits go on; the instant that counts as their start (CLOCK_MONOTONIC, ns)."""
        origin = time.monotonic_ns()
        for member in self.members:
            if member.process.stdin is not None and not member.over:
                member.state = "ready"
                with suppress(BrokenPipeError):
                    member.process.stdin.write(b"%d\n" % origin)
                    member.process.stdin.flush()
        return origin

    def failures(self) -> list[str]:
        """One line for every client that did not do its job to the end."""
        return [f"client {m.index} (pid {m.process.pid}) {m.error}" for m in self.members if m.state == "failed"]

    def _hear(self, member: Member) -> None:
        assert member.process.stdout is not None
        data = os.read(member.process.stdout.fileno(), 1 << 20)
        if not data:
            self._selector.unregister(member.process.stdout)
            self._ended(member)
        for message in member.take(data):
            self._learn(member, message)

    def _learn(self, member: Member, message: dict[str, Any]) -> None:
        if "touches" in message or "waiting" in message:
            member.touches = int(message.get("touches", message.get("waiting", 0)))
            member.state = "waiting" if "waiting" in message else member.state
        elif "ready" in message:
            member.state = "ready"
        elif "result" in message:
            member.result, member.state = message["result"], "done"
            member.touches = int(member.result["touches"])
        elif "error" in message:
            member.error, member.state = f"failed: {message['error']}", "failed"

    def _ended(self, member: Member) -> None:
        """Its output is closed: reap it, and let nobody wait for it."""
        try:
            status = member.process.wait(_END_WITHIN)
        except subprocess.TimeoutExpired:
            member.process.kill()
            status = member.process.wait()
        if not member.over:
            member.state = "failed"
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            member.error = f"{how} before it was done"
        with mmap.mmap(self._slots, 8 * len(self.members)) as slots:
            slots[8 * member.index : 8 * member.index + 8] = _GONE.to_bytes(8, sys.byteorder)

    def close(self) -> None:
        """End every client: those that are done leave in order, the others are killed."""
        for member in self.members:
            if not member.over:
                member.process.kill()
            if member.process.stdin is not None:
                with suppress(BrokenPipeError):
                    member.process.stdin.close()
        for member in self.members:
            try:
                member.process.wait(_END_WITHIN)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            if member.process.stdout is not None:
                member.process.stdout.close()
        self._selector.close()
        if self._slots >= 0:
            os.close(self._slots)
            self._slots = -1

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
