"""The order in which a client touches pages. Pure: the same seed gives the same order.

Every pattern is endless; the toucher decides how many touches it makes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

PATTERNS = ("random", "sequential", "zipf", "lockstep", "stride")

_SCATTER = 2654435761  # a large prime: spreads the popular pages of the zipf pattern over the block


@dataclass(frozen=True, slots=True)
class Place:
    """Toucher ``index`` of ``touchers`` (clients times threads), which touches pages ``[first, end)``."""

    index: int
    touchers: int
    first: int
    end: int
    seed: int
    stride: int = 16


class Meet(Protocol):
    """Waits until all clients have reached ``step``."""

    def __call__(self, step: int, /) -> None: ...


def no_meeting(step: int, /) -> None:
    """Waits for no other client."""


def order(pattern: str, place: Place, meet: Meet = no_meeting) -> Iterator[int]:
    """Page numbers of the pattern; ``meet`` is called before each step of ``lockstep``.

    * random: every page is equally likely; sequential: in order, each client from its own start
    * together: in order, all from the first page
    * zipf: few pages are popular; stride: every n-th page, with a new start after each round
    * lockstep: all clients touch the same random page at the same time
    """
    span, first = place.end - place.first, place.first
    own = random.Random(place.seed + place.index)
    start = span * place.index // place.touchers  # so that all clients together cover the block early
    if pattern == "sequential":
        return (first + (start + n) % span for n in count())
    if pattern == "together":
        return (first + n % span for n in count())
    if pattern == "zipf":
        return (first + (int(span ** own.random()) - 1) * _SCATTER % span for _ in count())
    if pattern == "lockstep":
        return _lockstep(first, span, random.Random(place.seed), meet)
    if pattern == "stride":
        return _strided(first, span, place.stride, start)
    return (first + own.randrange(span) for _ in count())


def _lockstep(first: int, span: int, together: random.Random, meet: Meet) -> Iterator[int]:
    for step in count(1):
        meet(step)
        yield first + together.randrange(span)


def _strided(first: int, span: int, stride: int, start: int) -> Iterator[int]:
    stride = min(stride, span)
    for first_page in count(start % stride):
        for page in range(first_page % stride, span, stride):
            yield first + page
