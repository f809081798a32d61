"""The state machine of worker processes: when one is forked, killed, restarted, given up. Pure; touches no process.

There is one slot a worker (worker 0 is the supervisor's own, see ``worker_zero``). Every process of a worker is an
incarnation with its own number, so that a late message about an earlier one is recognised. Two processes must never
read one userfaultfd at the same time, because each would get a part of the messages. So a successor is forked only when
the pidfd of its predecessor says that it has ended.

    starting --hello--> running --exit--> waiting --due--> starting        (restart, with a growing delay)
        any --renew--> ending --exit--> starting                           (its assignment has changed)
        any --leave--> ending --exit--> (gone)
    more than ``limit`` crashes in ``interval``: quarantined. The next incarnations run no code of a user and poison
    missing pages. Without ``poison`` there is no next one: resting, missing pages wait until ``postcopy resume``
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

LONGEST_BACKOFF = 5.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a worker that ends is restarted. Times in seconds.

    ``limit`` crashes within ``interval`` are forgiven. ``backoff`` doubles from crash to crash until an incarnation has
    lasted ``stable``. ``poison``: missing pages of a quarantined client are poisoned, else they wait.
    ``start_deadline``: for a new worker's hello."""

    limit: int = 5
    interval: float = 60.0
    backoff: float = 0.02
    stable: float = 10.0
    start_deadline: float = 20.0
    longest_backoff: float = LONGEST_BACKOFF
    poison: bool = True


@dataclass(frozen=True, slots=True)
class Fork:
    """Order this incarnation from the custodian."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL this incarnation by its pidfd."""

    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves."""

    worker: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The worker that was asked to leave has ended."""

    worker: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """It has crashed too often."""

    worker: int


Effect = Fork | Kill | Ready | Gone | Quarantine


@dataclass(slots=True)
class Slot:
    """State of one worker: starting, running, waiting, resting or ending."""

    worker: int
    state: str = "starting"
    incarnation: int = 0
    forked: bool = False
    since: float = 0.0
    due: float = 0.0
    then_leave: bool = False
    restarts: int = 0
    quarantined: bool = False
    crashes: deque[float] = field(default_factory=deque)
    strays: int = 0
    unforked: int = 0  # forks in a row that failed

    _routing_id: tuple[int, bytes] = (-1, b"")

    @property
    def routing_id(self) -> bytes:
        """The ZeroMQ routing id of the present incarnation; made once for each."""
        if self._routing_id[0] != self.incarnation:
            self._routing_id = (self.incarnation, b"w%d.%d" % (self.worker, self.incarnation))
        return self._routing_id[1]

    @property
    def shown_state(self) -> str:
        """The state that ``status`` shows."""
        if self.quarantined:
            return "quarantined"
        if self.state == "running":
            return "running"
        return "restarting" if self.restarts else "starting"


_ORDERED = ("starting", "ending")


class Lifecycle:
    """All slots. Every method takes the monotonic time in seconds and returns effects to carry out in order."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.policy = policy or RestartPolicy()
        self.slots: dict[int, Slot] = {}
        self.restarts = 0  # crashes of all workers so far, including those that have left
        self.restarts_of: dict[int, int] = {}  # by worker, until it is forgotten
        self._answered = 0.0
        self.used: dict[int, int] = {}
        """By worker: the highest incarnation that an earlier supervisor knew. New incarnations get higher numbers."""

    def start(self, worker: int, now: float, quarantined: bool = False) -> list[Effect]:
        """Start a new worker; ``quarantined``: an earlier supervisor quarantined it."""
        slot = self.slots[worker] = Slot(worker, incarnation=self.used.get(worker, 0), quarantined=quarantined)
        if quarantined and not self.policy.poison:
            slot.state = "resting"
            return [Ready(worker)]
        return self._fork(slot, now)

    def adopt(self, worker: int, incarnation: int, quarantined: bool, now: float) -> list[Effect]:
        """Continue an incarnation that an earlier supervisor started. Of two, the later one stays."""
        slot = self.slots.setdefault(worker, Slot(worker))
        later = incarnation > slot.incarnation
        effects: list[Effect] = []
        if slot.forked:
            slot.strays += 1
            effects.append(Kill(worker, slot.incarnation if later else incarnation))
        if later:
            slot.state, slot.incarnation, slot.forked, slot.since = "running", incarnation, True, now
            slot.quarantined = quarantined
        return effects

    def renew(self, worker: int, now: float) -> list[Effect]:
        """Replace it, because its assignment has changed."""
        slot = self.slots[worker]
        slot.then_leave = False
        return self._end(slot, now)

    def leave(self, worker: int, now: float) -> list[Effect]:
        """End it: it is not needed any more."""
        slot = self.slots.get(worker)
        if slot is None:
            return []
        slot.then_leave = True
        return self._end(slot, now)

    def resume(self, worker: int, now: float) -> list[Effect]:
        """End a quarantine (an operator asks for it) and forgive the crashes."""
        slot = self.slots[worker]
        slot.quarantined = False
        slot.crashes.clear()
        if slot.state in ("resting", "waiting"):
            return self._fork(slot, now)
        return [] if slot.state == "ending" else self.renew(worker, now)

    def _end(self, slot: Slot, now: float) -> list[Effect]:
        if slot.state == "waiting":  # nothing runs
            return self._after_the_end(slot, now)
        if slot.state == "resting":  # nothing runs or will run: requests that wait for the change are answered
            return self._after_the_end(slot, now) if slot.then_leave else [Ready(slot.worker)]
        was, slot.state, slot.since = slot.state, "ending", now
        # Ordered but not forked yet: it is killed when the custodian reports it.
        return [Kill(slot.worker, slot.incarnation)] if slot.forked and was != "ending" else []

    def forked(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """The custodian has forked it."""
        self._answered = now
        slot = self.slots.get(worker)
        if slot is None:
            return [Kill(worker, incarnation)]
        if incarnation != slot.incarnation:
            slot.strays += 1  # asked for again after a deadline, and now both came
            return [Kill(worker, incarnation)]
        slot.forked, slot.unforked, slot.since = True, 0, now
        return [Kill(worker, incarnation)] if slot.state == "ending" else []

    def hello(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """It has sent its WorkerHello."""
        slot = self.slots.get(worker)
        if slot is None or incarnation != slot.incarnation or slot.state != "starting":
            return []
        slot.state, slot.since = "running", now
        return [Ready(worker)]

    def exited(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """Its pidfd says that it has ended."""
        slot = self.slots.get(worker)
        if slot is None:
            return []
        if incarnation != slot.incarnation:
            # The stray may have read messages of the userfaultfd: a new incarnation wakes everything.
            slot.strays -= 1
            return self.renew(worker, now) if slot.state in ("starting", "running") else []
        if slot.state == "ending":
            return self._after_the_end(slot, now)
        return self._crashed(slot, now)

    def fork_failed(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """The custodian could not fork it (no memory or process left). That is no crash of the worker: the order is
        repeated with a growing delay."""
        self._answered = now
        slot = self.slots.get(worker)
        if slot is None or incarnation != slot.incarnation or slot.forked:
            return []
        if slot.state == "ending":
            return self._after_the_end(slot, now)
        wait = self.policy.backoff * 2 ** min(slot.unforked, 16)
        slot.unforked += 1
        slot.state, slot.due = "waiting", now + min(wait, self.policy.longest_backoff)
        return []

    def custodian_lost(self, now: float) -> list[Effect]:
        """Repeat the orders to fork that were lost with the custodian; running workers go on."""
        effects: list[Effect] = []
        for slot in list(self.slots.values()):
            if not slot.forked and slot.state == "starting":
                effects += self._fork(slot, now)
            elif not slot.forked and slot.state == "ending":
                effects += self._after_the_end(slot, now)
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        for slot in list(self.slots.values()):
            if slot.state == "waiting" and now >= slot.due:
                effects += self._fork(slot, now)
            elif slot.state == "starting" and now - slot.since > self.policy.start_deadline:
                if slot.forked:
                    slot.since = now
                    effects.append(Kill(slot.worker, slot.incarnation))
                elif now - self._answered > self.policy.start_deadline:  # else other orders are before it
                    effects += self._fork(slot, now)
        return effects

    def unanswered(self, now: float) -> float:
        """Seconds for which the custodian has answered none of the open orders to fork."""
        waiting = [slot.since for slot in self.slots.values() if not slot.forked and slot.state in _ORDERED]
        return max(0.0, now - max(min(waiting), self._answered)) if waiting else 0.0

    def next_due(self) -> float | None:
        """When ``tick`` has to be called next, if a slot waits."""
        return min((slot.due for slot in self.slots.values() if slot.state == "waiting"), default=None)

    def _fork(self, slot: Slot, now: float) -> list[Effect]:
        slot.incarnation += 1
        slot.state, slot.forked, slot.since = "starting", False, now
        return [Fork(slot.worker, slot.incarnation)]

    def _after_the_end(self, slot: Slot, now: float) -> list[Effect]:
        if not slot.then_leave:
            return self._fork(slot, now)
        del self.slots[slot.worker]
        return [Gone(slot.worker)]

    def _crashed(self, slot: Slot, now: float) -> list[Effect]:
        policy, effects = self.policy, list[Effect]()
        if slot.state == "running" and now - slot.since >= policy.stable:
            slot.crashes.clear()
        slot.crashes.append(now)
        while slot.crashes and now - slot.crashes[0] > policy.interval:
            slot.crashes.popleft()
        slot.restarts += 1
        self.restarts += 1
        self.restarts_of[slot.worker] = self.restarts_of.get(slot.worker, 0) + 1
        if len(slot.crashes) > policy.limit and not slot.quarantined:
            slot.quarantined = True
            effects.append(Quarantine(slot.worker))
        if slot.quarantined and not policy.poison:
            slot.state, slot.forked = "resting", False
            return [*effects, Ready(slot.worker)]  # attaches that wait for this worker are answered
        # The first restart is immediate, for the client's sake; the second and later ones wait.
        wait = 0.0 if len(slot.crashes) == 1 else policy.backoff * 2 ** (len(slot.crashes) - 2)
        slot.state, slot.forked, slot.due = "waiting", False, now + min(wait, policy.longest_backoff)
        return effects + (self.tick(now) if wait == 0.0 else [])
