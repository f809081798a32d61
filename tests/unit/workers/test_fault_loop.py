"""The fault loop, as Python source and compiled: both do the same, call by call."""

from __future__ import annotations

import errno
import importlib
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_kernel.userfaultfd import UFFDIO_COPY
from postcopy_protocol import counters
from postcopy_protocol.received_map import RECEIVED, TRUST, WATCHED
from postcopy_protocol.window import REACH
from postcopy_workers import fault_handler, fault_loop, twin
from postcopy_workers.placing import Calls
from tests.simulated.effort import effort
from tests.simulated.kernel import failure
from tests.simulated.world import Client, Kind, World

PAGES = 40
COMPILED = "postcopy_workers.compiled_fault_loop"
MODULES = {"python": fault_loop}
if find_spec(COMPILED) is not None:
    MODULES["compiled"] = importlib.import_module(COMPILED)
needs_compiled = pytest.mark.skipif("compiled" not in MODULES, reason="the fault loop is not compiled here")
chosen: Any = fault_handler  # it has the names of the loop that runs here
Log = list[tuple[int, int, bytes]]


class Recorded:
    """A simulated kernel's calls, each ioctl noted; a COPY whose number is in ``refused`` fails."""

    def __init__(self, world: World, refused: dict[int, int]) -> None:
        self.log: Log = []
        self._world, self._refused = world, refused

    def calls(self) -> Calls:
        kernel = self._world.kernel
        return Calls(self._ioctl, kernel.lseek, kernel.pread, kernel.pwrite)

    def _ioctl(self, descriptor: int, request: int, buffer: bytearray) -> int:
        self.log.append((descriptor, request, bytes(buffer)[: request >> 16 & 0x3FFF]))
        if request == UFFDIO_COPY and (code := self._refused.pop(len(self.log), 0)):
            raise failure(code)
        self._world.kernel.ioctl(descriptor, request, buffer)
        return 0


def history(module: Any, kind: Kind, touches: list[tuple[int, bool, bool]], refused: dict[int, int]) -> Any:
    """All that a handler with this loop has done, and what it knows, after these touches: page, write, lease lost."""
    world = World([kind], PAGES)
    client, recorded = world.clients[0], Recorded(world, dict(refused))
    before = chosen.FaultLoop, chosen.LocalRegion
    chosen.FaultLoop, chosen.LocalRegion = module.FaultLoop, module.LocalRegion
    try:
        handler = world.fault_handler(client, recorded.calls())
    finally:
        chosen.FaultLoop, chosen.LocalRegion = before
    for page, write, unleased in touches:
        world.map[PAGES + TRUST] = WATCHED if unleased else 0
        world.touch(client, page, 7 if write else None)
        for event, flags, address in world.kernel.messages(client.descriptor, 16):
            handler.message(event, flags, address)
        for thread in list(world.kernel.woken):
            world.kernel.run(thread)
    around = handler.regions[0].around
    told = [client.words[index] for index in range(counters.LAST_COUNTER + 1)]
    return recorded.log, around.expected(), around.used, told, counters.count(client.words), bytes(world.map)


touch = st.tuples(st.integers(0, PAGES - 1), st.booleans(), st.sampled_from((False, False, False, True)))
runs = st.tuples(st.integers(0, PAGES - 8), st.integers(2, 8)).map(
    lambda run: [(page, False, False) for page in range(run[0], run[0] + run[1])]
)


@needs_compiled
@effort(60)
@given(
    kind=st.builds(
        Kind,
        mode=st.sampled_from(("private", "shared")),
        largest=st.sampled_from((8, 4, 1)),
        adaptive=st.sampled_from((True, True, False)),
    ),
    parts=st.lists(st.one_of(touch.map(lambda one: [one]), runs), min_size=1, max_size=12),
    refused=st.dictionaries(st.integers(1, 30), st.sampled_from((errno.EAGAIN, errno.ENOENT)), max_size=2),
)
def test_the_compiled_loop_does_what_the_source_does(
    kind: Kind, parts: list[list[tuple[int, bool, bool]]], refused: dict[int, int]
) -> None:
    touches = [one for part in parts for one in part]
    found = [history(module, kind, touches, refused) for module in MODULES.values()]
    assert found[0] == found[1]


@needs_compiled
def test_both_sort_latencies_alike() -> None:
    times = [max(0, (1 << bits) + more) for bits in range(42) for more in (-1, 0, 1, 3 << bits >> 3)]
    assert [MODULES["compiled"].bucket(ns) for ns in times] == [counters.bucket(ns) for ns in times]


@pytest.fixture(params=sorted(MODULES))
def module(request: pytest.FixtureRequest) -> Any:
    return MODULES[request.param]


@pytest.fixture
def world() -> World:
    return World([Kind("private", adaptive=True)], PAGES)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def loop_of(module: Any, world: World, client: Client, userfaultfd: int) -> Any:
    """A loop that reads from ``userfaultfd`` and answers on the simulated kernel."""
    kernel = world.kernel
    calls = Calls(kernel.ioctl, kernel.lseek, kernel.pread, kernel.pwrite)
    handler = world.fault_handler(client, calls)
    given = client.descriptor, client.words, handler.control, calls
    return module.FaultLoop(userfaultfd, [module.LocalRegion(region, *given) for region in handler.regions], calls)


def message(client: Client, page: int, event: int = fault_loop.EVENT_PAGEFAULT) -> bytes:
    return struct.pack("<4Q", event, 0, client.address(page), 0)


def test_several_messages_of_one_read_are_answered(module: Any, world: World, pipe: tuple[int, int]) -> None:
    client = world.clients[0]
    loop = loop_of(module, world, client, pipe[0])
    for page in (3, 20, 11):
        world.touch(client, page)
    os.write(pipe[1], b"".join(message(client, page) for page in (3, 20, 11, 20)))
    assert loop.run() == fault_loop.UNCOMMON
    assert (loop.at, loop.count) == (4, 4), "the second message for page 20"
    assert [page for page in range(PAGES) if world.map[page] == RECEIVED] == [3, 11, 20]
    assert client.words[counters.PLAIN] == 3


def test_an_event_and_a_foreign_address_are_left_to_others(module: Any, world: World, pipe: tuple[int, int]) -> None:
    client = world.clients[0]
    loop = loop_of(module, world, client, pipe[0])
    os.write(pipe[1], message(client, 3, event=0x15) + message(client, PAGES + 5))
    assert [loop.run(), loop.run()] == [fault_loop.UNCOMMON, fault_loop.ELSEWHERE]
    assert loop.at == loop.count == 2
    assert not any(world.map[:PAGES])


def test_nothing_to_read_and_a_read_that_fails(module: Any, world: World, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[0], False)
    assert loop_of(module, world, world.clients[0], pipe[0]).run() == fault_loop.NOTHING_READ
    with pytest.raises(OSError, match="ad file descriptor"):
        loop_of(module, world, world.clients[0], pipe[1]).run()  # only to be written


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(twin.VARIABLE, "1")
    assert twin._choose() == (fault_loop, "POSTCOPY_PURE is set")
    monkeypatch.delenv(twin.VARIABLE)
    assert twin._choose()[0] is MODULES.get("compiled", fault_loop)
    monkeypatch.setattr(twin, "hash_of_source", lambda: "another")
    assert twin._choose()[0] is fault_loop


class Looks:
    """A received map that counts its reads."""

    def __init__(self, states: bytearray) -> None:
        self.states, self.count = states, 0

    def __getitem__(self, page: int) -> int:
        self.count += 1
        return self.states[page]


def in_terms_of_runs(expected: list[int], states: bytearray, page: int) -> bool:
    """What ``alone`` means: no stream is expected in the run of placed pages before it, nor at it or behind it."""
    first = page
    while first > 0 and page - first < REACH and states[first - 1]:
        first -= 1
    return not any(first <= at <= page + 1 for at in expected)


pages_near = st.integers(0, 60)


@given(st.lists(pages_near, unique=True, max_size=8), st.binary(min_size=62, max_size=62), pages_near)
def test_a_fault_alone_looks_no_further_back_than_a_stream_may_go_on(
    expected: list[int], placed: bytes, page: int
) -> None:
    region = fault_loop.LocalRegion.__new__(fault_loop.LocalRegion)
    states = bytearray(RECEIVED * (byte > 40) for byte in placed)
    looks = Looks(states)
    region.received, region.adaptive, region.noted = looks, True, 0  # type: ignore[assignment]
    region.streams, region.expected = len(expected), expected + [0] * (8 - len(expected))
    wanted = in_terms_of_runs(expected, states, page)
    before = [at for at in expected if at < page]
    assert region.alone(page) == wanted
    assert looks.count <= (page - max(before) if before else 0)
