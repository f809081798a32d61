"""What a worker does when supervisor and custodian have both died.

It goes on: its client is served as before, as far as it can be without a supervisor. Only pages of remote blocks cannot
be had. When no supervisor has come within the timeout of ``--on-orphan poison`` they are poisoned. A supervisor that
comes later ends this worker, and its successor unpoisons them.

Supervisor and custodian hold the writing end of a pipe, the *lifeline*, and each worker the reading end, as each
client's watcher does. A watcher acts only where no worker serves its client: that is seen by a record lock."""

from __future__ import annotations

import errno
import fcntl
import logging
from collections.abc import Callable, Iterable

from postcopy_protocol.counters import ORPHAN_MS
from postcopy_protocol.received_map import LIVES_AT

log = logging.getLogger(__name__)

NO_SUPERVISOR = "no supervisor came back within the orphan timeout"


class Life:
    """Locks this worker's byte in the received maps of its blocks. The kernel drops the locks when the process ends."""

    def __init__(self, received_maps: Iterable[int], worker: int) -> None:
        self._hidden, self._worker = list(received_maps), worker
        if self.show():
            log.warning("worker %d cannot show that it lives: a client has locked its received map", worker)

    def show(self) -> list[int]:
        """Lock what is not locked yet. Returns the maps that clients have locked: they are tried again."""
        self._hidden = [descriptor for descriptor in self._hidden if not self._lock(descriptor)]
        return self._hidden

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LIVES_AT + self._worker)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True


class Orphaned:
    """When the lifeline has ended: the policy of the monitor thread, by monotonic seconds. ``control`` is the
    supervisor's page, ``poison`` is called once."""

    def __init__(self, lifeline: int, control: memoryview, poison: Callable[[], None]) -> None:
        self.lifeline = lifeline
        """Descriptor to be watched for its end, or -1."""
        self._control, self._poison = control, poison
        self._due: float | None = None

    def ended(self, now: float) -> None:
        """The lifeline has ended: no process is left that could replace this worker."""
        self.lifeline = -1
        if timeout_ms := self._control[ORPHAN_MS]:
            self._due = now + timeout_ms / 1000

    def wait(self, seconds: float, now: float) -> float:
        """How long to wait at most, so that ``tick`` is in time."""
        return seconds if self._due is None else min(seconds, max(0.0, self._due - now))

    def tick(self, now: float) -> None:
        if self._due is not None and now >= self._due:
            self._due = None
            log.warning("%s: missing pages of remote blocks are poisoned", NO_SUPERVISOR)
            self._poison()
