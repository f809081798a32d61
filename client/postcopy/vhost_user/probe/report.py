"""The rules that the probe of a back-end checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...errors import VhostUserError
from ...verdicts import Verdicts

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


class Report(Verdicts):
    """The report about the back-end at ``socket``. Passed: the handshake reached its last rule as well."""

    def __init__(self, socket: str, device: str) -> None:
        super().__init__(RULES, "registered", {"socket": socket, "device": device}, "back_end")

    def blame(self, error: VhostUserError) -> None:
        rule = _GROUPED.get(error.rule, _OTHERS.get(error.rule, error.rule))
        self.break_(rule if rule in RULES else "answers", str(error))

    def title(self) -> list[str]:
        back_end = self.figures.get("back_end", {})
        lines = [f"{self.head['socket']}: {back_end.get('program', 'unknown program')}, pid {back_end.get('pid', '?')}"]
        return lines + [f"  {name}: {value}" for name, value in back_end.items() if name not in ("program", "pid")]
