"""What becomes of a watcher whose session ends: it watches on, or it ends; never is it a zombie for long."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postcopy.errors import AttachDenied
from postcopy.firecracker.machine import _resumed
from postcopy.vhost_user.attach_side import BackEndSession
from postcopy.watching import OrphanWatcher
from postcopy_supervisor.recovery import watchers
from postcopy_supervisor.recovery.watchers import Orphans, new_lifeline


@pytest.fixture
def watched() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(("sleep", "600")) as process:
        yield process
        process.kill()


def started(watched: subprocess.Popen[bytes]) -> OrphanWatcher:
    """Its userfaultfd is none: nothing faults here."""
    pidfd, other = os.pidfd_open(watched.pid), os.open(os.devnull, os.O_RDONLY)
    try:
        return OrphanWatcher(other, watched.pid, pidfd)
    finally:
        os.close(pidfd)
        os.close(other)


def children(watched: subprocess.Popen[bytes]) -> list[str]:
    """States of our children but the one that is watched."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in pids if int(pid) != watched.pid)
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def test_the_watcher_of_a_session_that_is_given_up_ends(watched: subprocess.Popen[bytes]) -> None:
    """The next session has a client number and a watcher of its own. The old one would poison beside its worker."""
    before = len(children(watched))

    def denied(*_: Any) -> None:
        raise AttachDenied("client 1 is not known here")

    session = BackEndSession.__new__(BackEndSession)
    session.connection = SimpleNamespace(resume=denied, close=lambda: None)  # type: ignore[assignment]
    session.name, session._kind, session.timeout = "vm", "vm", 1.0
    session._copied, session._maps = [], {}
    session._watcher = started(watched)
    assert _resumed(session) is None
    assert len(children(watched)) == before


def test_a_watcher_that_was_left_is_reaped(watched: subprocess.Popen[bytes]) -> None:
    before = len(children(watched))
    started(watched).leave()
    assert len(children(watched)) == before + 1
    watched.kill()
    until = time.monotonic() + 30
    while "Z" not in children(watched):
        assert time.monotonic() < until, "it ends with what it watches"
        time.sleep(0.01)
    started(watched).leave()
    assert len(children(watched)) == before


def test_a_take_over_without_rescued_clients_looks_at_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "_watchers_of", None)
    assert Orphans(1.0, -1).relieve({}) == []


def test_all_clients_of_a_process_get_what_its_watchers_have_poisoned(watched: subprocess.Popen[bytes]) -> None:
    running, lifeline = [started(watched), started(watched)], new_lifeline()
    client = watched.pid, os.geteuid()
    answers = Orphans(1.0, lifeline).relieve({1: client, 2: client, 3: (os.getpid(), os.geteuid())})
    os.close(lifeline)
    for watcher in running:
        watcher.close()
    assert sorted(number for number, _ in answers) == [1, 1, 2, 2]
