"""Events: every restart, quarantine, pause, recover, lost or polluted page, in the log and in a bounded history.

In the log an event is one line: the kind, a text for people, and then ``key=value`` fields. A value that is no plain
word is a JSON string, so the name of a client or a file cannot begin a line of its own.

    lost: block ram0: 1 pages from page 7: input/output error event=lost block=ram0 offset=28672 length=4096
    cause="input/output error"          (all in one line)

The history is for ``postcopy status --events`` and ``--story``. No event holds page contents or keys."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from postcopy_kernel.log_queue import about

log = logging.getLogger("postcopy")

LENGTH = 512
MOST_TEXT = 1000  # characters of a text that are kept: reasons come from sources and from users' functions
QUIET = frozenset({"complete", "memory", "source", "recover", "healed", "resumed", "handler-output"})
"""Kinds that are logged as information and not as warnings."""
FIELDS = (
    "client",
    "name",
    "worker",
    "incarnation",
    "pid",
    "uid",
    "block",
    "offset",
    "length",
    "source",
    "restarts",
    "cause",
)
"""Fields of an event, in this order: a client and its name, a worker, a block's name, offset and length in bytes."""

_PLAIN = re.compile(r"[A-Za-z0-9_.:/+-]+", re.ASCII)


class RecordEvent(Protocol):
    """Records an event: its kind, a text for people, and the FIELDS that apply."""

    def __call__(self, kind: str, detail: str, **where: int | str) -> None: ...


def readable(text: str) -> str:
    """``text`` in one line: control characters are shown as Python escapes."""
    if len(text) > MOST_TEXT:
        text = text[: MOST_TEXT - 1] + "…"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def field(value: int | str) -> str:
    """A value as it stands behind its ``key=``."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


@dataclass(frozen=True, slots=True)
class Event:
    """``at``: seconds since the epoch; ``number`` counts events since the start, so a reader knows which are new."""

    number: int
    at: float
    kind: str
    detail: str
    where: dict[str, int | str]

    def line(self) -> str:
        """The line in the log."""
        fields = [f"{key}={field(self.where[key])}" for key in FIELDS if key in self.where]
        return " ".join([f"{self.kind}: {self.detail} event={field(self.kind)}", *fields])

    def fields(self) -> dict[str, Any]:
        """What a line of JSON has of it."""
        return {"event": self.kind, "detail": self.detail, **self.where}

    def document(self) -> dict[str, Any]:
        """The entry in the status."""
        return {"number": self.number, "at": round(self.at, 3), "kind": self.kind, "detail": self.detail, **self.where}

    def concerns(self, block: str, first: int, end: int) -> bool:
        """Is it about bytes ``first`` to ``end`` of a block? An event about the whole block is."""
        if self.where.get("block") != block:
            return False
        offset = self.where.get("offset")
        if not isinstance(offset, int):
            return True
        length = self.where.get("length", 1)
        return offset < end and first < offset + (length if isinstance(length, int) else 1)


class EventLog:
    """The last events, oldest first, and the number of events of each kind."""

    def __init__(self, length: int = LENGTH) -> None:
        self.names: dict[int, str] = {}
        """Names of the clients that are attached; ``Clients`` writes it."""
        self._events: deque[Event] = deque(maxlen=length)
        self._number = 0
        self.counts: dict[str, int] = {}

    def record(self, kind: str, detail: str, **where: int | str) -> None:
        """Log an event and keep it (a ``RecordEvent``)."""
        assert where.keys() <= set(FIELDS), where
        if (name := self.names.get(cast(int, where.get("client", 0)))) and "name" not in where:
            where["name"] = name
        self._number += 1
        self.counts[kind] = self.counts.get(kind, 0) + 1
        clean = {key: readable(value) if isinstance(value, str) else value for key, value in where.items()}
        event = Event(self._number, time.time(), kind, readable(detail), clean)
        self._events.append(event)
        peer = " ".join(f"{key} {where[key]}" for key in ("client", "source", "block") if key in where)
        level = logging.INFO if kind in QUIET else logging.WARNING
        log.log(level, "%s", event.line(), extra=about(kind, peer or "this supervisor", **event.fields()))

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events))

    def documents(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Present events with numbers greater than ``after``."""
        return (event.document() for event in iter(self) if event.number > after)
