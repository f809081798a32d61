"""The received map: one byte for each page, shared by supervisor, workers and clients. And why it can be trusted.

The map records what *our programs* did; the kernel's page cache shows what *is present*. Neither is enough alone. A
page that an unregistered mapping touched is present (as zeros) although no program placed it, and a worker may die
between its two stores. So:

1. **place, then mark, then wake.** A byte becomes RECEIVED only after UFFDIO_COPY has put the page into the block. A
   worker that reads RECEIVED may therefore wake waiters. A worker that read MISSING just before the store has a request
   in flight, and that request finds RECEIVED. So no thread waits for ever for a present page.
2. **PLACING is stored before the COPY.** A writer that dies in between leaves PLACING behind. If the page is present,
   that byte distinguishes interrupted work from pollution:

   ============  =========  =========================================================================================
   the map says  present?   then
   ============  =========  =========================================================================================
   MISSING       no         nothing happened yet
   MISSING       yes        **polluted**: an unregistered mapping made a zero page. Never promoted
   PLACING       no         a writer is at work, or died before the COPY: place it (again)
   PLACING       yes        **interrupted**: the COPY was ours and complete, because the kernel makes a page visible
                            only when it is filled. The successor promotes it to RECEIVED
   RECEIVED      yes        the normal state
   RECEIVED      no         a hole was punched: PLACING, and place it again
   LOST          no         the source cannot supply it; its waiters are poisoned, never woken into zeros
   LOST          yes        never stored: LOST is stored only after presence was refuted
   ============  =========  =========================================================================================

   Where a foreign user may attach (GUARDED) it may make a zero page at any moment, also between a worker's PLACING and
   its COPY. There only RECEIVED is believed. A page is RECEIVED before any client can reach it (every client is
   registered MISSING|MINOR), so whatever is present and not RECEIVED is replaced by the source's bytes.

3. **Stores are idempotent and single bytes**, so they need no lock: several workers may place the same page, the
   kernel lets one of them win (the others get EEXIST), and all of them store the same byte. A byte cannot tear. The
   system call itself keeps the order of the stores before and after it.
4. What a **client** reads (to report what is resident) may be late by a moment, but it is never early.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MISSING = 0
PLACING = 1
RECEIVED = 2
LOST = 3

SHARED = 0
"""Byte behind the last page's: 1 as soon as a client may write the block. Then contents no longer prove anything."""
TRUST = 1
"""The byte after it: how far the file of the block can be trusted. One of the three values below."""
GUARDED = 2
"""The byte after that: 1 if users may attach whom the supervisor does not trust. They may pollute: see below."""
FLAGS = 3

LEASED = 0
"""We hold a lease: the file cannot change unnoticed, so no check is needed."""
WATCHED = 1
"""It may be truncated at any time: its size is checked before every page."""
CHANGED = 2
"""It was truncated or written: pages that are missing are lost."""

LIVES_AT = 1 << 40
"""Worker N holds a record lock of the byte LIVES_AT + N: where no process has that, no worker serves client N."""

STATES = ("missing", "placing", "received", "lost")

Run = tuple[int, int]
"""Half-open range of page numbers."""

_RUNS = tuple(re.compile(rb"[\x%02x]+" % state) for state in range(len(STATES)))


def runs_of(states: bytes | memoryview, state: int) -> Iterator[Run]:
    """Half-open runs of pages in ``state``, from the beginning of the slice. About 1 GB of map a second."""
    for match in _RUNS[state].finditer(states):
        yield match.span()


def polluted(states: bytes | memoryview, present: Iterable[Run]) -> tuple[Run, ...]:
    """The runs of pages that are present, but were not placed by our programs. ``present`` are the runs that the kernel
    reports (SEEK_DATA). Changes nothing.

    Read ``present`` first and ``states`` after it: then a page placed in between is marked PLACING or RECEIVED.
    """
    return tuple(match.span() for start, stop in present for match in _RUNS[MISSING].finditer(states, start, stop))
