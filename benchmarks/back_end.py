"""``back-end``: what does a read of a virtio disk cost when all its pages are missing, against a C handler's?

The same qemu-storage-daemon, the same requests, one at a time: a page of header and status and one to four pages of
data, none of which has come. Once its userfaultfd is served by our worker, once by the C floor. The time is from the
kick to the answer, so it has the disk's work and the driver's in it; fault-around is off. Runs alternate, each with a
fresh guest memory.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import postcopy
from postcopy.vhost_user import BackEnd
from postcopy.vhost_user.attach_side import BackEndSession, SharedBlock
from postcopy.vhost_user.channel import is_listening
from postcopy.vhost_user.probe.plan import PAGE, Plan, Planned, PlanSettings, offer
from postcopy.vhost_user.virtqueue import RingEvents, start_ring
from postcopy_kernel import memory

from .bench import Bench, BenchmarkFailed
from .figures import Pair, Row, percentile, ratio_row

BLOCK = "guest"
SECTORS = 8192
READY_WITHIN = 20.0
GOAL = 1.3


def run(bench: Bench) -> list[Row]:
    """Pinned to one CPU, which compares the handlers, and not."""
    rows = []
    with _disk(bench) as disk:
        for pinned in (True, False):
            medians, tails = list[Pair](), list[Pair]()
            for number in range(bench.scale.pairs):
                bench.say(f"back-end, {'pinned' if pinned else 'unpinned'}: pair {number + 1} of {bench.scale.pairs}")
                sides: dict[str, list[float]] = {}
                for side in ("ours", "floor") if number % 2 else ("floor", "ours"):
                    sides[side] = _reads(bench, disk, side, pinned, number)
                medians.append((percentile(sides["ours"], 50), percentile(sides["floor"], 50)))
                tails.append((percentile(sides["ours"], 99), percentile(sides["floor"], 99)))
            name = f"virtio-blk read of missing pages p50, {'pinned' if pinned else 'unpinned'}"
            rows.append(ratio_row(name, medians, GOAL if pinned else None))
            rows.append(ratio_row(name.replace("p50", "p99"), tails))
    return rows


class FloorSide(BackEndSession):
    """In the supervisor's place: a block of our own, and the C floor on the back-end's userfaultfd."""

    def __init__(self, bench: Bench, file: str, userfaultfd: int) -> None:
        self._bench, self._file, self._userfaultfd = bench, file, os.dup(userfaultfd)
        self._handler: subprocess.Popen[bytes] | None = None

    def open(self, name: str) -> SharedBlock:
        length = os.stat(self._file).st_size
        marks = memory.create_memfd("marks", -(-length // PAGE // PAGE) * PAGE)
        received = memory.Mapping.of(marks, os.fstat(marks).st_size)
        os.close(marks)
        self._length = length
        return SharedBlock(1, name, length, PAGE, length, memory.create_memfd("floor", length), received)

    def announce(self, block: int, address: int, length: int, offset: int) -> None:
        os.set_blocking(self._userfaultfd, True)
        words = [str(self._userfaultfd), self._file, str(address - offset), str(self._length), "-1"]
        keep = [self._userfaultfd]
        self._handler = subprocess.Popen([*self._bench.floor, *words], stdout=subprocess.PIPE, pass_fds=keep)
        assert self._handler.stdout is not None
        if self._handler.stdout.readline() != b"ready\n":
            raise BenchmarkFailed("the floor is not ready")

    @property
    def released(self) -> set[int]:
        return set()

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.kill()
            handler.wait()
            assert handler.stdout is not None
            handler.stdout.close()
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)
            self._userfaultfd = -1


class FloorBackEnd(BackEnd):
    """A back-end whose faults the floor resolves."""

    def __init__(self, bench: Bench, file: str, *given: Any, **more: Any) -> None:
        self._bench, self._file = bench, file
        super().__init__(*given, **more)

    def _hand_over(self, name: str, userfaultfd: int, timeout: float) -> BackEndSession:
        return FloorSide(self._bench, self._file, userfaultfd)


@contextmanager
def _disk(bench: Bench) -> Iterator[str]:
    if shutil.which("qemu-storage-daemon") is None:
        raise BenchmarkFailed("qemu-storage-daemon is missing (Debian: qemu-system-common)")
    path = os.path.join(bench.directory, "disk")
    with open(path, "wb") as file:
        file.write(random.Random(1).randbytes(SECTORS * 512))
    yield path


@contextmanager
def _storage_daemon(bench: Bench, disk: str, pinned: bool) -> Iterator[str]:
    path = os.path.join(bench.sockets, "disk.sock")
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,filename={disk},node-name=f,read-only=on"]
    command += ["--blockdev", "driver=raw,file=f,node-name=d,read-only=on"]
    command += ["--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path}"]
    with bench.placed(pinned):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + READY_WITHIN
        while not is_listening(path):
            if process.poll() is not None or time.monotonic() > limit:
                raise BenchmarkFailed("qemu-storage-daemon does not come up")
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait(10)
        if os.path.exists(path):
            os.unlink(path)


def _reads(bench: Bench, disk: str, side: str, pinned: bool, seed: int) -> list[float]:
    """Microseconds of each read, in a fresh guest memory."""
    plan = Plan(PlanSettings(bench.scale.of(1500, 50), 1, 1, SECTORS, False, False, seed, after=0))
    file = os.path.join(bench.directory, f"guest-{side}")
    plan.write(file)
    with _storage_daemon(bench, disk, pinned) as socket, bench.placed(pinned):
        if side == "floor":
            with FloorBackEnd(bench, file, socket, [BLOCK], bench.sockets) as back_end:
                return _drive(plan, back_end, disk)
        with (
            postcopy.Supervisor({BLOCK: file}, fault_around="4K") as supervisor,
            BackEnd(socket, [BLOCK], supervisor.runtime_dir) as back_end,
        ):
            return _drive(plan, back_end, disk)


def _drive(plan: Plan, back_end: BackEnd, disk: str) -> list[float]:
    """One read at a time, through a mapping of our own that is not registered: it touches only what the back-end has
    brought in. The ring's pages come with its start (used) and with the first request, which is on it already."""
    shared, samples = back_end.blocks[BLOCK], list[float]()
    with (
        memory.Mapping.of(shared.memory, shared.length) as mapping,
        RingEvents() as bells,
        mapping.view() as view,
        open(disk, "rb") as file,
    ):
        ring = plan.ring(0, view)
        start_ring(back_end, 0, ring, bells)
        ring.next_available = 1
        bells.notify()
        _answered(ring.completed, bells)
        for request in plan.requests[1:]:
            offer(ring, request, 0)
            begun = time.perf_counter_ns()
            bells.notify()
            _answered(ring.completed, bells)
            samples.append((time.perf_counter_ns() - begun) / 1000)
            _check(request, view, file.fileno())
    return samples


def _answered(completed: Any, bells: RingEvents) -> None:
    limit = time.monotonic() + READY_WITHIN
    while not completed():
        bells.wait(1.0)
        if time.monotonic() > limit:
            raise BenchmarkFailed("the back-end does not answer")


def _check(request: Planned, view: memoryview, disk: int) -> None:
    data = view[request.data_at : request.data_at + request.length]
    if request.kind == 0 and data != os.pread(disk, request.length, request.sector * 512):
        raise BenchmarkFailed(f"request {request.number} read wrong bytes")


__all__ = ["run"]
