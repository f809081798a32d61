"""One supervisor for several test processes: whoever comes first starts it, whoever leaves last ends it.

They meet in a directory, under a lock; a file there counts who is inside. The supervisor is nobody's child (the first
may leave before the last does), and ends by itself after ``LONGEST`` seconds, should all of them be killed.
"""

from __future__ import annotations

import fcntl
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postcopy.queries import Control
from tests.system.service import READY_WITHIN, arguments, environment, until

LONGEST = 900


@contextmanager
def shared_house(meeting: Path, source: Path) -> Iterator[str]:
    """The runtime directory of a supervisor that serves ``source`` as ``ram0`` to all that meet in ``meeting``."""
    meeting.mkdir(exist_ok=True)
    with _alone(meeting):
        if not _count(meeting, +1) - 1:
            _start(meeting, source)
        directory = (meeting / "runtime").read_text()
    try:
        yield directory
    finally:
        with _alone(meeting):
            if not _count(meeting, -1):
                _end(directory)


@contextmanager
def _alone(meeting: Path) -> Iterator[None]:
    with (meeting / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _count(meeting: Path, change: int) -> int:
    file = meeting / "inside"
    inside = int(file.read_text() if file.exists() else 0) + change
    file.write_text(str(inside))
    return inside


def _start(meeting: Path, source: Path) -> None:
    directory = tempfile.mkdtemp(prefix="pc-", dir="/tmp")  # short: a socket path may have about 107 bytes
    (meeting / "runtime").write_text(directory)
    command = shlex.join(["timeout", str(LONGEST), *arguments(directory, (f"ram0={source}",), {"fault_around": "4K"})])
    log = meeting / "log"
    log.touch()
    subprocess.run(["sh", "-c", f"{command} </dev/null >/dev/null 2>{shlex.quote(str(log))} &"], env=environment())
    until(lambda: "ready" in log.read_text(), "the shared supervisor is ready", READY_WITHIN)


def _end(directory: str) -> None:
    with Control(directory) as control:
        # The last clients have ended; the supervisor hears of it in its own time.
        until(lambda: not control.status()["clients"], "the last clients are forgotten")
        document = control.status(audit=True)
        control.stop()
    assert document["totals"]["polluted"] == 0
    assert not [event for event in document["events"] if event["kind"] == "bug"]
