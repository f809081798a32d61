"""The rules that a probe checks, their states, and the report as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ...errors import VhostUserError

HELD, QUIRK, BROKEN, NOT_APPLICABLE = "held", "quirk", "broken", "not applicable"

RULES: Final[Mapping[str, str]] = {
    "protocol-features": "has protocol features",
    "pagefault": "offers post-copy",
    "reply-ack": "can acknowledge",
    "answers": "answers in order, in the right form, and refuses nothing",
    "userfaultfd": "ADVISE brings a userfaultfd past its handshake",
    "locked-memory": "does not lock all its memory",
    "table-reply": "LISTEN, then SET_MEM_TABLE is answered with the same regions",
    "addresses": "reports where its memory is",
    "populated": "touches no memory before it has registered it",
    "registered": "registers all its memory after our acknowledgement",
    "rings": "starts rings whose pages are missing",
    "requests": "every request is answered with status ok",
    "reads": "reads bring the disk's data into missing pages",
    "writes": "writes take data out of missing pages",
    "get-id": "GET_ID is answered",
    "indirect": "takes indirect descriptors in missing pages",
    "kernel-faults": "system calls of the back-end fault on missing pages too",
    "pages": "exactly the pages of the rings and requests have arrived",
    "restarts": "continues when the worker that resolves its faults is killed",
    "delays": "continues when its faults are resolved late",
    "end": "END is acknowledged",
    "quiet": "no fault after END",
    "base": "a stopped ring reports its position",
    "lets-go": "unmaps the memory when the connection closes",
    "comes-back": "can be attached again",
}

_GROUPED = dict.fromkeys(
    "framing order size descriptors acknowledge queue-num config features-change vring-base".split(), "answers"
)
_OTHERS = {"process": "addresses", "rust-vmm-order": "table-reply"}


@dataclass
class Report:
    """States and details of the rules; ``figures`` are numbers of the run."""

    socket: str
    device: str
    states: dict[str, str] = field(default_factory=lambda: dict.fromkeys(RULES, NOT_APPLICABLE))
    details: dict[str, str] = field(default_factory=dict)
    quirks: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

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

    def blame(self, error: VhostUserError) -> None:
        rule = _GROUPED.get(error.rule, _OTHERS.get(error.rule, error.rule))
        self.break_(rule if rule in RULES else "answers", str(error))

    @property
    def passed(self) -> bool:
        """Whether no rule is broken, and the handshake reached its last rule."""
        return BROKEN not in self.states.values() and self.states["registered"] in (HELD, QUIRK)

    def document(self) -> dict[str, Any]:
        rules = [
            {"rule": rule, "says": says, "state": self.states[rule], "detail": self.details.get(rule, "")}
            for rule, says in RULES.items()
        ]
        verdict = "passed" if self.passed else "failed"
        head = {"socket": self.socket, "device": self.device, "verdict": verdict, "quirks": self.quirks}
        return {**head, "rules": rules, **self.figures}

    def lines(self) -> list[str]:
        """The report as text."""
        back_end = self.figures.get("back_end", {})
        lines = [f"{self.socket}: {back_end.get('program', 'unknown program')}, pid {back_end.get('pid', '?')}"]
        lines += [f"  {name}: {value}" for name, value in back_end.items() if name not in ("program", "pid")]
        width = max(map(len, RULES.values()))
        for rule, says in RULES.items():
            detail = f"  ({self.details[rule]})" if rule in self.details else ""
            lines.append(f"{self.states[rule]:>14}  {says:<{width}}{detail}".rstrip())
        lines += [f"{name}: {_flat(value)}" for name, value in self.figures.items() if name != "back_end"]
        quirks = f", with quirks: {', '.join(self.quirks)}" if self.quirks else ""
        return [*lines, f"verdict: {'passed' if self.passed else 'failed'}{quirks}"]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return str(value)
