"""What the monkeys do, and how long those whom it concerns stand still after it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from postcopy.errors import PostcopyError
from postcopy.queries import Control
from tests.chaos import progress
from tests.chaos.monkey import Act
from tests.chaos.progress import Progress
from tests.chaos.stage import Client, Stage
from tests.chaos.tally import Tally

CALM_WITHIN = 90.0
"""Seconds that the service may take to come back from one act, on a busy machine."""
CRASHES_A_MINUTE = 4
"""More would put an innocent client into quarantine, as it must."""
ENOUGH_OPERATIONS = 25


@dataclass
class Wait:
    """Seats that should make progress after an act: since when, on which blocks, who is still owed some (and how many
    operations it had done). Who does many without needing a missing page is not looked at any longer."""

    kind: str
    since: int
    blocks: tuple[int, ...]
    owed: dict[int, tuple[int, int]]  # seat: (pid, operations)


class Deeds:
    """Acts done to the people of a stage; ``troubled`` is when the service was last hit. ``find`` takes what must not
    be, ``note`` what happens."""

    def __init__(
        self, stage: Stage, table: Progress, tally: Tally, find: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        self.stage, self.table, self.tally = stage, table, tally
        self.find, self.note = find, note
        self.troubled = 0.0
        self.waits: list[Wait] = []
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._crashes: dict[int, list[float]] = {}

    def finish(self) -> None:
        """Whatever was to happen later happens now: nobody stays stopped, no line cut."""
        for _, what in sorted(self._due, key=lambda pair: pair[0]):
            what()
        self._due.clear()

    def tick(self) -> None:
        """What is due, and who has made progress."""
        now = time.monotonic()
        for pair in [pair for pair in self._due if pair[0] <= now]:
            self._due.remove(pair)
            pair[1]()
        for wait in list(self.waits):
            for seat, owed in list(wait.owed.items()):
                if self._is_paid(wait, seat, *owed):
                    del wait.owed[seat]
            if not wait.owed:
                self.waits.remove(wait)

    def _is_paid(self, wait: Wait, seat: int, pid: int, operations: int) -> bool:
        """Is this seat owed nothing any more? If it was given a missing page, how long it stood is noted."""
        client, row = self.stage.clients.get(seat), self.table.row(seat)
        if client is None or client.process.pid != pid or client.killed or client.stopped:
            return True
        served = [block for block in wait.blocks if row[progress.LAST_COLD + block] > wait.since]
        for block in served[:1]:
            stood = row[progress.LAST_COLD + block] - max(wait.since, row[progress.BEGAN + block])
            self.tally.recoveries.setdefault(wait.kind, []).append(stood / 1e9)
        return bool(served) or row[progress.OPERATIONS] - operations > ENOUGH_OPERATIONS

    def may(self, act: Act) -> bool:
        """One of the service at a time: the last must be back."""
        if not act.of_house:
            return True
        if self.stage.calm(self.troubled) and not any(wait.kind.split()[0] == act.who for wait in self.waits):
            return True
        if time.monotonic() - self.troubled > CALM_WITHIN and not self.stage.calm(self.troubled):
            self.find(f"the service does not come back: {self.stage.in_words()}")
        # Somebody who waits for a page longer than this is looked after by the watch over stuck clients.
        return self.stage.calm(self.troubled) and time.monotonic() - self.troubled > CALM_WITHIN / 6

    def do(self, act: Act) -> None:
        self.note(f"act {act.number}: {act.kind} {act.victims} pause {act.pause:.2f} workers {act.workers}")
        match act.who:
            case "worker":
                self.to_workers(act, act.victims)
            case "client":
                self.to_clients(act)
            case "network":
                self.to_network(act)
            case "directory":
                self.fill_directory(act)
            case "everything":
                self.to_everything(act)
            case _ if act.kind == "supervisor upgrade":
                self.upgrade(act)
            case who:
                self.to_house(act, who)
        if act.of_house:
            # Not the second kill of a pair: it must not fall into the next act, which may be at the custodian.
            at_once = act.kind.endswith(("kill", "cut", "upgrade"))
            self.troubled = time.monotonic() + (0.0 if at_once else act.pause)
            if act.who == "everything":
                return
            self.to_workers(act, act.victims[: act.workers] if act.workers < 4 else (*act.victims, 0.2, 0.4, 0.6, 0.8))

    def owe(self, kind: str, seats: list[int], blocks: tuple[int, ...] = (0, 1), delay: float = 0.0) -> None:
        done = {seat: self.table.row(seat)[progress.OPERATIONS] for seat in seats}
        owed = {seat: (client.process.pid, done[seat]) for seat in seats if (client := self.stage.clients.get(seat))}
        self.waits.append(Wait(kind, time.monotonic_ns() + int(delay * 1e9), blocks, owed))

    def to_workers(self, act: Act, victims: tuple[float, ...]) -> None:
        now = time.monotonic()
        for chance in victims:
            able = {
                number: pid
                for number, pid in sorted(self.stage.workers().items())
                if sum(then > now - 65 for then in self._crashes.get(number, ())) < CRASHES_A_MINUTE
            }
            if not able:
                return
            number = list(able)[int(chance * len(able))]
            seat, kind = self.stage.seat_of(number), "worker kill" if act.of_house else act.kind
            self._crashes.setdefault(number, []).append(now)
            if not send(able[number], signal.SIGKILL if kind == "worker kill" else signal.SIGSTOP):
                continue
            self.tally.kills[kind] += 1
            self.note(f"  worker {number} (pid {able[number]}, seat {seat})")
            if kind == "worker stop":
                self.later(act.pause, lambda pid=able[number]: send(pid, signal.SIGCONT))  # type: ignore[misc]
            self.owe(kind, [seat] if seat else [])

    def to_clients(self, act: Act) -> None:
        for chance in act.victims:
            seats = [seat for seat, client in self.stage.clients.items() if not client.killed and not client.stopped]
            if not seats:
                return
            client = self.stage.clients[sorted(seats)[int(chance * len(seats))]]
            self.tally.kills[act.kind] += 1
            if act.kind == "client kill":
                client.killed = True
                client.process.kill()
            else:
                client.stopped = True
                client.process.send_signal(signal.SIGSTOP)
                self.later(act.pause, lambda client=client: self.go_on(client))  # type: ignore[misc]

    def go_on(self, client: Client) -> None:
        client.process.send_signal(signal.SIGCONT)
        row = self.table.row(client.seat)
        if row[progress.SINCE]:
            row[progress.SINCE] = time.monotonic_ns()
        client.stopped = False

    def to_house(self, act: Act, who: str) -> None:
        custodians = self.stage.custodians()
        pid = {"supervisor": self.stage.supervisor, "source": self.stage.source}.get(who)
        target = pid.pid if pid is not None else custodians[0]
        stop = act.kind.endswith("stop")
        if not send(target, signal.SIGSTOP if stop else signal.SIGKILL):
            return
        self.tally.kills[act.kind] += 1
        if stop:
            self.later(act.pause, lambda: send(target, signal.SIGCONT))
        if act.kind.endswith("twice"):
            self.later(act.pause / 3, self.kill_supervisor_again)
        if who != "custodian":
            self.owe(act.kind, list(self.stage.clients), (1,), act.pause if stop else 0.0)

    def to_everything(self, act: Act) -> None:
        """Supervisor, custodian and all workers, as when their cgroup runs out of memory: the supervisor first, so that
        it replaces nothing."""
        service = [pid for pid, name in self.stage.people().items() if name.startswith(("postcopy-cust", "postcopy-w"))]
        assert self.stage.supervisor is not None
        hit = [pid for pid in (self.stage.supervisor.pid, *service) if send(pid, signal.SIGKILL)]
        self.note(f"  everything: {len(hit)} processes")
        self.tally.kills[act.kind] += 1
        self.owe(act.kind, list(self.stage.clients))

    def upgrade(self, act: Act) -> None:
        """``postcopy stop --keep-workers``: it ends in order, everybody else lives on."""
        self.stage.upgrading = True
        try:
            with Control(self.stage.place, timeout=30.0) as control:
                control.stop(keep_workers=True)
        except PostcopyError as error:  # its custodian may be behind; it says so and goes on
            return self.note(f"  not done: {error}")
        self.tally.kills[act.kind] += 1
        self.owe(act.kind, list(self.stage.clients), (1,))

    def kill_supervisor_again(self) -> None:
        """In the middle of its predecessor's heritage."""
        if self.stage.supervisor is not None and send(self.stage.supervisor.pid, signal.SIGKILL):
            self.tally.kills["supervisor kill twice"] += 1

    def to_network(self, act: Act) -> None:
        relay = self.stage.relay
        assert relay is not None
        self.tally.kills[act.kind] += 1
        match act.kind:
            case "network cut":
                relay.cut()
            case "network stall":
                relay.stall()
                self.later(act.pause, relay.go)
            case "network down":
                self.stage.take_down()
                self.later(act.pause, self.stage.bring_up)
        self.owe(act.kind, list(self.stage.clients), (1,), act.pause if act.kind != "network cut" else 0.0)

    def fill_directory(self, act: Act) -> None:
        if self.stage.fill():
            self.tally.kills[act.kind] += 1
            self.later(act.pause, self.stage.empty)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        self._due.append((time.monotonic() + seconds, lambda: void(what())))


def send(pid: int, number: int) -> bool:
    """A signal to a process that was on the stage a moment ago, by its pidfd."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)


def void(_: object) -> None:
    """Takes anything, says nothing."""
