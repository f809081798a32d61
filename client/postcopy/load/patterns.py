"""In which order a client touches pages. Pure: numbers in, page numbers out; the same seed gives the same order.

Every pattern is endless: whoever touches decides how many, or how long.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

PATTERNS = ("random", "sequential", "zipf", "lockstep", "stride")

_SCATTER = 2654435761  # a large prime: spreads the popular pages of the zipf pattern over the block


@dataclass(frozen=True, slots=True)
class Place:
    """Who touches: toucher ``index`` of ``touchers`` (clients times threads), pages ``[first, end)``."""

    index: int
    touchers: int
    first: int
    end: int
    seed: int
    stride: int = 16


def order(pattern: str, place: Place, meet: Callable[[int], None] = lambda step: None) -> Iterator[int]:
    """Page numbers of the pattern. ``meet`` holds a client of ``lockstep`` up until all others have come to the step.

    * random: every page as likely as any other; sequential: in order, everybody from a start of its own
    * zipf: few pages are popular, most are not; stride: every n-th page, round and round until all were touched
    * lockstep: everybody the same random page at the same time
    """
    span, first = place.end - place.first, place.first
    own = random.Random(place.seed + place.index)
    start = span * place.index // place.touchers  # so that together they cover the block early
    if pattern == "sequential":
        return (first + (start + n) % span for n in count())
    if pattern == "zipf":
        return (first + (int(span ** own.random()) - 1) * _SCATTER % span for _ in count())
    if pattern == "lockstep":
        return _lockstep(first, span, random.Random(place.seed), meet)
    if pattern == "stride":
        return _strided(first, span, place.stride, start)
    return (first + own.randrange(span) for _ in count())


def _lockstep(first: int, span: int, together: random.Random, meet: Callable[[int], None]) -> Iterator[int]:
    for step in count(1):
        meet(step)
        yield first + together.randrange(span)


def _strided(first: int, span: int, stride: int, start: int) -> Iterator[int]:
    stride = min(stride, span)
    for lane in count(start % stride):
        for page in range(lane % stride, span, stride):
            yield first + page
