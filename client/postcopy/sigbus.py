"""A word about the lost page where SIGBUS ends a process: ``explain_sigbus``.

No Python code can run in the process that dies: the thread that touched the page may hold the GIL, or may not be a
thread of Python's at all. So ``faulthandler``, which is C and safe in a signal handler, writes its traceback into a
pipe. At the other end of the pipe waits a small process. It passes the traceback on, asks the supervisor which page
this client was refused last, and why, and ends with the process.

A forked child gets an explainer of its own when it is attached."""

from __future__ import annotations

import faulthandler
import os
import select
import sys
from contextlib import suppress
from typing import IO

from postcopy_kernel.programs import command, environment

from .attach_socket import AttachConnection
from .deadline import Deadline
from .errors import NoSupervisor, PostcopyError

VARIABLE = "POSTCOPY_EXPLAIN_SIGBUS"

_FATAL = b"Fatal Python error: Bus error"
_NOTE = b"\0"  # begins a line that is about a client, and no line of a traceback
_QUIET = 0.2  # seconds without output after which a traceback is complete
_ANSWER_WITHIN = 5.0

_owner = -1
_output = -1
_pipe = -1
_known: list[tuple[str, int]] = []


def explain_sigbus(file: int | IO[str] | None = None) -> None:
    """From now on, when SIGBUS ends this process, say which lost page it was, and why it is lost.

    Python's traceback is written first, by ``faulthandler``, which this function enables; a later
    ``faulthandler.enable`` of yours takes the explanation away. ``file``: where to write, default: standard error.
    ``POSTCOPY_EXPLAIN_SIGBUS=1`` in the environment does the same at the first ``attach``. Costs one small process.

    Example::

        postcopy.explain_sigbus()
        block = postcopy.attach("ram0")
    """
    global _output
    target = sys.stderr if file is None else file
    if target is None:
        raise ValueError("this process has no standard error: explain_sigbus needs a file")
    _output = target if isinstance(target, int) else target.fileno()
    _start()


def introduce(directory: str, client: int) -> None:
    """This process has become client ``client`` of the supervisor in ``directory``."""
    if os.environ.get(VARIABLE, "0") not in ("", "0") and _output < 0 and sys.stderr is not None:
        explain_sigbus()
    if _output < 0:
        return
    if _owner != os.getpid():
        _known.clear()
    _known.append((directory, client))
    if _owner != os.getpid():
        return _start()
    _note(directory, client)


def _note(directory: str, client: int) -> None:
    with suppress(OSError):  # the explainer has been killed
        os.write(_pipe, _NOTE + b"%d %s\n" % (client, os.fsencode(directory)))


def _start() -> None:
    """Start an explainer for this process, and let faulthandler write to it."""
    import subprocess

    global _owner, _pipe
    before, (reading, writing) = _pipe, os.pipe()
    try:
        subprocess.Popen(
            command("postcopy.sigbus", str(os.getpid())),
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=_output,
            env=environment(),
            process_group=0,  # Ctrl-C on the terminal reaches only us
        ).returncode = 0  # it ends after us: no warning that it still runs
        faulthandler.enable(writing)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    _owner, _pipe = os.getpid(), writing
    if before >= 0:
        os.close(before)
    for directory, client in _known:
        _note(directory, client)


def main() -> None:
    """The explainer: copy what comes through standard input, and explain a SIGBUS that it reports."""
    process, clients, fatal, rest = sys.argv[1], dict[bytes, int](), False, b""
    while select.select([0], [], [], _QUIET if fatal else None)[0]:
        data = os.read(0, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_NOTE):
                number, _, directory = line[1:].partition(b" ")
                clients[directory] = int(number)
            else:
                fatal = fatal or line.startswith(_FATAL)
                _say(line)
    if fatal:
        for directory, client in clients.items():
            _say(f"postcopy: process {process}: {_explanation(os.fsdecode(directory), client)}".encode())


def _explanation(directory: str, client: int) -> str:
    deadline = Deadline(_ANSWER_WITHIN)
    try:
        connection = AttachConnection(directory, deadline)
        try:
            for fd in connection.greet("explain-sigbus", "native", deadline):
                os.close(fd)
            loss = connection.ask_loss(client, 0, 0, deadline)
        finally:
            connection.close()
    except NoSupervisor as error:
        return f"{error}. What was missing when it ended is lost"
    except (PostcopyError, OSError) as error:
        return f"which page was lost is not known: {error}"
    if not loss.block:
        return f"no page of a block in {directory} was refused to it"
    reason = loss.reason or "its source cannot supply it"
    return f"the page that was refused last is at offset {loss.offset} of block {loss.block}: {reason}"


def _say(line: bytes) -> None:
    with suppress(OSError):
        os.write(2, line + b"\n")


if __name__ == "__main__":
    main()
