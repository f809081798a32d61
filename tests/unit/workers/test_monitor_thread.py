"""A worker's monitor thread: a report of the main thread is sent even where the worker ends at the same moment."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from postcopy_kernel import memory
from postcopy_protocol.codec import decode
from postcopy_protocol.counters import ORPHAN_MS
from postcopy_protocol.messages import Report
from postcopy_protocol.received_map import LIVES_AT
from postcopy_workers.client_worker import MonitorThread
from postcopy_workers.orphaned import Life, Orphaned
from postcopy_workers.reports import Reports
from postcopy_workers.worker import ExitStatus, Worker


class Sent:
    """A channel that is connected, and keeps what it is to send."""

    connected, retry_in = True, 1.0

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.send = self.data.append

    def flush(self) -> None:
        pass

    def holds(self) -> bool:
        return False


class EndedError(Exception):
    """With this status."""


def ends(status: int) -> None:
    raise EndedError(status)


@pytest.mark.parametrize(
    ("place", "status"), [(0, ExitStatus.QUIT), (1, ExitStatus.CLIENT_GONE)], ids=["quit", "client"]
)
def test_a_report_made_as_the_worker_ends(monkeypatch: pytest.MonkeyPatch, place: int, status: int) -> None:
    """A client that dies of a lost page ends its worker at once; no other worker may ever report why it is lost."""
    monkeypatch.setattr(os, "_exit", ends)
    signs, reports, channel = [os.eventfd(0), os.eventfd(0)], Reports(3), Sent()

    def send_waiting(channel: Any) -> float:
        pause = Worker.send_waiting(worker, channel)
        if not channel.data:  # while the monitor thread is about to sleep
            reports("lost", 1, 4096, "gone for good")
            os.eventfd_write(signs[place], 1)
        return pause

    assignment = SimpleNamespace(quit_eventfd=0, client_pidfd=1)
    worker = cast(
        Any,
        SimpleNamespace(reports=reports, remote=True, fds=signs, assignment=assignment, send_waiting=send_waiting),
    )
    orphaned = Orphaned(-1, memoryview(b""), lambda: None)
    try:
        with pytest.raises(EndedError) as ended:
            MonitorThread(worker, cast(Any, channel), Life((), 1), orphaned)._monitor()
        assert ended.value.args == (status,)
        assert [decode(data, expect=(Report,)) for data in channel.data] == [
            Report(3, "lost", 1, 4096, "gone for good")
        ]
    finally:
        for fd in (*signs, reports.wakeup):
            os.close(fd)


def test_a_worker_poisons_once_after_the_whole_timeout_without_supervisor_and_custodian() -> None:
    calls: list[str] = []
    control = memoryview(bytearray(4096)).cast("Q")
    control[ORPHAN_MS] = 1500
    orphaned = Orphaned(5, control, lambda: calls.append("poison"))
    orphaned.tick(99.0)
    assert orphaned.lifeline == 5 and orphaned.wait(1.0, 99.0) == 1.0 and not calls
    orphaned.ended(100.0)
    assert orphaned.lifeline == -1 and orphaned.wait(1.0, 101.0) == 0.5
    for now in (101.4, 101.5, 103.0):
        orphaned.tick(now)
    assert calls == ["poison"] and orphaned.wait(1.0, 103.0) == 1.0
    control[ORPHAN_MS] = 0
    waits = Orphaned(5, control, lambda: calls.append("never"))
    waits.ended(100.0)
    waits.tick(1e9)
    assert calls == ["poison"]


def test_a_lock_that_a_client_holds_is_tried_again() -> None:
    """A client of the block may lock for reading what shows that another's worker lives."""
    fd, worker = memory.create_memfd("postcopy-ram0-map", 4096), 3
    locks = f"import fcntl; fcntl.lockf({fd}, fcntl.LOCK_SH, 1, {LIVES_AT + worker}); print(flush=True); input()"
    with subprocess.Popen(
        (sys.executable, "-c", locks), stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,)
    ) as client:
        assert client.stdout is not None and client.stdout.readline()
        life = Life([fd], worker)
        assert life.show() == [fd]
        client.communicate(b"\n")
    assert life.show() == []
    os.close(fd)
