"""Each benchmark runs and tells its figures in the promised shape. How fast anything is, no test asserts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from benchmarks import __main__ as program
from benchmarks import qemu, remote, stream
from benchmarks.__main__ import BENCHMARKS
from benchmarks.bench import Bench, BenchmarkFailed, Scale
from benchmarks.docs import write_docs
from benchmarks.figures import Row, markdown, percentile, ratio_row, value_row

ROOT = Path(__file__).parents[2]

# Words that name the figures of each benchmark: the documentation and readers of the JSON rely on them.
FIGURES = {
    "local": ["shared, pinned", "private, pinned", "shared, unpinned", "private, unpinned"],
    "clients8": ["disjoint, wall time, unpinned", "random, wall time, unpinned", "disjoint, wall time, pinned"],
    "sequential": [
        "shared, auto against 4K",
        "private, auto against 4K",
        "mmap of the warm file",
        "read() of the warm",
    ],
    "limits": ["plain mmap of the warm file, pinned", "plain mmap of the warm file, unpinned", "against an eager copy"],
    "twin": [
        "local fault p50, shared, compiled",
        "local fault p50, private, Python",
        "processor time for a fault, shared",
    ],
    "links": ["urgent p50 beside the background, 50 MB/s", "background alone, of 50 MB/s", "random pages of"],
    "qemu": [
        "urgent page p50, postcopy-ram",
        "total, postcopy-ram",
        "live image of",
        "VM stopped by a live image",
        "first page of a VM, from the start of the program",
        "first page of a VM, from QEMU's migrate",
    ],
    "store": [
        "fault p50, warm chunk cache",
        "from SeaweedFS, serve",
        "numpy: time to ready with replay",
        "numpy: requests with replay",
        "pack of",
        "second snapshot, 5 % of the pages changed",
    ],
    "clones": ["pack a block of a running machine", "host B: from nothing to its", "clones at once on both hosts"],
    "growth": [
        "shared, 300 random pages",
        "growth of the p50, private",
        "stored, 1 GiB, against mmap",
        "sparse, 200 GiB, against pread",
        "status, 300 pages of 1 GiB",
        "audit, 100 pages of 1 GiB",
    ],
    "cpu": ["local fault, 1 client", "local fault, 3 clients", "remote fault, 1 client", "remote fault, 3 clients"],
    "scaling": ["1 client, wall time", "3 clients, wall time"],
    "together": ["local, private, time", "local, shared, faults", "remote, private, faults", "remote, shared, time"],
    "bulk": ["pieces of 64 KiB", "pieces of 256 KiB", "pieces of 2048 KiB", "background of a local block"],
    "attach": ["to first byte", "private memory", "clients attached", "sparse file of 100 GiB"],
    "remote": [
        "remote fault p50, shared, pinned",
        "remote fault p99, private, unpinned",
        "QEMU's own post-copy",
        "streamed, against COPY alone",
        "urgent faults a second under the stream",
        "in lockstep",
        "clients at random",
    ],
    "transport": ["shared, native against libzmq", "private, native against libzmq"],
    "back-end": ["missing pages p50, pinned", "missing pages p50, unpinned", "missing pages p99, pinned"],
    "observing": [
        "status of 3 clients, p99",
        "postcopy status --json",
        "local fault p50, status of 3 clients at 10 Hz, unpinned",
        "remote fault p99, status of 3 clients at 10 Hz, unpinned",
        "postcopy top, 80x24",
        "postcopy top, 200x60",
        "report of 2,000 touches, html",
        "report of 2,000 touches, png",
    ],
    "recovery": [
        "killed to next fault resolved, p50",
        "killed to next fault resolved, p99",
        "workers killed, p50",
        "workers killed at once, p99",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def threads_of_obstore() -> None:
    """Its first request starts them, and they stay, with their descriptors."""
    obstore.put(MemoryStore(), "first", b"")


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A run sets a handler for its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(400)  # they start dozens of programs, beside everybody else's
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
@pytest.mark.usefixtures("sigterm", "require_userfaultfd")
def test_a_quick_run_tells_every_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte that a client touches is compared with the file, and a difference ends the run with status 1."""
    target = tmp_path / "figures.json"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    status = program.main([name, "--quick", "--json", str(target)])
    said = capsys.readouterr()
    assert status == 0, said.err
    document = json.loads(target.read_text())
    assert document["format"] == 1
    assert document["quick"] is True
    assert {"processor", "processors", "kernel", "python", "commit", "time"} <= document["machine"].keys()
    assert list(document["benchmarks"]) == [name]
    rows = document["benchmarks"][name]
    told = " | ".join(row["name"] for row in rows)
    assert all(words in told for words in FIGURES[name]), told
    for row in rows:
        _check_row(row)
        assert row["name"] in said.out  # the table for people
        if "QEMU's" in row["name"]:
            assert bool(row["samples"]) == bool(shutil.which(qemu.QEMU)), row["detail"]
    assert list(tmp_path.iterdir()) == [target], "the run has left files"


def _check_row(row: dict[str, object]) -> None:
    assert row.keys() == {
        "name", "value", "low", "high", "unit", "goal", "stretch", "detail", "samples", "verdict", "least", "held",
        "failed",
    }  # fmt: skip
    if row["samples"] == []:  # not measured here, and says so
        assert row["verdict"] == "" and "installed" in str(row["detail"])
        return
    value, low, high, samples = row["value"], row["low"], row["high"], row["samples"]
    assert isinstance(value, float) and isinstance(low, float) and isinstance(high, float)
    assert isinstance(samples, list) and samples
    assert 0 <= low <= value <= high and math.isfinite(high)
    assert low > 0 or row["unit"] == "%", "a share may be nothing"
    assert (row["verdict"] == "") == (row["goal"] is None)


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(120)
def test_compare_gives_the_ratio_of_this_checkout_to_another(tmp_path: Path, require_userfaultfd: None) -> None:
    other = tmp_path / "other"  # the same packages: what is tested is that the other's interpreter is started
    (other / ".venv" / "bin").mkdir(parents=True)
    used = tmp_path / "used"
    python = other / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$2" >> {used}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = _run("compare", str(other), "--quick", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["benchmarks"]["compare"]
    modes = ["shared", "private"]
    expected = [f"{kind} fault p50, {mode}, pinned" for kind in ("local", "remote") for mode in modes]
    assert [row["name"].partition(", against")[0] for row in rows] == expected
    for row in rows:
        _check_row(row)
    assert used.read_text().split().count("benchmarks.client") == 4


def test_compare_without_an_installed_checkout_says_what_is_missing(tmp_path: Path) -> None:
    assert _run("compare").returncode == 2
    done = _run("compare", str(tmp_path), "--quick")
    assert done.returncode == 1 and "scripts/install" in done.stderr


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


def test_an_unknown_benchmark_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr and "recovery" in done.stderr


@pytest.mark.usefixtures("sigterm")
def test_a_failing_benchmark_leaves_the_others_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Bench) -> list[Row]:
        raise BenchmarkFailed("client process 1 read wrong bytes: 3 pages")

    def works(bench: Bench) -> list[Row]:
        return [value_row("a figure", [1.0], "ms")]

    monkeypatch.setattr(program, "BENCHMARKS", {"first": fails, "second": works})
    target = tmp_path / "figures.json"
    assert program.main(["--quick", "--json", str(target)]) == 1
    told = capsys.readouterr()
    assert "benchmarks: first: client process 1 read wrong bytes" in told.err
    assert "a figure" in told.out and "client process 1 read" in told.out
    first, second = json.loads(target.read_text())["benchmarks"].values()
    assert [(row["verdict"], row["failed"], row["name"]) for row in first] == [("failed", True, "first")]
    assert [(row["verdict"], row["failed"], row["name"]) for row in second] == [("", False, "a figure")]


@pytest.mark.parametrize("error", [BenchmarkFailed("nothing was missing"), KeyError("blocks"), OSError(28, "no space")])
def test_a_failing_part_leaves_the_other_parts_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(bench: Bench) -> list[Row]:
        raise error

    figure = value_row("a figure", [1.0], "us")
    for name in ("_faults", "_lockstep", "_random", "_random_in_c"):
        monkeypatch.setattr(remote, name, lambda *_, name=name: [figure] if name == "_faults" else figure)
    monkeypatch.setattr(qemu, "compare", lambda *_: [figure])
    monkeypatch.setattr(stream, "run", fails)
    with Bench(Scale(quick=True, pairs=1)) as bench:
        rows = remote.run(bench)
    assert [row.name for row in rows if row.failed] == ["remote: stream"]
    assert [row for row in rows if not row.failed] == [figure] * 6
    assert "benchmarks: remote: stream: " in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("behaves", "reason"),
    [
        ("exec sleep 1000", "did not give the monitor's answer in time"),
        ("echo 'no such machine' >&2; exit 1", "ended before the monitor's answer: no such machine"),
        ("""echo '{"QMP": 1}' >&$monitor; exec sleep 1000""", "greeting names no version"),
        ("echo garbage >&$monitor; exec sleep 1000", "said b'garbage'"),
    ],
)
def test_a_qemu_that_misbehaves_costs_its_own_rows_only(
    behaves: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / qemu.QEMU
    # `socket,id=monitor,fd=N` is the descriptor of the monitor.
    fake.write_text(
        f'#!/bin/bash\necho $$ >> {tmp_path}/pids\n[[ "$*" =~ fd=([0-9]+) ]]; monitor=${{BASH_REMATCH[1]}}\n{behaves}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(qemu, "RUN_WITHIN", 2.0)
    with Bench(Scale(quick=True, pairs=1)) as bench:
        rows = qemu.compare(bench, lambda number: [1.0])
    assert len(rows) == 2
    for row in rows:
        assert reason in row.detail and "installed" in row.detail and row.samples == []
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists()


def test_a_ratio_is_the_median_of_the_ratios_of_pairs() -> None:
    row = ratio_row("r", [(2.0, 1.0), (30.0, 10.0), (4.0, 4.0)], goal=2.5, stretch=1.5)
    assert (row.value, row.low, row.high) == (2.0, 1.0, 3.0)
    assert row.verdict == "met"
    assert row.samples == [[2.0, 1.0], [30.0, 10.0], [4.0, 4.0]]


@pytest.mark.parametrize(
    ("value", "verdict"), [(1.0, "stretch"), (1.5, "stretch"), (1.6, "met"), (2.0, "met"), (2.1, "missed")]
)
def test_a_verdict_compares_with_goal_and_stretch(value: float, verdict: str) -> None:
    assert value_row("v", [value], "ms", 2.0, 1.5).verdict == verdict


def test_a_verdict_may_want_the_least_and_more_than_one_promise() -> None:
    assert ratio_row("r", [(0.8, 1.0)], 0.75, least=True).verdict == "met"
    assert ratio_row("r", [(0.7, 1.0)], 0.75, least=True).verdict == "missed"
    assert Row("r", 1.0, 1.0, 1.0, "x", 2.0, samples=[1.0], held=False).verdict == "missed"
    assert Row("r", 0.0, 0.0, 0.0, "us", detail="qemu: not installed").cells()[1] == ""


def test_percentiles_are_samples() -> None:
    samples = [float(number) for number in range(100, 0, -1)]
    assert percentile(samples, 50) == 50.0
    assert percentile(samples, 99) == 99.0
    assert percentile([7.0], 99) == 7.0


def test_the_documentation_gets_its_tables_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text("before\n<!-- figures:local -->\nstale figures\n<!-- /figures:local -->\nafter\n")
    rows = [Row("fault", 1.2, 1.1, 1.3, "x", 1.25, None, "told", [1.1, 1.2, 1.3])]
    found = {
        "processor": "P", "virtual": True, "processors": 2, "memory_bytes": 1 << 30, "kernel": "6.18-x",
        "python": "3.11", "commit": "abc", "time": "2000-01-01 00:00:00",
    }  # fmt: skip
    write_docs(found, {"local": rows}, str(path))
    write_docs(found, {"local": rows}, str(path))  # again: replaced, not added
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale figures" not in text
    assert text.count(markdown(rows)) == 1
    assert "| fault | 1.20 x | 1.10 - 1.30 | <= 1.25 x | met | told |" in text
    with pytest.raises(BenchmarkFailed, match="attach"):
        write_docs(found, {"attach": rows}, str(path))


def test_the_documentation_has_a_place_for_every_benchmark() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in BENCHMARKS:
        assert text.count(f"<!-- figures:{name} -->") == 1 == text.count(f"<!-- /figures:{name} -->"), name
