"""One round: fresh blocks, programs in all seats, chaos until the blocks would be whole, the last pass, the oracle.

What is not as it must be becomes a finding, one line each; a round without findings is a good one. Findings come from
the programs (a wrong byte, an end that they did not earn), from the house (it does not come back, a traceback, an audit
that finds strange pages), from the end (somebody waits, something is left).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from postcopy.control import Control
from postcopy.errors import PostcopyError

from . import evidence, progress
from .contents import Contents
from .monkey import Act
from .progress import Progress, where
from .stage import Client, Stage, descriptors

CALM_WITHIN = 90.0
"""Seconds that the house may take to come back from one act, on a busy machine."""
STUCK_AFTER = 120.0
"""An operation that takes longer than that never ends."""
LAST_PASS_WITHIN = 180.0
LEAVE_WITHIN = 15.0
CRASHES_A_MINUTE = 4
"""More would put an innocent client into quarantine, as it must."""
ENOUGH_OPERATIONS = 25
STEP = 0.02
WORKER_ZERO = Counter({"anon_inode:[pidfd]": 1, "socket": 2})
"""What worker zero costs whoever watches it. It is started when it is first needed and stays."""


@dataclass
class Plan:
    """What rounds have in common."""

    clients: int
    pages: int
    seconds: float
    pause: float
    options: tuple[str, ...] = ()
    namespaces: bool = False


@dataclass
class Tally:
    """What all rounds together have shown."""

    kills: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    slowest_touch: float = 0.0
    findings: list[str] = field(default_factory=list)
    rounds: int = 0


@dataclass
class Wait:
    """Seats that should make progress after an act: since when, on which blocks, who is still owed some (and how many
    operations it had done). Who does many without needing a missing page is not looked at any longer."""

    kind: str
    since: int
    blocks: tuple[int, ...]
    owed: dict[int, tuple[int, int]]  # seat: (pid, operations)


class Round:
    """``monkeys`` are the monkeys' minds, which go on from round to round."""

    def __init__(self, plan: Plan, seed: int, monkeys: Sequence[Iterator[Act]], tally: Tally, directory: Path) -> None:
        self.plan, self.seed, self.monkeys, self.tally = plan, seed, monkeys, tally
        self.directory = directory
        self.random = random.Random(seed)
        contents = Contents(seed)
        self.files = directory / "local", directory / "remote"
        for number, file in enumerate(self.files, 1):
            contents.write_file(file, number, plan.pages)
        self.run_length = self.random.choice((1, 8, 64))
        around = self.random.choice(("4K", "16K", "auto"))
        rate = int(plan.pages * 4096 / plan.seconds * self.random.choice((0, 0, 0.2)))
        options = ("--fault-around", around, "--background-rate", str(rate), "--source-timeout", "2", *plan.options)
        self.stage = Stage(directory, self.files, options, namespaces=plan.namespaces)
        self.table = Progress(directory / "progress", plan.clients, make=True)
        self.journal = (directory / "journal").open("w")
        self.note(f"seed {seed}: {plan.clients} clients, {plan.pages} pages, runs of {self.run_length}, {options}")
        self.findings: list[str] = []
        self.waits: list[Wait] = []
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.crashes: dict[int, list[float]] = {}
        self.troubled = 0.0
        self.told_stuck: set[int] = set()
        self.baseline: dict[str, Counter[str]] = {}

    # --- the course of a round ----------------------------------------------------------------------------------------

    def play(self) -> list[str]:
        """The whole round; returns its findings. Everybody has ended when it returns."""
        shm = set(Path("/dev/shm").glob("*postcopy*"))
        try:
            self.stage.start()
            self.take_baseline()
            self.begun = time.monotonic()
            for seat in range(1, self.plan.clients + 1):
                self.new_client(seat)
            self.chaos()
            self.last_pass()
            self.audit()
            self.look_for_leaks()
        except RuntimeError as error:
            self.find(str(error))
        finally:
            if self.findings:
                evidence.keep(self.stage, self.table)
            self.add_up()
            self.findings += [] if self.findings else self.stage.stop()
            self.findings += [] if self.findings else self.left_behind(shm)
            self.stage.close()
            self.read_logs()
            self.table.close()
            self.journal.close()
        return self.findings

    def note(self, what: str) -> None:
        self.journal.write(f"{time.time():.3f} {what}\n")
        self.journal.flush()

    def find(self, what: str) -> None:
        self.findings.append(what)
        self.note(f"FOUND {what}")

    def new_client(self, seat: int) -> None:
        self.table.clear(seat, 0)
        job = {
            "mode": ("private", "shared")[seat % 2],
            "pages": self.plan.pages,
            "begun": self.begun,
            "seconds": self.plan.seconds,
            "pause": self.plan.pause,
            "operations": self.random.choice((-1, -1, -1, 300, 1000)),
            "seed": self.seed,
            "program_seed": self.random.getrandbits(32),
            "progress": str(self.directory / "progress"),
            "seats": self.plan.clients,
            "run": self.run_length,
        }
        self.stage.seat(seat, job)
        self.tally.counts["programs"] += 1

    def chaos(self) -> None:
        """Acts and replacements until the front has come to the end of the blocks."""
        end = self.begun + self.plan.seconds
        begun = time.monotonic() + 2.0  # they have begun
        intended = [(monkey, act, begun + act.gap) for monkey in self.monkeys if (act := next(monkey, None))]
        while time.monotonic() < end and not self.findings:
            self.look_around()
            for place, (monkey, act, due) in enumerate(intended):
                if due <= time.monotonic() < end - 1 and self.may(act):
                    self.do(act)
                    act = next(monkey)
                    intended[place] = monkey, act, time.monotonic() + act.gap
            time.sleep(STEP)

    def last_pass(self) -> None:
        """No more acts: whoever was stopped goes on, and everybody must come to the end."""
        self.note("last pass")
        for _, what in sorted(self.due, key=lambda pair: pair[0]):
            what()
        self.due.clear()
        limit = time.monotonic() + CALM_WITHIN
        while not self.stage.calm(self.troubled) and not self.findings:
            self.look_around()
            if time.monotonic() > limit:
                return self.find(f"the house does not come back: {self.house_in_words()}")
            time.sleep(STEP)
        self.table.phase = progress.FINISH
        limit = time.monotonic() + LAST_PASS_WITHIN
        while self.stage.clients and not self.findings:
            self.look_around(replacing=False)
            if time.monotonic() > limit:
                for seat in self.stage.clients:
                    self.stuck(seat)
            time.sleep(STEP)

    # --- looking ------------------------------------------------------------------------------------------------------

    def look_around(self, replacing: bool = True) -> None:
        now = time.monotonic()
        for pair in [pair for pair in self.due if pair[0] <= now]:
            self.due.remove(pair)
            pair[1]()
        self.serve_as_manager()
        for client in list(self.stage.clients.values()):
            if client.process.poll() is not None:
                self.client_ended(client)
                del self.stage.clients[client.seat]
                if replacing and not self.findings:
                    self.new_client(client.seat)
        self.look_for_progress()

    def serve_as_manager(self) -> None:
        """Who died is started again; an end that nobody ordered is a finding."""
        for name, start in (("supervisor", self.stage.start_supervisor), ("source", self.stage.start_source)):
            process = getattr(self.stage, name)
            status = process.poll()
            if status is None:
                continue
            if status != -signal.SIGKILL:
                return self.find(f"the {name} ended with {status}: {self.stage.log(name)[-500:]}")
            start()
            self.note(f"{name} started again, pid {getattr(self.stage, name).pid}")

    def client_ended(self, client: Client) -> None:
        status = client.process.returncode
        said = [json.loads(line) for line in client.out.read_text("utf-8", "replace").splitlines() if line[-1:] == "}"]
        for word in said:
            if "wrong" in word:
                self.find(f"wrong bytes: {json.dumps(word)}")
            if "child" in word:
                self.find(f"a fork's child: {json.dumps(word)}")
            for kind, number in word.get("children", {}).items():
                self.tally.counts[f"forks: {kind}"] += number
                if kind == "wrong":
                    self.find(f"a fork's child of seat {client.seat} read wrong bytes")
        if status == 0 or (status == -signal.SIGKILL and client.killed):
            return
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        row = self.table.row(client.seat)
        said_last = client.errors.read_text("utf-8", "replace")[-600:]
        what = where(row[progress.WHAT])
        self.find(f"seat {client.seat} ({client.mode}) ended with {how}, not earned, in {what}: {said_last}")

    def look_for_progress(self) -> None:
        for wait in list(self.waits):
            for seat, (pid, operations) in list(wait.owed.items()):
                client, row = self.stage.clients.get(seat), self.table.row(seat)
                if client is None or client.process.pid != pid or client.killed or client.stopped:
                    del wait.owed[seat]
                    continue
                served = [block for block in wait.blocks if row[progress.LAST_COLD + block] > wait.since]
                for block in served[:1]:
                    stood = row[progress.LAST_COLD + block] - max(wait.since, row[progress.BEGAN + block])
                    self.tally.recoveries.setdefault(wait.kind, []).append(stood / 1e9)
                if served or row[progress.OPERATIONS] - operations > ENOUGH_OPERATIONS:
                    del wait.owed[seat]
            if not wait.owed:
                self.waits.remove(wait)
        now = time.monotonic_ns()
        for seat, client in self.stage.clients.items():
            since = self.table.row(seat)[progress.SINCE]
            if since and not client.stopped and now - since > STUCK_AFTER * 1e9:
                self.stuck(seat)

    def stuck(self, seat: int) -> None:
        if seat in self.told_stuck:
            return
        self.told_stuck.add(seat)
        client, row = self.stage.clients[seat], self.table.row(seat)
        waits = (time.monotonic_ns() - row[progress.SINCE]) / 1e9 if row[progress.SINCE] else 0.0
        self.tally.counts["stuck clients"] += 1
        what = where(row[progress.WHAT])
        self.find(f"seat {seat} ({client.mode}, pid {client.process.pid}) is stuck for {waits:.0f} s in {what}")

    def house_in_words(self) -> str:
        document = self.stage.watcher.document
        age = time.monotonic() - self.stage.watcher.seen
        return f"last status {age:.0f} s ago: {document.get('state')}, custodians {self.stage.custodians()}"

    # --- doing --------------------------------------------------------------------------------------------------------

    def may(self, act: Act) -> bool:
        """One of the house at a time: the last must be back."""
        if not act.of_house:
            return True
        if self.stage.calm(self.troubled) and not any(wait.kind.split()[0] == act.who for wait in self.waits):
            return True
        if time.monotonic() - self.troubled > CALM_WITHIN and not self.stage.calm(self.troubled):
            self.find(f"the house does not come back: {self.house_in_words()}")
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
            case who:
                self.to_house(act, who)
        if act.of_house:
            self.troubled = time.monotonic() + (0.0 if "kill" in act.kind else act.pause)
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
                if sum(then > now - 65 for then in self.crashes.get(number, ())) < CRASHES_A_MINUTE
            }
            if not able:
                return
            number = list(able)[int(chance * len(able))]
            seat, kind = self.stage.seat_of(number), "worker kill" if act.of_house else act.kind
            self.crashes.setdefault(number, []).append(now)
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
        self.due.append((time.monotonic() + seconds, lambda: void(what())))

    # --- the oracle's last questions ----------------------------------------------------------------------------------

    def take_baseline(self) -> None:
        """What supervisor and custodian have open without any client, libraries' own included."""
        with self.stage.watcher.asking:
            time.sleep(0.2)
            self.baseline = self.open_now()

    def open_now(self) -> dict[str, Counter[str]]:
        found = {}
        pids = {"supervisor": self.stage.supervisor.pid if self.stage.supervisor else 0}
        for name, pid in (pids | {"custodian": next(iter(self.stage.custodians()), 0)}).items():
            try:
                found[name] = descriptors(pid)
            except OSError:
                found[name] = Counter()
        return found

    def audit(self) -> None:
        """Strange pages, and events that say that we could not handle something."""
        if self.findings:
            return
        try:
            with Control(self.stage.place, timeout=60.0) as control:
                document = control.status(audit=True)
        except PostcopyError as error:
            return self.find(f"no status at the end: {error}")
        totals = document["totals"]
        if totals["polluted"] or totals.get("repaired"):
            self.find(f"pages that nobody of ours placed: {json.dumps(document['blocks'])}")
        for event in document.get("events", []):
            if event["kind"] in ("bug", "failed", "quarantined", "lost", "polluted", "handler-failed", "outside"):
                self.find(f"event: {json.dumps(event)}")
        for block in document["blocks"]:
            if block["received"] != block["pages"]:
                self.find(f"not every page of {block['name']} is marked: {block['received']} of {block['pages']}")

    def look_for_leaks(self) -> None:
        """With the last client everything of all clients must go."""
        if self.findings:
            return
        limit = time.monotonic() + LEAVE_WITHIN
        told = ["nothing was looked at"]
        while told and time.monotonic() < limit:
            time.sleep(0.25)
            told = [f"client {one['id']} is still known" for one in self.stage.watcher.document.get("clients", [])]
            told += [f"worker {number} still lives, pid {pid}" for number, pid in self.stage.workers().items()]
            with self.stage.watcher.asking:
                opened_now = self.open_now()
            zero = WORKER_ZERO if "postcopy-w0" in self.stage.people().values() else Counter()
            for name, opened in opened_now.items():
                more = opened - self.baseline[name] - zero
                told += [f"{name}: {number} more open: {target}" for target, number in more.items()]
        self.tally.counts["leaks"] += len(told)
        for leak in told:
            self.find(f"leak: {leak}")

    def left_behind(self, shm: set[Path]) -> list[str]:
        """After the orderly end: processes, files."""
        limit = time.monotonic() + LEAVE_WITHIN
        ours = {process.pid for process in [self.stage.relay.process if self.stage.relay else None] if process}
        while (people := {pid: name for pid, name in self.stage.people().items() if pid not in ours}) and (
            time.monotonic() < limit
        ):
            time.sleep(0.05)
        told = [f"leak: process {pid} ({name}) after the end" for pid, name in people.items()]
        place = self.stage.place
        told += [f"leak: {path.relative_to(place)} in the runtime directory" for path in place.rglob("*")]
        told += [f"leak: {name}" for name in set(Path("/dev/shm").glob("*postcopy*")) - shm]
        self.tally.counts["leaks"] += len(told)
        return told

    def read_logs(self) -> None:
        for name in ("supervisor", "source"):
            text = self.stage.log(name)
            if "Traceback" in text and not self.findings:
                self.find(f"a traceback in {self.directory}/{name}.log")

    def add_up(self) -> None:
        counts = self.tally.counts
        for seat in range(1, self.plan.clients + 1):
            row = self.table.row(seat)
            counts["wrong bytes"] += row[progress.WRONG]
            counts["local faults"] += row[progress.COLD]
            counts["remote faults"] += row[progress.COLD + 1]
            counts["bytes checked"] += row[progress.CHECKED]
            counts["attaches"] += row[progress.ATTACHES]
            counts["operations"] += row[progress.OPERATIONS]
            self.tally.slowest_touch = max(self.tally.slowest_touch, row[progress.SLOWEST] / 1e9)
        counts["supervisors"] += self.stage.lives["supervisor"]
        counts["sources"] += self.stage.lives["source"]


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
