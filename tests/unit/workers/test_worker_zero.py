"""Worker zero's errands on the simulated kernel: everything in the range is present, or named as lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol import counters
from postcopy_protocol.codec import unpack_offsets
from postcopy_protocol.messages import Fetch
from postcopy_protocol.received_map import FLAGS, LOST, MISSING, PLACING, RECEIVED
from postcopy_workers.placing import Calls
from postcopy_workers.worker_zero import PIECE, STARVED_SECONDS, RangePlacer
from tests.simulated.effort import effort
from tests.simulated.world import Kind, World

PAGES = 8


class Zero:
    """Worker zero over one block; its clock goes only while it waits."""

    def __init__(self, *, kind: str = "file", page_size: int = 4096, pages: int = PAGES) -> None:
        self.world = World([Kind("private")], pages, kind=kind, page_size=page_size)
        kernel = self.world.kernel
        self.now = 0.0
        self.relief = float("inf")
        block = self.world.block(Calls(kernel.ioctl, kernel.lseek, kernel.pread, kernel.pwrite))
        self.words, self.control = (memoryview(bytearray(counters.PAGE_BYTES)).cast("Q") for _ in range(2))
        self.placer = RangePlacer({0: block}, self.words, self.control, lambda: self.now, self._pause)

    def _pause(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.relief:
            self.world.memory.room = None

    def fetch(self, first: int, end: int) -> list[int]:
        """Lost pages of the range."""
        size = self.world.page_size
        answer = self.placer.fetch(Fetch(0, first * size, (end - first) * size))
        assert (answer.block, answer.offset, answer.length) == (0, first * size, (end - first) * size)
        assert self.words[counters.BUSY_SINCE_NS] == 0
        return [offset // size for offset in unpack_offsets(answer.lost)]

    @property
    def marks(self) -> list[int]:
        return list(self.world.map[:-FLAGS])


states = st.lists(
    st.sampled_from(((MISSING, False), (PLACING, False), (PLACING, True), (RECEIVED, True), (RECEIVED, False))),
    min_size=PAGES,
    max_size=PAGES,
)


@given(states, st.integers(0, PAGES - 1), st.integers(1, PAGES))
@effort(150)
def test_whatever_was_there_before_all_is_present_and_right_afterwards(
    before: list[tuple[int, bool]], first: int, length: int
) -> None:
    zero = Zero()
    for page, (state, present) in enumerate(before):
        zero.world.map[page] = state
        if present:
            zero.world.memory.pages[page] = zero.world.source.page(page)
    end = min(PAGES, first + length)
    assert zero.fetch(first, end) == []
    for page in range(first, end):
        assert zero.world.memory.pages[page] == zero.world.source.page(page)
        assert zero.marks[page] == RECEIVED
    outside = [page for page in range(PAGES) if not first <= page < end]
    assert [zero.marks[page] for page in outside] == [before[page][0] for page in outside]


def test_a_range_of_several_pieces_is_placed_whole() -> None:
    pages = 2 * (PIECE >> 12) + 5
    zero = Zero(pages=pages)
    assert zero.fetch(3, pages) == []
    assert zero.marks == [MISSING] * 3 + [RECEIVED] * (pages - 3)
    assert zero.words[counters.PLACED] == pages - 3


def test_what_the_source_has_lost_is_named_and_marked_and_not_asked_for_again() -> None:
    zero = Zero(kind="handler")
    zero.world.function.lost.add(3)
    assert zero.fetch(0, PAGES) == [3]
    assert zero.marks == [LOST if page == 3 else RECEIVED for page in range(PAGES)]
    calls = zero.world.function.calls
    assert zero.fetch(3, 4) == [3]
    assert zero.world.function.calls == calls
    assert zero.world.reported("lost") == [3]


def test_a_handler_that_fails_loses_nothing_for_ever() -> None:
    zero = Zero(kind="handler")
    zero.world.function.failing.add(3)
    assert zero.fetch(0, PAGES) == [3]
    assert LOST not in zero.marks
    zero.world.function.failing.clear()
    assert zero.fetch(0, PAGES) == []


def test_a_changed_file_loses_what_is_missing_only() -> None:
    zero = Zero()
    assert zero.fetch(0, 4) == []
    zero.world.change_the_file(6 * 4096)
    assert zero.fetch(0, PAGES) == [4, 5, 6, 7]
    assert zero.marks == [RECEIVED] * 4 + [LOST] * 4
    assert set(zero.world.reported("source-changed")) == {4, 5, 6, 7}


def test_a_source_that_cannot_be_read_loses_that_page() -> None:
    zero = Zero()
    zero.world.source.unreadable.add(2)
    assert zero.fetch(0, PAGES) == [2]
    assert zero.marks[2] == LOST and zero.marks.count(RECEIVED) == PAGES - 1


def test_a_shortage_that_ends_is_waited_for() -> None:
    zero = Zero()
    zero.world.memory.room, zero.relief = 3, STARVED_SECONDS / 2
    assert zero.fetch(0, PAGES) == []
    assert zero.marks == [RECEIVED] * PAGES


def test_a_shortage_that_stays_is_told_in_bounded_time_and_loses_nothing() -> None:
    zero = Zero()
    zero.world.memory.room = 3
    assert zero.fetch(0, PAGES) == [3, 4, 5, 6, 7]
    assert STARVED_SECONDS <= zero.now < STARVED_SECONDS + 1, "not that long for every page"
    assert LOST not in zero.marks
    assert zero.world.reported("no-memory") == [3, 4, 5, 6, 7]
    zero.world.memory.room = None
    assert zero.fetch(0, PAGES) == []


def test_huge_pages_come_one_by_one() -> None:
    zero = Zero(page_size=2 << 20, pages=3)
    zero.world.map[0] = RECEIVED  # punched: marked, and not there
    assert zero.fetch(0, 3) == []
    assert sorted(zero.world.memory.pages) == [0, 1, 2] and zero.marks == [RECEIVED] * 3
    zero.world.memory.pages.clear()
    zero.world.memory.room = 0
    zero.world.map[1] = MISSING
    assert zero.fetch(1, 2) == [1]
    assert zero.world.reported("no-memory") == [1]


def test_a_strangers_page_is_not_promoted_when_its_source_is_gone() -> None:
    zero = Zero()
    zero.world.pollute(2)
    zero.world.change_the_file(100)
    assert 2 in zero.fetch(0, PAGES)
    assert zero.marks[2] == MISSING
