"""A program that locks its memory (mlockall) and attaches: the kernel would populate a mapping while it is made, before
it can be registered, and every client would get zeros."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service

CURRENT, FUTURE, ON_FAULT = 1, 2, 4


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("flags", [CURRENT | FUTURE, FUTURE, FUTURE | ON_FAULT])
def test_a_program_that_locks_its_memory(runtime_dir: Path, source_file: SourceFile, mode: str, flags: int) -> None:
    path = source_file(100 * PAGE + 17)
    with Service(runtime_dir, f"ram0={path}") as service:
        locked, other = service.client(None), service.client()
        assert locked.do(f"libc.mlockall({flags})") == 0
        locked.attach("ram0", mode)
        assert service.status(audit=True)["totals"]["polluted"] == 0
        assert locked.do(f"check(b, {str(path)!r}, 'random')") == -1
        assert other.do(f"check(b, {str(path)!r}, 'random')") == -1
        locked.do("write(b, 0, 'abcd')")
        assert locked.do("read(b, 0, 2)") == "abcd"


def test_a_program_that_locks_its_memory_and_a_remote_block(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(100 * PAGE)
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), background_rate="0") as service,
    ):
        locked, other = service.client(None), service.client()
        assert locked.do(f"libc.mlockall({CURRENT | FUTURE})") == 0
        locked.attach()
        assert locked.do(f"check(b, {str(path)!r}, 'random')") == -1
        assert other.do(f"check(b, {str(path)!r}, 'random')") == -1


def test_locking_an_attached_block_waits_for_its_pages(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(100 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        assert client.do(f"libc.mlockall({CURRENT | FUTURE})") == 0
        service.await_received(100)
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1
