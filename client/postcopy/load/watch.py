"""What the load test sees and does from outside while its clients touch: residency, totals, and killed workers.

A worker is killed by its pidfd, checked after the pidfd is open: until then the number may have become somebody
else's. A client whose worker crashes more than ``FORGIVEN`` times a minute would be quarantined by the supervisor, so
the victim is always one whose worker was killed least, and nobody's worker is killed more often than that.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from typing import Any

from postcopy_kernel.process import pidfd_open, pidfd_signal

from ..crowd import Crowd
from ..errors import PostcopyError
from ..queries import Control

FORGIVEN = 4
MINUTE = 60.0
SHORTEST, LONGEST = 0.05, 1.0
"""Seconds between two looks: they grow with the time that the test has taken, so a long one is not looked at often."""
RESTS = 20
"""So many times as long as a look took nobody looks again: the status of many clients is work for the supervisor, which
they would take for its slowness."""


def kill_a_worker(control: Control, client: dict[str, Any]) -> int | None:
    """SIGKILL the worker of a client of the status; its pid, or None when it has none (any more)."""
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
    """Give ``look`` to ``Crowd.until``. ``kill_every`` in seconds, 0: nobody is killed."""

    def __init__(self, control: Control, crowd: Crowd, block: str, origin: int, kill_every: float, seed: int) -> None:
        self._control = control
        self._block = block
        self._origin = origin
        self._every = kill_every
        self._random = random.Random(seed)
        self._pids = {member.process.pid: member.index for member in crowd.members}
        self._killed: dict[int, list[float]] = {index: [] for index in self._pids.values()}
        self._next_kill = kill_every
        self._next_look = 0.0
        self.residency: list[list[float]] = []
        """[seconds since the start, fraction of the block that is received]"""
        self.kills: list[dict[str, Any]] = []
        self.trouble = ""
        self.first: dict[str, Any] = {"totals": {}}
        """What was counted before: the first look, unless somebody puts an earlier one here."""
        self.last = self.first

    @property
    def now(self) -> float:
        return (time.monotonic_ns() - self._origin) / 1e9

    def look(self) -> float:
        """What is to be seen or done now; seconds until the next time."""
        if self.trouble:
            return LONGEST  # nobody answers: there is nothing to be seen any more
        try:
            due = bool(self._every) and self.now >= self._next_kill
            if due or self.now >= self._next_look:
                begun = self.now
                self.sample()
                rest = RESTS * (self.now - begun)
                self._next_look = self.now + max(SHORTEST, min(LONGEST, self.now / 50), rest)
            if due:
                self._kill()
                self._next_kill += self._every
        except PostcopyError as error:
            self.trouble = str(error)  # the clients may go on all the same
        wanted = min(self._next_look, self._next_kill) if self._every else self._next_look
        return max(0.001, wanted - self.now)

    def sample(self) -> None:
        """One look at the status. Raises PostcopyError."""
        document = self._control.status()
        self.first = self.first if self.first["totals"] else document
        self.last = document
        for block in document["blocks"]:
            if block["name"] == self._block:
                self.residency.append([round(self.now, 3), block["received"] / max(1, block["pages"])])

    def _kill(self) -> None:
        # Of the look just taken: among many busy clients an answer may take a second.
        ours = [client for client in self.last.get("clients", ()) if client["pid"] in self._pids]
        alive = [client for client in ours if client.get("worker_pid") and client["state"] in ("running", "paused")]
        tired = {index for index, when in self._killed.items() if self._recent(when) >= FORGIVEN}
        able = [client for client in alive if self._pids[client["pid"]] not in tired]
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
