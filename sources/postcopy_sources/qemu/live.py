"""Mode live: a background snapshot. The VM runs on; its memory is as it was at one moment.

QEMU write-protects the memory, stops the VM for milliseconds, and sends each page once, before the guest can write to
it. Nothing can be requested, so clients wait until the scan brings a page.
"""

from __future__ import annotations

import logging
import select
import time
from contextlib import suppress

from postcopy_protocol.errors import BadMessage, PostcopyError
from postcopy_protocol.qemu_stream import Devices, Event
from postcopy_protocol.sizes import format_size

from .capabilities import ALWAYS_OFF, OFF_FOR_LIVE, POSTCOPY, UNDER_WAY, Borrowed, migration_status
from .channel import Channel, Listener
from .feed import VmFeed, wait_for
from .memory import VmMemory
from .qmp import PREPARE_SECONDS, Monitor

SOUND = (9, 0, 0)
"""Before this version a background snapshot resumes a paused VM, and one that follows a failed one stops the VM."""
END_SECONDS = 20.0

log = logging.getLogger(__name__)


def check(monitor: Monitor) -> None:
    """Raises PostcopyError for a VM of which no live image can be taken without harm to it."""
    status, version = monitor.execute("query-status")["status"], monitor.version_text
    migration = migration_status(monitor)
    if migration in UNDER_WAY or migration in POSTCOPY:
        raise PostcopyError(f"another migration of this VM is under way ({migration}): end it first")
    if status not in ("running", "paused"):
        raise PostcopyError(
            f"the VM is in the state {status}: a live image needs a VM that runs; start it (cont) first"
        )
    if monitor.version < SOUND:
        if status == "paused":
            raise PostcopyError(
                f"the VM is paused, and QEMU {version} would resume it: cont it first, or use --mode pause"
            )
        if migration in ("failed", "cancelled"):
            raise PostcopyError(
                f"an earlier migration of this VM has {migration}: after that QEMU {version} can hang in a background "
                "snapshot; use --mode pause, or restart the VM"
            )


class LiveFeed(VmFeed):
    """See VmFeed."""

    mode = "live"

    def __init__(self, listener: Listener, memory: VmMemory, monitor: Monitor | None) -> None:
        super().__init__(listener, memory, monitor)
        self._borrowed: Borrowed | None = None
        self._done = False

    def begin(self, uri: str, rate: int) -> None:
        """Let QEMU begin, by its monitor. Raises PostcopyError."""
        assert self.monitor is not None
        check(self.monitor)
        self._borrowed = Borrowed(self.monitor)
        self._borrowed.switch(["background-snapshot"], ALWAYS_OFF + OFF_FOR_LIVE)
        self.monitor.execute("migrate", {"uri": uri}, seconds=PREPARE_SECONDS)

    def accepted(self) -> None:
        self._listener.close()  # a second migration is refused

    def on_events(self, channel: Channel, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Devices) and not self.memory.complete:
                missing = self.memory.pages - self.memory.received
                raise BadMessage(
                    f"section {event.name} comes while {missing} pages of RAM are missing: it is not understood, or "
                    "this is no background snapshot"
                )
            if not isinstance(event, Devices):
                raise BadMessage(
                    f"it is no background snapshot ({type(event).__name__} came): use --mode pause, or switch the "
                    "capability background-snapshot on"
                )
            self._complete()

    def _complete(self) -> None:
        self._done = True
        seconds = time.monotonic() - self._began
        size = self.memory.pages * 4096
        log.info(
            "live: all %s are here, after %.2f s (%s/s)", format_size(size), seconds, format_size(int(size / seconds))
        )

    def read(self, channel: Channel) -> None:
        if not self.lost:
            return super().read(channel)
        if not _discard(channel):
            self.drop(channel)

    def on_end(self, channel: Channel, why: str) -> None:
        missing = self.memory.pages - self.memory.received
        if not self._done and not self.lost:
            reason = f"the live image ended with {missing} pages missing: {self.failure() or why}"
            log.error("%s; they are lost", reason)
            self.lost = True
            self.memory.lose(reason)
        if channel.ended:  # otherwise QEMU goes on, and what it sends is thrown away
            self.drop(channel)

    def give_back(self) -> None:
        revocable = self.monitor is not None and self.monitor.version >= SOUND
        if self._done or not revocable:
            self._take_rest()
        if self._channel is not None:
            self.drop(self._channel)
        self._listener.close()
        if self.monitor is None or self._borrowed is None:  # what goes on in that VM is not ours
            return
        try:
            if revocable and migration_status(self.monitor) in UNDER_WAY:
                self.monitor.execute("migrate_cancel")
            wait_for(lambda: not self._under_way(), END_SECONDS)
            status = self.monitor.execute("query-status")["status"]
            log.info("the VM is %s", status)
        except PostcopyError as error:
            log.warning("%s", error)
        self._borrowed.restore()

    def _under_way(self) -> bool:
        return self.monitor is not None and migration_status(self.monitor) in UNDER_WAY

    def _take_rest(self) -> None:
        """Throw away what is still to come: a reader that leaves early makes the migration fail, and QEMU before 9.0
        never lets the guest write again then."""
        heard = time.monotonic()
        with suppress(PostcopyError):
            while time.monotonic() - heard < END_SECONDS:
                if self._channel is None:
                    if self._borrowed is None or not self._under_way():
                        return
                    if select.select([self._listener.socket], [], [], 0.1)[0] and (found := self._listener.accept()):
                        self._channel = Channel(found, self.parser())
                elif self._channel.ended:
                    return
                elif select.select([self._channel.socket], [], [], 0.1)[0]:
                    _discard(self._channel)
                    heard = time.monotonic()
        log.warning("QEMU does not end its background snapshot")


def _discard(channel: Channel) -> bool:
    """Throw away what is there; False at the end."""
    try:
        return channel.discard()
    except BlockingIOError:
        return True
