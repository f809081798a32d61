"""A log that never waits: lines go into a bounded queue, and a thread of its own writes them to standard error.

A reader of standard error may stall: a full pipe, Ctrl-S in a terminal, ``| less``. Then the thread waits in write(2),
and nothing else does. Lines for which there is no room are counted, and the count is written when there is room again.
The thread starts with the first line and sleeps while there is nothing to write. A process that was forked begins with
an empty queue and no thread.

    set_up("json")              # once, in the main program
    log.warning("refused", extra=about("refused", "uid 7"))
    flush(1.0)                  # before os._exit
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from .log_limit import Key, LogLimit

FORMATS = ("text", "json", "journal")
MOST_LINES = 1000
MOST_CHARACTERS = 16_000  # of one line, or of one traceback
EXIT_SECONDS = 1.0
UNLIMITED = "postcopy.trace"  # a logger whose every line was asked for
_POLL_SECONDS = 0.005
_CONTEXT = "postcopy"
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
"""Levels of syslog, which journald reads from the beginning of a line."""


def about(kind: str, peer: str = "", **fields: Any) -> dict[str, Any]:
    """The ``extra`` of a line that a peer can cause as often as it likes. ``fields`` are the keys of its JSON."""
    return {"about": (kind, peer), "fields": fields}


class _OneLine(logging.Formatter):
    """A message is one line of text, whatever others have sent for it: no order to a terminal, no line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.isprintable():
            letters = (one if one.isprintable() else ascii(one)[1:-1] for one in record.message)
            record.message = "".join(letters)
        return super().formatMessage(record)


class TextFormat(_OneLine):
    """Time, level, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")


class JsonFormat(logging.Formatter):
    """One object in one line: what an event has, then ``time`` (seconds since the epoch), ``level``, ``logger``,
    ``pid`` and ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**getattr(record, "fields", {}), **entry}, default=str)


class JournalFormat(_OneLine):
    """The message with its priority before each line (sd-daemon(3)). journald knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


_FORMATTERS = {"text": TextFormat, "json": JsonFormat, "journal": JournalFormat}


class QueueHandler(logging.Handler):
    """Puts lines into the queue, and writes them to ``fd`` in a thread."""

    def __init__(self, fd: int, format: str = "text", limit: LogLimit | None = None) -> None:
        super().__init__()
        self.setFormatter(_FORMATTERS[format]())
        self._fd, self._plain = fd, format == "text"
        self._limit = limit or LogLimit()
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._put = self._written = self.dropped = 0
        self._limit.forget()

    def emit(self, record: logging.LogRecord) -> None:
        """``logging`` holds the handler's lock, which the thread that has it may take again (a signal)."""
        try:
            if record.name != UNLIMITED:
                kind, peer = getattr(record, "about", (f"{record.module}:{record.lineno}", ""))
                counting = self._limit.counting
                if not self._limit.admits(kind, peer, time.monotonic()):
                    return None if counting else self._enqueue(b"")  # the thread has a count to write later
            text = self.format(record)
        except Exception:
            text = f"a line of {record.name} cannot be formatted"
        self._enqueue(_bytes(text))

    def write_text(self, text: str) -> None:
        """Lines that are no records: what is printed to standard error."""
        self.acquire()
        try:
            if self._plain:
                self._enqueue(_bytes(text))
            else:
                self._log(text)
        finally:
            self.release()

    def flush(self, seconds: float = EXIT_SECONDS) -> None:
        """Wait until everything is written, or for so long. ``logging`` calls it at exit."""
        until = time.monotonic() + seconds
        while self._written < self._put and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def _enqueue(self, line: bytes) -> None:
        if self._lines.qsize() >= MOST_LINES:
            self.dropped += bool(line)
            return
        self._put += 1
        self._lines.put(line)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no memory or no process number is left: the next line tries again
                self._thread = None

    def _run(self) -> None:
        while True:
            line = b""
            with suppress(queue.Empty):
                line = self._lines.get(timeout=1.0 if self._limit.counting else None)
                self._write(line)
                self._written += 1
            if (self._limit.counting or self.dropped) and self.lock is not None and self.lock.acquire(False):
                try:
                    self._report()
                finally:
                    self.release()

    def _report(self) -> None:
        """Enqueue the counts of lines that are not in the log."""
        for key, count in self._limit.over(time.monotonic()):
            self._log(_left_out(key, count))
        if self.dropped and self._lines.qsize() < MOST_LINES // 2:
            dropped, self.dropped = self.dropped, 0
            self._log(f"{dropped} lines are missing here: the log was not read")

    def _log(self, text: str) -> None:
        record = logging.LogRecord(_CONTEXT, logging.WARNING, __file__, 0, "%s", (text,), None)
        self._enqueue(_bytes(self.format(record)))

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # another process has made it non-blocking
                waiting = select.poll()
                waiting.register(self._fd, select.POLLOUT)
                waiting.poll()
            except OSError:  # its terminal or its reader is gone, or the disk is full
                return


class QueuedStream(io.TextIOBase):
    """A ``sys.stderr`` whose lines go into the queue. An incomplete line waits for its end."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, handler: QueueHandler, fd: int) -> None:
        self._handler, self._fd = handler, fd
        self._text = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, text: str, /) -> int:
        self._text += text
        if "\n" in self._text or len(self._text) > MOST_CHARACTERS:
            whole, _, self._text = self._text.rpartition("\n")
            if not whole and len(self._text) > MOST_CHARACTERS:
                whole, self._text = self._text, ""
            if whole.strip():
                self._handler.write_text(whole)
        return len(text)


_handler: QueueHandler | None = None


def set_up(format: str = "text", level: str = "info") -> None:
    """Make this the log of the program, and standard error too. Without standard error nothing is logged."""
    global _handler
    if sys.stderr is None:
        logging.basicConfig(level=level.upper(), handlers=[logging.NullHandler()])
        return
    fd = sys.stderr.fileno()
    _handler = QueueHandler(fd, format)
    logging.basicConfig(level=level.upper(), handlers=[_handler], force=True)
    sys.stderr = QueuedStream(_handler, fd)


def flush(seconds: float = EXIT_SECONDS) -> None:
    """Wait until what was logged is written, at most so long: before ``os._exit``."""
    if _handler is not None:
        _handler.flush(seconds)


def _bytes(text: str) -> bytes:
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "…"
    return text.encode(errors="backslashreplace") + b"\n"


def _left_out(key: Key, count: int) -> str:
    kind, peer = key
    return f"{count} more lines about {kind}{f' of {peer}' if peer else ''} are left out"
