"""One round: fresh blocks, programs in all seats, chaos until the blocks would be whole, the last pass, the oracle.

What is not as it must be becomes a finding, one line each; a round without findings is a good one. Findings come from
the programs (a wrong byte, an end that they did not earn), from the service (it does not come back, a traceback, an
audit that finds strange pages), from the end (somebody waits, something is left).
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from postcopy.errors import PostcopyError
from postcopy.queries import Control
from tests.chaos import evidence, progress
from tests.chaos.contents import Contents
from tests.chaos.deeds import CALM_WITHIN, Deeds
from tests.chaos.leaks import Leaks
from tests.chaos.monkey import Act
from tests.chaos.progress import Progress, where
from tests.chaos.stage import Client, Stage
from tests.chaos.tally import Tally

STUCK_AFTER = 120.0
"""An operation that takes longer than that never ends."""
LAST_PASS_WITHIN = 180.0
START_WITHIN = 120.0
STEP = 0.02


@dataclass
class Plan:
    """What rounds have in common."""

    clients: int
    pages: int
    seconds: float
    pause: float
    options: tuple[str, ...] = ()
    namespaces: bool = False
    machines: int = 0
    guests: int = 0

    @property
    def modes(self) -> list[str]:
        """What sits in each seat: native programs, simulated Firecrackers, guests of KVM. Beside machines no program
        writes to a block: what their copies have then would depend on when they were made."""
        alone = not self.machines + self.guests
        programs = [("private", "shared")[seat % 2 * alone] for seat in range(1, self.clients + 1)]
        guests = [("guest", "vm-kvm")[number % 2] for number in range(self.guests)]
        return [*programs, *["vm"] * self.machines, *guests]


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
        self.stage = self.make_stage(options)
        self.table = Progress(directory / "progress", len(plan.modes), make=True)
        self.journal = (directory / "journal").open("w")
        self.note(f"seed {seed}: {plan.clients} clients, {plan.pages} pages, runs of {self.run_length}, {options}")
        self.findings: list[str] = []
        self.deeds = Deeds(self.stage, self.table, tally, self.find, self.note)
        self.leaks = Leaks(self.stage)
        self.told_stuck: set[int] = set()

    def make_stage(self, options: tuple[str, ...]) -> Stage:
        return Stage(self.directory, self.files, options, namespaces=self.plan.namespaces)

    # --- the course of a round ----------------------------------------------------------------------------------------

    def play(self) -> list[str]:
        """The whole round; returns its findings. Everybody has ended when it returns."""
        try:
            self.stage.start()
            for block in (0, 1) if self.plan.machines + self.plan.guests else ():
                self.stage.start_face(block)
            self.leaks.take_baseline()
            for seat in range(1, len(self.plan.modes) + 1):
                self.new_client(seat)
            self.wait_for_clients()
            self.table.begin(time.monotonic())
            self.chaos()
            self.last_pass()
            self.audit()
            self.leaked(self.leaks.after_the_last_client)
        except RuntimeError as error:
            self.find(str(error))
        finally:
            if self.findings:
                evidence.keep(self.stage, self.table)
            self.add_up()
            for fault in [] if self.findings else self.stage.stop():
                self.find(fault)
            self.leaked(self.leaks.after_the_end)
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

    def leaked(self, look: Callable[[], list[str]]) -> None:
        """What is left, unless something else was found: then of course much is."""
        leaks = [] if self.findings else look()
        self.tally.counts["leaks"] += len(leaks)
        for leak in leaks:
            self.find(leak)

    def new_client(self, seat: int) -> None:
        self.table.clear(seat, 0)
        job = {
            "mode": self.plan.modes[seat - 1],
            "pages": self.plan.pages,
            "seconds": self.plan.seconds,
            "pause": self.plan.pause,
            "operations": self.random.choice((-1, -1, -1, 300, 1000)),
            "seed": self.seed,
            "program_seed": self.random.getrandbits(32),
            "progress": str(self.directory / "progress"),
            "seats": len(self.plan.modes),
            "run": self.run_length,
        }
        self.stage.seat(seat, job)
        self.tally.counts["programs"] += 1

    def wait_for_clients(self) -> None:
        """On a busy machine many programs need a while to start. Before that there is nothing to disturb."""
        limit = time.monotonic() + START_WITHIN
        rows = [self.table.row(seat) for seat in range(1, len(self.plan.modes) + 1)]
        while not all(row[progress.ATTACHES] for row in rows) and time.monotonic() < limit and not self.findings:
            self.look_around()
            time.sleep(STEP)

    def chaos(self) -> None:
        """Acts and replacements until the front has come to the end of the blocks."""
        begun = time.monotonic()
        end = begun + self.plan.seconds
        intended = [(monkey, act, begun + act.gap) for monkey in self.monkeys if (act := next(monkey, None))]
        while time.monotonic() < end and not self.findings:
            self.look_around()
            for place, (monkey, act, due) in enumerate(intended):
                if due <= time.monotonic() < end - 1 and self.deeds.may(act):
                    self.deeds.do(act)
                    act = next(monkey)
                    intended[place] = monkey, act, time.monotonic() + act.gap
            time.sleep(STEP)

    def last_pass(self) -> None:
        """No more acts: whoever was stopped goes on, and everybody must come to the end."""
        self.note("last pass")
        self.deeds.finish()
        limit = time.monotonic() + CALM_WITHIN
        while not self.stage.calm(self.deeds.troubled) and not self.findings:
            self.look_around()
            if time.monotonic() > limit:
                return self.find(f"the service does not come back: {self.stage.in_words()}")
            time.sleep(STEP)
        self.table.phase = progress.FINISH
        limit = time.monotonic() + LAST_PASS_WITHIN * max(1.0, len(self.plan.modes) / 32)
        while self.stage.clients and not self.findings:
            self.look_around(replacing=False)
            if time.monotonic() > limit:
                for seat in self.stage.clients:
                    self.stuck(seat)
            time.sleep(STEP)

    # --- looking ------------------------------------------------------------------------------------------------------

    def look_around(self, replacing: bool = True) -> None:
        self.deeds.tick()
        self.serve_as_manager()
        for client in list(self.stage.clients.values()):
            if client.process.poll() is not None:
                self.client_ended(client)
                del self.stage.clients[client.seat]
                if replacing and not self.findings:
                    self.new_client(client.seat)
        now = time.monotonic_ns()
        for seat, client in self.stage.clients.items():
            since = self.table.row(seat)[progress.SINCE]
            if since and not client.stopped and now - since > STUCK_AFTER * 1e9:
                self.stuck(seat)

    def serve_as_manager(self) -> None:
        """Who died is started again; an end that nobody ordered is a finding."""
        for name, start in (("supervisor", self.stage.start_supervisor), ("source", self.stage.start_source)):
            process = getattr(self.stage, name)
            status = process.poll()
            if status is None:
                continue
            asked = name == "supervisor" and self.stage.upgrading and status == 0
            if status != -signal.SIGKILL and not asked:
                return self.find(f"the {name} ended with {status}: {self.stage.log(name)[-500:]}")
            start()
            self.note(f"{name} started again, pid {getattr(self.stage, name).pid}")

        for block, face in enumerate(self.stage.faces):
            if (status := face.poll()) is not None:
                self.note(f"face {block} ended with {status}: {self.stage.log(f'face-{block}')[-200:]}")
                self.stage.start_face(block)

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

    def stuck(self, seat: int) -> None:
        if seat in self.told_stuck:
            return
        self.told_stuck.add(seat)
        client, row = self.stage.clients[seat], self.table.row(seat)
        waits = (time.monotonic_ns() - row[progress.SINCE]) / 1e9 if row[progress.SINCE] else 0.0
        self.tally.counts["stuck clients"] += 1
        what = where(row[progress.WHAT])
        self.find(f"seat {seat} ({client.mode}, pid {client.process.pid}) is stuck for {waits:.0f} s in {what}")

    # --- the oracle's last questions ----------------------------------------------------------------------------------

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
            if self.plan.clients and block["received"] != block["pages"]:
                self.find(f"not every page of {block['name']} is marked: {block['received']} of {block['pages']}")

    def read_logs(self) -> None:
        for name in ("supervisor", "source"):
            text = self.stage.log(name)
            if "Traceback" in text and not self.findings:
                self.find(f"a traceback in {self.directory}/{name}.log")

    def add_up(self) -> None:
        counts = self.tally.counts
        for seat in range(1, len(self.plan.modes) + 1):
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
