"""What both modes have in common: QEMU's connection is accepted and read in the loop, and its progress is logged."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable

from postcopy_protocol.errors import BadMessage, PostcopyError
from postcopy_protocol.qemu_stream import Event, StreamParser
from postcopy_protocol.return_path import Progress
from postcopy_protocol.sizes import format_size
from postcopy_wire.transport import Router

from .channel import Channel, Listener
from .memory import VmMemory
from .qmp import GONE, Monitor

VM_EVENTS = {"STOP": "stopped", "RESUME": "running", "SHUTDOWN": "shut down", GONE: "gone"}
CONNECT_SECONDS = 60.0  # in which QEMU connects, when we have started the migration
LOOK_SECONDS = 0.1
SHOW_SECONDS = 2.0  # between lines about the progress
RATE_SECONDS = 0.5  # over which the rate is measured

log = logging.getLogger(__name__)


class VmFeed:
    """Feeds ``memory`` from the migration that comes to ``listener``. ``monitor``: that VM's, if we have it. A subclass
    says what its mode does with events, and with the end of a connection."""

    mode = ""

    def __init__(self, listener: Listener, memory: VmMemory, monitor: Monitor | None) -> None:
        self.memory, self.monitor = memory, monitor
        self._listener = listener
        self._channel: Channel | None = None
        self._router: Router | None = None
        self._began = self._shown_at = self._rated_at = time.monotonic()
        self._shown = self._rated = self._rate = 0
        self.lost = False  # nothing more comes
        if monitor is not None:
            monitor.on_event = self._on_vm_event
        self.vm = "" if monitor is None else str(monitor.execute("query-status")["status"])
        """State of the VM, in QEMU's words; empty: not known."""

    def await_blocks(self) -> None:
        """Wait until QEMU has connected and sent the list of its RAM blocks. Raises PostcopyError."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while not self.ready:
            watched = self._listener.socket if self._channel is None else self._channel.socket
            if select.select([watched], [], [], LOOK_SECONDS)[0]:
                self._step_to_blocks()
            elif self.monitor is not None and ((why := self.failure()) or time.monotonic() > deadline):
                raise PostcopyError(why or f"QEMU has not connected within {CONNECT_SECONDS:g} s")

    def _step_to_blocks(self) -> None:
        if self._channel is None:
            connection = self._listener.accept()
            if connection is not None:
                self._began = time.monotonic()
                self._channel = Channel(connection, self.parser())
                self.accepted()
            return
        try:
            events = self._channel.receive()
        except BlockingIOError:
            return
        except BadMessage as error:
            raise PostcopyError(f"what came to {self._listener.uri} cannot be read: {error}") from None
        if events is None:
            raise PostcopyError(self.failure() or "QEMU has closed the connection before it sent any memory")
        self.on_events(self._channel, events)

    def parser(self) -> StreamParser:
        """The parser of the first connection."""
        return StreamParser(self.memory)

    @property
    def ready(self) -> bool:
        """Are the blocks known?"""
        return bool(self.memory.blocks)

    def failure(self) -> str:
        """Why the migration has failed, in QEMU's words; empty: it has not, or QEMU says nothing."""
        if self.monitor is None:
            return ""
        try:
            found = self.monitor.execute("query-migrate", seconds=2.0)
        except PostcopyError as error:
            return str(error)
        if found.get("status") not in ("failed", "cancelled", "cancelling", "failing"):
            return ""
        return f"QEMU has ended the migration ({found['status']}): {found.get('error-desc', 'no reason given')}"

    # --- in the loop of the source ------------------------------------------------------------------------------------

    def start(self, router: Router) -> None:
        """See ``loop.Feed``."""
        self._router = router
        if self._channel is not None:
            self.watch(self._channel)

    def watch(self, channel: Channel) -> None:
        if self._router is not None:
            self._router.watch(channel.socket.fileno(), lambda: self.read(channel))

    def drop(self, channel: Channel) -> None:
        """Close a connection."""
        if channel.socket.fileno() >= 0:
            if self._router is not None:
                self._router.forget(channel.socket.fileno())
            channel.close()

    def read(self, channel: Channel) -> None:
        """Read what a connection has; it must not raise."""
        try:
            events = channel.receive()
            if events is None:
                return self.on_end(channel, "QEMU has closed the connection")
            self.on_events(channel, events)
        except BlockingIOError:
            return
        except BadMessage as error:
            self.on_end(channel, f"the stream cannot be read: {error}")
        except OSError as error:
            self.on_end(channel, f"no memory for the VM's pages: {error.strerror or error}")

    def tick(self, now: float) -> None:
        """See ``loop.Feed``."""
        if now - self._rated_at >= RATE_SECONDS:
            came = max(0, self.memory.received - self._rated) * 4096
            self._rate = int(came / (now - self._rated_at))
            self._rated, self._rated_at = self.memory.received, now
        if now - self._shown_at >= SHOW_SECONDS:
            self.show(now)

    def progress(self) -> Progress:
        """See ``loop.Feed``."""
        memory = self.memory
        phase = "lost" if self.lost else "complete" if memory.complete else self.phase()
        received, size = memory.received * 4096, memory.pages * 4096
        rate = 0 if memory.complete or self.lost else self._rate
        return Progress(phase, f"VM {self.vm}" if self.vm else "", min(received, size), size, rate)

    def _on_vm_event(self, name: str) -> None:
        if name in VM_EVENTS:  # in the monitor's thread: one store
            self.vm = VM_EVENTS[name]

    def show(self, now: float) -> None:
        """Log how far it is, if it goes on."""
        memory = self.memory
        if memory.received != self._shown and not memory.complete:
            rate = max(0, memory.received - self._shown) * 4096 / (now - self._shown_at)
            left = (memory.pages - memory.received) * 4096
            log.info(
                "%s: %d %% of %s, %s left, %s/s",
                self.mode,
                100 * memory.received // memory.pages,
                format_size(memory.pages * 4096),
                format_size(left),
                format_size(int(rate)),
            )
        self._shown, self._shown_at = memory.received, now

    # --- what a mode says ---------------------------------------------------------------------------------------------

    def phase(self) -> str:
        """What is going on, while pages are still to come."""
        return self.mode

    def accepted(self) -> None:
        """The first connection is there."""

    def on_events(self, channel: Channel, events: list[Event]) -> None:
        raise NotImplementedError

    def on_end(self, channel: Channel, why: str) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Give the VM back, when the source ends, however it ends: the loop runs no more."""
        self._router = None
        self.give_back()

    def give_back(self) -> None:
        raise NotImplementedError


def wait_for(look: Callable[[], bool], seconds: float) -> bool:
    """Look again and again; False: not within this time."""
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
