"""What a custodian does without a supervisor: the policy only, without process, descriptor or clock.

::

    served --channel ends--> orphaned --TakeOver--> on trial --first message--> served
      |                         ^                      |
      +--Dismiss--> dismissed   +----channel ends------+
                                |
                                +--no client left, and the time is over--> ended

Without a supervisor the custodian keeps one promise: a client that lives and has memory to serve has a worker. A
successor is forked only when every process of that worker has ended: of two that read one userfaultfd each would get
a part of the messages. A supervisor that takes over is *on trial* until it has sent a message after the inventory. One
that vanishes before has changed nothing, not even the time since the loss.

``WhenOrphaned`` decides about pages that only a supervisor can bring when none comes back in time. They go on waiting,
or the workers of clients with remote blocks are replaced by workers that poison missing pages. Local blocks are served
as long as their clients live, in either case.

A ``StandbyPolicy`` is made when a channel ends and forgotten when the next one is there: with a supervisor a custodian
does as little as it can, because each page of memory that it writes to is no longer shared with its workers. For the
same reason what it keeps is decoded only when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Assignment, ClientNote

from .orphaned import NO_SUPERVISOR

CLIENT = "client/"
FIRST_WAIT = 0.02
LONGEST_WAIT = 1.0
STABLE_SECONDS = 10.0  # after a worker has lived so long, its next replacement is as quick as the first


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is forked by: the keys of its descriptors, its assignment, its latest incarnation."""

    keys: tuple[str, ...]
    assignment: bytes
    incarnation: int


def client_of(key: str) -> int:
    """The number of the client that a key belongs to; 0 for another key, and for worker zero's."""
    number = key.removeprefix(CLIENT)
    return int(number) if number != key and number.isdecimal() else 0


def wants_worker(meta: bytes, last: Assignment) -> bool:
    """Does the client of this note need a worker when none lives? Not without regions (all its blocks are complete),
    and not in quarantine, unless its supervisor gave it a worker that poisons."""
    try:
        note = decode(meta, expect=(ClientNote,))
    except BadMessage:
        return True
    assert isinstance(note, ClientNote)
    poisons = all(grant.kind == "quarantined" for grant in last.blocks)
    return bool(note.regions) and (poisons or not note.quarantined)


def asks_remote(assignment: Assignment) -> bool:
    """Does the worker need a supervisor for some pages?"""
    return any(grant.kind == "remote" for grant in assignment.blocks)


def without_remote(assignment: Assignment) -> Assignment:
    """The same assignment for a worker that serves local blocks only, and poisons missing pages of remote blocks."""
    blocks = (
        replace(grant, kind="orphaned", detail=NO_SUPERVISOR) if grant.kind == "remote" else grant
        for grant in assignment.blocks
    )
    return replace(assignment, blocks=tuple(blocks))


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork this incarnation of a worker by its last order; ``poison``: without its remote sources."""

    worker: int
    incarnation: int
    poison: bool


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to every process of this worker."""

    worker: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The client is gone: close what is kept for it."""

    worker: int


@dataclass(frozen=True, slots=True)
class Log:
    """Write one line to the log."""

    text: str


Effect = Fork | Kill | Drop | Log


@dataclass(slots=True)
class StandbyClient:
    """A client and its worker. ``wanted``: it has regions, and there is an order to fork by. ``incarnation`` is the
    latest one, ``lives`` maps each living incarnation to when it began. ``poisoned``: its worker poisons missing pages
    of remote blocks."""

    wanted: bool
    remote: bool
    incarnation: int
    gone: bool = False
    poisoned: bool = False
    lives: dict[int, float] = field(default_factory=dict)
    wait: float = FIRST_WAIT
    due: float | None = None


class StandbyPolicy:
    """One stretch of time without a supervisor. Times are monotonic seconds. Methods that decide something return what
    is to be done, in order. Call ``add_client`` and ``add_life`` for everything that exists, then ``begin``."""

    def __init__(self, lost_at: float, timeout: float, poison: bool) -> None:
        self.ended = False  # no client is left, and no supervisor came: the custodian is not needed any more
        self._lost_at = lost_at
        self._timeout = timeout
        self._poison = poison
        self._clients: dict[int, StandbyClient] = {}
        self._zero = False
        self._time_over = False
        self._poisoning = False

    def add_client(self, number: int, incarnation: int, *, wanted: bool, remote: bool) -> None:
        """A client whose descriptors are kept."""
        self._clients[number] = StandbyClient(wanted, remote, incarnation)

    def add_life(self, worker: int, incarnation: int, began: float, *, poisoned: bool) -> None:
        """A process of a worker: it lives, or its end was not noticed yet."""
        if not worker:
            self._zero = True
        elif worker in self._clients:
            client = self._clients[worker]
            client.lives[incarnation] = began
            client.poisoned |= poisoned
            client.incarnation = max(client.incarnation, incarnation)

    def begin(self, now: float) -> list[Effect]:
        """After the last ``add_client`` and ``add_life``: what must be done at once."""
        effects: list[Effect] = [Kill(0)] if self._zero else []
        for worker, client in self._clients.items():
            if len(client.lives) > 1:  # ordered twice by a supervisor that died before it could end one of them
                effects.append(Kill(worker))
            elif not client.lives:
                self._schedule(client, now)
        return effects

    def forked(self, worker: int, incarnation: int, now: float) -> None:
        """A Fork has succeeded."""
        self._clients[worker].lives[incarnation] = now

    def fork_failed(self, worker: int, now: float) -> None:
        """A Fork has failed: it is tried again."""
        self._schedule(self._clients[worker], now)

    def exited(self, worker: int, incarnation: int, client_gone: bool, now: float) -> list[Effect]:
        """A process of a worker has ended; ``client_gone``: by its exit status its client's memory is gone."""
        client = self._clients.get(worker)
        if client is None:
            return []
        began = client.lives.pop(incarnation, now)
        if client_gone:
            return self.client_ended(worker)
        if now - began >= STABLE_SECONDS:
            client.wait = FIRST_WAIT
        self._schedule(client, now)
        return []

    def client_ended(self, number: int) -> list[Effect]:
        """The client's process, or its memory, is gone."""
        client = self._clients.get(number)
        if client is None or client.gone:
            return []
        client.gone, client.due = True, None
        return [Drop(number)]

    def tick(self, now: float) -> list[Effect]:
        """What is due now: call it when ``next_due`` has come, and after every other call."""
        effects: list[Effect] = []
        if not self._time_over and now >= self._lost_at + self._timeout:
            self._time_over = True
            effects += self._timed_out()
        if self._time_over and not self.clients:
            self.ended = True
            return [*effects, *(Kill(worker) for worker, client in self._clients.items() if client.lives)]
        for worker, client in self._clients.items():
            if client.due is not None and now >= client.due and not client.lives:
                client.due = None
                client.incarnation += 1
                client.poisoned = self._poisoning and client.remote
                effects.append(Fork(worker, client.incarnation, client.poisoned))
        return effects

    def next_due(self) -> float | None:
        """When ``tick`` will have something to do, unless something happens before; None: never."""
        dues = [client.due for client in self._clients.values() if client.due is not None and not client.lives]
        if not self._time_over:
            dues.append(self._lost_at + self._timeout)
        return min(dues, default=None)

    def taken(self) -> list[Effect]:
        """A supervisor takes over. Workers that poison are killed: there are remote sources again."""
        return [Kill(worker) for worker, client in self._clients.items() if client.poisoned and client.lives]

    @property
    def clients(self) -> int:
        """How many clients live, as far as is known."""
        return sum(not client.gone for client in self._clients.values())

    def _schedule(self, client: StandbyClient, now: float) -> None:
        if client.wanted and not client.gone:
            client.due = now + client.wait
            client.wait = min(2 * client.wait, LONGEST_WAIT)

    def _timed_out(self) -> list[Effect]:
        waiting = {worker: client for worker, client in self._clients.items() if client.wanted and client.remote}
        if not waiting:
            return []
        after = f"no supervisor for {self._timeout:g} s"
        if not self._poison:
            return [Log(f"{after}: missing pages of remote blocks wait on in {len(waiting)} clients")]
        self._poisoning = True
        asking = [worker for worker, client in waiting.items() if client.lives and not client.poisoned]
        report = Log(f"{after}: missing pages of remote blocks are poisoned in {len(waiting)} clients")
        return [report, *map(Kill, asking)]
