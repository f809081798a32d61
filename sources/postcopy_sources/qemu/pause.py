"""Mode pause: post-copy on demand. The VM stands still until its memory is here; then it runs on where it was.

A page for which a client waits is requested, and QEMU sends it ahead of its own scan. We are the destination of a
migration that never runs the VM. QEMU 10.2 and later keep the right to run it until a certain ping is answered. We
never answer it, so whatever ends the connection makes the VM run on. Before 10.2 the migration has to be finished; then
``cont`` makes the VM run on. If it cannot be finished, QEMU pauses it, and the next source recovers it.
"""

from __future__ import annotations

import logging
import re
import select
import socket
import threading
import time

from postcopy_protocol import qemu_return_path as answers
from postcopy_protocol.errors import BadMessage, PostcopyError
from postcopy_protocol.qemu_format import QemuBlock
from postcopy_protocol.qemu_return_path import PACKAGE_LOADED, Requests
from postcopy_protocol.qemu_stream import (
    UNKNOWN_SECTION,
    AskBitmap,
    Devices,
    EndOfRam,
    EndOfStream,
    Event,
    Package,
    Ping,
    Resume,
    StreamParser,
)
from postcopy_protocol.sizes import format_size
from postcopy_wire.transport import Router

from .capabilities import ALWAYS_OFF, POSTCOPY, UNDER_WAY, Borrowed, migration_status
from .channel import Channel, Listener
from .feed import VmFeed, wait_for
from .memory import VmMemory
from .qmp import PREPARE_SECONDS, Monitor

SLOW = 8 << 20
"""Bytes a second before the VM stands still: everything that is sent then may have to be sent again."""
LARGEST = 128 << 10  # bytes of one request
END_SECONDS = 30.0

log = logging.getLogger(__name__)


class PauseFeed(VmFeed):
    """See VmFeed."""

    mode = "pause"

    def __init__(self, listener: Listener, memory: VmMemory, monitor: Monitor | None) -> None:
        super().__init__(listener, memory, monitor)
        memory.wanted = self.want
        self._borrowed: Borrowed | None = None
        self._preempt: Channel | None = None
        self._uri = ""
        self._requests: Requests | None = None
        self._stopped = False  # the VM stands still, and pages can be requested
        self._revocable = False  # a cut makes the VM run on
        self._ended = False  # QEMU has sent everything on its main connection
        self._ram_ended = False
        self._done = False
        self._section = 0
        self._resuming: threading.Thread | None = None
        self._was_paused = False
        self._inherited: tuple[QemuBlock, ...] = ()
        """RAM blocks of a migration that an earlier source began."""
        self._asked_for: set[str] = set()  # those of them that belong to the migration
        self._resumed = False

    def begin(self, uri: str, rate: int) -> None:
        """Let QEMU begin, by its monitor, or go on with what an earlier source began. ``rate``: bytes a second of
        QEMU's scan, 0 for no limit. Raises PostcopyError."""
        assert self.monitor is not None
        self._uri = uri
        status, migration = self.monitor.execute("query-status")["status"], migration_status(self.monitor)
        if migration == "postcopy-paused":
            return self._take_over(rate)
        if migration in UNDER_WAY or migration in POSTCOPY:
            raise PostcopyError(f"another migration of this VM is under way ({migration}): end it first")
        if status not in ("running", "paused"):
            raise PostcopyError(f"the VM is in the state {status}: start it (cont) first")
        self._was_paused = status == "paused"
        self._borrowed = Borrowed(self.monitor)
        preempt = ["postcopy-preempt"] if "postcopy-preempt" in self._borrowed.capabilities else []
        self._borrowed.switch(["postcopy-ram", *preempt], [*ALWAYS_OFF, "background-snapshot", "release-ram"])
        self._borrowed.parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": rate})
        self.monitor.execute("migrate", {"uri": uri}, seconds=PREPARE_SECONDS)
        self.monitor.execute("migrate-start-postcopy")

    def _take_over(self, rate: int) -> None:
        """The source before this one was killed: QEMU sends everything again, as we say that nothing is here."""
        assert self.monitor is not None
        log.info("an earlier source was killed: its migration goes on")
        self._borrowed = Borrowed(self.monitor)
        self._borrowed.forget_postcopy()
        self.monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": rate})
        self._inherited = blocks_of(self.monitor.execute("human-monitor-command", {"command-line": "info ramblock"}))
        self._section = UNKNOWN_SECTION
        self.memory.begin(self._inherited)
        self.memory.use()
        self._stopped = True
        self.monitor.execute("migrate", {"uri": self._uri, "resume": True}, seconds=PREPARE_SECONDS)

    def parser(self) -> StreamParser:
        return StreamParser(self.memory, self._inherited, self._section) if self._inherited else super().parser()

    def phase(self) -> str:
        if not self._stopped:
            return "pre-copy"
        return "post-copy" if self._channel is not None else "interrupted"

    @property
    def ready(self) -> bool:
        return self._resumed if self._inherited else super().ready

    def start(self, router: Router) -> None:
        super().start(router)
        router.watch(self._listener.socket.fileno(), self._accept)

    def _accept(self) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        blocks = [block.qemu for block in self.memory.blocks]
        if self._channel is None and blocks and not self._done and self._stopped:
            self._requests_of_all().reconnected()
            self._channel = Channel(connection, StreamParser(self.memory, blocks, self._section))
            self.watch(self._channel)
        elif self._channel is not None and self._preempt is None:
            self._preempt = Channel(connection, StreamParser(self.memory, blocks, preempt=True))
            self.watch(self._preempt)
        else:
            log.warning("one more connection came to %s: it is refused", self._listener.uri)
            connection.close()

    # --- QEMU speaks --------------------------------------------------------------------------------------------------

    def on_events(self, channel: Channel, events: list[Event]) -> None:
        for event in events:
            match event:
                case Ping(value):
                    channel.send(answers.pong(value))
                case Package(pings):
                    self._stand_still(channel, pings)
                case AskBitmap(name):
                    staged = next((block for block in self.memory.blocks if block.qemu.name == name), None)
                    if staged is None:
                        raise BadMessage(f"QEMU asks for the bitmap of the unknown RAM block {name}")
                    self._asked_for.add(name)
                    channel.send(answers.bitmap(name, staged.bitmap()))
                case Resume():
                    channel.send(answers.resumed())
                    if self._inherited and not self._resumed:
                        self.memory.keep_only(self._asked_for)
                    self._resumed = True
                    log.info("the migration goes on")
                    self._request_waiting()
                case EndOfStream():
                    self._ended = True
                case EndOfRam():
                    self._ram_ended = True
                case Devices() if self._ram_ended and self.memory.complete:
                    self._stand_still(channel, (PACKAGE_LOADED,))  # all came in pre-copy: a cut makes the VM run on
                case Devices(name):
                    raise BadMessage(f"section {name} comes before post-copy has begun: it is not understood")
        self._look_complete()

    def _stand_still(self, channel: Channel, pings: tuple[int, ...]) -> None:
        self._stopped, self._section = True, channel.parser.section
        self._revocable = PACKAGE_LOADED in pings
        for value in pings:
            if value != PACKAGE_LOADED:
                channel.send(answers.pong(value))
        left = (self.memory.pages - self.memory.received) * 4096
        log.info("the VM stands still; %s of its memory are still to come", format_size(left))
        self.memory.use()
        self._request_waiting()

    def read(self, channel: Channel) -> None:
        if channel is self._channel and self._preempt is not None:
            super().read(self._preempt)  # pages that clients wait for do not wait behind what the scan brings
            self._look_complete()
            if channel is not self._channel:
                return  # that was the last one
        super().read(channel)
        if channel is self._preempt:
            self._look_complete()

    def _look_complete(self) -> None:
        # A QEMU that still may run the VM does not end the stream, and sends no page twice.
        if self._stopped and not self._done and self.memory.complete and (self._ended or self._revocable):
            self._done = True
            size, seconds = self.memory.pages * 4096, time.monotonic() - self._began
            log.info("pause: all %s are here, after %.2f s", format_size(size), seconds)
            self._complete()

    # --- requests -----------------------------------------------------------------------------------------------------

    def want(self, place: int, offset: int, length: int, urgent: bool) -> None:
        """A read waits for these pages."""
        if not self._stopped or self._channel is None or not urgent:
            return  # requested when they can be; the rest comes with QEMU's scan, which a request would only disturb
        staged = self.memory.blocks[place]
        missing = staged.present.find(0, offset // 4096, (offset + length) // 4096) * 4096
        if missing < 0:
            return
        for start in range(missing, offset + length, LARGEST):
            data = self._requests_of_all().request(place, start, min(LARGEST, offset + length - start))
            if data and not self._channel.send(data):
                return self.on_end(self._channel, "QEMU does not take requests")

    def _request_waiting(self) -> None:
        for place, staged in enumerate(self.memory.blocks):
            for offset in staged.waited_for():
                self.want(place, offset, 4096, True)

    def _requests_of_all(self) -> Requests:
        if self._requests is None:
            self._requests = Requests([block.qemu for block in self.memory.blocks])
        return self._requests

    def tick(self, now: float) -> None:
        super().tick(now)
        if self._channel is not None:
            self._channel.flush()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def on_end(self, channel: Channel, why: str) -> None:
        self.drop(channel)
        if channel is self._preempt:
            self._preempt = None
            if channel.foreign:
                log.warning("another migration came to %s: it is refused", self._listener.uri)
                return
            if self._done or self._channel is None:
                return
            if self._stopped and not self.memory.complete and channel.received:
                self._cut(why)
            return
        if channel is not self._channel:
            return
        self._channel = None
        if not self._done:
            self._cut(why)

    def _cut(self, why: str) -> None:
        """The migration is interrupted."""
        for channel in (self._channel, self._preempt):
            if channel is not None:
                self.drop(channel)
        self._channel = self._preempt = None
        cause = self.failure() or why
        if self._revocable or not self._stopped or "is gone" in cause:
            reason = f"the migration ended before the page came: {cause}"
            log.error("%s; %d pages are lost", reason, self.memory.pages - self.memory.received)
            self.memory.lose(reason)
            self.lost = True
        elif self.monitor is None:
            log.error("%s: the VM is paused. Type into its monitor, to go on: %s", cause, self._resume_text())
        else:
            log.warning("%s: the VM stands still until its migration goes on", cause)
            self._resuming = threading.Thread(target=self._resume, name="resume", daemon=True)
            self._resuming.start()

    def _resume_text(self) -> str:
        return f'{{"execute": "migrate", "arguments": {{"uri": "{self._listener.uri}", "resume": true}}}}'

    def _resume(self) -> None:
        """Let QEMU connect again."""
        monitor = self.monitor
        assert monitor is not None
        try:
            if wait_for(lambda: migration_status(monitor) == "postcopy-paused", END_SECONDS):
                monitor.execute("migrate", {"uri": self._uri, "resume": True}, seconds=PREPARE_SECONDS)
        except PostcopyError as error:
            log.error("the migration cannot go on: %s", error)

    def _complete(self) -> None:
        """Everything is here: the VM runs on."""
        channel, self._channel = self._channel, None
        if channel is None:  # it is cut already
            return
        if self._revocable:
            log.info("the connection is cut now, and QEMU lets the VM run on")
        else:
            channel.send(answers.shut())
            if self.monitor is None:
                log.info('the migration is complete; type into the VM\'s monitor: {"execute": "cont"}')
        if self._preempt is not None:
            self.drop(self._preempt)
            self._preempt = None
        channel.socket.shutdown(socket.SHUT_WR if not self._revocable else socket.SHUT_RDWR)
        self.drop(channel)
        if self.monitor is not None:
            self._resuming = threading.Thread(target=self._continue, name="resume", daemon=True)
            self._resuming.start()

    def _continue(self) -> None:
        """See that the VM runs, and restore its settings."""
        monitor = self.monitor
        assert monitor is not None
        try:
            if not wait_for(lambda: migration_status(monitor) not in (*UNDER_WAY, *POSTCOPY), END_SECONDS):
                log.error("QEMU does not end the migration (%s)", migration_status(monitor))
            wait_for(lambda: _status(monitor) in ("running", "paused", "postmigrate"), END_SECONDS)
            if _status(monitor) == "postmigrate" and not self._was_paused:
                monitor.execute("cont")
            log.info("the VM is %s", _status(monitor))
        except PostcopyError as error:
            log.error("%s", error)
        if self._borrowed is not None:
            self._borrowed.restore()
            self._borrowed = None

    def give_back(self) -> None:
        if self._stopped and not (self._revocable or self._done or self.lost):
            self._drain()
        elif not self._done:
            self._leave()
        if self._resuming is not None:
            self._resuming.join(END_SECONDS)

    def _leave(self) -> None:
        """Cut: the VM runs on."""
        self._listener.close()
        for channel in (self._channel, self._preempt):
            if channel is not None:
                channel.close()
        if self.monitor is None or self._borrowed is None:
            return
        try:
            if migration_status(self.monitor) in UNDER_WAY:
                self.monitor.execute("migrate_cancel")
        except PostcopyError as error:
            log.debug("%s", error)  # too late to cancel: the cut is enough
        self._continue()

    def _drain(self) -> None:
        """Take the rest as fast as it comes, also over a connection that is to come."""
        log.info("taking the rest of the memory, so that the VM can run on")
        try:
            if self.monitor is not None:
                self.monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        except PostcopyError as error:
            log.warning("%s", error)
        while not self._done and not self.lost:
            channels = [one for one in (self._channel, self._preempt) if one is not None]
            sockets = [self._listener.socket, *(one.socket for one in channels)]
            waits = channels or self.monitor is not None
            ready = select.select(sockets, [], [], END_SECONDS)[0] if waits else ()
            if not ready:
                return log.error("QEMU sends nothing more: the VM stays paused until a source is started again")
            if self._listener.socket in ready:
                self._accept()
            for channel in channels:
                if channel.socket in ready:
                    self.read(channel)


def blocks_of(text: str) -> tuple[QemuBlock, ...]:
    """The RAM blocks of a VM, from what ``info ramblock`` says. Raises PostcopyError."""
    found = re.findall(r"^\s*(\S+)\s+(\d+) ([KMG])iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s", text, re.MULTILINE)
    if not found:
        raise PostcopyError("this QEMU does not say which RAM blocks it has: the migration cannot be recovered")
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return tuple(QemuBlock(name, int(used, 16), int(size) * scale[unit]) for name, size, unit, used in found)


def _status(monitor: Monitor) -> str:
    return str(monitor.execute("query-status")["status"])
