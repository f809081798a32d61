"""What a custodian does without a supervisor. The law only: no process, descriptor or clock is touched here.

::

    served --channel ends--> orphaned --TakeOver--> on trial --first word--> served
      |                         ^                      |
      +--Dismiss--> dismissed   +----channel ends------+
                                |
                                +--no client left, and the time is over--> ended

Orphaned, it is the supervisor's deputy in one thing: a client that lives and has memory to serve has a worker. A
successor is forked only when no life of that worker is left, for two that read one userfaultfd get a part of the
messages each. Whoever takes over is *on trial* until it has said a word after the inventory: one that vanishes before
has changed nothing, not even the time since the loss.

``WhenOrphaned`` says what becomes of pages that only a supervisor can bring when nobody comes back in time: they wait
on, or the workers of clients with remote blocks are replaced by workers that poison what is missing. Local blocks are
served as long as their clients live, in either case.

A ``StandbyPolicy`` is made when a channel ends and forgotten when another is there: with a supervisor a custodian
does as little as it can, because each page of memory that it writes to is one that its workers share no longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(slots=True)
class StandbyClient:
    """A client and its worker. ``wanted``: it has regions, and there is an order by which to fork. ``incarnation`` is
    the latest; ``lives``: incarnation -> when it began; ``poisoned``: these poison what only a supervisor can bring."""

    wanted: bool
    remote: bool
    incarnation: int
    gone: bool = False
    poisoned: bool = False
    lives: dict[int, float] = field(default_factory=dict)
    wait: float = FIRST_WAIT
    due: float | None = None


class StandbyPolicy:
    """One time without a supervisor. Times are monotonic seconds; every method that decides something returns what is
    to be done, in order. First it is told of every ``client`` and every ``life``, then ``begin``."""

    def __init__(self, lost_at: float, timeout: float, poison: bool) -> None:
        self.ended = False
        """Nobody is left, and nobody came: the custodian is not needed any more."""
        self._lost_at = lost_at
        self._timeout = timeout
        self._poison = poison
        self._wards: dict[int, StandbyClient] = {}
        self._zero = False
        self._time_is_over = False
        self._poisoning = False

    # --- what there is ------------------------------------------------------------------------------------------------

    def client(self, number: int, incarnation: int, *, wanted: bool, remote: bool) -> None:
        """A client whose descriptors are kept."""
        self._wards[number] = StandbyClient(wanted, remote, incarnation)

    def life(self, worker: int, incarnation: int, began: float, *, poisoned: bool) -> None:
        """A worker that lives, or has ended without our having looked yet."""
        if not worker:
            self._zero = True
        elif worker in self._wards:
            ward = self._wards[worker]
            ward.lives[incarnation] = began
            ward.poisoned |= poisoned
            ward.incarnation = max(ward.incarnation, incarnation)

    def begin(self, now: float) -> list[Effect]:
        effects: list[Effect] = [Kill(0)] if self._zero else []
        for worker, ward in self._wards.items():
            if len(ward.lives) > 1:  # ordered twice by a supervisor that did not live to sort it out
                effects.append(Kill(worker))
            elif not ward.lives:
                self._later(ward, now)
        return effects

    # --- what happens -------------------------------------------------------------------------------------------------

    def forked(self, worker: int, incarnation: int, now: float) -> None:
        """A Fork has been done."""
        self._wards[worker].lives[incarnation] = now

    def fork_failed(self, worker: int, now: float) -> None:
        """A Fork could not be done: it is tried again."""
        self._later(self._wards[worker], now)

    def exited(self, worker: int, incarnation: int, client_gone: bool, now: float) -> list[Effect]:
        """A life has ended; ``client_gone``: it said that its client's memory is gone."""
        ward = self._wards.get(worker)
        if ward is None:
            return []
        began = ward.lives.pop(incarnation, now)
        if client_gone:
            return self.client_ended(worker)
        if now - began >= STABLE_SECONDS:
            ward.wait = FIRST_WAIT
        self._later(ward, now)
        return []

    def client_ended(self, client: int) -> list[Effect]:
        """The client's process, or its memory, is gone."""
        ward = self._wards.get(client)
        if ward is None or ward.gone:
            return []
        ward.gone, ward.due = True, None
        return [Drop(client)]

    def tick(self, now: float) -> list[Effect]:
        """Time has passed, or something has happened."""
        effects: list[Effect] = []
        if not self._time_is_over and now >= self._lost_at + self._timeout:
            self._time_is_over = True
            effects += self._too_late()
        if self._time_is_over and not self.clients:
            self.ended = True
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
        dues = [ward.due for ward in self._wards.values() if ward.due is not None and not ward.lives]
        if not self._time_is_over:
            dues.append(self._lost_at + self._timeout)
        return min(dues, default=None)

    def taken(self) -> list[Effect]:
        """Somebody takes over. Workers that poison are killed: with a supervisor there are sources again."""
        return [Kill(worker) for worker, ward in self._wards.items() if ward.poisoned and ward.lives]

    @property
    def clients(self) -> int:
        """How many clients live, as far as is known."""
        return sum(not ward.gone for ward in self._wards.values())

    # --- within -------------------------------------------------------------------------------------------------------

    def _later(self, ward: StandbyClient, now: float) -> None:
        if ward.wanted and not ward.gone:
            ward.due = now + ward.wait
            ward.wait = min(2 * ward.wait, LONGEST_WAIT)

    def _too_late(self) -> list[Effect]:
        waiting = {worker: ward for worker, ward in self._wards.items() if ward.wanted and ward.remote}
        if not waiting:
            return []
        after = f"no supervisor for {self._timeout:g} s"
        if not self._poison:
            return [Say(f"{after}: missing pages of remote blocks wait on in {len(waiting)} clients")]
        self._poisoning = True
        asking = [worker for worker, ward in waiting.items() if ward.lives and not ward.poisoned]
        said = Say(f"{after}: missing pages of remote blocks are poisoned in {len(waiting)} clients")
        return [said, *map(Kill, asking)]
