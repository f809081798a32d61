"""A group of client processes for load test and demo: started, instructed, followed, and ended.

One thread, one selector. The clients are forked by one starter process (see ``starter``), because 64 interpreters that
import the same modules need 15 s of CPU. A client that dies is noticed by the end of its pipe, and reported."""

from __future__ import annotations

import json
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from postcopy_kernel.descriptors import receive_message, send_message
from postcopy_kernel.process import pidfd_exited, pidfd_signal
from postcopy_kernel.programs import command, environment

from ..errors import PostcopyError

_GONE = 1 << 62
_END_WITHIN = 5.0
AT_ONCE = max(8, 2 * (os.cpu_count() or 1))
"""Clients that start at the same time."""


class Progress(Protocol):
    """Gets the number of touches so far."""

    def __call__(self, touches: int) -> None: ...


class Observer(Protocol):
    """Called during a wait. Returns the seconds until the next call."""

    def __call__(self) -> float: ...


def no_progress(touches: int) -> None:
    """Shows nothing."""


@dataclass
class ClientProcess:
    """One client process. ``state``: starting, ready, waiting, done, failed."""

    index: int
    mode: str
    pid: int
    pidfd: int
    input: int
    output: int
    state: str = "starting"
    touches: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    status: int | None = None
    """As of ``waitstatus_to_exitcode``; None: the process runs, or its starter has not reported yet."""
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

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            pidfd_signal(self.pidfd, signal.SIGKILL)

    def close_input(self) -> None:
        """End of input: the client detaches and ends."""
        if self.input >= 0:
            os.close(self.input)
            self.input = -1


class _Starter:
    """The starter process: forks clients, reports their end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                command("postcopy.load.starter", str(theirs.fileno()), str(os.getpid())),
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self._ended: dict[int, int] = {}

    def fork(self, job: dict[str, Any], slots: int) -> ClientProcess:
        """Start a client for ``job``. Raises PostcopyError when the starter has died."""
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        try:
            send_message(self._socket, json.dumps(job).encode(), (their_input, their_output, slots), wait=True)
            while (answer := self._receive())[0].get("started") is None:
                pass
        except BaseException:
            os.close(our_input)
            os.close(our_output)
            raise
        finally:
            os.close(their_input)
            os.close(their_output)
        message, (pidfd,) = answer
        return ClientProcess(job["index"], job["mode"], message["started"], pidfd, our_input, our_output)

    def wait(self, client: ClientProcess) -> int:
        """The exit status of a client, which is killed unless it ends in time."""
        if not pidfd_exited(client.pidfd, _END_WITHIN):
            client.kill()
        while client.pid not in self._ended:
            self._receive()
        return self._ended[client.pid]

    def _receive(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        received = receive_message(self._socket, wait=True)
        if not received.data:
            raise PostcopyError("the process that starts the clients has died")
        message: dict[str, Any] = json.loads(received.data)
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message, received.fds

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class ClientGroup:
    """Client processes that run ``steps`` (see ``toucher``) on a block. A context manager: at its end all have ended.

    ``modes`` gives the mode of each client, and so their number; ``verify`` names the expected contents (see
    ``expected``), or None."""

    def __init__(
        self,
        name: str,
        runtime_dir: str,
        modes: list[str],
        steps: list[dict[str, Any]],
        verify: str | None,
        seed: int = 1,
    ) -> None:
        self.clients: list[ClientProcess] = []
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._slots = os.memfd_create("postcopy-steps", os.MFD_CLOEXEC)
        os.ftruncate(self._slots, 8 * len(modes))
        job: dict[str, Any] = {"name": name, "runtime_dir": runtime_dir, "steps": steps, "verify": verify}
        job |= {"seed": seed, "timeout": 60.0, "clients": len(modes)}
        self._jobs = deque({**job, "index": index, "mode": mode} for index, mode in enumerate(modes))
        self._starter = _Starter()
        try:
            self._start_some()
        except BaseException:
            self.close()
            raise

    def _start_some(self) -> None:
        """Start a few clients at a time: hundreds that attach at once would all wait for a minute."""
        while self._jobs and sum(client.state == "starting" for client in self.clients) < AT_ONCE:
            client = self._starter.fork(self._jobs.popleft(), self._slots)
            self.clients.append(client)
            self._selector.register(client.output, selectors.EVENT_READ, client)

    def until(self, state: str, progress: Progress = no_progress, observer: Observer | None = None) -> None:
        """Follow the clients until every living one is in ``state`` or over. ``progress`` gets the sum of touches."""
        while self._jobs or any(client.state != state and not client.over for client in self.clients):
            for key, _ in self._selector.select(observer() if observer is not None else None):
                self._read(key.data)
            self._start_some()
            progress(sum(client.touches for client in self.clients))

    def stop(self, within: float) -> None:
        """Ask all clients for their results now. A client without a result after ``within`` seconds has failed."""
        for client in self.clients:
            if not client.over:
                with suppress(ProcessLookupError):
                    pidfd_signal(client.pidfd, signal.SIGINT)
        deadline = time.monotonic() + within
        while any(not client.over for client in self.clients) and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                self._read(key.data)
        for client in self.clients:
            if not client.over:
                client.state, client.error = "failed", f"did not end within {within:g} s"

    def go(self) -> int:
        """Let all waiting clients continue. Returns the instant of their start (CLOCK_MONOTONIC, ns)."""
        origin = time.monotonic_ns()
        for client in self.clients:
            if not client.over:
                client.state = "ready"
                with suppress(BrokenPipeError):
                    os.write(client.input, b"%d\n" % origin)
        return origin

    def failures(self) -> list[str]:
        """One line for every client that did not complete its job."""
        return [f"client {one.index} (pid {one.pid}) {one.error}" for one in self.clients if one.state == "failed"]

    def _read(self, client: ClientProcess) -> None:
        data = os.read(client.output, 1 << 20)
        if not data:
            self._selector.unregister(client.output)
            self._ended(client)
        for message in client.take(data):
            self._on_message(client, message)

    def _on_message(self, client: ClientProcess, message: dict[str, Any]) -> None:
        if "touches" in message or "waiting" in message:
            client.touches = int(message.get("touches", message.get("waiting", 0)))
            client.state = "waiting" if "waiting" in message else client.state
        elif "ready" in message:
            client.state = "ready"
        elif "result" in message:
            client.result, client.state = message["result"], "done"
            client.touches = int(client.result["touches"])
        elif "error" in message:
            client.error, client.state = f"failed: {message['error']}", "failed"

    def _ended(self, client: ClientProcess) -> None:
        """Its output is closed: take its exit status, and release the clients that wait for it at the barrier."""
        status = client.status = self._starter.wait(client)
        if not client.over:
            client.state = "failed"
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            client.error = f"{how} before it was done"
        with mmap.mmap(self._slots, 0) as slots:
            slots[8 * client.index : 8 * client.index + 8] = _GONE.to_bytes(8, sys.byteorder)

    def close(self) -> None:
        """End every client: those that are done detach in order, the others are killed. Their results stay."""
        if self._closed:
            return
        self._closed = True
        for client in self.clients:
            if not client.over:
                client.kill()
            client.close_input()
        for client in self.clients:
            if not pidfd_exited(client.pidfd, _END_WITHIN):
                client.kill()
            os.close(client.output)
            os.close(client.pidfd)
        self._starter.close()
        self._selector.close()
        if self._slots >= 0:
            os.close(self._slots)
            self._slots = -1

    def __enter__(self) -> ClientGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
