"""The chaos monkey's mind: what is done to whom, after how long, for how long. All of it comes from the seed alone.

There are two monkeys, one for workers and clients, of which any number may die, and one for the service, which waits
until the service is back. An act is drawn with the same number of draws whatever it is, and never looks at what the
last one did: two runs of one seed do the same acts in the same order. Only which process stands behind "the third of
the workers", and how long an act waits until the service may bear it, is the run's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

HOUSE = ("supervisor", "custodian", "source", "network", "directory", "everything")
"""One of these at a time: the promise is that any one of them may die, plus any number of workers and clients.
``everything`` is supervisor, custodian and all workers at once: the next supervisor rescues the clients."""
WEIGHTS = {
    "worker kill": 30,
    "worker stop": 6,
    "worker stop for good": 3,
    "client kill": 12,
    "client stop": 6,
    "supervisor kill": 8,
    "supervisor kill twice": 2,
    "supervisor stop": 4,
    "supervisor upgrade": 4,
    "custodian kill": 8,
    "custodian stop": 3,
    "source kill": 8,
    "source stop": 4,
    "network cut": 4,
    "network stall": 3,
    "network down": 3,
    "directory full": 2,
    "everything kill": 2,
}
EVERYTHING = frozenset({"everything kill"})
LONGEST_STOP = 3.0
CROWD_KINDS = frozenset(kind for kind in WEIGHTS if kind.partition(" ")[0] not in HOUSE)
HOUSE_KINDS = frozenset(WEIGHTS) - CROWD_KINDS


@dataclass(frozen=True, slots=True)
class Act:
    """``kind`` is ``WHO WHAT``. ``victims``: numbers in [0, 1), one a victim, to be taken among those there are;
    ``workers``: how many workers die with one of the service. Seconds: ``gap`` before the act, ``pause`` within it."""

    number: int
    kind: str
    gap: float
    pause: float
    victims: tuple[float, ...]
    workers: int

    @property
    def who(self) -> str:
        return self.kind.partition(" ")[0]

    @property
    def of_house(self) -> bool:
        return self.who in HOUSE


def acts(seed: int, mean_gap: float, kinds: frozenset[str], without: frozenset[str] = frozenset()) -> Iterator[Act]:
    """All acts of a seed that are of these ``kinds``, one every ``mean_gap`` seconds on average; ``without``: kinds, or
    first words, left out."""
    chance = random.Random(f"{seed} {sorted(kinds)}")
    weights = {
        kind: WEIGHTS[kind] for kind in WEIGHTS if kind in kinds and not {kind, kind.partition(" ")[0]} & without
    }
    number = 0
    while weights:
        number += 1
        kind = chance.choices(list(weights), list(weights.values()))[0]
        gap, pause = chance.expovariate(1 / mean_gap), chance.uniform(0.05, LONGEST_STOP)
        victims = tuple(chance.random() for _ in range(4))[: chance.choice((1, 1, 1, 2, 4))]
        yield Act(number, kind, gap, pause, victims, chance.choice((0, 0, 0, 1, 4)))
