"""Parts of the client that need no kernel: deadlines, jobs, comparisons, patterns, options."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import postcopy
from postcopy.block import Block
from postcopy.client import users_of
from postcopy.commands.demo import default_file
from postcopy.commands.verify import compare, first_difference, pieces
from postcopy.deadline import Deadline
from postcopy.errors import PageLost, PageTimeout, PostcopyError
from postcopy.load.client_group import ClientProcess
from postcopy.load.patterns import PATTERNS, Place, order
from postcopy.populate import STEP, PopulateJob, Populator, wait_for
from postcopy.supervisor import _options

PAGE = 4096


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_no_deadline_is_never() -> None:
    never = Deadline(None)
    assert (never.remaining(), never.milliseconds(), never.lock_timeout()) == (None, None, -1)


def test_a_deadline_passes() -> None:
    soon = Deadline(0.01)
    assert 0 < soon.lock_timeout() <= 0.01
    assert soon.milliseconds() in range(1, 12)
    time.sleep(0.011)
    assert (soon.remaining(), soon.milliseconds()) == (0.0, 0)
    assert Deadline(0).milliseconds() == 0
    for long in (float("inf"), 1e300):  # what no system call takes
        assert Deadline(long).lock_timeout() <= threading.TIMEOUT_MAX
        assert Deadline(long).remaining() is None


@pytest.mark.parametrize("seconds", ["5", b"5", [1]])
def test_a_timeout_is_a_number(seconds: Any) -> None:
    with pytest.raises(TypeError, match="a timeout is a number of seconds or None, not"):
        Deadline(seconds)


def test_numbers_of_numpy_are_numbers() -> None:
    assert isinstance(Deadline(cast(float, numpy.float32(5))).remaining(), float)
    assert users_of(numpy.int64(5)) == users_of((5, 5)) == {5}  # type: ignore[arg-type]


@pytest.mark.parametrize("users", ["15", None, 1.5, ["a"]])
def test_users_are_numbers(users: Any) -> None:
    with pytest.raises(TypeError):
        users_of(users)


def test_blocks_of_a_supervisor_are_a_mapping() -> None:
    with pytest.raises(TypeError, match="a mapping of names to SOURCEs, not list"):
        postcopy.Supervisor(["ram0=file"])  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_deadline_that_makes_no_sense(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Deadline(seconds)


# --- populate ---------------------------------------------------------------------------------------------------------


class FakeMemory:
    """Populates nothing; ``bad`` says what the page at an offset answers."""

    name = "ram0"
    page_size = PAGE

    def __init__(self, bad: dict[int, int | None] | None = None, gate: threading.Event | None = None) -> None:
        self.bad = bad or {}
        self.gate = gate
        self.asked: list[tuple[int, int]] = []

    def populate(self, offset: int, length: int) -> int | None:
        self.asked.append((offset, length))
        if self.gate is not None:
            self.gate.wait(10)
        return next((code for place, code in self.bad.items() if offset <= place < offset + length), 0)

    def lost(self, offset: int) -> PageLost:
        return PageLost(block=self.name, offset=offset)


def test_a_fill_goes_in_steps() -> None:
    memory = FakeMemory()
    wait_for(PopulateJob(memory, PAGE, 3 * STEP), Deadline(10))
    assert memory.asked == [(PAGE, STEP), (PAGE + STEP, STEP), (PAGE + 2 * STEP, STEP - PAGE)]


@pytest.mark.parametrize("code", [133, errno.EFAULT])
def test_a_poisoned_page_is_found_in_its_step(code: int) -> None:
    place = STEP + 5 * PAGE
    with pytest.raises(PageLost) as caught:
        wait_for(PopulateJob(FakeMemory({place: code}), 0, 2 * STEP), Deadline(10))
    assert caught.value.offset == place


def test_other_errors_are_what_they_are() -> None:
    with pytest.raises(OSError, match="ram0") as caught:
        wait_for(PopulateJob(FakeMemory({0: errno.ENOMEM}), 0, PAGE), Deadline(10))
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(ValueError, match="closed"):
        wait_for(PopulateJob(FakeMemory({0: None}), 0, PAGE), Deadline(10))


def test_a_fill_that_is_given_up_stops_at_the_next_step() -> None:
    gate = threading.Event()
    memory = FakeMemory(gate=gate)
    job = PopulateJob(memory, 0, 10 * STEP)
    with pytest.raises(PageTimeout):
        wait_for(job, Deadline(0.05))
    gate.set()
    assert job.finished.wait(10)
    assert len(memory.asked) == 1


def test_prefetches_run_one_after_the_other_in_one_thread_and_swallow_errors() -> None:
    prefetcher = Populator("postcopy-prefetch")
    bad, good = PopulateJob(FakeMemory({0: 133}), 0, PAGE), PopulateJob(FakeMemory(), 0, PAGE)
    prefetcher.submit(bad)
    prefetcher.submit(good)
    assert good.finished.wait(10)
    assert isinstance(bad.error, PageLost)
    assert good.error is None
    deadline = time.monotonic() + 10
    while any(thread.name == "postcopy-prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a fork beside a thread is a warning from Python 3.12 on"
        time.sleep(0.01)


# --- comparing --------------------------------------------------------------------------------------------------------


class FakeBlock:
    """Enough of a block to compare."""

    name, page_size = "ram0", PAGE

    def __init__(self, data: bytes) -> None:
        self.buf, self.size, self.pages = memoryview(bytearray(data)), len(data), -(-len(data) // PAGE)

    def ensure(self, offset: int, length: int) -> None:
        assert 0 <= offset < offset + length <= self.size


def fake(data: bytes) -> Block:
    return cast(Block, FakeBlock(data))


@given(st.binary(min_size=1, max_size=200), st.integers(0, 199), st.integers(0, 50))
def test_the_first_difference_is_found(data: bytes, place: int, start: int) -> None:
    memory = memoryview(bytes(start) + data)
    assert first_difference(memory, start, data) is None
    place %= len(data)
    wrong = bytearray(data)
    for later in range(place, len(data), 3):
        wrong[later] ^= 0x80
    assert first_difference(memory, start, bytes(wrong)) == start + place


def test_compare_tells_where(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * PAGE + 7)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert compare(fake(data), file.fileno(), "file") == len(data)
        wrong = data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(PostcopyError, match=f"offset {len(data) - 1}"):
            compare(fake(wrong), file.fileno(), "file")
        with pytest.raises(PostcopyError, match=f"{len(data) - 1} bytes"):
            compare(fake(data[:-1]), file.fileno(), "file")


def test_a_file_that_shrinks_meanwhile_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))

    class Shrinking(FakeBlock):
        def ensure(self, offset: int, length: int) -> None:
            os.truncate(path, PAGE)

    with path.open("rb") as file, pytest.raises(PostcopyError, match=f"{PAGE}.*nothing"):
        compare(cast(Block, Shrinking(bytes(2 * PAGE))), file.fileno(), "file")


@given(st.integers(1, 300), st.floats(0.001, 1.0))
def test_pieces_are_inside_and_as_many_as_wanted(pages: int, sample: float) -> None:
    block = fake(bytes(pages * PAGE - 5))
    found = list(pieces(block, sample))
    assert all(0 <= start < stop <= block.size for start, stop in found)
    assert found == sorted(set(found))
    covered = sum(stop - start for start, stop in found)
    assert covered == block.size if sample >= 1 else len(found) == max(1, round(pages * sample))


# --- load test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@given(first=st.integers(0, 50), span=st.integers(1, 500), stride=st.integers(1, 600), index=st.integers(0, 1))
def test_patterns_stay_in_their_range(pattern: str, first: int, span: int, stride: int, index: int) -> None:
    pages = list(islice(order(pattern, Place(index, 2, first, first + span, 9, stride)), 200))
    assert len(pages) == 200
    assert all(first <= page < first + span for page in pages)


@given(span=st.integers(1, 300), stride=st.integers(1, 400), index=st.integers(0, 3))
def test_a_stride_comes_to_every_page_once_a_round(span: int, stride: int, index: int) -> None:
    pages = list(islice(order("stride", Place(index, 4, 0, span, 9, stride)), span))
    assert sorted(pages) == list(range(span))


def test_what_the_patterns_are_named_for() -> None:
    def take(pattern: str, index: int, touches: int = 1000) -> list[int]:
        return list(islice(order(pattern, Place(index, 2, 0, 100, 9)), touches))

    assert take("sequential", 0, 100) == list(range(100))
    assert take("sequential", 1, 3) == [50, 51, 52]
    assert take("lockstep", 0) == take("lockstep", 1)
    assert take("random", 0) != take("random", 1)
    counts = sorted((take("zipf", 0).count(page) for page in range(100)), reverse=True)
    assert counts[0] > 100  # one page is far more popular than the many
    assert sum(counts[50:]) < 200


def test_messages_of_a_client_may_come_in_pieces() -> None:
    member = ClientProcess(0, "private", 1, -1, -1, -1)
    assert list(member.take(b'{"touches"')) == []
    assert list(member.take(b': 5}\nnoise\n{"a": 1}\n{')) == [{"touches": 5}, {"a": 1}]


def test_the_default_file_of_the_demo_is_large() -> None:
    assert Path(default_file()).stat().st_size > 1 << 20


def test_keyword_arguments_become_options() -> None:
    assert _options(
        {"page_size": "2M", "allow_uid": [1, 2], "recover": True, "quiet": False, "rate": None, "n": 0}
    ) == [
        *("--page-size", "2M", "--allow-uid", "1", "--allow-uid", "2", "--recover", "--n", "0"),
    ]
