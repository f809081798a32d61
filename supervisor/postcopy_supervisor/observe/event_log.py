"""What happened and why: every restart, quarantine, pause, recover, lost or polluted page is one event, told twice.

Once as one line of the log, in one format:

    lost: block ram0: 1 pages from page 7: input/output error event=lost block=ram0 offset=28672 length=4096
    cause="input/output error"          (all in one line)

that is, the kind, a text for people, and then ``key=value`` fields; a value that is no plain word is a JSON string, so
nobody who names a client or a file can begin a line of his own. And once in a bounded history for ``postcopy status
--events`` and ``--story``. No event holds a byte of anybody's memory, nor a key.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger("postcopy")

LENGTH = 512
MOST_TEXT = 1000
"""Characters of a text that are kept: reasons come from sources and from users' functions."""
QUIET = frozenset({"complete", "memory", "source", "recover", "healed", "resumed"})
"""Kinds that are no cause for concern: logged as information."""
FIELDS = ("client", "worker", "incarnation", "pid", "block", "offset", "length", "source", "restarts", "cause")
"""What an event may tell beside its text, in this order: numbers of client and worker, the block's name, bytes."""

_PLAIN = re.compile(r"[A-Za-z0-9_.:/+-]+", re.ASCII)


class Tell(Protocol):
    """How the rooms of the house tell an event: its kind, a text for people, and the FIELDS that apply."""

    def __call__(self, kind: str, detail: str, **where: int | str) -> None: ...


def readable(text: str) -> str:
    """In one line and without control characters: they are shown as Python writes them."""
    if len(text) > MOST_TEXT:
        text = text[: MOST_TEXT - 1] + "…"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def field(value: int | str) -> str:
    """A value behind its ``key=``."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


@dataclass(frozen=True, slots=True)
class Event:
    """``at``: seconds since the epoch; ``number`` counts all events since the start, so a reader knows what is new."""

    number: int
    at: float
    kind: str
    detail: str
    where: dict[str, int | str]

    def line(self) -> str:
        """As the log has it."""
        fields = [f"{key}={field(self.where[key])}" for key in FIELDS if key in self.where]
        return " ".join([f"{self.kind}: {self.detail} event={field(self.kind)}", *fields])

    def document(self) -> dict[str, Any]:
        """As the status has it."""
        return {"number": self.number, "at": round(self.at, 3), "kind": self.kind, "detail": self.detail, **self.where}

    def concerns(self, block: str, first: int, end: int) -> bool:
        """Is it about bytes ``first`` to ``end`` of a block? One about the whole block is."""
        if self.where.get("block") != block:
            return False
        offset = self.where.get("offset")
        if not isinstance(offset, int):
            return True
        length = self.where.get("length", 1)
        return offset < end and first < offset + (length if isinstance(length, int) else 1)


class History:
    """The last events, oldest first, and how many there have been of each kind."""

    def __init__(self, length: int = LENGTH) -> None:
        self._events: deque[Event] = deque(maxlen=length)
        self._number = 0
        self.counts: dict[str, int] = {}

    def tell(self, kind: str, detail: str, **where: int | str) -> None:
        """Log it and keep it (a ``Tell``)."""
        assert where.keys() <= set(FIELDS), where
        self._number += 1
        self.counts[kind] = self.counts.get(kind, 0) + 1
        clean = {key: readable(value) if isinstance(value, str) else value for key, value in where.items()}
        event = Event(self._number, time.time(), kind, readable(detail), clean)
        self._events.append(event)
        log.log(logging.INFO if kind in QUIET else logging.WARNING, "%s", event.line())

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self._events))

    def documents(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Those with numbers greater than ``after``, of the events that there are now."""
        return (event.document() for event in iter(self) if event.number > after)
