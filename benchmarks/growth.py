"""``growth``: does a fault cost more when there is more work? 1,000, 16,000 and 250,000 random pages of one block.

Local faults, pinned, against C handlers that make the same calls: COPY for a shared client, COPY through another
userfaultfd and then CONTINUE for a private one. Then random pages of files that are not cached, against a plain mapping
of the same file: there the kernel reads the device's read-ahead around each page. Status and audit are asked after as
many pages, and of blocks of as many bytes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from postcopy.queries import Control

from .bench import ANSWER_WITHIN, PAGE, RANDOM_PIECE, Bench
from .figures import Pair, Row, percentile, ratio_row, value_row

MODES: dict[str, list[str]] = {"shared": [], "private": ["two-calls"]}
"""For each mode what the C handler is started with before its other arguments."""
GOAL, STRETCH = 1.05, 1.02
GROWTH = 1.1
COUNTS, QUICK_COUNTS = (1000, 16_000, 250_000), (100, 300)
"""Random pages that one client touches."""
SPARSE = {1: 1 << 30, 16: 16 << 30, 200: 200 << 30}
COLD_GOALS = {"mmap": 0.05, "pread": None}
COLD_TOUCHES = 200


def run(bench: Bench) -> list[Row]:
    """Warm: a row for each mode and number of pages, and one for each mode that says how the p50 grows. Cold: a row for
    a stored file and for each size of a sparse one."""
    rows = bench.part("growth: warm", _warm)
    rows += bench.part("growth: cold, stored", _stored)
    for gigabytes, length in SPARSE.items():
        rows += bench.part(
            f"growth: cold, sparse {gigabytes} GiB", partial(_sparse, gigabytes=gigabytes, length=length)
        )
    return rows + bench.part("growth: status and audit", _questions)


def _warm(bench: Bench) -> list[Row]:
    counts = QUICK_COUNTS if bench.scale.quick else COUNTS
    length = -(-counts[-1] * PAGE // RANDOM_PIECE) * RANDOM_PIECE
    file = bench.warm_file("growth", length)
    rows = []
    for mode, handler in MODES.items():
        found: dict[int, list[Pair]] = {count: [] for count in counts}
        for number in range(bench.scale.pairs):
            for count in counts:
                bench.say(f"growth, {mode}, {count} pages: pair {number + 1} of {bench.scale.pairs}")
                found[count].append(_pair(bench, file, length, mode, handler, count, turned=bool(number % 2)))
        rows += [
            ratio_row(f"local fault p50, {mode}, {count:,} random pages", found[count], GOAL, STRETCH)
            for count in counts
        ]
        rows.append(_growth(f"growth of the p50, {mode}", found[counts[0]], found[counts[-1]]))
    os.unlink(file)
    return rows


def _growth(name: str, few: list[Pair], many: list[Pair]) -> Row:
    """How many times the p50 of little work is the p50 of much. C's own growth is not ours: it is divided out."""
    pairs = [(ours / other, theirs / least) for (ours, theirs), (other, least) in zip(many, few, strict=True)]
    return ratio_row(name, pairs, GROWTH, unit="x")


def _pair(bench: Bench, file: str, length: int, mode: str, handler: list[str], count: int, *, turned: bool) -> Pair:
    medians = {}
    for side in ("ours", "C") if turned else ("C", "ours"):
        if side == "ours":
            with (
                bench.supervisor({"ram": file}, pinned=True) as supervisor,
                bench.client(
                    pinned=True,
                    runtime_dir=supervisor.runtime_dir,
                    block="ram",
                    mode=mode,
                    file=file,
                    length=length,
                ) as client,
            ):
                took = client.ask(do="touch", seed=count, count=count)["ns"]
        else:
            command = [*bench.floor, *handler]
            with bench.client(pinned=True, handler=command, mode=mode, file=file, length=length) as client:
                took = client.ask(do="touch", seed=count, count=count)["ns"]
        medians[side] = percentile(took, 50) / 1000
    return medians["ours"], medians["C"]


def _stored(bench: Bench) -> list[Row]:
    length = bench.scale.of(1 << 30, RANDOM_PIECE)
    file = bench.warm_file("stored", length)
    try:
        return _cold(bench, file, length, "stored, 1 GiB")
    finally:
        os.unlink(file)


def _sparse(bench: Bench, gigabytes: int, length: int) -> list[Row]:
    path = os.path.join(bench.directory, "sparse")
    with _sparse_file(path, length):
        return _cold(bench, path, length, f"sparse, {gigabytes} GiB")


@contextmanager
def _sparse_file(path: str, length: int) -> Iterator[None]:
    with open(path, "wb") as file:
        file.truncate(length)
    try:
        yield
    finally:
        os.unlink(path)


def _cold(bench: Bench, file: str, length: int, name: str) -> list[Row]:
    """Each side has a file of which nothing is cached: our client, a plain mapping, pread of one page."""
    touches = bench.scale.of(COLD_TOUCHES, 20)
    orders = {"ours": "touch", "mmap": "touch_file", "pread": "read_file"}
    found: dict[str, list[float]] = {side: [] for side in orders}
    for number in range(bench.scale.pairs):
        bench.say(f"growth, cold, {name}: pair {number + 1} of {bench.scale.pairs}")
        for side in orders if number % 2 else reversed(orders):
            with (
                bench.supervisor({"ram": file}) as supervisor,
                bench.client(
                    runtime_dir=supervisor.runtime_dir, block="ram", mode="private", file=file, length=length
                ) as client,
            ):
                _forget(file)
                answer = client.ask(do=orders[side], seed=number, count=touches)
                found[side].append(statistics.median(answer["ns"]) / 1000)
    return [
        ratio_row(
            f"cold random page p50, {name}, against {other}",
            list(zip(found["ours"], found[other], strict=True)),
            goal,
            labels=("ours", other),
        )
        for other, goal in COLD_GOALS.items()
    ]


def _questions(bench: Bench) -> list[Row]:
    """The median time of status and audit, of sparse blocks of which so many random pages have been touched."""
    counts = QUICK_COUNTS if bench.scale.quick else COUNTS
    cases = [(1, count) for count in counts]
    cases += [(gigabytes, counts[0]) for gigabytes in SPARSE if gigabytes > 1 and not bench.scale.quick]
    path = os.path.join(bench.directory, "asked")
    rows = []
    for gigabytes, count in cases:
        bench.say(f"growth, status and audit, {count} pages of {gigabytes} GiB")
        length = SPARSE[gigabytes]
        with (
            _sparse_file(path, length),
            bench.supervisor({"ram": path}, fault_around="4K") as supervisor,
            bench.client(
                runtime_dir=supervisor.runtime_dir, block="ram", mode="private", file=path, length=length
            ) as client,
            Control(supervisor.runtime_dir, timeout=ANSWER_WITHIN) as control,
        ):
            client.ask(do="touch", seed=count, count=count)
            for name, audit in (("status", False), ("audit", True)):
                samples = [_asked(control, audit) for _ in range(bench.scale.of(30, 3))]
                rows.append(value_row(f"{name}, {count:,} pages of {gigabytes} GiB", samples, "ms"))
    return rows


def _asked(control: Control, audit: bool) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    control.status(audit=audit)
    return (time.perf_counter() - begun) * 1000


def _forget(file: str) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
