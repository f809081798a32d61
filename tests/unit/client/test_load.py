"""The load test's own arithmetic: what is recorded, whom it kills, what it checks against, what the report says."""

from __future__ import annotations

import gc
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import postcopy.load
from postcopy.errors import BadInput, PostcopyError
from postcopy.load import expected, report, watch
from postcopy.load.recorder import FIRST_WIDTH, MOST_BINS, Recorder, merged, together
from postcopy.load.results import fairness, results_of
from postcopy_protocol import counters

MS = 1_000_000


# --- the recorder -----------------------------------------------------------------------------------------------------


def test_an_open_loop_counts_the_touches_that_had_to_wait() -> None:
    """One touch hangs for a second; those due meanwhile are made late. Their own time is short, their wait is not."""
    record = Recorder(0, open_loop=True)
    record.touch(0, 1000 * MS, 0, first=True, missing=True)
    for number in range(1, 100):
        begun = 1000 * MS + number
        record.touch(begun, begun + 1000, number * 10 * MS, first=True, missing=False)
    told = record.document()
    assert counters.percentile(told["latency"], 50) < 10
    assert counters.percentile(told["response"], 50) > 400_000
    assert counters.count(told["faults"]) == 1


def test_a_closed_loop_has_no_response() -> None:
    record = Recorder(0)
    record.touch(5, 10, 5, first=False, missing=False)
    told = record.document()
    assert (told["touches"], told["response"], counters.count(told["latency"])) == (1, None, 0)


@given(st.lists(st.integers(0, 10 * MOST_BINS * FIRST_WIDTH), max_size=200))
def test_the_timeline_forgets_no_touch(instants: list[int]) -> None:
    records = [Recorder(0), Recorder(0)]
    for number, at in enumerate(instants):
        records[number % 2].touch(at, at, at, first=number % 3 == 0, missing=False)
    for number in range(3 * MOST_BINS):  # enough to make one of them wider
        records[1].touch(number * FIRST_WIDTH, number * FIRST_WIDTH, 0, first=False, missing=False)
    assert len(records[1].bins) <= MOST_BINS
    whole = together([record.document() for record in records])
    width, bins = merged([whole])
    assert width == max(record.width for record in records)
    assert sum(row[0] for row in bins.values()) == whole["touches"] == len(instants) + 3 * MOST_BINS
    assert sum(row[1] for row in bins.values()) == len(range(0, len(instants), 3))


def test_fairness_is_one_where_everybody_gets_the_same() -> None:
    assert fairness([5.0] * 7) == 1.0
    assert fairness([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert fairness([]) == 1.0


# --- expected ---------------------------------------------------------------------------------------------------------


def test_expected_contents_of_a_file_of_zeros_and_of_a_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abcdef")
    (tmp_path / "load_rule.py").write_text("def make(at, n): return None if at else bytes([7] * n)\n")
    monkeypatch.chdir(tmp_path)
    assert expected.parse(str(tmp_path / "file"))(2, 3) == b"cde"
    assert expected.parse("zeros")(5, 2) == b"\0\0"
    gc.collect()
    rule = expected.parse("handler:load_rule:make?size=1G")
    assert (rule(0, 2), rule(8, 2)) == (b"\7\7", b"\0\0")
    assert expected.size_of(str(tmp_path / "file")) == 6
    assert expected.size_of("zeros") is None
    for wrong in ("handler:load_rule", "handler:no_such:make", "handler:load_rule:no_such"):
        with pytest.raises(BadInput):
            expected.parse(wrong)


# --- the watch --------------------------------------------------------------------------------------------------------


def group_of(count: int) -> Any:
    return SimpleNamespace(clients=[SimpleNamespace(index=n, pid=100 + n) for n in range(count)])


def control_of(count: int) -> Any:
    clients = [{"pid": 100 + n, "worker_pid": 200 + n, "state": "running"} for n in range(count)]
    document = {"blocks": [{"name": "b", "received": 1, "pages": 4}], "clients": clients, "totals": {}}
    return SimpleNamespace(status=lambda: document)


def test_workers_are_killed_in_turns_and_never_into_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "kill_a_worker", lambda control, client: client["worker_pid"])
    now = 0.0
    monkeypatch.setattr(watch.Watch, "now", property(lambda self: now))
    seen = watch.Watch(control_of(3), group_of(3), "b", 0, 0.1, 1)
    for step in range(400):
        now = step / 10
        assert seen.step() > 0
    victims = [kill["client"] for kill in seen.kills]
    assert sorted(victims[:3]) == sorted(victims[3:6]) == [0, 1, 2]
    assert len(victims) == 3 * watch.FORGIVEN
    assert seen.residency[0][1] == 0.25
    now += watch.MINUTE
    seen.step()
    assert len(seen.kills) == 3 * watch.FORGIVEN + 1


def test_a_supervisor_that_dies_is_told_and_not_asked_again() -> None:
    def dead() -> dict[str, Any]:
        raise PostcopyError("no supervisor")

    seen = watch.Watch(cast(Any, SimpleNamespace(status=dead)), group_of(1), "b", time.monotonic_ns(), 0, 1)
    assert seen.step() > 0
    assert seen.step() == watch.LONGEST
    assert seen.trouble == "no supervisor"


# --- the report -------------------------------------------------------------------------------------------------------


def found_by(clients: int, touches: int, **more: Any) -> dict[str, Any]:
    """Results of ``clients`` clients of ``touches`` touches each, made by the recorder itself."""
    clients_done = []
    for index in range(clients):
        record = Recorder(0, open_loop=True)
        for number in range(touches):
            begun = number * 50_000
            taken = 90_000 + index * 100 if number % 50 == 0 else 500
            record.touch(begun, begun + taken, begun, first=number % 2 == 0, missing=number % 50 == 0)
        result = {**together([record.document()]), "compared": 1, "wrong": 0, "first_wrong": None, "seconds": 1.0}
        result["first_touches"] = touches // 2
        clients_done.append(
            SimpleNamespace(index=index, mode="private", state="done", touches=touches, result=result, pid=100 + index)
        )
    group: Any = SimpleNamespace(clients=clients_done, failures=list)
    seen = watch.Watch(control_of(clients), group, "b", time.monotonic_ns(), 0, 1)
    seen.sample()
    seen.kills.append({"at": 0.01, "client": 0, "worker_pid": 5})
    asked = {"touches": touches, "seconds": 0.0, "rate": 10.0, "think": 0.0, "ramp": 1.0, "threads": 2}
    asked |= {"writes": 0.5, "kill_workers": 1.0}
    found = {**results_of(group, seen, 1.0), "asked": asked, "size": 1 << 20, "pattern": "zipf", "mode": "mixed"}
    return {**found, "block": "<b>", "verified": True, **more}


@pytest.fixture(scope="module")
def fonts() -> None:
    """matplotlib keeps the fonts that it has used open, for ever: have it open them before a test looks."""
    from postcopy.load import plots

    plots.poster(found_by(1, 3000), "title", "/dev/null")
    plots.panel("rates", found_by(1, 3000))


@pytest.mark.usefixtures("fonts")
def test_a_page_of_its_own(tmp_path: Path) -> None:
    target = tmp_path / "load.html"
    report.ReportWriter(str(target), ["load", "--report", "<x>"]).write(found_by(2, 3000))
    text = target.read_text("utf-8")
    assert text.count("<svg") == 6
    assert "<b>" not in text.replace("&lt;b&gt;", "")
    assert not re.search(r"""(src|href)\s*=\s*['"]?(http|//|file)""", text)
    for word in ("p99", "fairness", "was killed (SIGKILL)", "open loop", "&lt;x&gt;", "was right"):
        assert word in text, word


@pytest.mark.usefixtures("fonts")
def test_a_text_with_its_picture(tmp_path: Path) -> None:
    report.ReportWriter(str(tmp_path / "load.md"), ["load"]).write(found_by(2, 3000, wrong=3))
    text = (tmp_path / "load.md").read_text("utf-8")
    assert "**Failed.** 3 bytes were not what they should be" in text
    assert "![plots](load-plots.png)" in text
    assert (tmp_path / "load-plots.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["/tmp/load.pdf", "/tmp/load", "/no/such/place/load.html"])
def test_a_report_that_cannot_be_is_known_before_the_test_runs(path: str) -> None:
    with pytest.raises(BadInput):
        report.ReportWriter(path, [])


def test_without_matplotlib_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "postcopy.load.plots", None)
    monkeypatch.delattr(postcopy.load, "plots", raising=False)  # another test may have imported it
    with pytest.raises(PostcopyError, match=r"postcopy\[report\]"):
        report.ReportWriter("/tmp/load.html", [])


def test_latencies_in_the_unit_that_people_choose() -> None:
    assert [report.human(us) for us in (0.5, 999.0, 1500.0, 2_500_000.0)] == ["0.5 us", "999.0 us", "1.50 ms", "2.50 s"]


@pytest.mark.usefixtures("fonts")
def test_plots_overwrite_only_those_of_the_earlier_report(tmp_path: Path) -> None:
    (tmp_path / "load.png").write_bytes(b"a photograph")
    for _ in range(2):  # the second report of that name replaces the first
        report.ReportWriter(str(tmp_path / "load.md"), ["load"]).write(found_by(1, 3000))
    assert (tmp_path / "load.png").read_bytes() == b"a photograph"
    (tmp_path / "x-plots.png").write_bytes(b"a photograph")
    with pytest.raises(PostcopyError, match=r"x-plots\.png, which is not of an earlier report"):
        report.ReportWriter(str(tmp_path / "x.md"), ["load"])
