"""Start the supervisor program from Python, for tests and for embedding."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from postcopy_kernel import polling
from postcopy_kernel.programs import command, environment

from .deadline import Deadline
from .errors import PostcopyError

READY_WITHIN = 30.0
END_WITHIN = 30.0

_LOG_LINES = 5

Option = str | int | float | bool | None | Sequence[str | int]


class Supervisor:
    """A supervisor process that serves ``blocks`` (name: SOURCE), started and ready when the constructor returns.

    ``runtime_dir`` is a new temporary directory unless given; ``page_size`` is ``"4K"`` or ``"2M"``. Other options
    are those of ``postcopy serve`` with underscores (``fault_around="256K"``, ``allow_uid=[1000]``, ``recover=True``).
    Raises PostcopyError with the last lines of its log when it is not ready within ``ready_within`` seconds.

    Example::

        with postcopy.Supervisor({"ram0": "weights.bin", "scratch": "zero:1G"}) as supervisor:
            block = postcopy.attach("ram0", supervisor.runtime_dir)
    """

    def __init__(
        self,
        blocks: Mapping[str, str | os.PathLike[str]],
        runtime_dir: str | os.PathLike[str] | None = None,
        page_size: str | int = "4K",
        *,
        ready_within: float = READY_WITHIN,
        die_with_parent: bool = True,
        **options: Option,
    ) -> None:
        if not isinstance(blocks, Mapping):
            raise TypeError(f"blocks is a mapping of names to SOURCEs, not {type(blocks).__name__}")
        self._stack = ExitStack()
        try:
            self.runtime_dir = self._directory(runtime_dir)
            self._log = self._stack.enter_context(tempfile.TemporaryFile(prefix="postcopy-log-"))  # noqa: SIM115
            arguments = [f"{name}={os.fsdecode(source)}" for name, source in blocks.items()]
            arguments += _options({"runtime_dir": self.runtime_dir, "page_size": page_size, **options})
            # The kernel sends the parent-death signal when the forking *thread* ends: only the main thread lives as
            # long as the process.
            if die_with_parent and threading.current_thread() is threading.main_thread():
                arguments += ["--die-with-parent", str(os.getpid())]
            self._start(arguments, Deadline(ready_within))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """The supervisor's log so far; after close() the whole log."""
        if self._log.closed:
            return self._last_log
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")

    def close(self) -> None:
        """End the supervisor with SIGTERM, or with SIGKILL when that takes too long. A second call does nothing."""
        process: subprocess.Popen[bytes] | None = self.__dict__.get("_process")
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process is not None:
            self._last_log = self.log()
        self._stack.close()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<postcopy.Supervisor in {self.runtime_dir}, pid {self.pid}>"

    def _directory(self, given: str | os.PathLike[str] | None) -> str:
        if given is not None:
            return os.path.abspath(os.fsdecode(given))
        path = tempfile.mkdtemp(prefix="postcopy-", dir=_short_directory())
        self._stack.callback(shutil.rmtree, path, ignore_errors=True)
        os.chmod(path, 0o711)
        return path

    def _start(self, arguments: list[str], deadline: Deadline) -> None:
        """Start the program and wait for its READY=1 (sd_notify), for its end, or for the deadline."""
        # The socket stays open until the end, because the supervisor also sends STOPPING=1.
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pc-", dir=_short_directory()))
        notices = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notices.bind(os.path.join(directory, "notify"))
        with ExitStack() as stack:
            self._process = subprocess.Popen(
                command("postcopy_supervisor", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                process_group=0,  # Ctrl-C on the terminal reaches only us
                env={**environment(), "NOTIFY_SOCKET": os.path.join(directory, "notify")},
            )
            pidfd = os.pidfd_open(self._process.pid)
            stack.callback(os.close, pidfd)
            self._wait(notices, pidfd, deadline)

    def _wait(self, notices: socket.socket, pidfd: int, deadline: Deadline) -> None:
        poll = polling.poll()
        poll.register(notices, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while ready := [fd for fd, _ in poll.poll(deadline.milliseconds())]:
            if notices.fileno() in ready:
                with suppress(OSError):
                    if b"READY=1" in notices.recv(65536, socket.MSG_DONTWAIT).split(b"\n"):
                        return
            elif pidfd in ready:
                status = self._process.wait()
                raise PostcopyError(
                    f"the supervisor ended with status {status} before it was ready{self._last_lines()}"
                )
        raise PostcopyError(f"the supervisor was not ready within {deadline.seconds} s{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log().strip().splitlines()[-_LOG_LINES:]
        return ": " + " | ".join(lines) if lines else " and logged nothing"


def _short_directory() -> str | None:
    """A directory for sockets. /tmp rather than $TMPDIR, which may be too long for a socket path."""
    return "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None


def _options(options: Mapping[str, Option]) -> list[str]:
    """Keyword arguments as the command line of ``serve``: a list repeats its option, True is a flag."""
    args: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            args.append(option)
        elif isinstance(value, (list, tuple)):
            for item in value:
                args += [option, str(item)]
        elif value is not None and value is not False:
            args += [option, str(value)]
    return args
