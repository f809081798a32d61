"""The conformance and load test for page-fault handlers of Firecracker: simulated machines on memory that is missing.

Each rule is tried on machines of its own. When a rule is broken the handler is started again, so that the next rule is
judged alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from postcopy_protocol.geometry import PAGE_4K

from ..errors import BadInput
from ..verdicts import Verdicts, microseconds
from .probed import Ended, Handler, Overdue, SimulatedMachine

RULES: Final = {
    "listens": "listens at the socket",
    "versions": "understands the list of regions of every release",
    "pieces": "reads a list that comes in pieces, and descriptors that it does not need",
    "content": "every byte is that of the memory file",
    "regions": "keeps regions apart that lie side by side in memory",
    "kernel-faults": "system calls of the machine fault on missing pages too",
    "storm": "many threads on the same missing pages all go on",
    "removed": "pages that were given back are zeros from then on",
    "prompt": "reads at once that pages are given back",
    "races": "pages that are given back while others are read stay zeros",
    "several": "serves several machines at once, also when one of them dies",
    "hostile": "serves on after peers that lie or say nothing",
    "delays": "a machine only waits while the handler stands still",
    "restarts": "a machine goes on when the handler is killed and started again",
    "restart-removed": "what was given back before that stays zeros",
    "lets-go": "closes every descriptor of a machine that has ended",
}
LETS_GO_SECONDS = 5.0
SLOW_REMOVAL = 1.0
"""Seconds after which giving a page back was not prompt: the machine's main thread stands still meanwhile."""
THREADS = 6
RACES = 60
VERSIONS: Final[dict[str, dict[str, Any]]] = {
    "1.1": {"version": "1.1", "close": True},
    "1.7": {"version": "1.7", "close": True},
    "1.12": {"version": "1.12"},
    "2.0": {"version": "2.0"},
    "a fork that keeps no descriptor": {"keep": False},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """``command``: with {socket} and {memory}. ``memory``: a file that it serves; None: one is made. ``only``: the
    rules of STEPS to try; empty: all."""

    command: tuple[str, ...]
    memory: str | None = None
    pages: int = 2048
    page_size: int = PAGE_4K
    restarts: int = 1
    delays: int = 1
    delay: float = 0.5
    one_shot: bool = False
    only: frozenset[str] = frozenset()
    seed: int = 1
    timeout: float = 30.0


def probe(settings: Settings) -> Verdicts:
    """Probe one handler. Raises BadInput (a file of a wrong size) and OSError (the command cannot be started)."""
    report = Verdicts(RULES, "listens", {"command": list(settings.command)}, "subject")
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-probe-"))
        os.chmod(place, 0o755)  # the handler may be another user's
        memory = settings.memory or _make_memory(os.path.join(place, "memory"), settings)
        size = os.path.getsize(memory)
        if size == 0 or size % settings.page_size:
            raise BadInput(f"{memory} has {size} bytes: not a whole number of pages of {settings.page_size}")
        handler = Handler(settings.command, os.path.join(place, "socket"), memory, settings.timeout)
        stack.callback(handler.end)
        Run(settings, handler, memory, size // settings.page_size, report).run()
    return report


def _make_memory(path: str, settings: Settings) -> str:
    """Random bytes, a tenth of the pages zeros."""
    chance = random.Random(settings.seed)
    with open(path, "wb") as file:
        for _ in range(settings.pages):
            zeros = chance.random() < 0.1
            file.write(bytes(settings.page_size) if zeros else chance.randbytes(settings.page_size))
    return path


class Run:
    """One probe: its rules in order."""

    def __init__(self, settings: Settings, handler: Handler, memory: str, pages: int, report: Verdicts) -> None:
        self.settings, self.handler, self.report = settings, handler, report
        self.memory, self.pages = memory, pages
        self.first_reads: list[float] = []
        self.removals: list[float] = []

    def run(self) -> None:
        try:
            self.handler.start()
        except Ended as error:
            return self.report.break_("listens", str(error))
        self.report.hold("listens")
        for rule, step in STEPS.items():
            if self.settings.only and rule not in self.settings.only:
                continue
            try:
                step(self)
            except (Ended, Overdue, OSError) as error:
                self.report.break_(rule, str(error))
            if self.report.states[rule] == "broken":
                self.handler.end()
        self.report.figures["first_read_us"] = microseconds(self.first_reads)
        self.report.figures["removal_us"] = microseconds(self.removals)
        self.report.figures["reads"] = len(self.first_reads)

    @contextmanager
    def machine(self, rule: str, regions: tuple[int, ...] = (), **profile: Any) -> Iterator[SimulatedMachine]:
        """A machine that is there. Afterwards what it found wrong breaks ``rule``."""
        self.handler.ready(fresh=self.settings.one_shot)
        body = {"regions": regions or (self.pages,), "page_size": self.settings.page_size, **profile}
        machine = SimulatedMachine(self.handler.socket, self.memory, body, self.settings.timeout)
        try:
            yield machine
            self.take(rule, machine.do("report"))
        finally:
            machine.end()

    def take(self, rule: str, found: dict[str, Any]) -> None:
        self.first_reads += found["first_reads"]
        self.removals += found["removals"]
        slowest = max(found["removals"], default=0.0)
        if found["removals"]:
            self.report.judge("prompt", slowest < SLOW_REMOVAL, f"one took {slowest:.1f} s")
        wrong = Counter(found["wrong"])
        detail = f"{rule}: {', '.join(f'{number} pages of {kind}' for kind, number in wrong.items())}"
        old = wrong.pop("old bytes", 0)
        self.report.judge(rule, not found["wrong"], detail)
        if rule not in ("removed", "races", "restart-removed"):
            self.report.judge("content", not wrong, detail)
        elif old:
            self.report.break_("removed", detail)

    def split(self, parts: int) -> tuple[int, ...]:
        """So many regions, of different sizes where there are enough pages."""
        parts = min(parts, self.pages)
        first = self.pages // (parts * 2) or 1
        return (*[first + number for number in range(parts - 1)], self.pages - sum(range(first, first + parts - 1)))

    # --- the rules ----------------------------------------------------------------------------------------------------

    def versions(self) -> None:
        for version, profile in VERSIONS.items():
            try:
                with self.machine("versions", **profile) as machine:
                    machine.do("touch 1 1")
            except (Ended, Overdue) as error:
                self.report.break_("versions", f"{version}: {error}")
                self.handler.end()

    def pieces(self) -> None:
        with self.machine("pieces", pieces=2, extra=2) as machine:
            machine.do("touch1 0")

    def regions(self) -> None:
        with self.machine("regions", self.split(3)) as machine:
            machine.do("edges")

    def kernel_faults(self) -> None:
        with self.machine("kernel-faults", self.split(2)) as machine:
            machine.do("system 1 5")

    def storm(self) -> None:
        with self.machine("storm") as machine:
            machine.do(f"touch {THREADS} {self.settings.seed}")

    def removed(self) -> None:
        third = max(1, self.pages // 3)
        with self.machine("removed", self.split(2)) as machine:
            machine.do("write 0")
            try:
                machine.do(f"balloon 0 {third}")  # all but one were never read
            except Overdue as error:
                self.report.break_("prompt", str(error))
                raise
            machine.do("touch 2 1")
            machine.do(f"balloon {self.pages - third} {third}")
            machine.do("touch 2 2")

    def races(self) -> None:
        with self.machine("races") as machine:
            machine.do(f"race {RACES} {self.settings.seed}")

    def several(self) -> None:
        if self.settings.one_shot:
            return
        with self.machine("several") as first, self.machine("several") as second:
            with self.machine("several") as victim:
                for one in (first, second, victim):
                    one.begin("touch 2 7")
                victim.end()  # in the middle of it
                victim.forget()
            first.answer()
            second.answer()

    def hostile(self) -> None:
        if self.settings.one_shot:
            return
        region = {"base_host_virt_addr": 1 << 40, "size": 1 << 30, "offset": 0, "page_size": PAGE_4K}
        good = json.dumps([region]).encode()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for data, fds in ((good, []), (good, [null]), (b"[", [null]), (b"{}", []), (b"", []), (b"\xff" * 9999, [])):
                self.handler.ready()
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                    peer.connect(self.handler.socket)
                    with suppress(OSError):
                        socket.send_fds(peer, [data], fds)
            self.handler.ready()
            silent.connect(self.handler.socket)
            with self.machine("hostile") as machine:
                machine.do("touch 1 1")
        finally:
            silent.close()
            os.close(null)

    def delays(self) -> None:
        for number in range(self.settings.delays):
            with self.machine("delays") as machine:
                machine.begin(f"touch {THREADS} {number}")
                self.handler.signal(signal.SIGSTOP)
                time.sleep(self.settings.delay)
                self.handler.signal(signal.SIGCONT)
                machine.answer()
        if self.settings.delays:
            self.report.hold("delays", detail=f"{self.settings.delays} of {self.settings.delay:g} s")

    def restarts(self) -> None:
        if self.settings.one_shot or not self.settings.restarts:
            return
        quarter = max(1, self.pages // 4)
        with self.machine("restarts") as machine:
            machine.do("touch1 0")
            machine.do(f"balloon 0 {quarter}")
            for number in range(self.settings.restarts):
                machine.begin(f"touch 2 {number}")
                self.handler.end()
                self.handler.start()
                try:
                    machine.answer()
                except Overdue as error:
                    raise Overdue(f"{error} after the handler was killed") from None
            found = machine.do("report")
            self.report.judge("restart-removed", not found["wrong"].get("old bytes"), "the snapshot's bytes came back")
        self.report.hold("restarts", detail=f"{self.settings.restarts} times")

    def lets_go(self) -> None:
        self.handler.ready()
        before = self.handler.userfaultfds()
        with self.machine("lets-go") as machine:
            machine.do("touch1 0")
        limit = time.monotonic() + LETS_GO_SECONDS
        while (left := self.handler.userfaultfds() - before) > 0 and time.monotonic() < limit:
            time.sleep(0.05)
        self.report.judge("lets-go", left <= 0, f"{left} are open after {LETS_GO_SECONDS:.0f} s")


STEPS: Final[dict[str, Callable[[Run], None]]] = {
    "versions": Run.versions,
    "pieces": Run.pieces,
    "regions": Run.regions,
    "kernel-faults": Run.kernel_faults,
    "storm": Run.storm,
    "removed": Run.removed,
    "races": Run.races,
    "several": Run.several,
    "hostile": Run.hostile,
    "delays": Run.delays,
    "restarts": Run.restarts,
    "lets-go": Run.lets_go,
}
"""The rules that are tried; the others are judged on the way."""
