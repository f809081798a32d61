"""The format of traces, the ring, and what is made of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy import traces
from postcopy.errors import PostcopyError
from postcopy.load import replay
from postcopy_protocol import trace
from postcopy_protocol.errors import BadInput
from postcopy_supervisor.observe.recorder import Recorder, Ring
from postcopy_workers.recording import Recording

HEAD = trace.Header(1.5, 10, (trace.Traced(1, "ram0", 100 * 4096 - 7, 4096), trace.Traced(2, "röm", 4096, 4096)))

fault = st.builds(
    trace.Fault,
    at=st.integers(0, (1 << 56) - 1),
    client=st.integers(0, (1 << 32) - 1),
    block=st.integers(0, (1 << 16) - 1),
    page=st.integers(0, (1 << 48) - 1),
    kind=st.integers(0, 3),
    latency=st.integers(0, (1 << 32) - 1),
    write=st.booleans(),
    announced=st.booleans(),
)


def packed(one: trace.Fault) -> bytes:
    kind = one.kind | trace.WRITE * one.write | trace.ANNOUNCED * one.announced
    return trace.pack(one.at, one.client, one.block, one.page, kind, one.latency)


@given(st.lists(fault), st.integers(0, 23))
def test_what_is_written_is_read(found: list[trace.Fault], more: int) -> None:
    """Also when the writer died in the middle of a record."""
    data = HEAD.encode() + b"".join(packed(one) for one in found) + bytes(more)
    head, start = trace.read_header(data)
    assert head == HEAD
    assert list(trace.faults(data, start)) == found


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: trace.MAGIC + data))
def test_what_is_no_trace_is_said_in_one_line(data: bytes) -> None:
    with pytest.raises(BadInput):
        trace.read_header(data)


@given(st.integers(0, len(HEAD.encode()) - 1))
def test_a_head_that_is_cut_off(length: int) -> None:
    with pytest.raises(BadInput):
        trace.read_header(HEAD.encode()[:length])


def test_the_longest_latency_is_the_longest_that_fits() -> None:
    (one,) = trace.faults(trace.pack(1, 2, 3, 4, 0, 1 << 40), 0)
    assert one.latency == trace.LONGEST


# --- the ring ---------------------------------------------------------------------------------------------------------


class Ringed:
    """A worker's end and the supervisor's end of one ring, and the file."""

    def __init__(self, path: Path) -> None:
        self.figures = memoryview(bytearray(trace.FIGURES_BYTES))
        self.clients: dict[int, Any] = {5: None}
        self.worker = Recording(self.figures, 5)
        block: Any = SimpleNamespace(number=1, name="ram0", size=4096 * 10**6, page_size=4096)
        self.recorder = Recorder(str(path), [block], self.clients.keys())
        self.recorder._rings[5] = Ring(
            self.figures[trace.RING_HEAD : trace.RING_AT].cast("Q"), self.figures[trace.RING_AT :]
        )

    def put(self, *pages: int) -> None:
        for page in pages:
            self.worker.put(self.recorder._monotonic + page, 1, page, trace.PLACED, 100)


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_the_ring_takes_is_in_the_file_and_the_rest_is_counted(tmp_path: Path, rounds: int) -> None:
    ring, many = Ringed(tmp_path / "t"), trace.RING_RECORDS * 2 // 3
    for number in range(rounds):
        ring.put(*range(number * many, (number + 1) * many))
        ring.recorder._round()
    ring.put(*range(10**6, 10**6 + trace.RING_RECORDS + 7))
    ring.recorder.close()
    found = traces.read(str(tmp_path / "t"))
    assert [one.page for one in found.faults[: rounds * many]] == list(range(rounds * many))
    assert len(found.faults) == rounds * many + trace.RING_RECORDS == ring.recorder.records
    assert all(one.at == one.page and one.client == 5 for one in found.faults)
    assert ring.recorder.lost == 7


def test_a_client_that_has_left_is_emptied_once_more_and_forgotten(tmp_path: Path) -> None:
    ring = Ringed(tmp_path / "t")
    ring.put(1, 2)
    ring.clients.clear()
    ring.recorder._round()
    assert (ring.recorder.records, ring.recorder._rings) == (2, {})
    ring.recorder.close()


def test_nonsense_in_a_ring_is_not_written(tmp_path: Path) -> None:
    ring = Ringed(tmp_path / "t")
    ring.figures[4096:4104] = (1 << 63).to_bytes(8, "little")
    ring.recorder.close()
    assert ring.recorder.records == 0


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path: Path) -> None:
    ring = Ringed(tmp_path / "t")
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), ring.recorder._file)
    ring.put(1, 2, 3)
    ring.recorder._round()
    ring.put(4)
    ring.recorder.close()
    assert (ring.recorder.records, ring.recorder.lost) == (0, 4)
    assert "space" in ring.recorder.failed


def test_a_file_that_cannot_be_written_is_said_at_once() -> None:
    with pytest.raises(BadInput, match="/no/such/place"):
        Recorder("/no/such/place", [], ())


# --- what is made of them ---------------------------------------------------------------------------------------------


def written(path: Path, *found: tuple[int, int, int]) -> str:
    """A trace of block 1: (at, client, page) each."""
    data = b"".join(trace.pack(at, client, 1, page, trace.PLACED, 1000 * page) for at, client, page in found)
    path.write_bytes(HEAD.encode() + data)
    return str(path)


def test_a_summary(tmp_path: Path) -> None:
    told = traces.summary(traces.read(written(tmp_path / "t", (10**9, 1, 5), (0, 1, 4), (5, 2, 9), (2 * 10**9, 1, 9))))
    assert (told["faults"], told["seconds"], told["faults_per_s"]) == (4, 2.0, 2.0)
    (block,) = told["blocks"]
    assert (block["block"], block["pages"], block["clients"], block["in_order"]) == ("ram0", 3, 2, 0.25)
    assert block["share_of_block"] == 0.03
    assert block["most_wanted"][0] == [9, 2]
    assert traces.summary(traces.read(written(tmp_path / "e")))["blocks"] == []


def test_a_difference(tmp_path: Path) -> None:
    one = traces.read(written(tmp_path / "a", (0, 1, 1), (1, 1, 2), (2, 1, 3)))
    two = traces.read(written(tmp_path / "b", (0, 1, 3), (1, 1, 4)))
    (block,) = traces.difference(one, two)["blocks"]
    assert (block["in_both"], block["only"], block["overlap"]) == (1, [2, 1], 0.25)


def test_every_toucher_plays_a_client_at_its_times(tmp_path: Path) -> None:
    path = written(tmp_path / "t", (100, 7, 1), (150, 9, 2), (300, 7, 3))
    assert replay.share(path, "ram0", 0) == [(0, 1, False), (200, 3, False)]
    assert replay.share(path, "ram0", 1) == [(50, 2, False)]
    assert replay.share(path, "ram0", 2) == replay.share(path, "ram0", 0)
    with pytest.raises(PostcopyError, match="has no block other"):
        replay.share(path, "other", 0)
    with pytest.raises(PostcopyError, match="no fault"):
        replay.share(path, "röm", 0)


def of(*faults: tuple[int, int], name: str = "ram0") -> traces.Trace:
    """A trace of ram0: page, and milliseconds waited."""
    found = [trace.Fault(at, 1, 1, page, 3, wait * 1_000_000, False, False) for at, (page, wait) in enumerate(faults)]
    return traces.Trace("x.trace", trace.Header(0.0, 0, (trace.Traced(1, name, 100 * 4096, 4096),)), found)


def test_what_a_replay_is_worth() -> None:
    known = traces.WorkingSet("/s/vm", 100 * 4096, frozenset(range(10, 20)))
    without = of(*((page, 20) for page in range(15, 25)))
    told = traces.replayed(known, without, None)
    assert (told["coverage"], told["waste"], told["needed_pages"], told["set_pages"]) == (0.5, 0.5, 10, 10)
    assert (told["waited_s"], told["waited_for_set_s"]) == (0.2, 0.1) and "saved_s" not in told
    told = traces.replayed(known, without, of((24, 30)))
    assert told["faults"] == [10, 1] and told["saved_s"] == 0.17


def test_a_replay_and_a_trace_that_do_not_fit() -> None:
    known = traces.WorkingSet("/s/vm", 99 * 4096, frozenset({1}))
    with pytest.raises(PostcopyError, match="has no block of 405504 bytes"):
        traces.replayed(known, of((1, 1)), None)
    with pytest.raises(PostcopyError, match="bytes ram7"):
        traces.replayed(traces.WorkingSet("/s/vm", 100 * 4096, frozenset()), of((1, 1)), None, "ram7")


def test_a_header_of_others_gives_no_orders(tmp_path: Path) -> None:
    """Its names are shown on terminals, and its sizes are divided by."""
    blocks = (trace.Traced(1, "\x1b]0;owned\x07", 4096, 0), trace.Traced(2, "\ud800", -1, 4096))
    path = tmp_path / "trace"
    path.write_bytes(trace.Header(1.0, 1, blocks).encode() + trace.pack(0, 1, 1, 0, 0, 5))
    found = traces.read(str(path))
    assert [block.name for block in found.head.blocks] == ["?]0;owned?", "?"]
    assert traces.summary(found)["blocks"][0]["faults"] == 1
