"""A file that is cut or written to while it is served: no zeros, no mixture; what has come stays right."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, PuppetError, Service, until, word

PAGES = 512
SIZE = PAGES * PAGE


def lost(client: Puppet, page: int, block: str = "b") -> bool:
    """Does ``ensure`` say that the page is lost? It must not answer anything but that or success."""
    try:
        client.do(f"{block}.ensure({page * PAGE}, 1, 10)")
    except PuppetError as error:
        assert error.kind == "PageLost", error
        return True
    return False


def all_lost(client: Puppet, pages: Iterable[int], block: str = "b") -> None:
    """Wait until all that is missing is lost. Each look takes another page, for it may still come: not too many a
    second, or a busy machine needs more of them than there are."""
    probes = iter(pages)

    def look() -> bool:
        time.sleep(0.1)
        return lost(client, next(probes), block)

    until(look, "all that is missing is lost")


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("cut", [0, 100 * PAGE, 100 * PAGE + 7, SIZE - 1])
def test_a_file_that_is_cut(runtime_dir: Path, source_file: SourceFile, cut: int, mode: str) -> None:
    path, other = source_file(SIZE, 1), source_file(SIZE, 5, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        client.attach("ram1", mode, "c")
        present = [1, 99, 101, 401, 510]
        values = [word(page * PAGE, 1) for page in present]
        assert client.do(f"words(b, {present})") == values
        os.truncate(path, cut)
        # At once: the page of the cut, which a careless COPY gives as data and zeros, and what lay behind it.
        for page in range(cut // PAGE, PAGES, 50):
            assert lost(client, page), f"page {page} was given after the cut"
        all_lost(client, range(2, 90))  # pages before the cut have their bytes still
        assert client.do(f"words(b, {present})") == values
        assert client.do(f"check(c, {str(other)!r})") == -1, "another block is not disturbed"
        toucher = service.client("ram0", mode)
        toucher.begin("words(b, [95])")
        assert toucher.status() == -signal.SIGBUS
        assert service.block()["lost"] > 0
        until(lambda: service.events("source-changed"), "it is told")
        assert service.client("ram0", mode).do(f"words(b, {present})") == values


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("gone", [False, True], ids=["stopped", "killed"])
def test_a_file_that_is_cut_while_the_supervisor_sees_nothing(
    runtime_dir: Path, source_file: SourceFile, gone: bool, mode: str
) -> None:
    """Workers outlive the supervisor: that no page is data and zeros must not depend on its being awake."""
    path = source_file(SIZE, 1)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", orphan_timeout="0.1") as service:
        client = service.client("ram0", mode)
        assert client.do("words(b, [7])") == [word(7 * PAGE, 1)]
        service.process.send_signal(signal.SIGKILL if gone else signal.SIGSTOP)
        if gone:
            service.wait()
        try:
            os.truncate(path, 100 * PAGE + 7)
            for page in (100, 101, 511):
                assert lost(client, page), f"page {page}: {client.do(f'read(b, {page * PAGE}, 16)')}"
            assert client.do("words(b, [7])") == [word(7 * PAGE, 1)]
        finally:
            if gone:
                client.kill()
                until(lambda: not service.people(), "nobody lives on without clients")
                (runtime_dir / "door").unlink()
                (runtime_dir / "private/router").unlink()
            else:
                service.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_file_that_is_written_to(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path, other = source_file(SIZE), source_file(SIZE, 5, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        client.attach("ram1", mode, "c")
        present = [1, 2, 3, 300]
        client.do(f"words(b, {present})")
        with path.open("r+b") as file:
            file.seek(200 * PAGE)
            file.write(b"changed" * 1000)
        # Probed on pages far from the change, whose bytes are right either way: each probe takes another one.
        all_lost(client, range(10, 190))
        for page in (200, 201, 0, 511):
            assert lost(client, page)
        assert client.do(f"words(b, {present})") == [word(page * PAGE) for page in present]
        toucher = service.client("ram0", mode)
        toucher.begin("words(b, [400])")
        assert toucher.status() == -signal.SIGBUS
        assert client.do(f"check(c, {str(other)!r})") == -1
        until(lambda: service.events("source-changed"), "it is told")


def test_a_file_that_grows_or_is_replaced(runtime_dir: Path, source_file: SourceFile) -> None:
    """Replacing it by another file of the same name touches nothing of what is served; growing it is a change."""
    path, grown = source_file(SIZE), source_file(SIZE, 5, "grown.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={grown}", fault_around="4K") as service:
        client = service.client()
        client.attach("ram1", "private", "c")
        new = source_file(SIZE, 9, "new.bin")
        kept = path.with_name("kept.bin")
        os.link(path, kept)
        new.rename(path)
        assert client.do(f"check(b, {str(kept)!r})") == -1
        with grown.open("ab") as file:
            file.write(b"more")
        all_lost(client, range(PAGES), "c")


def test_a_deleted_file_is_served_on(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        client.do("words(b, [1])")
        path.unlink()
        pages = [5, 100, 511]
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages]


def test_lost_pages_are_told_by_a_system_call_too(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client()
        os.truncate(path, PAGE)
        with pytest.raises(PuppetError) as told:
            client.do(f"syscall_read(b, {20 * PAGE})")
        assert "Bad address" in told.value.text
        with pytest.raises(PuppetError) as said:
            client.do(f"b.ensure({20 * PAGE}, {PAGE}, 10)")
        assert said.value.kind == "PageLost" and str(20 * PAGE) in said.value.text
