"""The fleet: when a worker is forked, killed, forked again, given up. The law only; no process is touched here.

One slot a worker (worker 0 is the supervisor's own, see ``client_zero``). Every life of a worker is an incarnation
with a number of its own, so that a late word about an earlier life is known for what it is. Two lives must never read
one userfaultfd at the same time (each would get a part of the messages), so a successor is forked only when the
predecessor's pidfd has said that it is gone.

    starting --hello--> running --exit--> waiting --due--> starting        (restart, ever later when it crashes often)
        any --renew--> ending --exit--> starting                           (its assignment has changed)
        any --leave--> ending --exit--> (gone)
    more than ``limit`` crashes in ``interval``: quarantined. The next lives run nothing of a user's and poison what is
    missing; or (not ``poison``) there is none: resting, what is missing waits until an operator says resume
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

LONGEST_BACKOFF = 5.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds, but for ``limit``: crashes within ``interval`` that are forgiven. ``backoff`` doubles from crash to
    crash until a life has lasted ``stable``. ``poison``: what is missing for a quarantined client is poisoned, else it
    waits. ``start_deadline``: for a worker to say hello."""

    limit: int = 5
    interval: float = 60.0
    backoff: float = 0.02
    stable: float = 10.0
    start_deadline: float = 20.0
    longest_backoff: float = LONGEST_BACKOFF
    poison: bool = True


@dataclass(frozen=True, slots=True)
class Fork:
    """Ask the custodian for this incarnation."""

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
    """The worker that was to leave has left."""

    worker: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """It has crashed too often."""

    worker: int


Effect = Fork | Kill | Ready | Gone | Quarantine


@dataclass(slots=True)
class Slot:
    """What is known of one worker."""

    worker: int
    state: str = "starting"  # starting, running, waiting, resting, ending
    incarnation: int = 0
    forked: bool = False
    since: float = 0.0
    due: float = 0.0
    then_leave: bool = False
    restarts: int = 0
    quarantined: bool = False
    crashes: deque[float] = field(default_factory=deque)
    strays: int = 0
    unforked: int = 0
    """Forks in a row that failed."""

    called: tuple[int, bytes] = (-1, b"")
    """An incarnation, and its routing id."""

    @property
    def name(self) -> bytes:
        """The routing id of the worker that lives now."""
        if self.called[0] != self.incarnation:
            self.called = (self.incarnation, b"w%d.%d" % (self.worker, self.incarnation))
        return self.called[1]

    @property
    def shown(self) -> str:
        """The state in the words of ``status``."""
        if self.quarantined:
            return "quarantined"
        if self.state == "running":
            return "running"
        return "restarting" if self.restarts else "starting"


_ORDERED = ("starting", "ending")


class Lifecycle:
    """All slots. Every method takes the monotonic time in seconds and returns what is to be done, in order."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.policy = policy or RestartPolicy()
        self.slots: dict[int, Slot] = {}
        self.restarts = 0
        """Crashes of all workers so far, those that are gone included."""
        self._answered = 0.0
        self.used: dict[int, int] = {}
        """The highest incarnation of a worker that an earlier supervisor knew; its new lives are above it."""

    # --- wishes -------------------------------------------------------------------------------------------------------

    def start(self, worker: int, now: float, quarantined: bool = False) -> list[Effect]:
        """A new worker is wanted; ``quarantined``: by an earlier supervisor."""
        slot = self.slots[worker] = Slot(worker, incarnation=self.used.get(worker, 0), quarantined=quarantined)
        if quarantined and not self.policy.poison:
            slot.state = "resting"
            return [Ready(worker)]
        return self._fork(slot, now)

    def adopt(self, worker: int, incarnation: int, quarantined: bool, now: float) -> list[Effect]:
        """A life that an earlier supervisor began and that serves on. Of two lives the later one stays."""
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
        """Its assignment has changed: a successor with the new one."""
        slot = self.slots[worker]
        slot.then_leave = False
        return self._end(slot, now)

    def leave(self, worker: int, now: float) -> list[Effect]:
        """It is not needed any more."""
        slot = self.slots.get(worker)
        if slot is None:
            return []
        slot.then_leave = True
        return self._end(slot, now)

    def resume(self, worker: int, now: float) -> list[Effect]:
        """An operator trusts a quarantined worker's next life: its crashes are forgiven."""
        slot = self.slots[worker]
        slot.quarantined = False
        slot.crashes.clear()
        if slot.state in ("resting", "waiting"):
            return self._fork(slot, now)
        return [] if slot.state == "ending" else self.renew(worker, now)

    def _end(self, slot: Slot, now: float) -> list[Effect]:
        if slot.state == "waiting":  # nothing runs
            return self._after_the_end(slot, now)
        if slot.state == "resting":  # nothing runs, and nothing shall: whoever waits for the change is answered
            return self._after_the_end(slot, now) if slot.then_leave else [Ready(slot.worker)]
        was, slot.state, slot.since = slot.state, "ending", now
        # Asked for but not yet there: it is killed when it comes.
        return [Kill(slot.worker, slot.incarnation)] if slot.forked and was != "ending" else []

    # --- news ---------------------------------------------------------------------------------------------------------

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
        """It has said that it is there."""
        slot = self.slots.get(worker)
        if slot is None or incarnation != slot.incarnation or slot.state != "starting":
            return []
        slot.state, slot.since = "running", now
        return [Ready(worker)]

    def exited(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """Its pidfd says that it is gone."""
        slot = self.slots.get(worker)
        if slot is None:
            return []
        if incarnation != slot.incarnation:
            # The stray may have read messages of the userfaultfd: a new life wakes everything.
            slot.strays -= 1
            return self.renew(worker, now) if slot.state in ("starting", "running") else []
        if slot.state == "ending":
            return self._after_the_end(slot, now)
        return self._crashed(slot, now)

    def fork_failed(self, worker: int, incarnation: int, now: float) -> list[Effect]:
        """The custodian could not fork it: no memory, no process more. Nothing that its client did, so no crash: it
        waits, ever longer, until there is room."""
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
        """Orders to fork that were under way are lost with it; workers that run go on."""
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
                elif now - self._answered > self.policy.start_deadline:  # else a crowd stands before it in the queue
                    effects += self._fork(slot, now)
        return effects

    def unanswered(self, now: float) -> float:
        """For how many seconds the custodian has answered none of the orders to fork that wait."""
        waiting = [slot.since for slot in self.slots.values() if not slot.forked and slot.state in _ORDERED]
        return max(0.0, now - max(min(waiting), self._answered)) if waiting else 0.0

    def next_due(self) -> float | None:
        """When tick has something to do, if anything waits."""
        return min((slot.due for slot in self.slots.values() if slot.state == "waiting"), default=None)

    # --- the law ------------------------------------------------------------------------------------------------------

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
        if len(slot.crashes) > policy.limit and not slot.quarantined:
            slot.quarantined = True
            effects.append(Quarantine(slot.worker))
        if slot.quarantined and not policy.poison:
            slot.state, slot.forked = "resting", False
            return [*effects, Ready(slot.worker)]  # an attach that waits for this worker is answered
        # The first crash costs the client as little time as can be; the second and later ones wait.
        wait = 0.0 if len(slot.crashes) == 1 else policy.backoff * 2 ** (len(slot.crashes) - 2)
        slot.state, slot.forked, slot.due = "waiting", False, now + min(wait, policy.longest_backoff)
        return effects + (self.tick(now) if wait == 0.0 else [])
