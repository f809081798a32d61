"""Processes that start warm: forks of an interpreter that has imported a program already.

A supervisor needs 0.3 s of processor time for its imports, and the tests start about a thousand. ``Zygote`` starts
``python -m tests.system.zygote MODULE...`` once per test process. Its children run the program as ``__main__`` with
their own arguments and standard streams; they are sessions of their own, so that their orphans are found.
A start that needs another environment, directory, namespace or limit than the zygote has must not come from here.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

PER_TEST = ("POSTCOPY_TEST_ID", "PYTEST_CURRENT_TEST")
"""Environment variables that differ from test to test."""
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)
MAX_REQUEST = 1 << 16


class WarmProcess:
    """A fork of the zygote, with those parts of ``subprocess.Popen`` that tests use. It stays a zombie until it is
    waited for, as the test's own child would."""

    def __init__(self, zygote: Zygote, pid: int, stdin: IO[bytes] | None, stdout: IO[bytes] | None) -> None:
        self._zygote, self.pid, self.stdin, self.stdout = zygote, pid, stdin, stdout
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._reap()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        self.returncode = self._zygote.reap(self.pid)
        os.close(self._pidfd)


class Zygote:
    """The parent of warm processes that run one program: ``program`` is ``-m MODULE`` or a file."""

    def __init__(self, program: tuple[str, ...], imports: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.program = program
        self.living: dict[int, WarmProcess] = {}
        self.sessions: set[int] = set()
        self._conditions = _conditions(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.system.zygote", str(theirs.fileno()), *imports]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=dict(environment))
        self.pid = self._process.pid

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Would a fork run under the same conditions as a process that is started here and now?"""
        return _conditions(environment) == self._conditions

    def start(
        self,
        arguments: list[str],
        environment: Mapping[str, str],
        stderr: int,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> WarmProcess:
        """Fork. ``stdin`` and ``stdout`` are ``DEVNULL`` or ``PIPE``."""
        null = os.open(os.devnull, os.O_RDWR)
        to_close = [null]
        ours: list[IO[bytes] | None] = []
        streams = [null, null, stderr]
        for place, (wanted, end) in enumerate(((stdin, 1), (stdout, 0))):
            if wanted == subprocess.PIPE:
                pipe = os.pipe()
                streams[place] = pipe[1 - end]
                to_close.append(pipe[1 - end])
                ours.append(os.fdopen(pipe[end], "wb" if end else "rb", buffering=0))
            else:
                ours.append(None)
        variables = {name: environment[name] for name in PER_TEST if name in environment}
        request = {"program": self.program, "arguments": arguments, "variables": variables}
        pid = self._ask(request, streams)
        for descriptor in to_close:
            os.close(descriptor)
        process = self.living[pid] = WarmProcess(self, pid, ours[0], ours[1])
        self.sessions.add(pid)
        return process

    def reap(self, pid: int) -> int:
        """Wait for a process that has ended: its exit status, or minus the signal."""
        self.living.pop(pid, None)
        return self._ask({"reap": pid}, [])

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)

    def _ask(self, request: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(MAX_REQUEST)
        assert answer, "the zygote has ended"
        return int(json.loads(answer))


def _conditions(environment: Mapping[str, str]) -> tuple[Any, ...]:
    """What a fork inherits from the zygote and a new process from the test."""
    return (
        {name: value for name, value in environment.items() if name not in PER_TEST},
        Path.cwd(),
        [Path(f"/proc/thread-self/ns/{kind}").readlink() for kind in ("net", "mnt", "user")],
        [resource.getrlimit(limit) for limit in LIMITS],
        Path("/proc/thread-self/cgroup").read_text(),
        os.getresuid(),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    )


zygotes: dict[str, Zygote] = {}
"""The zygotes of this test process, by the program that they run; empty before ``open_zygotes``."""


def open_zygotes(environment: Mapping[str, str], puppet: str) -> None:
    zygotes["puppet"] = Zygote((puppet,), ("postcopy", "random", "resource"), environment)
    modules = ("postcopy_supervisor.settings", "postcopy_supervisor.main_loop")
    zygotes["supervisor"] = Zygote(("-m", "postcopy_supervisor"), modules, environment)


def close_zygotes() -> None:
    while zygotes:
        zygotes.popitem()[1].close()


# --- the process of the zygote ----------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the test process ends; in each child return what it must run."""
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(connection, MAX_REQUEST, 3)
        if not message:
            return None
        request: dict[str, Any] = json.loads(message)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for place, descriptor in enumerate(descriptors):
                os.dup2(descriptor, place)
                os.close(descriptor)
            connection.close()
            os.environ.update(request["variables"])
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps(pid).encode())


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    for module in sys.argv[2:]:
        import_module(module)
    try:
        request = _serve(connection)
    except KeyboardInterrupt:  # Ctrl-C for the whole run
        return
    if request is None:
        return
    *option, name = request["program"]
    sys.argv = [name, *request["arguments"]]
    if option:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main()
