"""``qemu``: a running QEMU as page source, against QEMU itself, in turns.

Post-copy: a guest of 1 GiB full of data (guest.S, see qemu.py). QEMU moves it to another QEMU, as it comes and with
postcopy-preempt, and the guest times its own touches; ``source qemu --mode pause`` takes the same memory, and a client
times as many touches at random. Both are timed from the switch to post-copy to the last page.

Live: a VM full of random bytes does nothing. QEMU sends a background snapshot to a plain reader and to ``source qemu``.
Both are timed from the connection to the last page, and how long the VM stands still by QEMU's own events. The first
page of a VM is usable when the source serves: that is timed from the command that starts the source, and from QEMU's
``migrate``.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import postcopy

from .bench import PAGE, Bench, BenchmarkFailed
from .figures import Pair, Row, percentile, ratio_row, value_row
from .qemu import (
    PRECOPY,
    PREEMPT,
    REGION,
    Found,
    Machine,
    QemuFailed,
    assemble,
    found_here,
    migrate,
    pages_of,
    touches_of,
)

WITHIN = 120.0
SNAPSHOT = "background-snapshot"
RAM = "pc.ram"


def run(bench: Bench) -> list[Row]:
    """Every row, or BenchmarkFailed where there is no QEMU."""
    image = assemble(bench)
    found = found_here(bench, image)
    return [*_post_copy(bench, image, found), *_live(bench)]


# --- post-copy --------------------------------------------------------------------------------------------------------


def _post_copy(bench: Bench, image: str, found: Found) -> list[Row]:
    stalls: dict[str, list[Pair]] = {mode: [] for mode in found.modes}
    totals: dict[str, list[Pair]] = {mode: [] for mode in found.modes}
    for number in range(bench.scale.pairs):
        bench.say(f"qemu: post-copy, round {number + 1} of {bench.scale.pairs}")
        theirs = {mode: migrate(bench, image, found.acceleration, preempt=mode == PREEMPT) for mode in found.modes}
        touches, seconds = _ours(bench, image, found, number)
        for mode, run in theirs.items():
            stalls[mode].append((percentile(touches, 50), percentile(run.faults, 50)))
            totals[mode].append((seconds * 1e3, run.seconds * 1e3))
    rows = []
    size, labels = f"{pages_of(bench) * PAGE >> 20} MiB", ("ours", f"QEMU {found.version} {found.acceleration}")
    for mode in found.modes:
        name = f"{mode} of {size}, against QEMU to QEMU"
        rows += [ratio_row(f"urgent page p50, {name}", stalls[mode], 0.8, labels=labels)]
        rows += [ratio_row(f"total, {name}", totals[mode], 1.0, unit="ms", labels=labels)]
    return rows


def _ours(bench: Bench, image: str, found: Found, seed: int) -> tuple[list[float], float]:
    """Microseconds of the touches that met a missing page, and seconds from the switch to the last page."""
    with Machine(bench, image, found.acceleration, time.monotonic() + WITHIN) as machine:
        machine.hear(b"R")
        machine.switch(*found.modes)
        machine.order("migrate-set-parameters", **{"max-bandwidth": PRECOPY, "max-postcopy-bandwidth": 0})
        with _source(bench, "--mode", "pause") as source:
            source.await_line("type into")
            machine.order("migrate", uri=source.uri)
            source.await_line("ready:")
            with (
                bench.supervisor({"ram": f"{source.endpoint}/{RAM}"}, fault_around="4K") as supervisor,
                postcopy.attach("ram", runtime_dir=supervisor.runtime_dir, mode="shared") as block,
            ):
                machine.order("migrate-start-postcopy")
                began = time.monotonic()
                source.await_line("stands still")
                took = _touch(block, pages_of(bench), touches_of(bench), seed)
                while block.resident() < 1.0:
                    if time.monotonic() - began > WITHIN:
                        raise QemuFailed("gave not all of its memory")
                    time.sleep(0.005)
                return took, time.monotonic() - began


def _touch(block: postcopy.Block, pages: int, count: int, seed: int) -> list[float]:
    chance, view, took = random.Random(seed), block.buf, []
    for page in chance.sample(range(pages), count):
        offset = REGION + page * PAGE
        if block.resident(offset, PAGE) < 1.0:
            began = time.perf_counter_ns()
            view[offset]
            took.append((time.perf_counter_ns() - began) / 1e3)
    if len(took) < count / 4:
        raise QemuFailed(f"had only {len(took)} of {count} pages missing when they were touched")
    return took


# --- live -------------------------------------------------------------------------------------------------------------


def _live(bench: Bench) -> list[Row]:
    length = bench.scale.of(512 << 20, 64 << 20)
    rates: list[Pair] = []
    stops: list[Pair] = []
    first: list[float] = []
    begun: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="pcq-", dir="/dev/shm") as directory,
        _filled(bench, Path(directory), length) as machine,
    ):
        for number in range(bench.scale.pairs):
            bench.say(f"qemu: live, round {number + 1} of {bench.scale.pairs}")
            plain, stop = _thrown_away(machine, directory)
            with _source(bench, "--qmp", f"{directory}/qmp") as source:
                first.append((source.await_line("ready:")[0] - source.began) * 1e3)
                ours = float(source.await_line("are here, after")[1].split("after ")[1].split()[0])
                machine.await_status("completed")
            rates.append((length / ours / 1e6, length / plain / 1e6))
            stops.append((machine.stop_time() * 1e3, stop * 1e3))
            with _source(bench) as source:
                source.await_line("type into")
                machine.switch(SNAPSHOT)
                asked = time.monotonic()
                machine.order("migrate", uri=source.uri)
                source.await_line("ready:")
                begun.append((time.monotonic() - asked) * 1e3)
                source.await_line("are here, after")
                machine.await_status("completed")
            machine.stop_time()
    sides = ("ours", "reader")
    return [
        ratio_row(f"live image of {length >> 20} MiB, against a reader that keeps nothing", rates, 0.9,
                  unit="MB/s", labels=sides, least=True),
        ratio_row("VM stopped by a live image, against the same reader", stops, 1.2, unit="ms", labels=sides),
        value_row("first page of a VM, from the start of the program", first, "ms", 100),
        value_row("first page of a VM, from QEMU's migrate", begun, "ms", 100),
    ]  # fmt: skip


@contextmanager
def _filled(bench: Bench, directory: Path, length: int) -> Iterator[Machine]:
    """A VM with a second monitor, full of random bytes, whose processor does nothing."""
    with (directory / "ram").open("wb") as file:
        for _ in range(length >> 20):
            file.write(os.urandom(1 << 20))
    memory = f"memory-backend-file,id=m,mem-path={directory}/ram,share=on,size={length}"
    more = ["-object", memory, "-machine", "memory-backend=m", "-m", f"{length >> 20}M"]
    more += ["-qmp", f"unix:{directory}/qmp,server=on,wait=off"]
    with Machine(bench, "", "tcg", time.monotonic() + 10 * WITHIN, *more) as machine:
        yield machine


def _thrown_away(machine: Machine, directory: str) -> tuple[float, float]:
    """Seconds from the connection to the end of the stream, and in which the VM stood still."""
    path = f"{directory}/plain"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        machine.switch(SNAPSHOT)
        machine.order("migrate", uri=f"unix:{path}")
        connection, _ = listener.accept()
    os.unlink(path)
    buffer, begun = bytearray(1 << 20), time.monotonic()
    with connection:
        while connection.recv_into(buffer):
            pass
    took = time.monotonic() - begun
    machine.await_status("completed")
    machine.switch()
    return took, machine.stop_time()


class Source:
    """``postcopy source qemu``, and what it logs."""

    def __init__(self, place: str, *options: str) -> None:
        self.endpoint, self.uri = f"ipc://{place}/vm", f"unix:{place}/migration"
        command = [sys.executable, "-m", "postcopy_sources", "qemu", "--listen", self.endpoint]
        command += ["--migration", self.uri, *options]
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def await_line(self, text: str) -> tuple[float, str]:
        """When (CLOCK_MONOTONIC, seconds) it logged the line with this text, and the line."""
        assert self.process.stderr is not None
        said = "nothing"
        for line in self.process.stderr:
            if text in line:
                return time.monotonic(), line
            said = line
        raise BenchmarkFailed(f"postcopy source qemu ended before {text!r}: {said.strip()}")


@contextmanager
def _source(bench: Bench, *options: str) -> Iterator[Source]:
    source = Source(bench.sockets, *options)
    try:
        yield source
    finally:
        source.process.terminate()
        try:
            source.process.communicate(timeout=WITHIN)
        finally:
            source.process.kill()
