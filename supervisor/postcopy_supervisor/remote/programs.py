"""The page source program that serves the snapshots of ``NAME=store:STORE/NAME``: started, restarted and ended here.

To the rest of the supervisor such a block is an ordinary remote block, at an ipc endpoint in the runtime directory. The
supervisor knows nothing of stores. The program ends when the supervisor ends, in whichever way; the next one starts its
own, and the identity of a snapshot proves to it that the content is the same. Its endpoint has the process id of its
supervisor in it, because a predecessor's program may still be ending."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace

from postcopy_kernel.programs import command, environment
from postcopy_protocol.runtime_paths import PRIVATE
from postcopy_protocol.sources import RemoteSource, StoreSource

from ..settings import Settings

SOCKET = "store-source-"
PROGRAM = "postcopy_sources"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
STABLE_SECONDS = 30.0
LEAVE_SECONDS = 5.0

log = logging.getLogger(__name__)


class SourceProgram:
    """A context manager that ends the program. ``settings``: those given, with the endpoint in place of each store."""

    def __init__(self, settings: Settings) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._due = 0.0
        self._pause = FIRST_PAUSE
        self._stores = {name: one for name, one in settings.sources.items() if isinstance(one, StoreSource)}
        self._socket = os.path.join(settings.directory, PRIVATE, f"{SOCKET}{os.getpid()}")
        self._command = command(PROGRAM, *_arguments(settings, self._stores, self._socket)) if self._stores else []
        remote = {name: RemoteSource(f"ipc://{self._socket}", name, str(one)) for name, one in self._stores.items()}
        self.settings = replace(settings, sources=settings.sources | remote)

    def __enter__(self) -> SourceProgram:
        if self._stores:
            _remove_sockets(os.path.dirname(self._socket))
            self._start()
        return self

    def _start(self) -> None:
        self._began = time.monotonic()
        # A group of its own: Ctrl-C at a terminal ends the supervisor, and that ends it.
        self._process = subprocess.Popen(self._command, env=environment(), stdin=subprocess.DEVNULL, process_group=0)

    def check_started(self) -> None:
        """Raises SystemExit when the program could not serve from the start, and has said why. One that was killed is
        started again."""
        if self._process is None or self._process.poll() is None:
            return
        if self._process.returncode >= 0:
            raise SystemExit(self._process.returncode)
        self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Start it again when it has ended; the pause doubles while it does not stay."""
        if self._process is None or self._process.poll() is None:
            return
        if not self._due:
            stayed = now - self._began > STABLE_SECONDS
            self._pause = FIRST_PAUSE if stayed else min(2 * self._pause, LONGEST_PAUSE)
            self._due = now + self._pause
            status = self._process.returncode
            log.warning("the page source of %s ended (%d); it is started again", ", ".join(self._stores), status)
        if now >= self._due:
            self._due = 0.0
            try:
                self._start()
            except OSError as error:
                log.error("the page source of %s cannot be started: %s", ", ".join(self._stores), error.strerror)
                self._due = now + LONGEST_PAUSE

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(OSError):
            os.unlink(self._socket)


def _arguments(settings: Settings, stores: dict[str, StoreSource], socket: str) -> list[str]:
    arguments = [f"{name}={one}" for name, one in stores.items()]
    arguments += ["--listen", f"ipc://{socket}", "--die-with-parent", str(os.getpid()), "--for-serve"]
    # What it says of its supervisor's coming and going is only worth a debugger's time.
    level = "warning" if settings.log_level == "info" else settings.log_level
    arguments += ["--log-level", level, "--log-format", settings.log_format]
    arguments += ["--transport", settings.transport, "--chunk-cache-size", str(settings.chunk_cache_size)]
    arguments += ["--record-working-set"] * settings.record_working_set + ["--replay"] * settings.replay
    if settings.curve_secret:
        arguments += ["--peer-secret", settings.curve_secret, "--peer-key", settings.source_key]
    arguments += ["--plain-peers"] * settings.plain_tcp
    if settings.chunk_cache:
        arguments += ["--chunk-cache", settings.chunk_cache]
    return arguments


def _remove_sockets(directory: str) -> None:
    """Those of programs whose supervisors were killed; the runtime directory is ours alone."""
    with suppress(OSError):
        for name in os.listdir(directory):
            if name.startswith(SOCKET):
                os.unlink(os.path.join(directory, name))
