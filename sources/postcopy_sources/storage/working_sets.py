"""Record and replay: which pages a run needs, and sending them to the next run before it asks.

While it is replayed one page in PROBE is held back. How many of these clients ask for, beside what they ask for outside
the set, tells how good the set is: a page that was sent in time is not seen again. A set that is not needed is given
up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from postcopy_protocol.caibx import Index
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.sidecar import SIDECAR_ENDING, Sidecar, WorkingSet, format_sidecar

from .snapshots import Snapshot, check_writable, load_sidecar
from .stores import Store, StoreFailed

PROBE = 64
LEAST_MISSES = 64
"""So many faults outside the set are needed before it is given up."""
LEAST_SHARE = 0.25
SAVE_SECONDS = 10.0

log = logging.getLogger(__name__)


class Recording:
    """The pages of one run, in the order of their first use, written into the sidecar. Raises PostcopyError for a store
    that cannot be written."""

    def __init__(self, store: Store, snapshot: Snapshot) -> None:
        check_writable(store)
        self._store, self._snapshot = store, snapshot
        self._needed: dict[int, None] = {}
        self._saved = 0
        self._written: WorkingSet | None = None
        self._before = WorkingSet()
        self._ended = threading.Event()
        threading.Thread(target=self._save_often, name="recording", daemon=True).start()

    def needed(self, first: int, pages: int) -> None:
        """A client needs these pages."""
        for page in range(first, first + pages):
            self._needed[page] = None

    def close(self) -> None:
        """Write what has come since the last time."""
        self._ended.set()
        self._save()

    def _save_often(self) -> None:
        while not self._ended.wait(SAVE_SECONDS):
            self._save()

    def _save(self) -> None:
        needed = list(self._needed)
        if len(needed) == self._saved:
            return
        index, name = self._snapshot.index, self._snapshot.name
        none = bytes(page_count(page_count(index.size, PAGE_4K), 8))
        try:
            found = load_sidecar(self._store, name, self._snapshot.key) or Sidecar(self._snapshot.key, index.size, none)
            if found.working_set != self._written:  # the first time, or another run has written its own
                self._before = found.working_set
            merged = self._before.merged(index, needed)
            sidecar = Sidecar(found.index, found.size, found.zeros, merged)
            self._store.put(name + SIDECAR_ENDING, format_sidecar(sidecar), replace=True)
        except StoreFailed as error:
            log.warning("the working set of %s is not written: %s", name, error)
            return
        self._written, self._saved = merged, len(needed)
        log.info("the working set of %s has %d pages of %d runs", name, len(merged.pages), merged.runs)


class Replay:
    """One replay of a working set. ``order``: the chunks of the set by first use, with the pages in each."""

    def __init__(self, name: str, index: Index, pages: Sequence[int]) -> None:
        self._name = name
        self._set = frozenset(pages)
        probes = pages[PROBE - 1 :: PROBE]
        self._probes = frozenset(probes)
        self.order = _by_chunk(index, [page for page in pages if page not in self._probes])
        self.rest = _by_chunk(index, probes)
        self._asked: set[int] = set()
        self._sent: set[int] = set()
        self.misses = self._late = self._probed = 0
        self._began = time.monotonic()
        self.running = True

    def asked(self, page: int) -> None:
        """A client waits for this page."""
        if not self.running or page in self._asked:
            return
        self._asked.add(page)
        if page in self._probes:
            self._probed += 1
        elif page not in self._set:
            self.misses += 1
        elif page not in self._sent:
            self._late += 1

    @property
    def share(self) -> float:
        """The share of what clients need that is in the set, as far as it can be seen."""
        useful = PROBE * self._probed + self._late
        return useful / (useful + self.misses) if useful + self.misses else 1.0

    @property
    def pays(self) -> bool:
        return self.misses < LEAST_MISSES or self.share >= LEAST_SHARE

    def send(
        self,
        push: Callable[[int, Sequence[int]], object],
        fetch: Callable[[int], object],
        width: Callable[[], int] = lambda: 16,
    ) -> None:
        """Send all of it. ``fetch`` begins to fetch a chunk, ``width`` says how many beside one another; ``push`` sends
        pages of one and waits for it. Returns when all is sent, or it does not pay."""
        try:
            self._send(push, fetch, width)
        finally:
            self.running = False
            sent, seconds = len(self._sent), time.monotonic() - self._began
            what = "is complete" if self.pays else "is given up, because other pages are needed"
            text = (
                "replay of %s %s: %d of %d pages sent in %.2f s; %d faults outside the set, %d before their page came"
            )
            log.warning(text, self._name, what, sent, len(self._set), seconds, self.misses, self._late)

    def _send(
        self,
        push: Callable[[int, Sequence[int]], object],
        fetch: Callable[[int], object],
        width: Callable[[], int],
    ) -> None:
        for part in (self.order, self.rest):
            ahead, begun = iter(part), 0
            for pushed, (number, pages) in enumerate(part.items()):
                if not self.pays:
                    return
                for following in islice(ahead, max(0, pushed + max(1, width()) - begun)):
                    fetch(following)
                    begun += 1
                push(number, pages)
                self._sent.update(pages)


def _by_chunk(index: Index, pages: Iterable[int]) -> dict[int, list[int]]:
    """Pages by the chunk in which they begin, in the order of first use; within a chunk by place."""
    found: dict[int, list[int]] = {}
    for page in pages:
        found.setdefault(index.at(page * PAGE_4K), []).append(page)
    return {number: sorted(inside) for number, inside in found.items()}
