"""Disturbances: the worker that resolves a back-end's faults is killed or stopped while requests are in flight."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from postcopy_kernel import process

from ...queries import Control
from .inspection import program_of
from .settings import Settings


class Disturbances:
    """Kills and delays of the worker that resolves the back-end's faults, spread evenly over the run."""

    def __init__(self, settings: Settings, directory: str, client: int) -> None:
        self.kills = self.delays = 0
        self._settings, self._directory, self._client = settings, directory, client
        self._stopped: int | None = None
        self._continue_at = 0.0
        total = settings.kills + settings.delays
        kinds = ["kill", "delay"] * total
        if settings.delays == 0 or settings.kills == 0:
            kinds = ["kill" if settings.kills else "delay"] * total
        self._due = [((n + 1) / (total + 1), kinds[n]) for n in range(total)]

    def step(self, done: int, elapsed: float) -> None:
        """Disturb if it is time: ``done`` requests are complete after ``elapsed`` seconds."""
        if self._stopped is not None:
            if time.monotonic() < self._continue_at:
                return
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None
        settings = self._settings
        progress = max(done / settings.requests, elapsed / settings.duration if settings.duration else 0.0)
        if not self._due or progress < self._due[0][0]:
            return
        pid = self._worker()
        if pid is None:
            return  # the successor is starting
        _, kind = self._due.pop(0)
        kill = self.kills < self._settings.kills and (kind == "kill" or self.delays >= self._settings.delays)
        if kill:
            self.kills += self._signal(pid, signal.SIGKILL)
        elif self._signal(pid, signal.SIGSTOP):
            self.delays += 1
            self._stopped, self._continue_at = pid, time.monotonic() + self._settings.delay

    @property
    def next_step(self) -> float:
        """Seconds until the next ``step`` is due."""
        return max(0.0, self._continue_at - time.monotonic()) if self._stopped is not None else 1.0

    def end(self) -> None:
        if self._stopped is not None:
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None

    def _worker(self) -> int | None:
        record = client_record(self._directory, self._client)
        return int(record["worker_pid"]) if record.get("state") == "running" and record.get("worker_pid") else None

    @staticmethod
    def _signal(pid: int, number: int) -> bool:
        """Signal by pidfd, after a check of the process name, so that no other process is hit."""
        try:
            pidfd = process.pidfd_open(pid)
        except OSError:
            return False
        try:
            if not program_of(pid).startswith("postcopy-w"):
                return False
            process.pidfd_signal(pidfd, number)
        except OSError:
            return False
        finally:
            os.close(pidfd)
        return True


def client_record(directory: str, client: int) -> dict[str, Any]:
    """The status record of a client; empty when the client does not exist."""
    with Control(directory) as control:
        return next((each for each in control.status()["clients"] if each["id"] == client), {})
