"""Figures and how they are told: rows of a table, Markdown for the documentation, JSON for programs.

A row is a median with its spread (smallest and greatest of the samples) and, where there is one, a goal: the most, or
the least, that the figure may be. A ratio's samples are ratios of pairs that ran one after the other, never a ratio of
two medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from statistics import median
from typing import Any

Pair = tuple[float, float]
"""Ours and theirs, in the same unit, measured one after the other."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``goal`` and ``stretch`` are the most it may be (the least, where ``least`` says so), or None;
    ``samples`` is what it was made from, nothing where nothing could be measured. ``held``: whether what was promised
    in the same breath, and stands in the detail, held too."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    goal: float | None = None
    stretch: float | None = None
    detail: str = ""
    samples: list[Any] = field(default_factory=list)
    least: bool = False
    held: bool = True
    failed: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, ``stretch`` (better than was asked), ``failed``, or nothing where no goal is set."""
        if self.failed:
            return "failed"
        if self.goal is None or not self.samples:
            return ""
        if not self.held or not self._within(self.goal):
            return "missed"
        return "stretch" if self.stretch is not None and self._within(self.stretch) else "met"

    def _within(self, bound: float) -> bool:
        return self.value >= bound if self.least else self.value <= bound

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Name, value, spread, goal, verdict and detail, as people read them."""
        return (
            self.name,
            _told(self.value, self.unit) if self.samples else "",
            f"{_number(self.low)} - {_number(self.high)}" if len(self.samples) > 1 else "",
            self._goal_told(),
            self.verdict,
            self.detail,
        )

    def _goal_told(self) -> str:
        if self.goal is None:
            return ""
        told = f"{'>=' if self.least else '<='} {_told(self.goal, self.unit)}"
        return told if self.stretch is None else f"{told} ({_number(self.stretch)})"


HEADINGS = ("figure", "median", "spread", "goal (stretch)", "verdict", "from")


def ratio_row(
    name: str,
    pairs: Sequence[Pair],
    goal: float | None = None,
    stretch: float | None = None,
    *,
    unit: str = "us",
    labels: tuple[str, str] = ("ours", "C"),
    least: bool = False,
) -> Row:
    """A ratio ours/theirs from pairs; the detail tells both medians in ``unit``."""
    ratios = [ours / theirs for ours, theirs in pairs]
    ours, theirs = (median(side) for side in zip(*pairs, strict=True))
    detail = f"{labels[0]} {_told(ours, unit)}, {labels[1]} {_told(theirs, unit)}, {len(pairs)} pairs"
    samples = [list(pair) for pair in pairs]
    return Row(name, median(ratios), min(ratios), max(ratios), "x", goal, stretch, detail, samples, least)


def value_row(
    name: str,
    samples: Sequence[float],
    unit: str,
    goal: float | None = None,
    stretch: float | None = None,
    *,
    detail: str = "",
    value: float | None = None,
) -> Row:
    """The median (or the given ``value``) of samples in ``unit``."""
    chosen = median(samples) if value is None else value
    return Row(name, chosen, min(samples), max(samples), unit, goal, stretch, detail, list(samples))


def failed_row(name: str, reason: str) -> Row:
    """The row of a part that could not be measured."""
    return Row(name, 0.0, 0.0, 0.0, "", detail=reason, failed=True)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that ``percent`` of all do not exceed (nearest rank)."""
    return sorted(samples)[max(0, ceil(len(samples) * percent / 100) - 1)]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | ---: | --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)


def as_document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON: every field, every sample, the verdict."""
    return [{**asdict(row), "verdict": row.verdict} for row in rows]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _told(value: float, unit: str) -> str:
    return f"{_number(value)} {unit}"
