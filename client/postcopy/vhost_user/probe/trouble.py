"""Trouble: the worker that resolves a back-end's faults is killed or stopped while requests are in flight."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from postcopy_kernel import process

from ...queries import Control
from .settings import Settings, program_of


class Trouble:
    """Kills and delays of the worker that resolves the back-end's faults, spread evenly over the run, which ends when
    all requests are done or its time is over."""

    def __init__(self, settings: Settings, directory: str, client: int) -> None:
        self.kills = self.delays = 0
        self._settings, self._directory, self._client = settings, directory, client
        self._stopped: int | None = None
        self._go_on_at = 0.0
        total = settings.kills + settings.delays
        kinds = ["kill", "delay"] * total
        if settings.delays == 0 or settings.kills == 0:
            kinds = ["kill" if settings.kills else "delay"] * total
        self._due = [((n + 1) / (total + 1), kinds[n]) for n in range(total)]

    def look(self, done: int, elapsed: float) -> None:
        """Called between requests: ``done`` of them after ``elapsed`` seconds."""
        if self._stopped is not None:
            if time.monotonic() < self._go_on_at:
                return
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None
        settings = self._settings
        past = max(done / settings.requests, elapsed / settings.duration if settings.duration else 0.0)
        if not self._due or past < self._due[0][0]:
            return
        pid = self._worker()
        if pid is None:
            return  # its successor is on its way
        _, kind = self._due.pop(0)
        kill = self.kills < self._settings.kills and (kind == "kill" or self.delays >= self._settings.delays)
        if kill:
            self.kills += self._signal(pid, signal.SIGKILL)
        elif self._signal(pid, signal.SIGSTOP):
            self.delays += 1
            self._stopped, self._go_on_at = pid, time.monotonic() + self._settings.delay

    @property
    def next_look(self) -> float:
        """Seconds until something is to be done by the clock."""
        return max(0.0, self._go_on_at - time.monotonic()) if self._stopped is not None else 1.0

    def over(self) -> None:
        if self._stopped is not None:
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None

    def _worker(self) -> int | None:
        record = client_record(self._directory, self._client)
        return int(record["worker_pid"]) if record.get("state") == "running" and record.get("worker_pid") else None

    @staticmethod
    def _signal(pid: int, number: int) -> bool:
        """By its pidfd and its name: nobody else is ever hit."""
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
    """What the status says of a client; empty when it is not there."""
    with Control(directory) as control:
        return next((each for each in control.status()["clients"] if each["id"] == client), {})
