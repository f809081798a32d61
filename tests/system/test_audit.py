"""The audit: pages in a block that nobody of ours placed are found and reported, and repaired where that is safe.

What pollutes is an unregistered mapping: it turns a hole that it touches into a zero page for everybody. Our client
never has one; a scripted client (``tests/wire/caller.py``'s ways, here in a puppet) can.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, end_by_pidfd, until, word

POLLUTE = """
from postcopy.session import Session
from postcopy.deadline import Deadline
from postcopy_kernel.memory import Mapping

def pollute(mode, pages, name="ram0"):
    # A second conversation, whose descriptor is mapped and touched, but never registered.
    session = Session(directory, Deadline(10))
    opened = session.open(name, mode, Deadline(10))
    mapping = Mapping.of(opened.memory, opened.length, shared=mode == "shared")
    values = [ctypes.string_at(mapping.address + page * PAGE, 8).hex() for page in pages]
    mapping.close(); opened.close(); session.end()
    return values
"""
ZEROS = "00" * 8


def test_a_sound_house_has_nothing_to_report(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(512 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        for mode in ("private", "shared"):
            assert service.client("ram0", mode).do("words(b, [1, 2, 300])") == [
                word(page * PAGE) for page in (1, 2, 300)
            ]
            assert service.status(audit=True)["totals"]["polluted"] == 0
        assert service.events("polluted") == []


def test_pages_made_by_an_unregistered_mapping_are_found(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(512 * PAGE)
    with Service(runtime_dir, f"ram0={path}", polluting=True) as service:
        stranger = service.client(None)
        stranger.do(POLLUTE)
        assert stranger.do("pollute('shared', [5, 6, 100])") == [ZEROS] * 3
        document = service.status(audit=True)
        assert document["totals"]["polluted"] == 3
        assert document["blocks"][0]["polluted"] == [[5 * PAGE, 2 * PAGE], [100 * PAGE, PAGE]]
        assert document["blocks"][0]["received"] == 0
        assert "3 pages" in service.events("polluted")[0] and str(5 * PAGE) in service.events("polluted")[0]
        assert len(service.events("polluted")) == 1
        service.status(audit=True)
        assert len(service.events("polluted")) == 1, "the same news is told once"


def test_the_house_looks_by_itself(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", polluting=True) as service:
        stranger = service.client(None)
        stranger.do(POLLUTE)
        stranger.do("pollute('private', [7])")
        until(lambda: service.status()["totals"]["polluted"] == 1, "found without being asked", 30)


def test_what_clients_get_beside_a_polluted_page(runtime_dir: Path, source_file: SourceFile) -> None:
    """Fault-around steps over it and marks nothing of it."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", polluting=True, fault_around="256K") as service:
        stranger, client = service.client(None), service.client()
        stranger.do(POLLUTE)
        assert stranger.do("pollute('private', [9, 20])") == [ZEROS] * 2
        pages = [0, 8, 10, 19, 21, 63]
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages]
        assert service.status(audit=True)["blocks"][0]["polluted"] == [[9 * PAGE, PAGE], [20 * PAGE, PAGE]]
        assert service.block()["complete"] is False, "a block with strange pages is never released"


def test_a_client_of_another_user_is_announced_and_mended(runtime_dir: Path, source_file: SourceFile) -> None:
    """It is registered MISSING|MINOR: its own touch of a polluted page is announced, and repaired from the source."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", polluting=True, allow_uid=[65534], fault_around="4K") as service:
        stranger, other = service.client(None), service.client(None)
        stranger.do(POLLUTE)
        other.do("become(65534)")
        other.attach()
        assert stranger.do("pollute('private', [9])") == [ZEROS]
        assert other.do("words(b, [9, 10])") == [word(9 * PAGE), word(10 * PAGE)]
        until(lambda: service.status()["totals"]["repaired"] == 1, "the repair is counted")
        assert service.status(audit=True)["totals"]["polluted"] == 0
        assert service.client().do("words(b, [9])") == [word(9 * PAGE)]


def test_a_worker_killed_between_placing_and_marking_is_no_pollution(
    runtime_dir: Path, source_file: SourceFile
) -> None:
    """Present and PLACING is ours, interrupted; the audit of a service whose workers die must stay quiet."""
    path = source_file(16 << 20)
    with Service(runtime_dir, f"ram0={path}") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        for _ in range(4):
            for client in clients:
                pid = service.record(client)["worker_pid"]
                with suppress(ProcessLookupError, FileNotFoundError):  # released, or another's life has just ended
                    if pid and not client.answered(0.01):
                        end_by_pidfd(pid, signal.SIGKILL, "postcopy-")
            assert service.status(audit=True)["totals"]["polluted"] == 0
        assert [client.answer() for client in clients] == [-1, -1]
        assert service.events("polluted") == []
