"""The log: bounded, limited by kind and peer, written by a thread of its own, and safe across fork."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from postcopy_kernel.log_limit import MOST_KEYS, LogLimit
from postcopy_kernel.log_queue import MOST_LINES, QueuedStream, QueueHandler, about


class Pipe:
    """A full pipe is what a reader that stalls leaves."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.reader, False)
        self.text = ""
        self.handlers: list[QueueHandler] = []

    def close(self) -> None:
        """A thread that waits in write(2) gets EPIPE."""
        os.close(self.reader)
        for handler in self.handlers:
            handler.flush(10)
        os.close(self.writer)

    def read(self) -> str:
        with suppress(BlockingIOError):
            while data := os.read(self.reader, 1 << 16):
                self.text += data.decode()
        return self.text

    def until(self, done: Callable[[str], object]) -> str:
        deadline = time.monotonic() + 20
        while not done(self.read()):
            assert time.monotonic() < deadline, self.text[-2000:]
            time.sleep(0.01)
        return self.text


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def logger(pipe: Pipe, format: str = "text", limit: LogLimit | None = None) -> tuple[logging.Logger, QueueHandler]:
    log = logging.Logger("test", logging.DEBUG)  # noqa: LOG001 (of this test only)
    handler = QueueHandler(pipe.writer, format, limit)
    pipe.handlers.append(handler)
    log.addHandler(handler)
    return log, handler


def test_a_reader_that_stalls_stops_no_one(pipe: Pipe) -> None:
    log, handler = logger(pipe, limit=LogLimit(kind_burst=1 << 30))
    begun = time.monotonic()
    for number in range(3 * MOST_LINES):
        log.info("line %d of a peer", number)
    handler.flush(0.1)
    assert time.monotonic() - begun < 10
    assert handler.dropped >= MOST_LINES
    text = pipe.until(lambda text: "are missing here" in text)
    assert "line 0 of" in text and f"line {3 * MOST_LINES - 1} of" not in text


def test_a_kind_and_peer_is_limited_and_counted(pipe: Pipe) -> None:
    log, _ = logger(pipe, limit=LogLimit(burst=2, kind_burst=5, seconds=0.3))
    for _ in range(10):
        log.warning("no", extra=about("refused", "uid 7"))
    log.warning("another", extra=about("refused", "uid 8"))
    text = pipe.until(lambda text: "left out" in text)
    assert text.count(" no\n") == 2 and "another" in text
    assert "8 more lines about refused of uid 7 are left out" in text
    time.sleep(0.3)
    log.warning("no", extra=about("refused", "uid 7"))
    pipe.until(lambda text: text.count(" no\n") == 3)


def test_lines_without_a_kind_are_limited_by_their_place(pipe: Pipe) -> None:
    log, _ = logger(pipe, limit=LogLimit(kind_burst=3, seconds=60))
    for number in range(50):
        log.error("bug %d", number)
    log.error("other")
    text = pipe.until(lambda text: "other" in text)
    assert text.count("bug") == 3


def test_many_peers_take_bounded_memory() -> None:
    limit = LogLimit(kind_burst=4)
    admitted = [limit.admits("refused", f"uid {number}", 0.0) for number in range(5 * MOST_KEYS)]
    assert sum(admitted) == 4
    assert len(limit._windows) <= MOST_KEYS
    limit.over(1e6)
    assert not limit.counting


def test_formats(pipe: Pipe) -> None:
    for format in ("json", "journal"):
        log, handler = logger(pipe, format)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("failed", extra=about("failed", "uid 7", event="failed", block="ram0"))
        handler.flush(10)
    text = pipe.until(lambda text: text.count("ValueError") > 1)
    entry, *journal = text.splitlines()
    found = json.loads(entry)
    assert (found["level"], found["message"], found["event"], found["block"]) == ("error", "failed", "failed", "ram0")
    assert "two" in found["traceback"]
    assert len(journal) > 3 and all(line.startswith("<3>") for line in journal)
    assert journal[0] == "<3>failed"


def test_what_is_printed_goes_the_same_way(pipe: Pipe) -> None:
    _, handler = logger(pipe)
    stream = QueuedStream(handler, pipe.writer)
    for _ in range(3000):
        print("x" * 100, file=stream)
    print("no end", end="", file=stream)
    assert "x" * 100 in pipe.until(lambda text: "x" in text)


def test_a_forked_process_has_a_queue_of_its_own(pipe: Pipe) -> None:
    log, handler = logger(pipe)
    for number in range(100):
        log.info("%s", f"{number} {'x' * 200}")  # the thread waits in write(2)
    pid = os.fork()
    if not pid:
        log.info("child")
        handler.flush(10)
        os._exit(0 if handler._written == 1 else 1)
    text = pipe.until(lambda text: "child" in text)
    assert os.waitpid(pid, 0)[1] == 0
    assert text.count("child") == 1


def test_a_reader_that_is_gone_is_no_error(pipe: Pipe) -> None:
    log, handler = logger(pipe)
    reader, pipe.reader = pipe.reader, os.open("/dev/null", os.O_RDONLY)
    os.close(reader)
    log.info("nobody sees it")
    handler.flush(10)
    assert handler._written == 1


@pytest.mark.parametrize("format", ["text", "journal"])
def test_a_message_is_one_line_that_gives_no_orders(format: str) -> None:
    reader, writer = os.pipe()
    handler = QueueHandler(writer, format)
    handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "%s", ("a\x1b]0;owned\x07\n<0>ERROR forged",), None))
    handler.flush()
    os.close(writer)
    written = os.read(reader, 4096)
    os.close(reader)
    assert written.count(b"\n") == 1 and b"\x1b" not in written and rb"\x1b]0;owned\x07\n<0>" in written
