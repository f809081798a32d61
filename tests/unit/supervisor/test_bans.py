"""Bans of users who connect without end: when they begin, how long they are, and that they end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postcopy_supervisor.bans import FIRST_SECONDS, LONGEST_SECONDS, MOST_REFUSED, REFUSED_PER_SECOND, Bans

UID = 1001


def storm(bans: Bans, now: float, uid: int = UID) -> float:
    """The ban that refusals at one moment bring."""
    return max(bans.refused(uid, now) for _ in range(MOST_REFUSED + 1))


def test_a_storm_brings_a_ban_and_a_few_refusals_do_not() -> None:
    bans = Bans(4)
    assert max(bans.refused(UID, 0.0) for _ in range(MOST_REFUSED - 1)) == 0
    assert not bans.changed
    assert storm(bans, 0.0) == FIRST_SECONDS
    assert bans.take(0.0) == [UID]


def test_slow_refusals_never_bring_one() -> None:
    bans = Bans(4)
    assert not any(bans.refused(UID, number / (0.9 * REFUSED_PER_SECOND)) for number in range(5000))


def test_bans_grow_while_it_goes_on_and_end_when_it_is_quiet() -> None:
    bans, now, found = Bans(4), 0.0, []
    for _ in range(9):
        found.append(storm(bans, now))
        now += found[-1] + 0.1
        bans.check(now)
        assert bans.changed and bans.take(now) == []
    assert found == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    now += 2 * LONGEST_SECONDS
    bans.check(now)
    assert storm(bans, now) == FIRST_SECONDS


def test_what_was_in_the_backlog_makes_a_ban_no_longer() -> None:
    bans = Bans(4)
    assert storm(bans, 0.0) == 1
    assert max(bans.refused(UID, 0.1) for _ in range(5000)) == 0
    bans.check(1.1)
    assert bans.take(1.1) == []


def test_a_user_who_is_kept_out_stays_out_while_that_is_renewed() -> None:
    bans = Bans(1)
    assert bans.keep_out(UID, 1.0, 0.0) and bans.changed
    assert not bans.keep_out(UID, 1.25, 0.25) and bans.take(1.1) == [UID]
    assert not bans.keep_out(UID + 1, 9.0, 0.5) and bans.take(0.5) == [UID]
    bans.check(1.3)
    assert bans.changed and bans.take(1.3) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400), st.floats(0, 90)), max_size=60))
def test_never_more_than_so_many_users_and_each_is_let_in_again(steps: list[tuple[int, int, float]]) -> None:
    bans, now = Bans(4), 0.0
    for uid, count, seconds in steps:
        for _ in range(count):
            assert bans.refused(uid, now) <= LONGEST_SECONDS
        assert len(bans.take(now)) <= 4
        now += seconds
        bans.check(now)
    bans.check(now + 2 * LONGEST_SECONDS)
    assert bans.take(now + 2 * LONGEST_SECONDS) == []
