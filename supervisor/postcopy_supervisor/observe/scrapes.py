"""A small HTTP server for scrapes: one thread, few connections, a deadline for each.

Any user of the machine reaches the loopback. So a connection costs little, whatever its peer does or does not: a new
one takes the place of the oldest that waits, and scrapes that follow one another closely get the same text. A peer that
speaks no HTTP is answered or closed, and never named in the log."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 16
REQUEST_SECONDS, ANSWER_SECONDS = 5.0, 10.0
REQUEST_BYTES = 8 << 10
SAME_SECONDS = 0.2  # in which scrapes get the same text
MOST_FORMATS = 2  # that are made in this time
SHARE, BURST_SECONDS = 0.1, 0.05
"""Share of one processor's time for all scrapes, and seconds of it that may be used at once: each step holds the
interpreter's lock, which a fault of a client needs."""
FULL_SECONDS = 0.1  # between two tries to accept while no descriptor is free
_END = b"\r\n\r\n"

Answer = tuple[str, bytes]
"""Content type and text."""
Scrape = Callable[[str], Answer]
"""Makes the answer for a request's Accept header. It may raise."""


@dataclass(slots=True, eq=False)
class Scraper:
    """One connection. ``deadline``: monotonic seconds."""

    socket: socket.socket
    deadline: float
    request: bytes = b""
    answer: memoryview = field(default_factory=lambda: memoryview(b""))


class ScrapeServer(threading.Thread):
    """Answers at a listening socket until the process ends."""

    def __init__(self, listener: socket.socket, scrape: Scrape) -> None:
        super().__init__(name="metrics", daemon=True)
        listener.setblocking(False)
        self._listener, self._scrape = listener, scrape
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._scrapers: dict[Scraper, None] = {}  # the oldest first
        self._made: dict[str, tuple[float, bytes]] = {}  # answers by Accept header: until when, and the bytes
        self._left, self._used, self._at = BURST_SECONDS, 0.0, 0.0
        """Seconds of this thread's time that are left; how much it had used, and when that was counted."""

    def run(self) -> None:
        while True:
            try:
                self.turn()
            except Exception:  # a scrape must not end the thread
                log.exception("metrics: a scrape has failed")
                time.sleep(FULL_SECONDS)

    def turn(self) -> None:
        """Wait for events or a deadline, and handle them."""
        soonest = min((scraper.deadline for scraper in self._scrapers), default=None)
        wait = None if soonest is None else max(0.0, soonest - time.monotonic())
        for key, _ in self._selector.select(wait):
            if key.data is None:
                self._accept()
            elif key.data in self._scrapers:  # else closed for a newer one
                self._serve(key.data)
        now = time.monotonic()
        for scraper in [one for one in self._scrapers if one.deadline <= now]:
            self._close(scraper)
        self._keep_share()

    def _keep_share(self) -> None:
        """Pause when more than the share has been used. Connections wait in the kernel."""
        now, total = time.monotonic(), time.thread_time()
        allowed = (now - self._at) * SHARE
        self._left = min(BURST_SECONDS, self._left + allowed) - (total - self._used)
        self._used, self._at = total, now
        if self._left < 0:
            time.sleep(-self._left / SHARE)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is free
            if self._scrapers:
                return self._close(next(iter(self._scrapers)))
            return time.sleep(FULL_SECONDS)
        connection.setblocking(False)
        if len(self._scrapers) >= MOST_CONNECTIONS:
            self._close(next(iter(self._scrapers)))
        scraper = Scraper(connection, time.monotonic() + REQUEST_SECONDS)
        self._selector.register(connection, selectors.EVENT_READ, scraper)
        self._scrapers[scraper] = None

    def _serve(self, scraper: Scraper) -> None:
        """Read or write what the connection accepts now."""
        try:
            if scraper.answer:
                return self._write(scraper)
            data = scraper.socket.recv(REQUEST_BYTES)
            scraper.request += data
            if not data:
                return self._close(scraper)
            if _END not in scraper.request and len(scraper.request) < REQUEST_BYTES:
                return None
            scraper.answer = memoryview(self._answer(scraper.request))
            scraper.deadline = time.monotonic() + ANSWER_SECONDS
            self._selector.modify(scraper.socket, selectors.EVENT_WRITE, scraper)
            self._write(scraper)
        except BlockingIOError:
            return None
        except OSError:  # it has left
            self._close(scraper)

    def _write(self, scraper: Scraper) -> None:
        scraper.answer = scraper.answer[scraper.socket.send(scraper.answer, socket.MSG_NOSIGNAL) :]
        if not scraper.answer:
            with suppress(OSError):
                scraper.socket.shutdown(socket.SHUT_WR)
            self._close(scraper)

    def _close(self, scraper: Scraper) -> None:
        self._scrapers.pop(scraper, None)
        self._selector.unregister(scraper.socket)
        scraper.socket.close()

    def _answer(self, request: bytes) -> bytes:
        """The response to a request, or to the beginning of one that is too long."""
        first, _, rest = request.partition(b"\r\n")
        words = first.split()
        if _END not in request or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", "text/plain", b"this is no request for metrics\n")
        if words[0] != b"GET":
            return _response("405 Method Not Allowed", "text/plain", b"only GET is answered\n")
        accept = _header(rest, b"accept")
        now = time.monotonic()
        self._made = {key: one for key, one in self._made.items() if one[0] > now}
        if accept not in self._made and len(self._made) >= MOST_FORMATS:
            accept = next(iter(self._made))
        _, made = self._made.get(accept, (0.0, b""))
        if not made:
            try:
                made = _response("200 OK", *self._scrape(accept))
            except Exception:
                log.exception("metrics: a scrape has failed")
                return _response("500 Internal Server Error", "text/plain", b"the supervisor's log says more\n")
            self._made[accept] = (time.monotonic() + SAME_SECONDS, made)
        return made


def _header(lines: bytes, name: bytes) -> str:
    for line in lines.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().decode("latin-1")
    return ""


def _response(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + body
