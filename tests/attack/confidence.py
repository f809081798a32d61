"""How sure is it that one p99 is more than N times another one?

Faults of one moment are alike: a delay of the scheduler makes several of them slow. So the pieces of time are drawn
again and again (bootstrap), each with the piece of the other kind that was measured right beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SURE = 0.99
DRAWS = 400
LEAST_PIECES, LEAST_FAULTS = 10, 500
"""Fewer decide nothing."""
HOLDS, EXCEEDS, OPEN = "holds", "exceeds", "open"
Pieces = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two p99, and between which figures it is with confidence."""

    x: float
    low: float = 0.0
    high: float = float("inf")

    def verdict(self, bound: float) -> str:
        return HOLDS if self.high <= bound else EXCEEDS if self.low > bound else OPEN

    def __str__(self) -> str:
        return f"{self.x:.1f} ({self.low:.1f}-{self.high:.1f})"


def ratio_of(under: Pieces, beside: Pieces) -> Ratio:
    """The ratio of the p99 of the first to that of the second."""
    pieces = min(len(under), len(beside))
    under, beside = under[:pieces], beside[:pieces]
    once = np.ones((1, pieces), dtype=np.int64)
    if min(sum(map(len, under)), sum(map(len, beside))) == 0:
        return Ratio(float("nan"))
    x = float(_p99(under, once)[0] / _p99(beside, once)[0])
    if pieces < LEAST_PIECES or min(sum(map(len, under)), sum(map(len, beside))) < LEAST_FAULTS:
        return Ratio(x)
    drawn = np.random.default_rng(1).multinomial(pieces, [1 / pieces] * pieces, size=DRAWS)
    low, high = np.quantile(_p99(under, drawn) / _p99(beside, drawn), [(1 - SURE) / 2, (1 + SURE) / 2])
    return Ratio(x, float(low), float(high))


def _p99(pieces: Pieces, drawn: np.ndarray) -> np.ndarray:
    """The p99 of each draw; ``drawn``: how often it has each piece."""
    took = np.concatenate([np.asarray(piece, dtype=float) for piece in pieces])
    piece = np.repeat(np.arange(len(pieces)), [len(one) for one in pieces])
    order = np.argsort(took)
    weight = np.cumsum(drawn[:, piece[order]], axis=1)
    place = np.argmax(weight > 0.99 * weight[:, -1:], axis=1)
    found: np.ndarray = np.maximum(1.0, took[order][place])
    return found
