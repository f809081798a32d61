"""The report of a probe: its rules, their states, figures, and a verdict, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HELD, QUIRK, BROKEN, NOT_APPLICABLE = "held", "quirk", "broken", "not applicable"


@dataclass
class Verdicts:
    """States and details of ``rules`` (name: what it says). ``figures`` are numbers of the run; the one named
    ``subject`` is what was probed. Passed: no rule is broken, and ``required`` is held."""

    rules: Mapping[str, str]
    required: str
    head: dict[str, Any]
    subject: str
    states: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    quirks: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = dict.fromkeys(self.rules, NOT_APPLICABLE)

    def hold(self, *rules: str, detail: str = "") -> None:
        """Mark rules as held, unless they have been broken."""
        for rule in rules:
            if self.states[rule] == NOT_APPLICABLE:
                self.states[rule] = HELD
            if detail:
                self.details.setdefault(rule, detail)

    def break_(self, rule: str, detail: str) -> None:
        """Mark a rule as broken; the detail of the first break is kept."""
        if self.states[rule] != BROKEN:
            self.states[rule], self.details[rule] = BROKEN, detail

    def quirk(self, rule: str, name: str, detail: str) -> None:
        self.states[rule], self.details[rule] = QUIRK, detail
        if name not in self.quirks:
            self.quirks.append(name)

    def judge(self, rule: str, kept: bool, detail: str) -> None:
        """Mark a rule as held, or as broken with ``detail``."""
        if kept:
            self.hold(rule)
        else:
            self.break_(rule, detail)

    @property
    def broken(self) -> list[str]:
        return [rule for rule, state in self.states.items() if state == BROKEN]

    @property
    def passed(self) -> bool:
        return not self.broken and self.states[self.required] in (HELD, QUIRK)

    def document(self) -> dict[str, Any]:
        rules = [
            {"rule": rule, "says": says, "state": self.states[rule], "detail": self.details.get(rule, "")}
            for rule, says in self.rules.items()
        ]
        verdict = "passed" if self.passed else "failed"
        return {**self.head, "verdict": verdict, "quirks": self.quirks, "rules": rules, **self.figures}

    def title(self) -> Sequence[str]:
        """The first lines of the text."""
        return ()

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [*self.title()]
        width = max(map(len, self.rules.values()))
        for rule, says in self.rules.items():
            detail = f"  ({self.details[rule]})" if rule in self.details else ""
            lines.append(f"{self.states[rule]:>14}  {says:<{width}}{detail}".rstrip())
        lines += [f"{name}: {_flat(value)}" for name, value in self.figures.items() if name != self.subject]
        quirks = f", with quirks: {', '.join(self.quirks)}" if self.quirks else ""
        return [*lines, f"verdict: {'passed' if self.passed else 'failed'}{quirks}"]


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the longest of a list of times, in microseconds; empty for none."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1e6, 1) for name, part in at.items()}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return str(value)
