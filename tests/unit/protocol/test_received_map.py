"""The received map against a table of what each pair of mark and presence means."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.geometry import runs
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED, STATES, polluted, runs_of

quick = settings(deadline=None)
maps = st.binary(max_size=200).map(lambda data: bytes(byte & 3 for byte in data))


def pages(found: object) -> list[int]:
    return [page for start, stop in found for page in range(start, stop)]  # type: ignore[attr-defined]


@quick
@given(maps, st.sampled_from((MISSING, PLACING, RECEIVED, LOST)))
def test_runs_of_a_state_are_its_pages(states: bytes, state: int) -> None:
    found = list(runs_of(memoryview(states), state))
    assert pages(found) == [page for page, byte in enumerate(states) if byte == state]
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_states_have_names() -> None:
    assert [STATES[state] for state in (MISSING, PLACING, RECEIVED, LOST)] == ["missing", "placing", "received", "lost"]


@quick
@given(maps, st.sets(st.integers(0, 199)))
def test_the_audit_law(states: bytes, present: set[int]) -> None:
    present = {page for page in present if page < len(states)}
    found = polluted(states, list(runs(present)))
    assert pages(found) == sorted(page for page in present if states[page] == MISSING)


@pytest.mark.parametrize("state", [PLACING, RECEIVED, LOST])
def test_what_is_marked_otherwise_is_no_finding(state: int) -> None:
    assert polluted(bytes([state] * 8), [(0, 8)]) == ()


def test_the_map_lives_in_shared_memory_and_is_read_there() -> None:
    states = bytearray(16)
    states[3:5] = bytes([PLACING] * 2)
    assert polluted(memoryview(states), [(2, 6)]) == ((2, 3), (5, 6))
    states[2] = RECEIVED
    assert polluted(memoryview(states), [(2, 6)]) == ((5, 6),)
