"""Observes a load test from outside (residency, totals), and kills workers.

A worker is killed by its pidfd, which is checked after it is open: before that the pid may have been reused. The
supervisor quarantines a client whose worker crashes too often, so no worker is killed more than ``FORGIVEN`` times a
minute, and the next victim is always the one that was killed least."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from typing import Any

from postcopy_kernel.process import pidfd_open, pidfd_signal

from ..errors import PostcopyError
from ..queries import Control
from .client_group import ClientGroup

FORGIVEN = 4
MINUTE = 60.0
SHORTEST, LONGEST = 0.05, 1.0
"""Seconds between two status requests; they grow with the time that the test has taken."""
RESTS = 20
"""The pause after a status request is this many times its duration: the status of many clients is work for the
supervisor, and the clients would measure it."""


def kill_a_worker(control: Control, client: dict[str, Any]) -> int | None:
    """SIGKILL the worker of a client of the status. Returns its pid; None without a worker."""
    pid = client.get("worker_pid")
    with suppress(ProcessLookupError):
        pidfd = pidfd_open(pid) if pid else -1
        try:
            if pid and any(other.get("worker_pid") == pid for other in control.status()["clients"]):
                pidfd_signal(pidfd, signal.SIGKILL)
                return int(pid)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
    return None


class Watch:
    """An observer for ``ClientGroup.until`` (``step``). ``kill_every`` in seconds, 0: no worker is killed."""

    def __init__(
        self, control: Control, group: ClientGroup, block: str, origin: int, kill_every: float, seed: int
    ) -> None:
        self._control = control
        self._block = block
        self._origin = origin
        self._every = kill_every
        self._random = random.Random(seed)
        self._pids = {client.pid: client.index for client in group.clients}
        self._killed: dict[int, list[float]] = {index: [] for index in self._pids.values()}
        self._next_kill = kill_every
        self._next_sample = 0.0
        self.residency: list[list[float]] = []
        """[seconds since the start, fraction of the block that is received]"""
        self.kills: list[dict[str, Any]] = []
        self.trouble = ""
        self.first: dict[str, Any] = {"totals": {}}
        """The status at the start: the first sample, unless an earlier one is set."""
        self.last = self.first

    @property
    def now(self) -> float:
        return (time.monotonic_ns() - self._origin) / 1e9

    def step(self) -> float:
        """Sample or kill if it is time. Returns the seconds until the next step."""
        if self.trouble:
            return LONGEST  # the supervisor does not answer: there is nothing more to observe
        try:
            due = bool(self._every) and self.now >= self._next_kill
            if due or self.now >= self._next_sample:
                begun = self.now
                self.sample()
                rest = RESTS * (self.now - begun)
                self._next_sample = self.now + max(SHORTEST, min(LONGEST, self.now / 50), rest)
            if due:
                self._kill()
                self._next_kill += self._every
        except PostcopyError as error:
            self.trouble = str(error)  # the clients may continue without the supervisor
        wanted = min(self._next_sample, self._next_kill) if self._every else self._next_sample
        return max(0.001, wanted - self.now)

    def sample(self) -> None:
        """Take one status. Raises PostcopyError."""
        document = self._control.status()
        self.first = self.first if self.first["totals"] else document
        self.last = document
        for block in document["blocks"]:
            if block["name"] == self._block:
                self.residency.append([round(self.now, 3), block["received"] / max(1, block["pages"])])

    def _kill(self) -> None:
        # Use the sample just taken: with many busy clients a new status may take a second.
        ours = [client for client in self.last.get("clients", ()) if client["pid"] in self._pids]
        alive = [client for client in ours if client.get("worker_pid") and client["state"] in ("running", "paused")]
        spared = {index for index, when in self._killed.items() if self._recent(when) >= FORGIVEN}
        able = [client for client in alive if self._pids[client["pid"]] not in spared]
        if not able:
            return
        fewest = min(len(self._killed[self._pids[client["pid"]]]) for client in able)
        able = [client for client in able if len(self._killed[self._pids[client["pid"]]]) == fewest]
        victim = self._random.choice(able)
        pid = kill_a_worker(self._control, victim)
        if pid is not None:
            index = self._pids[victim["pid"]]
            self._killed[index].append(self.now)
            self.kills.append({"at": round(self.now, 3), "client": index, "worker_pid": pid})

    def _recent(self, when: list[float]) -> int:
        return sum(self.now - at < MINUTE for at in when)
