"""Files that change without a trace in their modification time, files that cannot be mapped, copies, odd names."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, PuppetError, Service, environment, word

PAGES = 512
SIZE = PAGES * PAGE
LAST = PAGES - 1
UNMAPPED = Path("/sys/kernel/btf/vmlinux")


def state(client: Puppet, page: int, seed: int = 0) -> str:
    """``lost``, ``right`` or ``wrong``: what a client has of this page."""
    try:
        client.do(f"b.ensure({page * PAGE}, 1, 10)")
    except PuppetError as error:
        assert error.kind == "PageLost", error
        return "lost"
    return "right" if client.do(f"words(b, [{page}])") == [word(page * PAGE, seed)] else "wrong"


@contextlib.contextmanager
def served(directory: Path, path: Path, kind: str, copy: bool = False) -> Iterator[Service]:
    """A service of this file, as a local block or by a source; the background does not fetch."""
    with contextlib.ExitStack() as stack:
        block = f"ram0={path}"
        if kind == "remote":
            words = ("--copy-on-serve",) if copy else ()
            block = stack.enter_context(Source(block, options=words)).block()
        local = copy and kind == "local"
        yield stack.enter_context(
            Service(directory, block, fault_around="4K", background_rate="0", copy_on_serve=local)
        )


def put_back(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        facts = path.stat()
        change(path)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    return changed


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(LAST * PAGE)
        file.write(b"changed!")


def cut_and_grow(path: Path) -> None:
    os.truncate(path, 100)
    os.truncate(path, SIZE)


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("change", [write, cut_and_grow])
def test_a_time_that_is_put_back_hides_nothing(
    runtime_dir: Path, source_file: SourceFile, change: Callable[[Path], None], kind: str
) -> None:
    path = source_file(SIZE)
    with served(runtime_dir, path, kind) as service:
        client = service.client()
        assert state(client, 0) == "right"
        put_back(change)(path)
        assert state(client, LAST) == "lost"


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("directory", ["", "/dev/shm"])
def test_a_store_through_a_mapping_of_before(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, kind: str, directory: str
) -> None:
    data = source_file(SIZE).read_bytes()
    with tempfile.TemporaryDirectory(dir=directory or tmp_path) as place:
        path = Path(place, "file")
        path.write_bytes(data)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as writer:
            writer[LAST * PAGE] = writer[LAST * PAGE]  # its page is dirty already: nothing would see the next store
            with served(runtime_dir, path, kind) as service:
                client = service.client()
                assert state(client, 0) == "right"
                writer[LAST * PAGE : LAST * PAGE + 8] = b"changed!"
                assert state(client, LAST) == "lost"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_what_changes_only_names_and_rights_is_no_change(runtime_dir: Path, source_file: SourceFile, kind: str) -> None:
    path = source_file(SIZE)
    with served(runtime_dir, path, kind) as service:
        client = service.client()
        deeds: tuple[Callable[[], object], ...] = (
            lambda: path.chmod(0o400),
            lambda: path.chmod(0o640),
            lambda: path.with_name("link").hardlink_to(path),
            lambda: path.rename(path.with_name("other")),
            lambda: path.with_name("other").unlink(),
            lambda: path.with_name("link").unlink(),
        )
        for page, deed in enumerate(deeds):
            deed()
            assert state(client, 10 + page) == "right", page


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("directory", ["", "/dev/shm"])
def test_a_copy_keeps_what_was_served(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, kind: str, directory: str
) -> None:
    data = source_file(SIZE).read_bytes()
    with tempfile.TemporaryDirectory(dir=directory or tmp_path) as place:
        path = Path(place, "file")
        path.write_bytes(data)
        with served(runtime_dir, path, kind, copy=True) as service:
            client = service.client()
            write(path)
            path.unlink()
            assert state(client, LAST) == "right"
            assert not list(Path(place).iterdir())


def test_a_copy_is_taken_over(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", copy_on_serve=True) as service:
        client = service.client()
        assert state(client, 0) == "right"
        service.kill()
        write(path)
        service.recover()
        assert state(client, LAST) == "right"


@pytest.mark.skipif(not UNMAPPED.exists(), reason="no file that cannot be mapped")
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_file_that_cannot_be_mapped(runtime_dir: Path, kind: str) -> None:
    with served(runtime_dir, UNMAPPED, kind) as service:
        client = service.client()
        data = UNMAPPED.read_bytes()
        for offset in (0, 5 * PAGE, len(data) - 100):
            assert client.do(f"read(b, {offset}, 100)") == data[offset : offset + 100].hex()
        assert not service.events("restart")


def test_names_that_are_no_utf8(source_file: SourceFile, tmp_path: Path) -> None:
    """Of the file, of the runtime directory, and of an export."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    path = source_file(SIZE).rename(odd / "file")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(os.fsdecode(os.fsencode(short) + b"/\xff"))
        with Service(directory, f"ram0={path}") as service:
            assert state(service.client(), 7) == "right"
            for words in (["status"], ["export", "ram0", str(odd / "out")], ["verify", "ram0", str(path)]):
                done = subprocess.run(
                    [sys.executable, "-m", "postcopy", *words, "--runtime-dir", str(directory)],
                    env=environment(),
                    capture_output=True,
                    timeout=60,
                    check=False,
                )
                assert done.returncode == 0 and b"Traceback" not in done.stderr, (words, done.stderr)
            assert (odd / "out").read_bytes() == path.read_bytes()
