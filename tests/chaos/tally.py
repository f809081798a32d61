"""The sum of all rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What all rounds together have shown."""

    kills: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    slowest_touch: float = 0.0
    findings: list[str] = field(default_factory=list)
    rounds: int = 0
