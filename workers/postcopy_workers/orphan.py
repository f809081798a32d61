"""What a custodian does without a supervisor. The law only: no process, descriptor or clock is touched here.

::

    served --channel ends--> orphaned --TakeOver--> served, on trial --first word--> served
      |                         ^                        |
      |                         +----channel ends--------+
      +--Dismiss--> dismissed   orphaned, no client left and the time is over --> dismissed

Orphaned, it is the supervisor's deputy in one thing: a client that lives and has memory to serve has a worker. A
successor is forked only when no life of that worker is left, for two that read one userfaultfd get a part of the
messages each. Whoever takes over is *on trial* until it has said a word after the inventory: one that vanishes before
has changed nothing, not even the time since the loss.

``WhenOrphaned`` says what becomes of pages that only a supervisor can bring when nobody comes back in time: they wait
on, or the workers of clients with remote blocks are replaced by workers that poison what is missing. Local blocks are
served as long as their clients live, in either case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

FIRST_WAIT = 0.02
LONGEST_WAIT = 1.0
STABLE_SECONDS = 10.0
"""A life that lasted so long makes the next replacement as quick as the first."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork this incarnation by the worker's last order; ``poison``: without its remote sources."""

    worker: int
    incarnation: int
    poison: bool


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to every life of this worker."""

    worker: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The client is gone: close what is kept for it."""

    worker: int


@dataclass(frozen=True, slots=True)
class Say:
    """One line of the log."""

    text: str


Effect = Fork | Kill | Drop | Say


class State(Enum):
    SERVED = "served"
    ORPHANED = "orphaned"
    DISMISSED = "dismissed"


@dataclass(slots=True)
class Ward:
    """A client and its worker. ``lives``: incarnation -> when it began; ``wanted``: there are regions to serve."""

    wanted: bool = False
    kept: bool = False
    ordered: bool = False
    remote: bool = False
    incarnation: int = 0
    poisoned: bool = False
    lives: dict[int, float] = field(default_factory=dict)
    wait: float = FIRST_WAIT
    due: float | None = None


class Orphan:
    """All wards by number. Times are monotonic seconds; every method that decides something returns what is to be
    done, in order."""

    def __init__(self) -> None:
        self.state = State.SERVED
        self.timeout = 0.0
        self.poison = False
        self._wards: dict[int, Ward] = {}
        self._lost_at: float | None = None
        self._time_is_over = False
        self._poisoning = False

    # --- what is known in any state -----------------------------------------------------------------------------------

    def kept(self, client: int, wanted: bool) -> None:
        """A client's descriptors are kept; ``wanted``: it has regions."""
        ward = self._ward(client)
        ward.kept, ward.wanted = True, wanted

    def dropped(self, client: int) -> None:
        """Nothing of the client is kept any more."""
        ward = self._wards.get(client)
        if ward is not None:
            ward.kept = ward.wanted = False
            ward.due = None
            self._tidy(client)

    def ordered(self, worker: int, incarnation: int, remote: bool) -> None:
        """A supervisor has ordered this life, or told of it (Adopt)."""
        ward = self._ward(worker)
        ward.ordered, ward.remote, ward.poisoned = True, remote, False
        ward.incarnation = max(ward.incarnation, incarnation)

    def forked(self, worker: int, incarnation: int, now: float) -> None:
        """This life runs."""
        self._ward(worker).lives[incarnation] = now

    def lives_of(self, worker: int) -> int:
        ward = self._wards.get(worker)
        return len(ward.lives) if ward else 0

    def exited(self, worker: int, incarnation: int, client_gone: bool, now: float) -> list[Effect]:
        """A life has ended; ``client_gone``: it said that its client's memory is gone."""
        ward = self._wards[worker]
        began = ward.lives.pop(incarnation, now)
        if self.state is not State.ORPHANED or not ward.kept:
            self._tidy(worker)
            return []
        if client_gone:
            return self.client_ended(worker)
        if now - began >= STABLE_SECONDS:
            ward.wait = FIRST_WAIT
        self._later(ward, now)
        return []

    def fork_failed(self, worker: int, now: float) -> None:
        """A Fork could not be done: it is tried again."""
        self._later(self._ward(worker), now)

    def told(self, timeout: float, poison: bool) -> None:
        """WhenOrphaned: seconds, and what then."""
        self.timeout, self.poison = timeout, poison

    # --- supervisors go and come --------------------------------------------------------------------------------------

    def lost(self, now: float) -> list[Effect]:
        """The channel has ended."""
        if self.state is State.DISMISSED:
            return []
        self.state = State.ORPHANED
        if self._lost_at is None:
            self._lost_at = now
        effects: list[Effect] = [Kill(0)] if self.lives_of(0) else []
        for worker, ward in self._wards.items():
            if worker and len(ward.lives) > 1:  # ordered twice by a supervisor that did not live to sort it out
                effects.append(Kill(worker))
            elif not ward.lives:
                ward.wait = FIRST_WAIT
                self._later(ward, now)
        return effects

    def taken(self) -> list[Effect]:
        """Somebody takes over. Workers that poison are killed: with a supervisor there are sources again."""
        self.state = State.SERVED
        for ward in self._wards.values():
            ward.due = None
        return [Kill(worker) for worker, ward in self._wards.items() if ward.poisoned and ward.lives]

    def heard(self) -> None:
        """The supervisor has said something: it is here to stay."""
        self._lost_at = None
        self._time_is_over = self._poisoning = False

    def dismissed(self) -> None:
        """The house ends in order."""
        self.state = State.DISMISSED

    # --- orphaned -----------------------------------------------------------------------------------------------------

    def client_ended(self, client: int) -> list[Effect]:
        """The client's process, or its memory, is gone."""
        ward = self._wards.get(client)
        if ward is None or not ward.kept:
            return []
        self.dropped(client)
        return [Drop(client)]

    def tick(self, now: float) -> list[Effect]:
        """Time has passed, or something has happened."""
        if self.state is not State.ORPHANED:
            return []
        effects: list[Effect] = []
        assert self._lost_at is not None
        if not self._time_is_over and now >= self._lost_at + self.timeout:
            self._time_is_over = True
            effects += self._too_late()
        if self._time_is_over and not self.clients:
            self.state = State.DISMISSED
            return [*effects, *(Kill(worker) for worker, ward in self._wards.items() if ward.lives)]
        for worker, ward in self._wards.items():
            if ward.due is not None and now >= ward.due and not ward.lives:
                ward.due = None
                ward.incarnation += 1
                ward.poisoned = self._poisoning and ward.remote
                effects.append(Fork(worker, ward.incarnation, ward.poisoned))
        return effects

    def next_due(self) -> float | None:
        """When ``tick`` has something to do, if nothing else happens."""
        if self.state is not State.ORPHANED:
            return None
        dues = [ward.due for ward in self._wards.values() if ward.due is not None and not ward.lives]
        if not self._time_is_over and self._lost_at is not None:
            dues.append(self._lost_at + self.timeout)
        return min(dues, default=None)

    @property
    def clients(self) -> int:
        """How many clients live, as far as is known."""
        return sum(ward.kept for ward in self._wards.values())

    # --- within -------------------------------------------------------------------------------------------------------

    def _ward(self, number: int) -> Ward:
        return self._wards.setdefault(number, Ward())

    def _tidy(self, number: int) -> None:
        if not self._wards[number].kept and not self._wards[number].lives:
            del self._wards[number]

    def _later(self, ward: Ward, now: float) -> None:
        if ward.kept and ward.wanted and ward.ordered:
            ward.due = now + ward.wait
            ward.wait = min(2 * ward.wait, LONGEST_WAIT)

    def _too_late(self) -> list[Effect]:
        waiting = [ward for ward in self._wards.values() if ward.kept and ward.wanted and ward.remote]
        if not waiting:
            return []
        after = f"no supervisor for {self.timeout:g} s"
        if not self.poison:
            return [Say(f"{after}: missing pages of remote blocks wait on in {len(waiting)} clients")]
        self._poisoning = True
        for ward in waiting:
            ward.wait = FIRST_WAIT
        killed: list[Effect] = [Kill(worker) for worker, ward in self._wards.items() if ward in waiting and ward.lives]
        return [Say(f"{after}: missing pages of remote blocks are poisoned in {len(waiting)} clients"), *killed]
