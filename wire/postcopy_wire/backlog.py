"""What libzmq holds for each tcp connection, and the end of connections that make it hold too much.

libzmq gives a message when its last frame is there. Its limits are for one frame and for whole messages, so a peer
whose message never ends would fill our memory. Only libzmq can read CURVE, but the kernel counts bytes: what has come
and was not given to us is in libzmq's memory, and so is what we gave to libzmq and the kernel has not got.

A descriptor of our own refers to each connection. Shutting it down ends the connection in libzmq, which then frees the
unfinished message. The peers beside it notice nothing. (A process of its own with a memory limit would end all of them
together, and would pass on every message once more.)
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import threading
import time
from contextlib import suppress

ASKED_LIMIT, UNASKED_LIMIT = 20 << 20, 6 << 20
"""Bytes that may come to all connections together and wait, as they are on the wire: from peers that we ask for pages,
and from peers that ask us. In memory, short frames take 2.2 times as much."""
SENT_LIMIT = 20 << 20
MOST_CONNECTIONS = 256
CHECK_SECONDS = 0.025  # CURVE brings some 10 MiB in this time
REST = 1 << 16  # heartbeats are not given to us: so few bytes are forgotten when a message has come after them
_COUNTS = struct.Struct("=QQ")
_COUNTS_AT = 120  # of tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h)
SEND_BYTES = 2 << 20  # that libzmq may hold for one peer that is sent to; its sender keeps the rest
CURVE_BYTES = 33  # that CURVE puts before each frame's body (RFC 26: MESSAGE)


class Link:
    """One tcp connection of libzmq. ``taken``, ``given``: bytes on the wire of the messages that we received and
    sent."""

    def __init__(self, fd: int, more: int) -> None:
        """``more``: bytes that the security mechanism adds to each frame. Raises OSError."""
        self.taken = self.given = 0
        self._more = more
        self._taken_before = self._given_before = self._outward = 0
        self._socket = socket.socket(fileno=os.dup(fd))
        self._sent, self._received = self._counts()

    def took(self, length: int) -> None:
        """A frame of this length was received."""
        self.taken += self._wire(length)

    def gave(self, length: int) -> None:
        """A frame of this length was sent."""
        self.given += self._wire(length)

    def held(self) -> tuple[int, int]:
        """Bytes that libzmq holds for it: what has come, and what was sent. Raises OSError."""
        taken, given = self.taken, self.given  # before the counts: they grow in the other thread
        sent, received = self._counts()
        inward = received - self._received - taken
        if inward < 0 or (inward < REST and taken != self._taken_before):
            self._received += inward
            inward = 0
        self._taken_before = taken
        self._outward = max(0, given - (sent - self._sent))
        if not self._outward:  # also heartbeats were sent
            self._sent = sent - given
        return inward, self._outward

    def is_full(self) -> bool:
        """Does libzmq hold as much as it may of what we have sent?"""
        if self.given - self._given_before + self._outward > SEND_BYTES:
            self._given_before = self.given
            with suppress(OSError):
                self.held()
        return self._outward > SEND_BYTES

    def shut(self) -> None:
        """End the connection; libzmq notices it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _wire(self, length: int) -> int:
        length += self._more
        return length + (2 if length < 256 else 9)

    def _counts(self) -> tuple[int, int]:
        """Bytes that libzmq has handed to the kernel, and bytes that have come."""
        queued = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS_AT + _COUNTS.size)
        acked, received = _COUNTS.unpack_from(info, _COUNTS_AT)
        return acked + queued, received


class Backlog:
    """All tcp connections of one router's libzmq sockets, and the thread that looks at them."""

    def __init__(self, limit: int = ASKED_LIMIT) -> None:
        """``limit``: bytes that may have come."""
        self.links: dict[int, Link] = {}  # by libzmq's descriptor
        self.limit = limit
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def opened(self, fd: int, more: int) -> None:
        """libzmq has this connection."""
        self.closed(fd)
        if len(self.links) >= MOST_CONNECTIONS:
            silent = next((link for link in self.links.values() if not link.taken), None)
            (silent or next(reversed(self.links.values()))).shut()
        try:
            self.links[fd] = Link(fd, more)
        except OSError:  # it has ended already, or is no tcp connection
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
            self._thread.start()

    def closed(self, fd: int) -> None:
        """libzmq has closed it."""
        link = self.links.pop(fd, None)
        if link is not None:
            link.close()

    def check(self) -> None:
        """Shut the connections that hold most, until the others are below the limits."""
        come: dict[Link, int] = {}
        sent: dict[Link, int] = {}
        for link in list(self.links.values()):
            with suppress(OSError):  # it has just been closed
                come[link], sent[link] = link.held()
        for held, limit in ((come, self.limit), (sent, SENT_LIMIT)):
            while sum(held.values()) > limit:
                worst = max(held, key=held.__getitem__)
                del held[worst]
                worst.shut()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for fd in list(self.links):
            self.closed(fd)

    def _run(self) -> None:
        pause = CHECK_SECONDS
        while not self._over.wait(pause):
            begun = time.monotonic()
            self.check()
            pause = max(CHECK_SECONDS, 20 * (time.monotonic() - begun))
