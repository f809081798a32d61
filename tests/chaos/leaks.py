"""What may be left of clients, and of the whole service: nothing."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from tests.chaos.stage import Stage, descriptors

LEAVE_WITHIN = 15.0
WORKER_ZERO = Counter({"anon_inode:[pidfd]": 1, "socket": 2})
"""What worker zero costs whoever watches it. It is started when it is first needed and stays."""


class Leaks:
    """Looks at a stage before the first client, after the last one, and after the orderly end."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._shm = set(Path("/dev/shm").glob("*postcopy*"))
        self._baseline: dict[str, Counter[str]] = {}

    def take_baseline(self) -> None:
        """What supervisor and custodian have open without any client, libraries' own included."""
        with self.stage.watcher.asking:
            time.sleep(0.2)
            self._baseline = self._open_now()

    def _open_now(self) -> dict[str, Counter[str]]:
        found = {}
        pids = {"supervisor": self.stage.supervisor.pid if self.stage.supervisor else 0}
        for name, pid in (pids | {"custodian": next(iter(self.stage.custodians()), 0)}).items():
            try:
                found[name] = descriptors(pid)
            except OSError:
                found[name] = Counter()
        return found

    def after_the_last_client(self) -> list[str]:
        """With the last client everything of all clients must go."""
        limit = time.monotonic() + LEAVE_WITHIN
        asked = ["nothing was looked at"]
        while asked and time.monotonic() < limit:
            time.sleep(0.25)
            asked = [f"client {one['id']} is still known" for one in self.stage.watcher.document.get("clients", [])]
            asked += [f"worker {number} still lives, pid {pid}" for number, pid in self.stage.workers().items()]
            with self.stage.watcher.asking:
                opened_now = self._open_now()
            zero = WORKER_ZERO if "postcopy-w0" in self.stage.people().values() else Counter()
            for name, opened in opened_now.items():
                more = opened - self._baseline[name] - zero
                asked += [f"{name}: {number} more open: {target}" for target, number in more.items()]
        return [f"leak: {leak}" for leak in asked]

    def after_the_end(self) -> list[str]:
        """After the orderly end: processes, files."""
        limit = time.monotonic() + LEAVE_WITHIN
        ours = {process.pid for process in [self.stage.relay.process if self.stage.relay else None] if process}
        while (people := {pid: name for pid, name in self.stage.people().items() if pid not in ours}) and (
            time.monotonic() < limit
        ):
            time.sleep(0.05)
        asked = [f"leak: process {pid} ({name}) after the end" for pid, name in people.items()]
        place = self.stage.place
        asked += [f"leak: {path.relative_to(place)} in the runtime directory" for path in place.rglob("*")]
        asked += [f"leak: {name}" for name in set(Path("/dev/shm").glob("*postcopy*")) - self._shm]
        return asked
