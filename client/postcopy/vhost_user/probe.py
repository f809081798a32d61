"""The conformance and load test for back-ends: real requests on memory of which every page is missing.

A supervisor of the probe's own serves the guest's memory, one page a fault. The probe is a native client of it beside
the back-end, and touches only what the back-end has brought in; so the received map at the end is the list of the pages
that the back-end has faulted on.
"""

from __future__ import annotations

import os
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from postcopy_kernel import process
from postcopy_protocol.vhost_user import FEATURE_INDIRECT, feature_names

from ..block import Block
from ..client import attach
from ..control import Control
from ..errors import BackEndGone, BackEndTimeout, PostcopyError, VhostUserError
from ..supervisor import Supervisor
from . import blk
from .back_end import BackEnd
from .probe_plan import PAGE, Plan, Planned, Wishes, offer
from .probe_report import Report
from .rings import Bells, Ring, start_ring

BLOCK = "guest"
HANDSHAKE_RULES = (
    "protocol-features pagefault reply-ack answers userfaultfd locked-memory table-reply addresses populated registered"
).split()
STALL_SECONDS = 60.0
"""Without one request answered: the back-end is stuck."""
LET_GO_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the person wants. ``disk`` has the contents that reads are compared with; ``rate`` is requests a second
    (0: as fast as they are answered); ``duration`` in seconds (0: until all are done)."""

    socket: str
    device: str = "blk"
    disk: str | None = None
    requests: int = 1000
    queues: int = 0
    depth: int = 16
    rate: float = 0.0
    duration: float = 0.0
    writes: bool = False
    kills: int = 0
    delays: int = 0
    delay: float = 0.1
    seed: int = 1
    timeout: float = 30.0
    pid: int | None = None
    order: str = "standard"


def probe(settings: Settings) -> Report:
    """Probe one back-end. Raises BackEndGone when there is none, OSError for the disk; whatever the back-end does wrong
    is in the report."""
    report = Report(settings.socket, settings.device)
    try:
        wishes = _look_ahead(settings, report)
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-probe-"))
            plan = Plan(wishes)
            path = os.path.join(place, "guest")
            plan.write(path)
            # Kills are ours: forgiven, and a successor need not wait.
            law = Supervisor({BLOCK: path}, fault_around="4K", restart_limit=settings.kills + 5, restart_stable=0.1)
            supervisor = stack.enter_context(law)
            Run(settings, plan, supervisor.runtime_dir, report).run(stack)
    except VhostUserError as error:
        report.blame(error)
    except (BackEndGone, BackEndTimeout) as error:
        if not report.figures:
            raise
        report.break_("answers", str(error))
    return report


def _look_ahead(settings: Settings, report: Report) -> Wishes:
    """What the back-end is, learnt in a connection of its own: queues, capacity, features."""
    from contextlib import closing

    from postcopy_protocol.vhost_conversation import FrontEnd
    from postcopy_protocol.vhost_user import ProtocolFeature

    from .channel import Channel

    talk, sectors, writable, offered = FrontEnd(), 0, False, 0
    with closing(Channel(settings.socket, settings.timeout)) as channel:
        credentials = channel.credentials
        report.figures["back_end"] = {"program": _program(settings.pid or credentials.pid), "pid": credentials.pid}

        def ask(question: Any) -> Any:
            frame = channel.ask(question)
            return talk.heard(question, frame) if frame is not None else None

        offered = ask(talk.get_features())
        report.figures["back_end"]["features"] = f"{offered:#x}"
        report.hold("protocol-features")
        try:
            ask(talk.get_protocol_features())
        finally:
            report.figures["back_end"]["protocol_features"] = feature_names(talk.protocol_offered)
        report.hold("pagefault", "reply-ack")
        ask(talk.set_protocol_features())
        ask(talk.set_owner())
        if talk.protocol & ProtocolFeature.MQ:
            ask(talk.get_queue_num())
        report.figures["back_end"]["queues"] = talk.queues
        if settings.device == "blk":
            if not talk.protocol & ProtocolFeature.CONFIG:
                raise VhostUserError("config", "the device has no configuration space: it is no virtio-blk")
            sectors = blk.capacity(ask(talk.get_config(0, blk.CONFIG_BYTES)))
            report.figures["back_end"]["sectors"] = sectors
            if sectors < 1024:
                raise VhostUserError("config", f"a disk of {sectors} sectors is too small to probe: at least 1024")
            writable = not offered & blk.READ_ONLY
    _settle(settings.socket)
    if settings.device != "blk":
        return Wishes(0, 1, 1, 1024, False, False, after=0)
    queues = min(settings.queues or talk.queues, talk.queues, 16)
    indirect = bool(offered & FEATURE_INDIRECT)
    writes = settings.writes and writable
    return Wishes(settings.requests, queues, settings.depth, sectors, writes, indirect, settings.seed)


def _settle(path: str) -> None:
    """Let the back-end notice that the first connection has ended, and listen again."""
    from .channel import somebody_listens

    limit = time.monotonic() + LET_GO_SECONDS
    time.sleep(0.05)
    while not somebody_listens(path) and time.monotonic() < limit:
        time.sleep(0.02)


def _program(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return "unknown program"


class Trouble:
    """Kills and delays of the worker that resolves the back-end's faults, spread evenly over the run."""

    def __init__(self, settings: Settings, directory: str, client: int) -> None:
        self.kills = self.delays = 0
        self._settings, self._directory, self._client = settings, directory, client
        self._stopped: int | None = None
        self._go_on_at = 0.0
        total = settings.kills + settings.delays
        every = settings.requests / (total + 1)
        kinds = ["kill", "delay"] * total
        if settings.delays == 0 or settings.kills == 0:
            kinds = ["kill" if settings.kills else "delay"] * total
        self._due = [(int(every * (n + 1)), kinds[n]) for n in range(total)]

    def look(self, done: int) -> None:
        """Called between requests."""
        if self._stopped is not None:
            if time.monotonic() < self._go_on_at:
                return
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None
        if not self._due or done < self._due[0][0]:
            return
        pid = self._worker()
        if pid is None:
            return  # its successor is on its way
        _, kind = self._due.pop(0)
        kill = self.kills < self._settings.kills and (kind == "kill" or self.delays >= self._settings.delays)
        if kill:
            self.kills += self._signal(pid, signal.SIGKILL)
        elif self._signal(pid, signal.SIGSTOP):
            self.delays += 1
            self._stopped, self._go_on_at = pid, time.monotonic() + self._settings.delay

    @property
    def next_look(self) -> float:
        """Seconds until something is to be done by the clock."""
        return max(0.0, self._go_on_at - time.monotonic()) if self._stopped is not None else 1.0

    def over(self) -> None:
        if self._stopped is not None:
            self._signal(self._stopped, signal.SIGCONT)
            self._stopped = None

    def _worker(self) -> int | None:
        record = client_record(self._directory, self._client)
        return int(record["worker_pid"]) if record.get("state") == "running" and record.get("worker_pid") else None

    @staticmethod
    def _signal(pid: int, number: int) -> bool:
        """By its pidfd and its name: nobody else is ever hit."""
        try:
            pidfd = process.pidfd_open(pid)
        except OSError:
            return False
        try:
            if not _program(pid).startswith("postcopy-w"):
                return False
            process.pidfd_signal(pidfd, number)
        except OSError:
            return False
        finally:
            os.close(pidfd)
        return True


def client_record(directory: str, client: int) -> dict[str, Any]:
    """What the status says of a client; empty when it is not there."""
    with Control(directory) as control:
        return next((each for each in control.status()["clients"] if each["id"] == client), {})


class Run:
    """One probe, from the handshake to the second handshake."""

    def __init__(self, settings: Settings, plan: Plan, directory: str, report: Report) -> None:
        self.settings, self.plan, self.directory, self.report = settings, plan, directory, report
        self.latencies: list[float] = []
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
        limit = time.monotonic() + LET_GO_SECONDS
        while not gone and time.monotonic() < limit:
            time.sleep(0.05)
            gone = not client_record(self.directory, back_end.side.client)
        self.report.judge("lets-go", gone, f"not within {LET_GO_SECONDS:.0f} s")
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
            self.report.quirk("populated", "open-before-registered", "could: its memory is accessible before that")
        if "registration-unproven" in back_end.quirks:
            self.report.quirk("registered", "registration-unproven", "its smaps cannot be read from here")
        return back_end

    # --- load ---------------------------------------------------------------------------------------------------------

    def _load(self, back_end: BackEnd, rings: Rings) -> None:
        trouble = Trouble(self.settings, self.directory, back_end.side.client)
        begun = time.monotonic()
        try:
            rings.start()
            self.report.hold("rings")
            self._drive(rings, rings.prepared, self.plan.requests[: self.plan.wishes.requests], trouble)
        finally:
            trouble.over()
        seconds = time.monotonic() - begun
        self._judge_pages(back_end)
        self._judge_writes()
        record = client_record(self.directory, back_end.side.client)
        self._judge_trouble(trouble, record)
        rate = round(len(self.done) / seconds, 1)
        self.report.figures["requests"] = {"done": len(self.done), "seconds": round(seconds, 3), "per_s": rate}
        self.report.figures["latency_us"] = summary(self.latencies)

    def _drive(
        self, rings: Rings, flying: dict[tuple[int, int], Planned], requests: list[Planned], trouble: Trouble | None
    ) -> None:
        """Keep the rings full (or to the rate) until every request is answered. ``flying`` are on the rings already."""
        settings = self.settings
        waiting: list[list[Planned]] = [[] for _ in range(self.plan.wishes.queues)]
        there = {request.number for request in flying.values()}
        for request in reversed(requests):
            if request.number not in there:
                waiting[request.queue].append(request)
        begun = now = time.monotonic()
        sent = dict.fromkeys(flying, now)
        count, answered_at, over = len(flying), now, begun + settings.duration if settings.duration else None
        while flying or any(waiting):
            if over is not None and now > over:
                waiting = [[] for _ in waiting]
            for queue, rest in enumerate(waiting):
                for slot in rings.free(queue, flying, self.plan.wishes.depth):
                    if not rest or (settings.rate and count > (now - begun) * settings.rate):
                        break
                    flying[queue, slot] = request = rest.pop()
                    offer(rings.rings[queue], request, slot)
                    sent[queue, slot] = time.monotonic()
                    rings.bells[queue].ring()
                    count += 1
            patience = min(trouble.next_look if trouble else 1.0, 1 / settings.rate if settings.rate else 1.0)
            for queue, slot in rings.wait(patience):
                answered_at = time.monotonic()
                request = flying.pop((queue, slot))
                self.latencies.append(answered_at - sent.pop((queue, slot)))
                self.done.append(request)
                self._judge(request)
            now = time.monotonic()
            if trouble is not None:
                trouble.look(len(self.done))
            if now - answered_at > STALL_SECONDS:
                raise VhostUserError("acknowledge", f"no request was answered for {STALL_SECONDS:.0f} s")

    def _judge(self, request: Planned) -> None:
        """An answered request: its pages must be there before we look into them."""
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
            text = data.rstrip(b"\0").decode("ascii", "replace")
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
        for sector, requests in written.items():  # which of several was the last, nobody can know
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

    def _judge_trouble(self, trouble: Trouble, record: dict[str, Any]) -> None:
        if trouble.kills:
            self.report.hold("restarts", detail=f"{trouble.kills} times")
        if trouble.kills < self.settings.kills:
            self.report.break_("restarts", f"only {trouble.kills} of {self.settings.kills} kills fitted in")
        if trouble.delays:
            self.report.hold("delays", detail=f"{trouble.delays} of {self.settings.delay:g} s")
        self.report.figures["trouble"] = {
            "kills": trouble.kills,
            "delays": trouble.delays,
            "restarts": record.get("restarts", 0),
        }

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self, back_end: BackEnd, rings: Rings) -> None:
        report = self.report
        self.block.ensure()
        limit = time.monotonic() + self.settings.timeout
        while not back_end.complete:
            if time.monotonic() > limit:
                raise PostcopyError("the supervisor does not release a block that is whole")
            time.sleep(0.01)
        before = client_record(self.directory, back_end.side.client).get("faults", 0)
        back_end.end()
        report.hold("end")
        if self.settings.device != "blk":
            return
        after = self.plan.requests[self.plan.wishes.requests :]
        self._drive(rings, {}, after, None)
        faults = client_record(self.directory, back_end.side.client).get("faults", 0)
        report.judge("quiet", faults == before, f"{faults - before} faults after END")
        for queue, ring in enumerate(rings.rings):
            base = back_end.ask(back_end.talk.get_vring_base(queue))
            wanted = ring.next_available
            report.judge("base", base == wanted, f"ring {queue} says {base}, it stood at {wanted}")

    def _come_back(self) -> None:
        _settle(self.settings.socket)
        try:
            self._attach().close()
        except (VhostUserError, BackEndGone, BackEndTimeout) as error:
            self.report.break_("comes-back", str(error))
        else:
            self.report.hold("comes-back")


class Rings:
    """The rings of all queues, with their bells."""

    def __init__(self, back_end: BackEnd, plan: Plan, memory: memoryview) -> None:
        self._back_end, self._plan = back_end, plan
        queues = range(plan.wishes.queues)
        self.rings: list[Ring] = [plan.ring(queue, memory) for queue in queues]
        self.bells = [Bells() for _ in queues]
        self.prepared: dict[tuple[int, int], Planned] = {}
        self._poll = select.poll()
        self._queues = {bells.call: queue for queue, bells in enumerate(self.bells)}
        for bells in self.bells:
            self._poll.register(bells.call, select.POLLIN)

    def start(self) -> None:
        """With the requests that are on them already."""
        for queue, (ring, bells) in enumerate(zip(self.rings, self.bells, strict=True)):
            start_ring(self._back_end, queue, ring, bells)
            first = self._plan.first(queue)
            ring.next_available = len(first)
            for slot, request in enumerate(first):
                self.prepared[queue, slot] = request
        for bells in self.bells:
            bells.ring()

    def free(self, queue: int, flying: dict[tuple[int, int], Planned], depth: int) -> Iterator[int]:
        """Slots of a queue that may be used now."""
        return (slot for slot in range(depth) if (queue, slot) not in flying)

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """(queue, slot) of requests that were answered, or nothing when the time is over."""
        found = self._collect()
        if not found:
            for fd, _ in self._poll.poll(seconds * 1000):
                os.eventfd_read(fd)
            found = self._collect()
        return found

    def _collect(self) -> list[tuple[int, int]]:
        return [
            (queue, first // 3)
            for queue, ring in enumerate(self.rings)
            if self._started(queue)
            for first, _ in ring.completed()
        ]

    def _started(self, queue: int) -> bool:
        """Its used page is there: before that a look would be our own fault, and not the back-end's."""
        return bool(self._back_end.blocks[BLOCK].mark(self._plan.ring_offsets(queue)[2] // PAGE))

    def close(self) -> None:
        for bells in self.bells:
            with suppress(OSError):
                bells.close()


def summary(latencies: list[float]) -> dict[str, float]:
    """Microseconds."""
    if not latencies:
        return {}
    ordered = sorted(latencies)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1e6, 1) for name, part in at.items()}
