"""What a probe plans: pages of its own for every request, and a file in which the first of them stand ready."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.verdicts import BROKEN
from postcopy.vhost_user import blk
from postcopy.vhost_user.probe.load import Load
from postcopy.vhost_user.probe.plan import PAGE, Plan, PlanSettings
from postcopy.vhost_user.probe.report import RULES, Report
from postcopy.vhost_user.probe.settings import Settings
from postcopy.vhost_user.virtqueue import Piece, Ring, chain
from postcopy_protocol.vhost_user import VhostUserError

sizes = st.tuples(st.integers(1, 200), st.integers(1, 4), st.integers(1, 64))


@given(sizes, st.integers(1024, 9000), st.booleans(), st.integers(0, 9))
def test_no_two_requests_share_a_page(sizes: tuple[int, int, int], sectors: int, writes: bool, seed: int) -> None:
    requests, queues, depth = sizes
    plan = Plan(PlanSettings(requests, queues, depth, sectors, writes, True, seed))
    pages = [page for request in plan.requests for page in request.touched()]
    assert sorted(pages) == list(range(3 * queues, plan.pages))
    for request in plan.requests:
        assert 0 <= request.sector <= sectors - request.pages * 8
        assert request.kind != blk.WRITE or (writes and request.sector >= sectors // 2)
        assert request.kind != blk.READ or not writes or request.sector + request.pages * 8 <= sectors // 2
    assert plan.expected([]) == set(range(3 * queues))
    assert sum(len(list(plan.of_queue(queue))) for queue in range(queues)) == requests


def test_the_file_of_a_plan(tmp_path: Path) -> None:
    plan = Plan(PlanSettings(20, 2, 4, 4096, True, True, 3))
    plan.write(str(tmp_path / "guest"))
    memory = (tmp_path / "guest").read_bytes()
    assert len(memory) == plan.pages * PAGE
    for queue in range(2):
        descriptors, available, used = plan.ring_offsets(queue)
        assert struct.unpack_from("<HH", memory, available) == (0, 4) and not any(memory[used : used + PAGE])
        for slot, request in enumerate(plan.first(queue)):
            address, length, flags, _ = struct.unpack_from("<QIHH", memory, descriptors + 16 * 3 * slot)
            wanted = (request.header_at + 64, 48, 4) if request.indirect else (request.header_at, 16, 1)
            assert (address, length, flags) == wanted
    for request in plan.requests:
        assert memory[request.header_at :].startswith(blk.header(request.kind, request.sector))
        assert memory[request.status_at] == blk.PENDING
        if request.kind == blk.WRITE:
            assert memory[request.data_at :].startswith(request.pattern())


def test_a_ring_goes_round() -> None:
    memory = bytearray(3 * PAGE)
    ring = Ring(memoryview(memory), 4, 0, PAGE, 2 * PAGE)
    for n in range(0x10003):
        ring.submit([Piece(n, 1)], n % 4)
        struct.pack_into("<II", memory, 2 * PAGE + 4 + 8 * (n % 4), n % 4, 7)
        struct.pack_into("<H", memory, 2 * PAGE + 2, (n + 1) & 0xFFFF)
        assert ring.in_flight == 1
        assert ring.completed() == [(n % 4, 7)]
    assert ring.next_available == ring.next_used == 3


def test_the_index_of_a_ring_is_written_by_one_store() -> None:
    """Another process that looks all the time sees what stood there or what stands there, and nothing between them."""
    with mmap.mmap(-1, 3 * PAGE) as memory, memoryview(memory) as view:
        ring = Ring(view, 4, 0, PAGE, 2 * PAGE)

        def submit() -> None:
            ring.next_available = 0x1233
            ring.submit([Piece(0, 1)], 0)

        submit()
        writer = os.fork()
        if writer == 0:
            limit = time.monotonic() + 1
            while time.monotonic() < limit:
                submit()
            os._exit(0)
        with view[PAGE + 2 : PAGE + 4] as index:
            seen = set[int]()
            while os.waitpid(writer, os.WNOHANG)[0] == 0:
                seen.update(struct.unpack("<500H", b"".join([index] * 500)))
        assert seen == {0x1234}


def test_an_answer_that_nobody_asked_for() -> None:
    """A back-end that puts any number into the used ring is told so."""
    rings: Any = SimpleNamespace(rings=[None], free=lambda *_: (), wait=lambda _: [(0, 3), (0, 77)])
    plan = Plan(PlanSettings(1, 1, 1, 1024, False, False))
    load = Load(Settings("s"), plan, rings, lambda request: None, None)
    with pytest.raises(VhostUserError, match="slot 77, which has no request") as caught:
        load.drive([], {(0, 3): plan.requests[0]})
    assert caught.value.rule == "requests" and load.done == plan.requests[:1]


def test_a_chain() -> None:
    data = chain([Piece(4096, 16), Piece(8192, 512, device_writes=True), Piece(4112, 1, device_writes=True)], 6)
    assert list(struct.iter_unpack("<QIHH", data)) == [(4096, 16, 1, 7), (8192, 512, 3, 8), (4112, 1, 2, 0)]


def test_a_report() -> None:
    report = Report("s", "blk")
    assert report.document()["verdict"] == "failed", "nothing was looked at"
    report.hold("registered", "pages")
    report.quirk("addresses", "addresses-echoed", "ours")
    document = report.document()
    assert (document["verdict"], document["quirks"]) == ("passed", ["addresses-echoed"])
    report.blame(VhostUserError("size", "too short"))
    report.hold("answers")
    report.break_("answers", "later")
    assert report.states["answers"] == BROKEN and report.details["answers"] == "too short"
    assert report.document()["verdict"] == "failed"
    assert report.lines()[-1] == "verdict: failed, with quirks: addresses-echoed"


@pytest.mark.parametrize("rule", ["framing", "order", "process", "rust-vmm-order", "registered", "anything"])
def test_every_error_breaks_a_rule(rule: str) -> None:
    report = Report("s", "blk")
    report.blame(VhostUserError(rule, "x"))
    assert next(name for name, state in report.states.items() if state == BROKEN) in RULES
