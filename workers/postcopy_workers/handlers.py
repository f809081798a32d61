"""A user's handler functions: how they are imported, and where what they print goes.

``python -m postcopy_workers.handlers DIRECTORY MODULE:FUNCTION...`` imports them as a worker would, and ends. Its
output is why one cannot be imported, or nothing: the supervisor asks this before it says that it is ready.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from typing import TYPE_CHECKING

from postcopy_kernel import process
from postcopy_protocol.errors import text_of

from .page_sources import Handler
from .reports import Reporter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TRACEBACK = "POSTCOPY_TRACEBACK"
"""Environment variable: 1 shows where in its module an import fails."""

MOST_LINE = 1000  # bytes of a line that are reported


class CannotImport(Exception):
    """Why a handler cannot be imported."""


def load_handler(detail: str, directory: str) -> Handler:
    """The function that ``MODULE:FUNCTION`` names. Raises CannotImport.

    The directory in which serve was started comes last on the path: a file there never replaces another module."""
    name, _, function = detail.partition(":")
    if directory not in ("", *sys.path):
        sys.path.append(directory)
    try:
        module = importlib.import_module(name)
        handler: Handler | None = getattr(module, function, None)
        place = getattr(module, "__file__", None)
    except BaseException as error:  # a module may call sys.exit()
        raise CannotImport(f"cannot import {detail}: {type(error).__name__}: {text_of(error)}") from error
    if not callable(handler):
        raise CannotImport(f"cannot import {detail}: {place or name} has no function {function}")
    return handler


def show(failed: CannotImport) -> None:
    """Print the traceback of an import that failed, from the user's module on."""
    error = failed.__cause__ or failed
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith((__file__, importlib.__file__, "<frozen")):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


class ReportedLines(io.RawIOBase):
    """A stream whose lines are reported: standard output of a worker would go nowhere, or block it."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._rest = b""

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        *lines, self._rest = (self._rest + bytes(data)).split(b"\n")
        if len(self._rest) > MOST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        for line in filter(None, map(bytes.strip, lines)):
            self._report("handler-output", -1, -1, line[:MOST_LINE].decode("utf-8", "replace"))
        return memoryview(data).nbytes


def report_output(report: Reporter) -> None:
    """From now on what Python code of this process prints is reported, as far as reports are (see ``Reports``)."""
    for stream in ("stdout", "stderr"):
        buffer = io.BufferedWriter(ReportedLines(report))
        setattr(sys, stream, io.TextIOWrapper(buffer, "utf-8", errors="backslashreplace", line_buffering=True))


def main() -> None:
    """Import every function of the command line; print why the first one that cannot be imported cannot."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what the modules print belongs into the log
    process.drop_privileges()  # workers import without any
    reason = ""
    try:
        for detail in sys.argv[2:]:
            load_handler(detail, sys.argv[1])
    except CannotImport as error:
        reason = str(error)
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            show(error)
        elif error.__cause__ is not None:
            reason += f" ({TRACEBACK}=1 shows where)"
    os.write(answer, reason.encode("utf-8", "replace"))
    sys.stdout.flush()
    os._exit(bool(reason))  # a thread that a module has started must not hold up the start


if __name__ == "__main__":
    main()
