"""The server for scrapes: few connections, one thread, deadlines, and no traceback for what a peer sends."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from postcopy_protocol.errors import BadInput
from postcopy_supervisor.observe import scrapes
from postcopy_supervisor.observe.metrics import _listen
from postcopy_supervisor.observe.scrapes import MOST_CONNECTIONS, ScrapeServer


class Served:
    def __init__(self) -> None:
        self.scrapes = 0
        self.fails = False
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.place = listener.getsockname()
        self._server, self._over = ScrapeServer(listener, self._scrape), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            self._server.turn()

    def close(self) -> None:
        self._over = True
        self.connect().close()
        self._thread.join(20)
        for scraper in list(self._server._scrapers):
            self._server._close(scraper)
        self._server._selector.close()
        self._server._listener.close()

    def _scrape(self, accept: str) -> tuple[str, bytes]:
        self.scrapes += 1
        if self.fails:
            raise ValueError("a bug")
        return "text/plain", b"figures"

    def connect(self) -> socket.socket:
        return socket.create_connection(self.place, timeout=20)

    def ask(self, request: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_silent_peers_hold_up_no_scrape(served: Served) -> None:
    silent = [served.connect() for _ in range(10 * MOST_CONNECTIONS)]
    assert served.ask(GET).endswith(b"\r\n\r\nfigures")
    for connection in silent:
        connection.close()
    assert served.ask(GET).endswith(b"figures")


def test_scrapers_get_a_share_of_a_processor(served: Served) -> None:
    """Connections that come and go without a word, faster than they are accepted."""
    assert served._thread.ident is not None
    clock = time.pthread_getcpuclockid(served._thread.ident)
    began, used = time.monotonic(), time.clock_gettime(clock)
    while time.monotonic() - began < 1.5:
        served.connect().close()
    share = (time.clock_gettime(clock) - used - scrapes.BURST_SECONDS) / (time.monotonic() - began)
    assert share < 1.5 * scrapes.SHARE, share
    assert served.ask(GET).endswith(b"figures")


def test_the_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "REQUEST_SECONDS", 0.1)
    with served.connect() as silent:
        silent.send(b"GET /")
        assert not silent.recv(10)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"\0" * 9000, b"400"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000, b"400"),
        (b"POST / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\nAccept: \xff\xfe;q=x\r\n\r\n", b"200"),
    ],
)
def test_bad_scrapers(served: Served, request_: bytes, status: bytes, caplog: pytest.LogCaptureFixture) -> None:
    try:
        assert served.ask(request_).startswith(b"HTTP/1.1 " + status)
    except ConnectionResetError:  # it did not read all that was sent
        assert status == b"400"
    with served.connect() as rude:
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.send(GET)  # and a reset, which close sends
    assert served.ask(GET).endswith(b"figures")
    assert not caplog.records


def test_scrapes_close_together_are_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "SAME_SECONDS", 60.0)
    for number in range(30):
        assert served.ask(b"GET / HTTP/1.1\r\nAccept: %d\r\n\r\n" % number).endswith(b"figures")
    assert served.scrapes == scrapes.MOST_FORMATS


def test_a_scrape_that_fails(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.fails = True
    with caplog.at_level(logging.ERROR):
        assert served.ask(GET).startswith(b"HTTP/1.1 500")
    served.fails = False
    assert served.ask(GET).endswith(b"figures")


def test_an_address_of_others_needs_an_option() -> None:
    with pytest.raises(BadInput, match="--metrics-public"):
        _listen("0.0.0.0", 0, public=False)
    for host, public in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        _listen(host, 0, public=public).close()
