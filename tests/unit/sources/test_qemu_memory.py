"""What has come of a VM's memory, against a model: reads wait for missing pages, old bytes never show."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.errors import PageLost, PostcopyError
from postcopy_protocol.qemu_format import PAGE, QemuBlock
from postcopy_protocol.qemu_return_path import Requests
from postcopy_sources.qemu.capabilities import Borrowed
from postcopy_sources.qemu.memory import StagedBlock, VmMemory

PAGES = 12
DEEDS = st.tuples(st.sampled_from("place zero discard wait".split()), st.integers(0, PAGES - 1), st.integers(1, 6))


@pytest.fixture
def memory() -> Iterator[VmMemory]:
    made = VmMemory("test")
    made.begin((QemuBlock("m", PAGES * PAGE),))
    yield made
    made.close()


@given(st.lists(DEEDS, max_size=40))
def test_histories(deeds: list[tuple[str, int, int]]) -> None:
    memory = VmMemory("test")
    memory.begin((QemuBlock("m", PAGES * PAGE),))
    try:
        run(memory, deeds)
    finally:
        memory.close()


def run(memory: VmMemory, deeds: list[tuple[str, int, int]]) -> None:
    block = memory.blocks[0]
    model: dict[int, bytes] = {}
    waits: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []
    for number, (deed, page, count) in enumerate(deeds):
        pages = range(page, min(PAGES, page + count))
        offset, length = page * PAGE, len(pages) * PAGE
        match deed:
            case "place":
                data = bytes([number + 1]) * PAGE
                memory.place(0, offset, [memoryview(data)] * len(pages))
                model |= dict.fromkeys(pages, data)
            case "zero":
                memory.zero(0, offset, length)
                model |= dict.fromkeys(pages, bytes(PAGE))
            case "discard":
                memory.discard(0, offset, length)
                for one in pages:
                    model.pop(one, None)
            case _ if not done and not any(one not in model for one in pages):
                pass
            case _:
                wait = (pages.start, pages.stop)
                waits.append(wait)
                block.when_ready(offset, length, True, lambda wait=wait: done.append(wait))  # type: ignore[misc]
        assert memory.received == len(model) and memory.complete == (len(model) == PAGES)
        for one in range(PAGES):
            if one in model:
                assert (block.read_now(one * PAGE, PAGE) or bytes(PAGE)) == model[one]
            else:
                with pytest.raises(BlockingIOError):
                    block.read_now(one * PAGE, PAGE)
    memory.zero(0, 0, PAGES * PAGE)
    assert sorted(done) == sorted(waits), "a read still waits though everything is here"
    assert block.read_now(0, PAGES * PAGE) is None


def test_what_may_change_is_not_read(memory: VmMemory) -> None:
    block, done = memory.blocks[0], []
    block.usable = False
    memory.zero(0, 0, PAGES * PAGE)
    block.when_ready(0, PAGE, True, lambda: done.append(1))
    with pytest.raises(BlockingIOError):
        block.read_now(0, PAGE)
    assert not done
    memory.use()
    assert done == [1] and block.read_now(0, PAGE) is None


def test_lost_is_never_zeros(memory: VmMemory) -> None:
    block, done = memory.blocks[0], []
    memory.zero(0, 0, PAGE)
    block.when_ready(0, 2 * PAGE, False, lambda: done.append(1))
    memory.lose("the VM is gone")
    assert done == [1] and block.read_now(0, PAGE) is None
    with pytest.raises(PageLost, match="the VM is gone"):
        block.read_now(PAGE, PAGE)


def test_the_bitmap_is_qemus(memory: VmMemory) -> None:
    block: StagedBlock = memory.blocks[0]
    memory.zero(0, PAGE, PAGE)
    memory.place(0, 9 * PAGE, [memoryview(bytes(PAGE))])
    assert block.bitmap() == bytes((0b10, 0b10, 0, 0, 0, 0, 0, 0))


def test_a_host_page_is_requested_once_and_its_block_named_once() -> None:
    requests = Requests((QemuBlock("a", 4 * PAGE), QemuBlock("huge", 4 << 20, 2 << 20)))
    named = bytes.fromhex("0003000e00000000000010000000200001") + b"a"
    assert requests.request(0, PAGE, 2 * PAGE) == named
    assert requests.request(0, 2 * PAGE, PAGE) == b""
    assert requests.request(0, 0, PAGE) == bytes.fromhex("0004000c000000000000000000001000")
    huge = bytes.fromhex("0003001100000000002000000020000004") + b"huge"
    assert requests.request(1, (2 << 20) + 5 * PAGE, PAGE) == huge
    requests.reconnected()
    assert requests.request(1, 3 << 20, PAGE) == huge
    with pytest.raises(ValueError, match="RAM block a"):
        requests.request(0, 4 * PAGE, PAGE)


def test_a_capability_that_this_qemu_lacks() -> None:
    lacking = SimpleNamespace(version_text="2.12.0", execute=lambda command: [{"capability": "xbzrle", "state": True}])
    with pytest.raises(PostcopyError, match=r"QEMU 2\.12\.0 has no capability background-snapshot"):
        Borrowed(cast(Any, lacking)).switch(["background-snapshot"], ["xbzrle"])
