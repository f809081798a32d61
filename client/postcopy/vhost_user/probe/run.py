"""The conformance and load test for back-ends: real requests on memory whose pages are all missing.

The probe starts its own supervisor for the guest's memory, which places one page for each fault. The probe is also a
native client, and touches only pages that the back-end has faulted on. So the received map at the end is the list of
pages on which the back-end has faulted."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from ...block import Block
from ...client import attach
from ...errors import BackEndGone, BackEndTimeout, PostcopyError, VhostUserError
from ...supervisor import Supervisor
from ...verdicts import microseconds
from .. import blk
from ..back_end import BackEnd
from .disturbances import Disturbances, client_record
from .inspection import UNMAP_SECONDS, inspect_back_end, wait_until_listening
from .load import Load
from .plan import Plan, Planned
from .report import Report
from .rings import BLOCK, Rings
from .settings import Settings

__all__ = ["Settings", "probe"]

HANDSHAKE_RULES = (
    "protocol-features pagefault reply-ack answers userfaultfd locked-memory table-reply addresses populated registered"
).split()


def probe(settings: Settings) -> Report:
    """Probe one back-end. Raises BackEndGone when there is none, OSError for the disk. Broken rules are in the
    report."""
    report = Report(settings.socket, settings.device)
    try:
        plan_settings = inspect_back_end(settings, report)
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-probe-"))
            plan = Plan(plan_settings)
            path = os.path.join(place, "guest")
            plan.write(path)
            # Our own kills must not lead to quarantine, nor delay the successor.
            started = Supervisor(
                {BLOCK: path}, fault_around="4K", restart_limit=settings.kills + 5, restart_interval=0.1
            )
            supervisor = stack.enter_context(started)
            Run(settings, plan, supervisor.runtime_dir, report).run(stack)
    except VhostUserError as error:
        report.blame(error)
    except (BackEndGone, BackEndTimeout) as error:
        if not report.figures:
            raise
        report.break_("answers", str(error))
    return report


class Run:
    """One probe, from the handshake to the second handshake."""

    def __init__(self, settings: Settings, plan: Plan, directory: str, report: Report) -> None:
        self.settings, self.plan, self.directory, self.report = settings, plan, directory, report
        self.done: list[Planned] = []

    def run(self, stack: ExitStack) -> None:
        back_end = self._attach()
        stack.callback(back_end.close)
        self.block: Block = stack.enter_context(attach(BLOCK, self.directory, "shared", self.settings.timeout))
        self.shared = back_end.blocks[BLOCK]
        self.memory = stack.enter_context(self.block.buf[:])
        rings = Rings(back_end, self.plan, self.memory)
        stack.callback(rings.close)
        if self.settings.device == "blk":
            self._load(back_end, rings)
        self._end(back_end, rings)
        back_end.close()
        gone = not client_record(self.directory, back_end.side.client)
        limit = time.monotonic() + UNMAP_SECONDS
        while not gone and time.monotonic() < limit:
            time.sleep(0.05)
            gone = not client_record(self.directory, back_end.side.client)
        self.report.judge("lets-go", gone, f"not within {UNMAP_SECONDS:.0f} s")
        self._come_back()

    def _attach(self) -> BackEnd:
        settings = self.settings
        back_end = BackEnd(
            settings.socket,
            [BLOCK],
            self.directory,
            pid=settings.pid,
            timeout=settings.timeout,
            order=settings.order,
        )
        self.report.figures["back_end"]["pid"] = back_end.pid
        self.report.hold(*HANDSHAKE_RULES)
        if "addresses-echoed" in back_end.quirks:
            self.report.quirk("addresses", "addresses-echoed", "sends our own addresses back, as libvhost-user does")
        if "open-before-registered" in back_end.quirks:
            self.report.quirk("populated", "open-before-registered", "possible: its memory is accessible before that")
        if "registration-unproven" in back_end.quirks:
            self.report.quirk("registered", "registration-unproven", "its smaps cannot be read from here")
        return back_end

    def _load(self, back_end: BackEnd, rings: Rings) -> None:
        disturbances = Disturbances(self.settings, self.directory, back_end.side.client)
        begun = time.monotonic()
        try:
            rings.start()
            self.report.hold("rings")
            load = Load(self.settings, self.plan, rings, self._judge, disturbances)
            load.drive(self.plan.requests[: self.plan.settings.requests], rings.prepared)
        finally:
            disturbances.end()
        seconds = time.monotonic() - begun
        self.done = load.done
        self._judge_pages(back_end)
        self._judge_writes()
        record = client_record(self.directory, back_end.side.client)
        self._judge_disturbances(disturbances, record)
        rate = round(len(self.done) / seconds, 1)
        self.report.figures["requests"] = {"done": len(self.done), "seconds": round(seconds, 3), "per_s": rate}
        self.report.figures["latency_us"] = microseconds(load.latencies)

    def _judge(self, request: Planned) -> None:
        """Check an answered request. Its pages must be present before they are read."""
        report, marks = self.report, self.shared.mark
        if absent := [page for page in request.touched() if not marks(page)]:
            report.break_("pages", f"request {request.number} is answered, and its page {absent[0]} was never touched")
            return
        status = self.memory[request.status_at]
        report.judge("requests", status == 0, f"request {request.number}: {blk.STATUS.get(status, status)}")
        if request.indirect:
            report.judge("indirect", status == 0, f"request {request.number}")
        data = bytes(self.memory[request.data_at : request.data_at + request.length])
        if request.kind == blk.GET_ID:
            text = "".join(map(chr, filter(range(32, 127).__contains__, data)))  # it is shown on a terminal
            report.judge("get-id", status == 0, "refused")
            self.report.figures["back_end"].setdefault("id", text)
        elif request.kind == blk.READ and status == 0:
            report.hold("kernel-faults")
            self._judge_read(request, data)
        elif request.kind == blk.READ:
            report.break_("kernel-faults", "a read into missing pages failed: is its userfaultfd for user mode only?")

    def _judge_read(self, request: Planned, data: bytes) -> None:
        if self.settings.disk is None:
            return
        wanted = self._disk(request)
        self.report.judge("reads", data == wanted, f"request {request.number} at sector {request.sector} differs")

    def _disk(self, request: Planned) -> bytes:
        assert self.settings.disk is not None
        with open(self.settings.disk, "rb") as disk:
            return os.pread(disk.fileno(), request.length, request.sector * blk.SECTOR)

    def _judge_writes(self) -> None:
        if self.settings.disk is None:
            return
        written: dict[int, list[Planned]] = {}
        for request in self.done:
            if request.kind == blk.WRITE:
                written.setdefault(request.sector, []).append(request)
        for sector, requests in written.items():  # the order of several writes is unknown
            same = any(self._disk(request) == request.pattern() for request in requests)
            self.report.judge("writes", same, f"request {requests[-1].number} at sector {sector} differs")

    def _judge_pages(self, back_end: BackEnd) -> None:
        """The received map is exact once the worker has marked what it placed last."""
        expected = self.plan.expected(self.done)
        limit = time.monotonic() + 5
        while (found := set(self.shared.touched())) != expected and time.monotonic() < limit:
            time.sleep(0.05)
        more, less = sorted(found - expected), sorted(expected - found)
        faults = client_record(self.directory, back_end.side.client).get("faults", 0)
        self.report.figures["faults"] = {"predicted_pages": len(expected), "pages": len(found), "faults": faults}
        what = f"{len(more)} that nothing asked for (first {more[:1]}), {len(less)} did not come (first {less[:1]})"
        self.report.judge("pages", found == expected, what)

    def _judge_disturbances(self, disturbances: Disturbances, record: dict[str, Any]) -> None:
        if disturbances.kills:
            self.report.hold("restarts", detail=f"{disturbances.kills} times")
        if disturbances.kills < self.settings.kills:
            self.report.break_("restarts", f"only {disturbances.kills} of {self.settings.kills} kills happened")
        if disturbances.delays:
            self.report.hold("delays", detail=f"{disturbances.delays} of {self.settings.delay:g} s")
        self.report.figures["trouble"] = {
            "kills": disturbances.kills,
            "delays": disturbances.delays,
            "restarts": record.get("restarts", 0),
        }

    def _end(self, back_end: BackEnd, rings: Rings) -> None:
        report = self.report
        self.block.ensure()
        limit = time.monotonic() + self.settings.timeout
        while not back_end.complete:
            if time.monotonic() > limit:
                raise PostcopyError("the supervisor does not release a complete block")
            time.sleep(0.01)
        before = client_record(self.directory, back_end.side.client).get("faults", 0)
        back_end.end()
        report.hold("end")
        if self.settings.device != "blk":
            return
        after = self.plan.requests[self.plan.settings.requests :]
        Load(self.settings, self.plan, rings, self._judge, None).drive(after, {})
        faults = client_record(self.directory, back_end.side.client).get("faults", 0)
        report.judge("quiet", faults == before, f"{faults - before} faults after END")
        for queue, ring in enumerate(rings.rings):
            base = back_end.ask(back_end.talk.get_vring_base(queue))
            wanted = ring.next_available
            report.judge("base", base == wanted, f"ring {queue} reports {base} instead of {wanted}")

    def _come_back(self) -> None:
        wait_until_listening(self.settings.socket)
        try:
            self._attach().close()
        except (VhostUserError, BackEndGone, BackEndTimeout) as error:
            self.report.break_("comes-back", str(error))
        else:
            self.report.hold("comes-back")
