"""QEMU's own post-copy between two QEMUs on this machine: how long does the guest stand at a missing page?

A guest of our own (guest.S) fills its memory on the source, is moved over a unix socket, and touches its missing pages
at random on the destination, one at a time, with the processor's clock around each touch. It compares every page that
it touched with what it wrote. Nothing dirties memory. Measured as QEMU comes, and with postcopy-preempt where it has
that: its own way past its background stream.

The stream itself cannot be held back: max-postcopy-bandwidth holds urgent pages back too (QEMU 7.2: until the next
tenth of a second, whatever the guest waits for). So the memory is large and the touches are few, and the guest is done
before much has come. What came before its touch is no fault; QEMU counts what it was asked for, and as many touches,
the slowest, are the faults. (A touch of a page that is there costs 1 us, or 20 us where KVM keeps shadow tables: no
bound that is the same everywhere would tell them apart.)
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from postcopy_kernel.process import die_with_parent

from .bench import PAGE, Bench, BenchmarkFailed
from .figures import Pair, Row, percentile, ratio_row, value_row

QEMU = "qemu-system-x86_64"
STALL = "QEMU's own post-copy, guest stall p50"
RATIO = "remote fault p50, shared, unpinned, against QEMU's"
ACCELERATIONS = ("kvm", "tcg")
GOAL = 1.0
REGION = 16 << 20
"""Where guest.S has the pages that it touches."""

HERE, THERE = 0xE9, 0xD5
"""What the debug console reads as on the source and on the destination: so the guest knows that it was moved."""

PRECOPY = 1 << 20
"""Bytes a second. The switch to post-copy comes at once, and QEMU sends everything again after it: this only keeps the
source from being done before it. In post-copy there is no limit, which is QEMU's default."""

PLAIN, PREEMPT = "postcopy-ram", "postcopy-preempt"
SWITCHED = (PLAIN, PREEMPT, "background-snapshot")
RUN_WITHIN = 60.0
"""Seconds for one run: a guest under a software KVM takes its time, and a machine may be busy."""

HEADER = struct.Struct("<QQII")


@dataclass(frozen=True, slots=True)
class Stalls:
    """One migration: microseconds of each fault, of how many touches, and seconds from the switch to post-copy to the
    end of the migration."""

    faults: Sequence[float]
    touches: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The QEMU of this machine, and what our guest runs with."""

    acceleration: str
    version: str
    modes: Sequence[str]


def compare(bench: Bench, ours: Callable[[int], Sequence[float]]) -> list[Row]:
    """QEMU's stalls, and ``ours`` (microseconds of the touches of pair N) against them, in turns.

    Where there is no QEMU, or it fails, the rows have no figure and say why.
    """
    if shutil.which(QEMU) is None:
        return _without(f"{QEMU}: not installed")
    try:
        return _compare(bench, ours)
    except QemuFailed as error:
        return _without(f"{QEMU}: installed, but {error}")


def _without(reason: str) -> list[Row]:
    return [Row(name, 0.0, 0.0, 0.0, unit, detail=reason) for name, unit in ((STALL, "us"), (RATIO, "x"))]


def _compare(bench: Bench, ours: Callable[[int], Sequence[float]]) -> list[Row]:
    image = assemble(bench)
    found = found_here(bench, image)
    runs: dict[str, list[Stalls]] = {mode: [] for mode in found.modes}
    mine = []
    for number in range(bench.scale.pairs):
        bench.say(f"remote, against QEMU's: pair {number + 1} of {bench.scale.pairs}")
        for turn in ("ours", *found.modes) if number % 2 else (*found.modes, "ours"):
            if turn == "ours":
                mine.append(percentile(ours(number), 50))
            else:
                runs[turn].append(migrate(bench, image, found.acceleration, preempt=turn == PREEMPT))
    return [row for mode in found.modes for row in _rows(found, mode, runs[mode], mine)]


def _rows(found: Found, mode: str, runs: Sequence[Stalls], mine: Sequence[float]) -> list[Row]:
    theirs = [percentile(run.faults, 50) for run in runs]
    faults, touches = [fault for run in runs for fault in run.faults], sum(run.touches for run in runs)
    tail = f"p99 {percentile(faults, 99):.0f} us, {len(faults)} faults of {touches} touches"
    more = f", {mode}" if mode == PREEMPT else ""
    return [
        value_row(STALL + more, theirs, "us", detail=f"{tail}, {found.acceleration}, QEMU {found.version}"),
        ratio_row(RATIO + more, list[Pair](zip(mine, theirs, strict=True)), GOAL, labels=("ours", "QEMU")),
    ]


def assemble(bench: Bench) -> str:
    """guest.S as the image of a ROM."""
    pages = pages_of(bench)
    sizes = [f"-DPAGES={pages}", f"-DTOUCHES={touches_of(bench)}", f"-DHALF={pages.bit_length() // 2}"]
    place = "-Wl,-Ttext=0xffff0000,--oformat=binary,--build-id=none"
    try:
        return bench.compile("guest.S", "guest", "-m32", "-nostdlib", "-static", *sizes, place)
    except BenchmarkFailed as error:
        raise QemuFailed(str(error).replace("\n", " ")) from error


def pages_of(bench: Bench) -> int:
    """A power of two, because the guest makes its random order of the bits of a page's number."""
    return bench.scale.of(1 << 30, 128 << 20) // PAGE


def touches_of(bench: Bench) -> int:
    """So few that a stream of 1 GB/s has brought about a tenth of the memory when the guest is done."""
    return bench.scale.of(256, 64)


def found_here(bench: Bench, image: str) -> Found:
    """The first acceleration that our guest comes up with: a /dev/kvm may be there and be of no use."""
    reasons = []
    for acceleration in ACCELERATIONS:
        try:
            with Machine(bench, image, acceleration, time.monotonic() + RUN_WITHIN / 2) as machine:
                machine.hear(b"R")
                offered = [capability["capability"] for capability in machine.order("query-migrate-capabilities")]
                return Found(acceleration, machine.version, [PLAIN, *([PREEMPT] if PREEMPT in offered else [])])
        except QemuFailed as error:
            reasons.append(f"{acceleration}: {error}")
    raise QemuFailed("; ".join(reasons))


# --- one migration ----------------------------------------------------------------------------------------------------


def migrate(bench: Bench, image: str, acceleration: str, *, preempt: bool) -> Stalls:
    """Move a guest, and hear from it how long its touches took. Raises BenchmarkFailed within RUN_WITHIN seconds."""
    path = os.path.join(bench.sockets, "migration")
    limit = time.monotonic() + RUN_WITHIN
    with ExitStack() as stack:
        stack.callback(_unlink, path)
        source = stack.enter_context(Machine(bench, image, acceleration, limit))
        source.hear(b"R")
        target = stack.enter_context(Machine(bench, image, acceleration, limit, "-incoming", "defer", reads_as=THERE))
        wanted = [PLAIN, PREEMPT] if preempt else [PLAIN]
        for machine in (source, target):
            machine.order("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in wanted])
        source.order("migrate-set-parameters", **{"max-bandwidth": PRECOPY, "max-postcopy-bandwidth": 0})
        target.order("migrate-incoming", uri=f"unix:{path}")
        source.order("migrate", uri=f"unix:{path}")
        source.order("migrate-start-postcopy")
        switched = time.monotonic()
        begun = target.hear(b"B")
        ended = target.hear(b"E")
        header = HEADER.unpack(target.read(HEADER.size))
        took = struct.unpack(f"<{touches_of(bench)}I", target.read(4 * touches_of(bench)))
        rate = (header[1] - header[0]) / (ended - begun)
        faults = sorted(ticks / rate for ticks in took)[-_asked_for(source, len(took), header[2]) :]
        source.await_status("completed")
        return Stalls(faults, len(took), time.monotonic() - switched)


def _asked_for(source: Machine, touches: int, wrong: int) -> int:
    """How many of the touches met a missing page, as QEMU counted; what the guest read was right, or QemuFailed."""
    if wrong:
        raise QemuFailed(f"its guest read wrong bytes: {wrong} pages")
    told = source.order("query-migrate")
    requests = int(told.get("ram", {}).get("postcopy-requests", 0))
    if requests < touches / 4:
        raise QemuFailed(f"only {requests} of {touches} touches met a missing page (migration {told.get('status')})")
    return min(requests, touches)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


class QemuFailed(BenchmarkFailed):
    """QEMU, or its guest, did not do what it should; the other figures of the table have nothing to do with it."""


class Machine:
    """One QEMU: its monitor (QMP) on a socket pair, the guest's debug console on a pipe; nothing waits beyond
    ``limit`` (CLOCK_MONOTONIC, seconds). A context manager that leaves no process."""

    def __init__(
        self, bench: Bench, image: str, acceleration: str, limit: float, *more: str, reads_as: int = HERE
    ) -> None:
        self._limit, self._buffer = limit, b""
        self._events: list[tuple[str, float]] = []  # names, and seconds
        self._monitor, theirs = socket.socketpair()
        self._errors = os.memfd_create("qemu-errors")
        megabytes = (REGION + pages_of(bench) * PAGE) >> 20
        command = [QEMU, "-accel", acceleration, "-machine", "pc", "-m", f"{megabytes}M"]
        command += ["-bios", image] if image else []
        command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        command += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
        command += ["-chardev", "stdio,id=console,signal=off"]
        command += ["-device", f"isa-debugcon,iobase=0xe9,chardev=console,readback={reads_as}", *more]
        with theirs:
            self._process = self._start(command, theirs.fileno())
        try:
            self.version = _version(self._answer("QMP"))
            self.order("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _start(self, command: Sequence[str], keep: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=[keep],
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            self._monitor.close()
            os.close(self._errors)
            raise QemuFailed(f"it cannot be started: {error}") from error

    def order(self, command: str, **arguments: Any) -> Any:
        """What the monitor returns for a command."""
        line = json.dumps({"execute": command, "arguments": arguments}).encode()
        try:
            self._monitor.settimeout(max(0.001, self._limit - time.monotonic()))
            self._monitor.sendall(line + b"\n")
        except OSError as error:
            raise self._failed(f"took no {command!r} ({error})") from error
        answer = self._answer("return", "error")
        if "error" in answer:
            raise self._failed(f"refused {command!r}: {answer['error'].get('desc')}")
        return answer["return"]

    def switch(self, *on: str) -> None:
        """Switch these capabilities on, and no others."""
        known = [one["capability"] for one in self.order("query-migrate-capabilities")]
        states = [{"capability": name, "state": name in on} for name in known if name in (*on, *SWITCHED)]
        self.order("migrate-set-capabilities", capabilities=states)

    def stop_time(self) -> float:
        """Seconds in which the VM stood still since the last call, by the times of QEMU's own events."""
        self.order("query-status")  # events come before the answer
        total = since = 0.0
        for name, at in self._events:
            if name == "STOP":
                since = at
            elif name == "RESUME" and since:
                total, since = total + at - since, 0.0
        self._events.clear()
        return total

    def await_status(self, *wanted: str) -> None:
        """Until the migration has one of these states."""
        while (status := self.order("query-migrate").get("status")) not in wanted:
            if time.monotonic() > self._limit or status in ("failed", "cancelled"):
                raise self._failed(f"is {status} and not {wanted[0]}")
            time.sleep(0.01)

    def hear(self, word: bytes) -> float:
        """When (CLOCK_MONOTONIC, microseconds) the guest said this word, which must be the next."""
        heard = self.read(1)
        if heard != word:
            raise self._failed(f"has a guest that said {heard!r} and not {word!r}")
        return time.monotonic_ns() / 1000

    def read(self, length: int) -> bytes:
        """The next bytes of the guest's debug console."""
        assert self._process.stdout is not None
        found = b""
        while len(found) < length:
            found += self._some(self._process.stdout.fileno(), length - len(found), "the guest's word")
        return found

    def _answer(self, *keys: str) -> dict[str, Any]:
        """The monitor's next message with one of these keys; events pass by."""
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if not found:
                self._buffer += self._some(self._monitor.fileno(), 65536, "the monitor's answer")
                continue
            self._buffer = rest
            try:
                message = json.loads(line)
            except ValueError as error:
                raise self._failed(f"has a monitor that said {line[:80]!r}") from error
            if isinstance(message, dict) and any(key in message for key in keys):
                return message
            if "event" in message:
                at = message["timestamp"]
                self._events.append((message["event"], at["seconds"] + at["microseconds"] / 1e6))

    def _some(self, descriptor: int, most: int, what: str) -> bytes:
        if not select.select([descriptor], [], [], max(0.0, self._limit - time.monotonic()))[0]:
            raise self._failed(f"did not give {what} in time")
        try:
            some = os.read(descriptor, most)
        except ConnectionResetError:  # it ended with an order unread
            some = b""
        if not some:
            raise self._failed(f"ended before {what}")
        return some

    def _failed(self, what: str) -> QemuFailed:
        lines = os.pread(self._errors, 4096, 0).decode(errors="replace").strip().splitlines()
        return QemuFailed(f"it {what}" + (f": {lines[-1]}" if lines else ""))

    def close(self) -> None:
        """End QEMU, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._monitor.close()
        os.close(self._errors)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _version(greeting: dict[str, Any]) -> str:
    try:
        told = greeting["QMP"]["version"]["qemu"]
        return f"{told['major']}.{told['minor']}.{told['micro']}"
    except (KeyError, TypeError) as error:
        raise QemuFailed(f"its monitor's greeting names no version: {greeting}"[:200]) from error
