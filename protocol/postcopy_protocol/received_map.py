"""The received map: one byte a page, in memory that supervisor, workers and clients share. And why it can be believed.

The map says what *we* did; the kernel's page cache says what *is*. Neither is enough alone: a page that an unregistered
mapping touched is present (and zeros) though nobody placed it, and a worker may die between the two stores. So:

1. **place, then mark, then wake.** A byte becomes RECEIVED only after UFFDIO_COPY has put the page into the block.
   Whoever reads RECEIVED may therefore wake waiters. Whoever read MISSING just before the store has a request on its
   way, and that request finds RECEIVED. So no thread sleeps for ever on a page that is there.
2. **PLACING is stored before the COPY.** A writer that dies in between leaves PLACING behind, and that byte tells two
   things apart when the page turns out to be present:

   ============  =========  =========================================================================================
   the map says  present?   then
   ============  =========  =========================================================================================
   MISSING       no         nothing happened yet
   MISSING       yes        **polluted**: a mapping that was not registered made a zero page. Never promoted
   PLACING       no         somebody is at work, or died before the COPY: place it (again)
   PLACING       yes        **interrupted**: the COPY was ours and whole, for the kernel makes a page visible only when
                            it is filled. The successor promotes it to RECEIVED
   RECEIVED      yes        the rule
   RECEIVED      no         somebody punched a hole: PLACING, and place it again
   LOST          no         the source cannot supply it; its waiters are poisoned, never woken into zeros
   LOST          yes        never stored: LOST is stored only after presence was refuted
   ============  =========  =========================================================================================

3. **Stores are idempotent and single bytes**, so they need no lock: several workers may place the same page, the
   kernel lets one of them win (the others get EEXIST, which is a result), and all of them store the same byte.
   A byte cannot tear. The order of the two stores around a system call is kept by the call itself.
4. A **reader outside** (a client asking what is resident) may be late by a moment, but it is never early.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MISSING = 0
PLACING = 1
RECEIVED = 2
LOST = 3

SHARED = 0
"""Byte behind the last page's: 1 once a client may write the block, so that contents prove nothing any more."""
TRUST = 1
"""The byte after it: how far the file under the block can be trusted, one of the three below."""
FLAGS = 2

LEASED = 0
"""Nobody can change it without our leave: no look at it is needed."""
WATCHED = 1
"""It may be cut at any time: its size is looked at before every page."""
CHANGED = 2
"""It was cut or written to: what is missing is lost."""

STATES = ("missing", "placing", "received", "lost")

Run = tuple[int, int]
"""Half-open range of page numbers."""

_RUNS = tuple(re.compile(rb"[\x%02x]+" % state) for state in range(len(STATES)))


def runs_of(states: bytes | memoryview, state: int) -> Iterator[Run]:
    """Half-open runs of pages in ``state``, counted from the beginning of the slice. About 1 GB of map a second."""
    for match in _RUNS[state].finditer(states):
        yield match.span()


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found, as runs of pages."""

    polluted: tuple[Run, ...]
    """Present, but nobody of ours placed them."""
    interrupted: tuple[Run, ...]
    """Present and marked PLACING: ours. Promote them when their writer is gone."""


def polluted(states: bytes | memoryview, present: Iterable[Run]) -> Audit:
    """Compare the map with the ``present`` runs of pages that the kernel reports (SEEK_DATA). Changes nothing.

    Take ``present`` first and ``states`` after it: a page placed meanwhile is then marked at least PLACING.
    """
    strange: list[Run] = []
    ours: list[Run] = []
    for start, stop in present:
        strange.extend(match.span() for match in _RUNS[MISSING].finditer(states, start, stop))
        ours.extend(match.span() for match in _RUNS[PLACING].finditer(states, start, stop))
    return Audit(tuple(strange), tuple(ours))
