"""Races of the supervisor's parts that a whole service shows too seldom: two threads, or a descriptor number that is
used again, within microseconds."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from postcopy_kernel.userfaultfd import Userfaultfd
from postcopy_protocol.attach_conversation import AttachConversation, Refusal
from postcopy_protocol.messages import OpenBlock
from postcopy_supervisor.clients import release
from postcopy_supervisor.clients.attach_server import AttachServer
from postcopy_supervisor.clients.client import Client, Clients
from postcopy_supervisor.clients.client_zero import ClientZero, OwnMapping
from postcopy_supervisor.clients.release import ClientRelease
from postcopy_supervisor.exports import Export
from postcopy_supervisor.listener import FAILED, Listener
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.paging.flow_control import FlowControl, RangeRequest
from postcopy_supervisor.paging.source_link import FIRST_PING_SECONDS
from postcopy_supervisor.pool.lifecycle import Slot
from postcopy_supervisor.pool.worker_pool import WorkerPool
from postcopy_supervisor.remote.sources import Sources
from postcopy_wire.transport import FULL, SENT, UNREACHABLE

ABSENT = cast(Any, None)


def test_the_number_of_a_pidfd_is_used_again_by_the_next_client() -> None:
    """The event that a client's process has ended is queued while it says goodbye and another client attaches."""
    clients = Clients((), ABSENT)
    pidfd = os.pidfd_open(os.getpid())
    try:
        clients.by_number[1] = client = Client(1, None, 0, os.getpid(), pidfd, AttachConversation(), 0.0)
        ClientRelease({}, clients, ABSENT, ABSENT, ABSENT, ABSENT).on_process_ended(pidfd)
        assert clients.by_number == {1: client} and not client.leaving
    finally:
        os.close(pidfd)


def test_the_address_space_of_a_machine_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine does not unmap its memory while it lives, and to read the smaps of a large one takes long."""
    clients, looked = Clients((), ABSENT), list[int]()
    monkeypatch.setattr(release, "back_end_has_unmapped", lambda client: looked.append(client.number))
    pidfd = os.pidfd_open(os.getpid())
    try:
        for number, kind in enumerate(("vm", "vhost-user"), 1):
            conversation = AttachConversation()
            conversation.kind = kind
            client = Client(number, None, 0, os.getpid(), pidfd, conversation, 0.0)
            client.back_end, client.userfaultfd = True, Userfaultfd(-1)
            clients.by_number[number] = client
        ClientRelease({}, clients, ABSENT, ABSENT, ABSENT, ABSENT).tick(1.0)
        assert looked == [2]
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("stopping", [False, True])
def test_a_supervisor_does_not_outlive_its_listener(stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener.__new__(Listener)
    listener._stopping = stopping
    ended: list[int] = []

    def fails() -> None:
        raise KeyError(7)

    monkeypatch.setattr(listener, "_loop", fails)
    monkeypatch.setattr(os, "_exit", ended.append)
    listener.run()
    assert ended == ([] if stopping else [FAILED])


def test_a_cancelled_export_does_not_end_another() -> None:
    """Both wait for a page; only the pages of the cancelled one are poisoned, and the other still waits for its own."""
    engine, poisoned = Engine(), list[tuple[int, int]]()
    blocks = {
        number: cast(Any, SimpleNamespace(number=number, page_size=4096, mapping=SimpleNamespace(address=number << 30)))
        for number in (1, 2)
    }
    core = SimpleNamespace(poison=lambda at, size: poisoned.append((at >> 30, at % (1 << 30))), wake=lambda *_: None)
    paging = SimpleNamespace(
        engine=engine, fault=lambda waiter, block, pages: engine.fault(waiter, block.number, pages[0], pages[0] + 1)
    )
    zero = ClientZero.__new__(ClientZero)
    zero._blocks, zero._paging, zero._mapping = blocks, cast(Any, paging), OwnMapping(cast(Any, core))
    for number in blocks:
        engine.fault(0, number, 3, 4)
    zero.give_up(blocks[1])
    assert poisoned == [(1, 3 * 4096)]
    assert not engine.waiters_of(1, 3) and engine.waiters_of(2, 3) == [0]
    engine.check()


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

    def unlinking(path: str, *, dir_fd: int) -> None:
        running.append(export.running)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlinking)
    if state == "cancelled":
        export.cancel()
    export.run()
    assert running == [True] and export.progress().state == state
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if state == "done" else [])


@pytest.mark.parametrize(("became", "killed"), [(FULL, [3]), (UNREACHABLE, []), (SENT, [])])
def test_a_worker_that_does_not_read_its_messages_is_killed(became: int, killed: list[int]) -> None:
    """A wake to it is lost, and its client must not sleep: its successor wakes every waiter."""
    pool, found = WorkerPool.__new__(WorkerPool), list[int]()
    pool.slots, pool._router = {3: Slot(3, "running", 1)}, cast(Any, SimpleNamespace(send=lambda name, data: became))
    pool.kill = lambda worker, why: found.append(worker)  # type: ignore[method-assign]
    pool.send(3, b"wake")
    pool.send(4, b"absent")
    assert found == killed


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


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_refused_for_unread_answers_is_not_opened() -> None:
    """A client that reads nothing asks for its copied map again and again: no descriptor stays open."""
    block = Mock(complete=False, pages=8, page_size=4096, size=32768, number=1)
    block.name, uid = "ram0", os.geteuid() + 1
    clients = Mock(unread=Counter({uid: 1 << 30}))
    pool = watcher = release = losses = orphans = Mock()
    server = AttachServer({"ram0": block}, clients, pool, watcher, release, losses, -1, 4096, None, orphans)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"unread")
        client = Client(1, ours, uid, 1, -1, Mock(), 0.0)
        for before in (open_descriptors() + 1,) * 3:  # with the copied map
            with pytest.raises(Refusal):
                server._open(client, OpenBlock("ram0", "own"))
            assert open_descriptors() <= before
        client.conversation.opened.assert_not_called()  # type: ignore[attr-defined]
        os.close(client.copied_map)


def test_a_connection_that_was_read_late_is_closed_without_waiting() -> None:
    """There may be a descriptor in it whose close never ends."""
    clients, listener, uid = Clients((), ABSENT), Mock(), os.geteuid() + 1
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        client = Client(1, ours, uid, 1, -1, AttachConversation(), 0.0)
        clients.count_unread(client, 1)
        ours.send(b"unread")
        assert clients.leaves_unread(client, ours)
        ends = ClientRelease({}, clients, ABSENT, listener, ABSENT, ABSENT)
        ends.tick(0.0)
        listener.close_connection.assert_not_called()
        theirs.recv(10)
        ends.tick(0.0)
        listener.close_connection.assert_called_once_with(ours, uid)
    assert not clients.by_user and not clients.unread
