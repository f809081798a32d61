"""``observing``: what does it cost to be seen?

Three promises: the status of 256 clients comes soon and slows no client's faults, ``postcopy top`` leaves the processor
alone, and the report of a million touches is written in seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import postcopy
from postcopy.queries import Control

from .bench import Bench, BenchmarkFailed, ClientProcess, Measure
from .figures import Pair, Row, percentile, ratio_row, value_row
from .machine import ROOT

MODES = ("shared", "private")
SLICES = 16
POLLS_A_SECOND = 10
TOUCHES_A_SECOND = 250
SIZES = ((80, 24), (200, 60))
WITHIN = 120.0


def run(bench: Bench) -> list[Row]:
    """Ratios with the figures and without, milliseconds, per cent of a processor, seconds."""
    parts: dict[str, Measure] = {"status": _status, "top": _top, "report": _report}
    return [row for name, measure in parts.items() for row in bench.part(f"observing: {name}", measure)]


# --- the status of many clients ---------------------------------------------------------------------------------------


def _status(bench: Bench) -> list[Row]:
    count = bench.scale.of(256, 3)
    with (
        bench.source(["far"]) as far,
        bench.supervisor({"ram": bench.file, **far}, background_rate=0, fault_around="4K") as supervisor,
        _attached(bench, supervisor, count),
        bench.product_client(supervisor, "ram", "shared") as local,
        bench.product_client(supervisor, "far", "shared") as remote,
    ):
        bench.say(f"observing: status of {count} clients")
        with Control(supervisor.runtime_dir) as control:
            asked = [_milliseconds(control.status) for _ in range(bench.scale.of(50, 3))]
            command = [sys.executable, "-m", "postcopy", "status", "--json", "--runtime-dir", supervisor.runtime_dir]
            whole = [_milliseconds(lambda: _run(command)) for _ in range(bench.scale.of(5, 1))]
            kinds = {"local": local, "remote": remote}
            slowed = [row for kind, client in kinds.items() for row in _slowed(bench, control, kind, client, count)]
    told = f"p50 {percentile(asked, 50):.1f} ms, {len(asked)} questions of a program that has asked before"
    return [
        value_row(f"status of {count} clients, p99", asked, "ms", 200, value=percentile(asked, 99), detail=told),
        value_row(f"postcopy status --json, {count} clients", whole, "ms", detail="with the start of Python"),
        *slowed,
    ]  # fmt: skip


def _slowed(bench: Bench, control: Control, kind: str, client: ClientProcess, clients: int) -> list[Row]:
    """Faults of one client, at a steady rate, while the status is asked and while it is not, in turns."""
    medians: list[Pair] = []
    tails: list[Pair] = []
    for number in range(bench.scale.pairs):
        bench.say(f"observing, {kind} faults under status: pair {number + 1} of {bench.scale.pairs}")
        found = {}
        for asking in (True, False) if number % 2 else (False, True):
            with _polled(control) if asking else ExitStack():
                order = {"do": "touch_missing", "seed": number * 2 + asking, "rate": TOUCHES_A_SECOND}
                found[asking] = [ns / 1000 for ns in client.ask(**order, count=bench.scale.of(500, 20))["ns"]]
        for kept, percent in ((medians, 50), (tails, 99)):
            kept.append((percentile(found[True], percent), percentile(found[False], percent)))
    about = f"status of {clients} clients at {POLLS_A_SECOND} Hz, unpinned"
    labels = ("asked", "left alone")
    return [
        ratio_row(f"{kind} fault p50, {about}", medians, 1.10, labels=labels),
        ratio_row(f"{kind} fault p99, {about}", tails, labels=labels),
    ]


@contextmanager
def _polled(control: Control) -> Iterator[None]:
    """The status is asked POLLS_A_SECOND times a second inside. Raises what an asking raised."""
    end = threading.Event()
    wrong: list[Exception] = []

    def ask() -> None:
        try:
            while not end.wait(1 / POLLS_A_SECOND):
                control.status()
        except Exception as error:
            wrong.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield
    finally:
        end.set()
        asking.join()
    if wrong:
        raise wrong[0]


@contextmanager
def _attached(bench: Bench, supervisor: postcopy.Supervisor, count: int) -> Iterator[None]:
    """So many clients that do nothing any more, once each has read four pages."""
    spec = {"parent": os.getpid(), "runtime_dir": supervisor.runtime_dir, "block": "ram", "clients": count}
    command = [sys.executable, "-m", "benchmarks.crowd", json.dumps(spec | {"file": bench.file, "stay": True})]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], WITHIN)[0]:
            raise BenchmarkFailed(f"{count} clients were not attached within {WITHIN:.0f} s")
        answer = json.loads(process.stdout.readline() or '{"failed": "all", "wrong": 0}')
        if answer["failed"] or answer["wrong"]:
            raise BenchmarkFailed(f"{count} clients: {answer['failed']} failed, {answer['wrong']} read wrong bytes")
        yield
    finally:
        process.communicate(timeout=WITHIN)


def _milliseconds(what: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    what()
    return (time.perf_counter() - begun) * 1000


# --- postcopy top -----------------------------------------------------------------------------------------------------


def _top(bench: Bench) -> list[Row]:
    """On terminals of two sizes, while every client makes faults: per cent of one processor, at one look a second."""
    count, seconds = bench.scale.of(64, 2), bench.scale.of(20, 2)
    rate, lead = bench.scale.of(8, 50), bench.scale.of(5, 1)
    bench.say(f"observing: top with {count} clients")
    with bench.supervisor({"ram": bench.file}, fault_around="4K") as supervisor, ExitStack() as stack:
        load = _load(supervisor.runtime_dir, clients=count, rate=rate, seconds=seconds + 2 * lead + 2, mode="mixed")
        touching = stack.enter_context(_started(load))
        with Control(supervisor.runtime_dir) as control:
            _until_all_touch(control, count)
        tops = [stack.enter_context(_on_terminal(supervisor.runtime_dir, size)) for size in SIZES]
        time.sleep(lead)  # imports and the first drawing are not what goes on and on
        before = [_cpu_seconds(top.pid) for top in tops]
        begun = time.monotonic()
        time.sleep(seconds)
        span = time.monotonic() - begun
        used = [100 * (_cpu_seconds(top.pid) - was) / span for top, was in zip(tops, before, strict=True)]
        if touching.poll() is not None or any(top.poll() is not None for top in tops):
            raise BenchmarkFailed("postcopy top, or the load test under it, ended too soon")
    told = f"{count} clients, {count * rate} touches a second, one look a second, {seconds} s"
    return [
        value_row(f"postcopy top, {columns}x{lines}", [share], "% of a core", 5.0, detail=told)
        for (columns, lines), share in zip(SIZES, used, strict=True)
    ]  # fmt: skip


def _load(directory: str, **options: object) -> list[str]:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "postcopy", "load", *words, "--runtime-dir", directory]


def _until_all_touch(control: Control, count: int) -> None:
    deadline = time.monotonic() + WITHIN
    while sum(client["faults"] > 1 for client in control.status()["clients"]) < count:
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"not all of {count} clients have made faults within {WITHIN:.0f} s")
        time.sleep(0.2)


@contextmanager
def _started(command: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL} | more
    process: subprocess.Popen[bytes] = subprocess.Popen(command, text=False, **streams)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _on_terminal(directory: str, size: tuple[int, int]) -> Iterator[subprocess.Popen[bytes]]:
    """``postcopy top`` on a terminal of ``size`` (columns, lines) whose output is read and forgotten."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    command = [sys.executable, "-m", "postcopy", "top", "--interval", "1", "--runtime-dir", directory]
    reading = threading.Thread(target=_read_all, args=(ours,), daemon=True)
    try:
        with _started(command, env=environment | {"TERM": "xterm-256color"}, **streams) as process:
            reading.start()
            try:
                yield process
            finally:
                process.terminate()
    finally:
        os.close(theirs)
        reading.join(5)
        os.close(ours)


def _read_all(terminal: int) -> None:
    with suppress(OSError):  # EIO: no process has it open any more
        while os.read(terminal, 65536):
            pass


def _cpu_seconds(pid: int) -> float:
    """Of all its threads."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the report of a load test ----------------------------------------------------------------------------------------

WRITE = (
    "import json, sys; from postcopy.load.report import ReportWriter; "
    "ReportWriter(sys.argv[2], []).write(json.load(open(sys.argv[1])))"
)


def _report(bench: Bench) -> list[Row]:
    """A million touches, then what it takes to write their report: a program that starts, draws and ends."""
    clients, touches = 4, bench.scale.of(250_000, 500)
    bench.say(f"observing: report of {clients * touches} touches")
    words = ["--serve", bench.file, "--clients", str(clients), "--touches", str(touches), "--mode", "mixed", "--json"]
    found = os.path.join(bench.directory, "findings.json")
    with open(found, "wb") as file:
        file.write(_run([sys.executable, "-m", "postcopy", "load", *words]))
    rows = []
    for ending in ("html", "png"):
        command = [sys.executable, "-c", WRITE, found, os.path.join(bench.directory, f"load.{ending}")]
        samples = [_milliseconds(lambda: _run(command)) / 1000 for _ in range(bench.scale.of(3, 1))]  # noqa: B023
        rows.append(value_row(f"report of {clients * touches:,} touches, {ending}", samples, "s", 10))
    return rows


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=WITHIN)
    if done.returncode:
        raise BenchmarkFailed(f"{command[1:5]} ended with {done.returncode}: {done.stderr.decode()[-300:]}")
    return done.stdout
