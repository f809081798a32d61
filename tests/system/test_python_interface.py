"""The Python interface with a real supervisor: why a page is lost, ensure_async, buffers in use, blocks, SIGBUS."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import postcopy
from tests.conftest import SourceFile
from tests.system.service import PAGE, ROOT, Service, environment, until, word

MODULE = """
import time
from postcopy import PageLost
def words(offset, length): return b"".join((at // 8).to_bytes(8, "little") for at in range(offset, offset + length, 8))
def make(offset, length):
    page = offset // 4096
    if page == 3: raise OSError("the disk is on fire\\x1b[31m")
    if page == 4: raise PageLost("gone for good " + "x" * 5000)
    if page == 5: time.sleep(3600)
    return words(offset, length)
"""
FIRE = r"OSError: the disk is on fire\x1b[31m"
PAGES = 512


@pytest.fixture
def service(runtime_dir: Path, tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "pages.py").write_text(MODULE)
    source = f"ram0=handler:pages:make?size={PAGES * PAGE}"
    with Service(runtime_dir, source, cwd=tmp_path, fault_around="4K", handler_timeout=300.0) as service:
        yield service


def why(block: postcopy.Block, page: int) -> str:
    with pytest.raises(postcopy.PageLost) as caught:
        block.ensure(page * PAGE, PAGE)
    assert (caught.value.block, caught.value.offset) == (block.name, page * PAGE)
    return str(caught.value)


def test_a_lost_page_has_the_words_of_its_handler(service: Service, runtime_dir: Path) -> None:
    """Cleaned and bounded; for a client that finds the page lost already, and for one with a failure of its own."""
    with postcopy.attach("ram0", runtime_dir) as block:
        for _ in range(2):
            assert why(block, 3) == f"block ram0: the page at offset {3 * PAGE} is lost: {FIRE}"
            assert "is lost: gone for good xx" in why(block, 4) and len(why(block, 4)) < 1200
        with pytest.raises(postcopy.PageLost, match="on fire"):
            asyncio.run(block.ensure_async(3 * PAGE, 1))
        other = service.client()
        other.begin(f"b.ensure({4 * PAGE}, 1)")
        with pytest.raises(Exception, match="gone for good"):
            other.answer()


def test_a_lost_page_has_the_words_of_its_source(runtime_dir: Path, tmp_path: Path, source_file: SourceFile) -> None:
    path = source_file(16 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K"), postcopy.attach("ram0", runtime_dir) as block:
        block.ensure(0, PAGE)
        path.write_bytes(b"")
        until(lambda: block.resident() == 1 / 16 and "the file" in why(block, 9), "the words of the file's watcher")


def test_a_lost_page_has_the_words_of_a_remote_source(runtime_dir: Path) -> None:
    endpoint = f"ipc://{runtime_dir}/source"
    command, options = [sys.executable, str(ROOT / "examples" / "page_source.py"), endpoint], {"fault_around": "4K"}
    with subprocess.Popen(command, env=environment()) as source:
        try:
            with Service(runtime_dir, f"ram0={endpoint}/squares", **options):  # type: ignore[arg-type]
                block = postcopy.attach("ram0", runtime_dir)
                assert why(block, 13).endswith("is lost: page 13 cannot be supplied")
                block.close()
        finally:
            source.terminate()


def test_ensure_async_waits_in_the_loop(service: Service, runtime_dir: Path) -> None:
    with postcopy.attach("ram0", runtime_dir) as block:

        async def all_at_once() -> None:
            calls = (block.ensure_async(page * PAGE, 1, timeout=60.0) for page in range(8, PAGES))
            await asyncio.gather(*calls)

        before = threading.active_count()
        most = before

        async def watched() -> None:
            nonlocal most
            task = asyncio.ensure_future(all_at_once())
            while not task.done():
                most = max(most, threading.active_count())
                await asyncio.sleep(0.001)
            await task

        asyncio.run(watched())
        assert block.resident(8 * PAGE) == 1.0
        assert most - before <= 17, "a few threads wait for hundreds of pages"
        until(lambda: threading.active_count() == before, "they end")


def test_ensure_async_can_be_cancelled_and_times_out(service: Service, runtime_dir: Path) -> None:
    """Also when more calls wait for a page that does not come than there are threads, and others for present ones."""
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure(8 * PAGE, PAGE)

        async def check() -> None:
            stuck = [asyncio.ensure_future(block.ensure_async(5 * PAGE, 1)) for _ in range(40)]
            await asyncio.sleep(0.05)
            await asyncio.wait_for(block.ensure_async(8 * PAGE, PAGE), 30)
            with pytest.raises(postcopy.PageTimeout, match="ram0"):
                await block.ensure_async(5 * PAGE, 1, timeout=0.05)
            for task in stuck:
                task.cancel()
            ended = await asyncio.gather(*stuck, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in ended)
            await block.ensure_async(0, 0)
            with pytest.raises(ValueError, match="ram0"):
                await block.ensure_async(PAGES * PAGE, 1)

        asyncio.run(check())


class UnseenUser:
    """A library that keeps a reference to the object whose buffer it has taken, and uses the address without an
    export: torch.frombuffer does."""

    def __init__(self, buffer: memoryview) -> None:
        self._owner, self._size = buffer, len(buffer)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))

    def read(self, offset: int, length: int) -> bytes:
        return ctypes.string_at(self._address + offset, length)


def test_a_buffer_in_use_stays_valid_after_close(service: Service, runtime_dir: Path) -> None:
    with postcopy.attach("ram0", runtime_dir) as block:
        user = UnseenUser(block.buf)
    assert block.closed
    with pytest.raises(ValueError, match="closed"):
        block.buf  # noqa: B018
    for page in (100, 200):  # missing pages still come
        assert int.from_bytes(user.read(page * PAGE, 8), "little") == word(page * PAGE)
    assert len(service.status()["clients"]) == 1
    del user
    until(lambda: not service.status()["clients"], "the memory is given up with its last user")
    with postcopy.attach("ram0", runtime_dir) as block:
        kept = memoryview(block.buf)
        with pytest.raises(BufferError, match="views"):
            block.close()
        kept.release()


TOUCH = """
import sys, os, postcopy
if "call" in sys.argv: postcopy.explain_sigbus()
block = postcopy.attach("ram0", sys.argv[1])
if "fork" in sys.argv and (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -7)
print(block.buf[int(sys.argv[2]) * 4096])
"""


def test_sigbus_is_explained_where_that_is_wanted(service: Service, runtime_dir: Path) -> None:
    def touch(page: int, *words: str, explain: str = "") -> tuple[int, str]:
        command = [sys.executable, "-c", TOUCH, str(runtime_dir), str(page), *words]
        program = environment(POSTCOPY_EXPLAIN_SIGBUS=explain)
        done = subprocess.run(command, env=program, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    for status, text in (touch(3, "call"), touch(3, explain="1"), touch(3, "fork", explain="1")):
        assert status in (-signal.SIGBUS, 1), text
        assert "Fatal Python error: Bus error" in text and "line 7 in <module>" in text
        assert f"refused last is at offset {3 * PAGE} of block ram0: {FIRE}" in text.splitlines()[-1]
    assert touch(3, explain="0") == (-signal.SIGBUS, "")
    assert touch(0, "call") == (0, ""), "it ends in silence where nothing happens"


def test_blocks_are_listed(service: Service, runtime_dir: Path, tmp_path: Path) -> None:
    assert postcopy.blocks(runtime_dir) == [postcopy.BlockInfo("ram0", PAGES * PAGE, PAGE, ("private", "shared"))]
    until(lambda: not service.status()["clients"], "no client is left of it")
    with pytest.raises(postcopy.NoSupervisor):
        postcopy.blocks(tmp_path / "nowhere")
