"""The background stream of ``remote``: a whole block as fast as it comes, and faults that cannot wait for it.

The stream's rate is taken from the supervisor's own count of bytes, looked at while it runs: from the first look at
which something had come to the last at which something was missing, so that no start and no end of a program is in it.
COPY alone (copying.py) places the same bytes in the same pieces, without a source, a socket or a second process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from statistics import median
from threading import Event, Thread
from types import TracebackType

import postcopy
from postcopy.queries import Control

from .bench import Bench, BenchmarkFailed, ClientProcess
from .figures import Pair, Row, percentile, ratio_row
from .machine import ROOT

PIECE = 256 << 10
"""Bytes in one message of a page source, and so in one COPY of the supervisor."""
GOAL = 0.75
URGENT_RATE = 200
URGENT_GOAL = 10.0
KEPT_GOAL = 0.6
STREAMED_WITHIN = 60.0
STREAM_SECONDS = 1.5
LOOK_EVERY = 0.1
"""Seconds. A look is a status, which the supervisor works out where it places pages, too: it is in the figure."""


def run(bench: Bench) -> list[Row]:
    """The stream alone against COPY alone; urgent faults under the stream.

    The block is so large that streaming it takes STREAM_SECONDS: on a fast machine 1 GiB would be there before enough
    faults were measured.
    """
    length = bench.length_for(STREAM_SECONDS, _probe(bench), bench.scale.of(1 << 30, 64 << 20))
    file = bench.warm_file("streamed", length)
    try:
        return _rows(bench, file, length)
    finally:
        os.unlink(file)


def _probe(bench: Bench) -> float:
    """Bytes a second of COPY alone, which no stream exceeds."""
    return copy_alone(bench.file, bench.length) * 1e6


def _rows(bench: Bench, file: str, length: int) -> list[Row]:
    solo: list[Pair] = []
    urgent: list[Pair] = []
    kept: list[float] = []
    for number in range(bench.scale.pairs):
        bench.say(f"remote, stream: round {number + 1} of {bench.scale.pairs}")
        alone = copy_alone(file, length)
        streamed = _stream(bench, file, length)
        solo.append((streamed, alone))
        calm, _ = _urgent(bench, file, length, rate="0")
        # A quick run's block is streamed in no time at full rate.
        waited, rate = _urgent(bench, file, length, rate="32M" if bench.scale.quick else "auto")
        urgent.append((percentile(waited, 99), percentile(calm, 50)))
        kept.append(rate / streamed)
    size = f"{length >> 20} MiB"
    rows = [ratio_row(f"{size} streamed, against COPY alone", solo, GOAL, unit="MB/s", least=True, labels=_ALONE)]
    return [*rows, _under_stream(urgent, kept)]


_ALONE = ("stream", "COPY")


def _under_stream(urgent: list[Pair], kept: list[float]) -> Row:
    name = f"{URGENT_RATE} urgent faults a second under the stream, p99 against p50 without"
    row = ratio_row(name, urgent, URGENT_GOAL, labels=("p99", "p50"))
    share = median(kept)
    told = f"{row.detail}; the stream keeps {share:.0%} of its rate (goal >= {KEPT_GOAL:.0%})"
    return Row(row.name, row.value, row.low, row.high, "x", row.goal, None, told, row.samples, held=share >= KEPT_GOAL)


def copy_alone(file: str, length: int, piece: int = PIECE) -> float:
    """MB a second."""
    command = [sys.executable, "-m", "benchmarks.copying", file, str(piece)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STREAMED_WITHIN)
    if done.returncode:
        raise BenchmarkFailed(f"COPY alone ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return length / float(done.stdout) / 1e6


def _stream(bench: Bench, file: str, length: int) -> float:
    """MB a second of the stream that no fault disturbs; a client then compares pages with the file."""
    with (
        bench.source(["ram"], file=file) as blocks,
        bench.supervisor(blocks) as supervisor,
        Watch(supervisor, length) as watch,
    ):
        rate = watch.rate()
        with bench.client(runtime_dir=supervisor.runtime_dir, file=file, length=length) as client:
            client.ask(do="join", block="ram", mode="private")
            client.ask(do="touch", seed=1, count=bench.scale.of(1000, 100))
    return rate


def _urgent(bench: Bench, file: str, length: int, rate: str) -> tuple[list[float], float]:
    """Microseconds of each urgent fault of an open loop, and the stream's rate (MB/s; 0.0 without a stream)."""
    directory = os.path.join(bench.sockets, "urgent")
    with (
        bench.source(["ram"], file=file) as blocks,
        bench.client(runtime_dir=directory, file=file, length=length) as client,
        bench.supervisor(blocks, background_rate=rate, runtime_dir=directory) as supervisor,
    ):
        if rate == "0":
            client.ask(do="join", block="ram", mode="shared")
            return _open_loop(client, bench.scale.of(400, 50)), 0.0
        # The stream begins with the supervisor. It is held back by stopping its source until the client has attached,
        # which takes longer than the whole stream on a machine that is fast enough.
        os.kill(blocks.pid, signal.SIGSTOP)
        try:
            client.ask(do="join", block="ram", mode="shared")
        finally:
            os.kill(blocks.pid, signal.SIGCONT)
        with Watch(supervisor, length) as watch:
            waited = _open_loop(client, 100_000)
            return waited, watch.rate()


def _open_loop(client: ClientProcess, count: int) -> list[float]:
    """Microseconds; ends when nothing is missing any more."""
    answer = client.ask(do="touch_missing", seed=1, count=count, rate=URGENT_RATE)
    if not answer["ns"]:
        raise BenchmarkFailed("nothing was missing any more when the client began to touch")
    return [nanoseconds / 1000 for nanoseconds in answer["ns"]]


class Watch:
    """Looks at a supervisor's one source, in a thread of its own, until everything has come."""

    def __init__(self, supervisor: postcopy.Supervisor, length: int) -> None:
        self._directory = supervisor.runtime_dir
        self._length = length
        self._begun = (time.monotonic(), 0)
        self._looks: list[tuple[float, int]] = []
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with Control(self._directory) as control:
            while True:
                block = control.status()["blocks"][0]
                self._looks.append((time.monotonic(), block["received"] * block["page_size"]))
                if self._looks[-1][1] >= self._length or self._stop.wait(LOOK_EVERY):
                    return

    def rate(self) -> float:
        """MB a second, when everything has come. Raises BenchmarkFailed when it does not."""
        self._thread.join(STREAMED_WITHIN)
        if not self._looks or self._looks[-1][1] < self._length:
            raise BenchmarkFailed(f"the stream has not brought the block within {STREAMED_WITHIN:.0f} s")
        partly = [look for look in self._looks if 0 < look[1] < self._length]
        # Too short to look twice in between: then its beginning and its end are in the figure.
        first, last = (partly[0], partly[-1]) if len(partly) > 1 else (self._looks[0], self._looks[-1])
        if last[1] == first[1]:  # complete at the first look, as a quick run's block may be
            first = self._begun
        return (last[1] - first[1]) / (last[0] - first[0]) / 1e6

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(5)
