"""When a replay is given up, and when it is not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from postcopy_protocol.caibx import index_of
from postcopy_sources.storage.working_sets import LEAST_MISSES, PROBE, Replay

INDEX = index_of(((bytes([n]) * 32, 64 * 4096) for n in range(100)), 64 * 4096)


@pytest.mark.parametrize(("share", "complete"), [(0.0, False), (0.9, True), (1.0, True)])
def test_a_set_that_is_not_needed_is_given_up(share: float, complete: bool) -> None:
    """A client that needs pages of the set with this share, two for each page that is sent: what was sent in time
    is not seen."""
    pages = list(range(3200))
    replay, sent, others = Replay("ram0", INDEX, pages), list[int](), iter(range(3200, 6400))
    needed = iter(pages)

    def push(number: int, some: Sequence[int]) -> None:
        assert all(INDEX.at(page * 4096) == number for page in some)
        for page in some:
            sent.append(page)
            if len(sent) % 100 < 100 * share:
                wanted = next(needed)
                if wanted not in sent:
                    replay.asked(wanted)
            else:
                replay.asked(next(others))

    replay.send(push, lambda number: None)
    assert not replay.running and replay.pays is complete
    assert (sorted(sent) == pages) is complete
    if not complete:
        assert len(sent) < LEAST_MISSES + 2 * 64


def test_the_order_is_that_of_first_use() -> None:
    pages = [640, 641, 3, 700, 2]
    assert list(Replay("ram0", INDEX, pages).order.items()) == [(10, [640, 641, 700]), (0, [2, 3])]
    many = Replay("ram0", INDEX, list(range(2 * PROBE)))
    assert sum(map(len, many.rest.values())) == 2 and sum(map(len, many.order.values())) == 2 * PROBE - 2
