"""Clients that stay and disturb: silent ones, crowds, floods, dying ones. The honest client goes on."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from postcopy_protocol.messages import Hello, OpenBlock
from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, until, word
from tests.wire.caller import Caller, die_after
from tests.wire.test_hostile_door import PAGES, Watched


@pytest.fixture
def watched(runtime_dir: Path, source_file: SourceFile) -> Iterator[Watched]:
    path = source_file(PAGES * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        yield Watched(service, path)
        assert service.client("ram0", "private").do(f"check(b, {str(path)!r})") == -1


def shown_out(callers: list[Caller]) -> list[Caller]:
    """Those whose connections have been closed by the other side."""
    poll = select.poll()
    for caller in callers:
        poll.register(caller.socket, select.POLLHUP)
    closed = {fd for fd, event in poll.poll(0) if event & select.POLLHUP}
    return [caller for caller in callers if caller.socket.fileno() in closed]


def test_a_silent_connection_ends_after_ten_seconds(watched: Watched) -> None:
    with ExitStack() as stack:
        callers = [stack.enter_context(Caller(watched.service.directory)) for _ in range(4)]
        callers[1].hello()
        callers[2].say(Hello("never listens", "native"))
        callers[3].hello()
        callers[3].offer()  # after its offer it may take its time
        began = time.monotonic()
        until(lambda: len(shown_out(callers)) == 3, "the silent ones are shown out", 15)
        assert time.monotonic() - began > 7
        assert shown_out(callers) == callers[:3]
        watched.works()
        opened, _ = callers[3].open()
        assert opened.pages == PAGES
    watched.alone()


def test_three_hundred_connections_that_wait(watched: Watched) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(Caller(watched.service.directory))
        began = time.monotonic()
        for _ in range(10):
            watched.works()
        late = watched.service.client()
        assert late.do("words(b, [60])") == [word(60 * PAGE)]
        assert time.monotonic() - began < 8, "the client did not wait until the crowd was gone"
        late.kill()
    watched.alone()


FLOOD = """
import socket
from tests.wire.caller import Caller
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import OpenBlock, Hello
caller = Caller(directory)
caller.hello(); caller.offer()
caller.socket.settimeout(1)
def flood(seconds, data):
    end, sent = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            caller.raw(data)
            sent += 1
        except OSError:
            return sent
    return sent
"""


@pytest.mark.parametrize("what", ["OpenBlock('ram0', 'shared')", "OpenBlock('ram9', 'shared')", "Hello('x', 'native')"])
def test_a_client_that_sends_and_does_not_read(watched: Watched, what: str) -> None:
    flooder = watched.service.client(None)
    flooder.do(FLOOD)
    flooder.begin(f"flood(2, encode({what}))")
    while not flooder.answered():
        watched.works() if watched.page < 50 else None
        began = time.monotonic()
        assert watched.service.status()["state"] == "running"
        assert time.monotonic() - began < 3
    assert flooder.answer() > 10
    flooder.kill()
    watched.alone()


def test_a_client_that_dies_between_any_two_messages(watched: Watched) -> None:
    for steps in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                die_after(str(watched.service.directory), steps)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7, steps
    watched.alone()


def test_a_client_that_closes_the_connection_and_lives(watched: Watched) -> None:
    """Its memory is served as long as it lives; before it has any, it is no client."""
    for steps in range(2):
        with Caller(watched.service.directory) as caller:
            caller.hello()
            if steps:
                caller.offer()
        watched.alone()
    liver = watched.service.client("ram0", "shared")
    liver.do("b.session.connection._socket.shutdown(2)")
    assert liver.do("words(b, [50, 51])") == [word(50 * PAGE), word(51 * PAGE)]
    watched.service.kill_worker(liver)
    assert liver.do("words(b, [52])") == [word(52 * PAGE)]
    liver.kill()
    watched.alone()


def test_a_client_that_opens_without_end_has_a_limit(watched: Watched) -> None:
    """Many blocks opened and many regions: bounded, and refused with a reason."""
    with Caller(watched.service.directory) as caller:
        caller.hello()
        caller.offer()
        for _ in range(200):
            caller.open()
        caller.say(OpenBlock("x" * 4000, "shared"))
        assert caller.refusal() == "no-such-block"
    watched.alone()
