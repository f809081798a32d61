"""Clients that are killed at every stage of their life: a second later nothing of them is left anywhere."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, Service, descriptors, until, word
from tests.system.test_custodian import custodian
from tests.system.test_workers import more_than

DOOR = """
import select, socket
from postcopy_kernel import descriptors
from postcopy_kernel.userfaultfd import open_userfaultfd
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Hello, Mapped, OfferUserfaultfd, OpenBlock
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(DIRECTORY + "/door")
def say(message, fds=()):
    descriptors.send_message(door, encode(message), fds)
    assert select.select([door], [], [], 20)[0]
    return descriptors.receive_message(door)
"""
HELLO = 'held = [say(Hello("doomed", "native"))]'
OFFER = "ufd = open_userfaultfd(); held.append(say(OfferUserfaultfd(), [ufd.fileno()]))"
OPEN = 'held.append(say(OpenBlock("ram0", "private")))'
STAGES = {
    "connected": [],
    "hello": [HELLO],
    "offered": [HELLO, OFFER],
    "opened": [HELLO, OFFER, OPEN],
    "attaching": [HELLO, OFFER, OPEN, "attach_and_do_not_wait()"],
}
ATTACH = """
import mmap, ctypes
def attach_and_do_not_wait():
    fd = held[-1].fds[0]
    area = mmap.mmap(fd, 65536, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    held.append(area)
    descriptors.send_message(door, encode(Mapped(1, at, 65536, 0)), [])
"""


class Costs:
    """Descriptors of supervisor and custodian beyond those of the beginning."""

    def __init__(self, service: Service) -> None:
        self._pids = service.pid, custodian(service)
        self._before = [sorted(descriptors(pid)) for pid in self._pids]
        self._people = len(service.people())
        self._service = service

    def gone(self, client: Puppet) -> bool:
        """Is nothing left of it?"""
        service = self._service
        if service.record(client) or len(service.people()) > self._people:
            return False
        return not more_than(self._before, *self._pids)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_between_the_doors_messages(runtime_dir: Path, source_file: SourceFile, stage: str) -> None:
    path = source_file(16 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        keeper, doomed = service.client(), service.client(None)
        assert keeper.do("words(b, [1])") == [word(PAGE)]
        costs = Costs(service)
        doomed.do(f"DIRECTORY = {str(runtime_dir)!r}")
        for order in [DOOR, ATTACH, *STAGES[stage]]:
            doomed.do(order)
        doomed.kill()
        until(partial(costs.gone, doomed), "nothing is left of it", 5)
        assert keeper.do("words(b, [2])") == [word(2 * PAGE)]


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_killed_while_it_waits_for_a_remote_page(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        keeper = service.client("ram0", mode)
        assert keeper.do("words(b, [1])") == [word(PAGE)]
        costs = Costs(service)
        doomed = service.client("ram0", mode)
        source.tell(signal.SIGSTOP)
        doomed.begin("words(b, [9])")
        until(lambda: service.record(doomed)["requests"], "it has asked")
        doomed.kill()
        until(partial(costs.gone, doomed), "nothing is left of it", 5)
        source.tell(signal.SIGCONT)
        assert keeper.do("words(b, [9])") == [word(9 * PAGE)], "what it had asked for is there for others"
        until(lambda: service.status()["sources"][0]["in_flight"] == 0, "and nothing is open")
