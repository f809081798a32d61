"""Events that are no page faults: memory moved, dropped, unmapped, forked by its owner.

The owner waits in its system call until the event has been read, and while it waits nothing can be placed (RETRY). Our
own clients are registered without these features; a stranger's userfaultfd may bring them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from postcopy_kernel import memory
from postcopy_kernel.abi import parse_event
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.userfaultfd import (
    Feature,
    Fork,
    Outcome,
    Remap,
    Remove,
    Status,
    Unknown,
    Unmap,
    Userfaultfd,
    is_userfaultfd,
)
from tests.kernel.clients import Client
from tests.kernel.touching import PATIENCE, Arena, Page, next_events, next_fault, readable

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
MAYMOVE_FIXED = 3


class Beside:
    """``call()`` in a thread; leaving the block waits for it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=call, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def test_remove_is_told_and_placing_waits_for_its_being_read() -> None:
    page = Page()
    with Arena(features=Feature.EVENT_REMOVE) as arena:
        with Beside(lambda: memory.advise(arena.page(1), 2 * PAGE, memory.DONTNEED)):
            assert readable(arena.ufd)
            assert arena.ufd.copy(arena.page(0), page.address, PAGE) == Outcome(Status.RETRY, 0)
            assert arena.ufd.zeropage(arena.page(0), PAGE) == Outcome(Status.RETRY, 0)
            assert next_events(arena.ufd) == [Remove(arena.page(1), arena.page(3))]
        assert arena.ufd.copy(arena.page(0), page.address, PAGE).status is Status.DONE


def test_unmap_is_told() -> None:
    with Arena(features=Feature.EVENT_UNMAP) as arena:
        with Beside(lambda: libc.munmap(arena.page(3), PAGE)):
            assert next_events(arena.ufd) == [Unmap(arena.page(3), arena.page(4))]
        assert arena.ufd.zeropage(arena.page(3), PAGE).status is Status.STALE


def test_remap_is_told_and_keeps_the_registration() -> None:
    page = Page()
    with Arena(features=Feature.EVENT_REMAP) as arena, memory.Mapping.anonymous(PAGE) as target:
        with Beside(lambda: libc.mremap(arena.page(3), PAGE, PAGE, MAYMOVE_FIXED, target.address)):
            assert next_events(arena.ufd) == [Remap(arena.page(3), target.address, PAGE)]
        assert arena.ufd.copy(target.address, page.address, PAGE).status is Status.DONE


def test_without_the_feature_a_remap_drops_the_registration() -> None:
    page = Page()
    with Arena() as arena, memory.Mapping.anonymous(PAGE) as target:
        assert libc.mremap(arena.page(3), PAGE, PAGE, MAYMOVE_FIXED, target.address) == target.address
        assert arena.ufd.copy(target.address, page.address, PAGE).status is Status.STALE


def test_fork_gives_the_childs_userfaultfd() -> None:
    page = Page(b"data")
    with Client(-1, 1, "anonymous", features=Feature.EVENT_FORK) as client:
        client.begin("fork", 0)  # its fork() waits for the reader of the event
        (event,) = next_events(client.ufd)
        assert isinstance(event, Fork)
        with Userfaultfd(event.fd) as grandchild:
            assert is_userfaultfd(grandchild.fd)
            assert next_fault(grandchild).address == client.page(0)
            assert grandchild.copy(client.page(0), page.address, PAGE).status is Status.DONE
            assert client.answer() == b"data"
        assert client.ufd.read() == []  # the client itself has not touched it


def test_an_event_of_the_future_is_unknown_and_no_error() -> None:
    assert parse_event(memoryview(bytes([0x42]) + bytes(31))) == Unknown(0x42)
