"""Small laws of the supervisor's parts that a whole service shows too seldom: what two threads, or a number that is
used again, may do to each other within microseconds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from postcopy_protocol.attach_conversation import AttachConversation
from postcopy_supervisor.clients.attach_server import AttachServer, Client
from postcopy_supervisor.exports import Export
from postcopy_supervisor.listener import FAILED, Listener
from postcopy_supervisor.main_loop import MainLoop
from postcopy_supervisor.paging.flow_control import FlowControl, RangeRequest
from postcopy_supervisor.paging.source_link import FIRST_PING_SECONDS
from postcopy_supervisor.pool.lifecycle import Slot
from postcopy_supervisor.remote.sources import Sources
from postcopy_wire.transport import FULL, SENT, UNREACHABLE

ABSENT = cast(Any, None)


def test_a_pidfds_number_that_is_the_next_clients_by_now() -> None:
    """The word that a client's process has ended is under way while it says goodbye and another one comes."""
    reception = AttachServer({}, ABSENT, ABSENT, -1, frozenset(), 100, ABSENT)
    pidfd = os.pidfd_open(os.getpid())
    try:
        reception.clients[1] = client = Client(1, None, 0, os.getpid(), pidfd, AttachConversation(), 0.0)
        reception.process_ended(pidfd)
        assert reception.clients == {1: client} and not client.leaving
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("stopping", [False, True])
def test_a_supervisor_does_not_outlive_its_porter(stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    porter = Listener.__new__(Listener)
    porter._stopping = stopping
    ended: list[int] = []

    def fails() -> None:
        raise KeyError(7)

    monkeypatch.setattr(porter, "_carry", fails)
    monkeypatch.setattr(os, "_exit", ended.append)
    porter.run()
    assert ended == ([] if stopping else [FAILED])


@pytest.mark.parametrize("state", ["done", "cancelled", "failed"])
def test_an_export_is_over_when_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Whoever hears that it is over may look at once."""

    def view(size: int, writable: bool) -> memoryview:
        if state == "failed":
            raise OSError(errno.EFAULT, "lost")
        return memoryview(bytes(size))

    block = SimpleNamespace(name="ram0", size=8, mapping=SimpleNamespace(view=view))
    export, unlink, running = Export(1, cast(Any, block), str(tmp_path / "out")), os.unlink, list[bool]()

    def unlinking(path: str) -> None:
        running.append(export.running)
        unlink(path)

    monkeypatch.setattr(os, "unlink", unlinking)
    if state == "cancelled":
        export.cancel()
    export.run()
    assert running == [True] and export.progress().state == state
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if state == "done" else [])


@pytest.mark.parametrize(("became", "killed"), [(FULL, [3]), (UNREACHABLE, []), (SENT, [])])
def test_a_worker_that_takes_no_more_words_is_killed(became: int, killed: list[int]) -> None:
    """It lives, and a wake is lost: its successor wakes everybody."""
    service = MainLoop.__new__(MainLoop)
    service.workforce = workforce = cast(Any, Workers())
    service._router = cast(Any, SimpleNamespace(send=lambda name, data: became))
    service._tell_worker(3, b"wake")
    service._tell_worker(4, b"nobody")
    assert workforce.killed == killed


def test_a_postponed_wish_has_a_tick_of_its_own() -> None:
    """A regular tick that comes before its time does not take it away."""
    sources = Sources.__new__(Sources)
    calm, short, hurried = (
        SimpleNamespace(tick=lambda now: None, pings_often=often, finished=False, flow=FlowControl(), state="up")
        for often in (False, False, True)
    )
    short.flow.defer([RangeRequest(1, 1, 0, 4096)], 100.0)
    for links, due in ((calm,), None), ((calm, short), short.flow.retry_at), ((hurried,), 100.0 + FIRST_PING_SECONDS):
        sources.staging = {}
        sources.links = cast(Any, dict(enumerate(links)))
        assert sources.tick(100.0) == due


class Workers:
    """A workforce of one."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self.fleet = self
        self.slots = {3: Slot(3, "running", 1)}
        self.kill: Callable[[int, str], None] = lambda worker, why: self.killed.append(worker)
