"""Fixtures of every test: a runtime directory, files with known bytes, and the check that nothing is left behind.

Workers outlive the supervisor on purpose, so a broken test can easily leave processes, and those disturb the next test.
Every test must therefore end with no process, descriptor or socket file more than it began with. Strays are found in
two ways: as children of the test process, and by the environment variable POSTCOPY_TEST_ID, which every process that
a test starts inherits, orphans too. What a fixture of wider scope started before the test is left alone.
"""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from tests.selection import (  # noqa: F401  (hooks of pytest)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
    pytest_terminal_summary,
    pytest_xdist_make_scheduler,
)
from tests.system import zygote

PATIENCE = 15.0
"""Seconds that processes and descriptors of a test may take to vanish after it, on a busy machine."""

# A page fault on a busy virtual machine has no upper bound: a time limit per example would find no bugs.
hypothesis.settings.register_profile("postcopy", deadline=None, print_blob=True)
hypothesis.settings.register_profile("fast", hypothesis.settings.get_profile("postcopy"), max_examples=25)

# Compiling their sources costs supervisor and custodian 0.3 s together at each of many starts, so bytecode is kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
"""Audit events of a process that is started."""

SourceFile = Callable[..., Path]
Found = TypeVar("Found", set[str], set[int], dict[int, str])


def pytest_configure(config: pytest.Config) -> None:
    # Before the test files are imported: a settings object takes what it does not say from the profile.
    fast = config.getoption("fast")
    hypothesis.settings.load_profile("fast" if fast else "postcopy")
    if fast:
        os.environ.setdefault("POSTCOPY_EFFORT", "fast")


def pytest_sessionstart() -> None:
    # The first use of shared memory or of a spawned process starts it, and it stays until the end: not a test's leak.
    multiprocessing.resource_tracker.ensure_running()
    sys.addaudithook(_started.see)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # or each collection would visit all tests again
    if any(item.nodeid.startswith(("tests/system/", "tests/wire/")) for item in session.items):
        from tests.system.service import environment

        if not session.config.getoption("collectonly"):
            zygote.open_zygote(environment())


def pytest_sessionfinish() -> None:
    zygote.close_zygote()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where ``.ci/run`` runs the tests, a test that is left out is red: a run that proves nothing must not be green."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("POSTCOPY_NO_SKIPS"):
        report.outcome, report.longrepr = "failed", f"left out: {item.nodeid}: {report.longrepr}"
    return report


class _Started:
    """Did this process start another one? Most tests start none, and need no search through /proc (6 ms each)."""

    def __init__(self) -> None:
        self.any = True

    def see(self, event: str, _arguments: tuple[object, ...]) -> None:
        if event in STARTS:
            self.any = True


_started = _Started()
_children_before: set[int] = set()


@pytest.fixture
def runtime_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A private directory with a short path, because a ZeroMQ ipc path may have about 107 bytes.

    At the end it may hold the lock, because removing it would be a race, and records for a rescue, which a supervisor
    that is killed leaves on purpose. A test that kills the process that would
    remove the rest has the marker ``@pytest.mark.leaves_files("why")``.
    """
    path = Path(tempfile.mkdtemp(prefix="pc-", dir="/tmp"))
    try:
        yield path
        if request.node.get_closest_marker("leaves_files") is None:
            left = _vanished(lambda: _files_in(path))
            assert not left, f"left in the runtime directory: {', '.join(sorted(left))}"
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def source_file(tmp_path: Path) -> SourceFile:
    """``source_file(size, seed=0, name="source.bin") -> Path``: a file in which every word depends on its offset.

    Word ``n`` is the little-endian 64-bit number ``n ^ (seed * 0x9E3779B97F4A7C15 % 2**64)``: a page in the wrong
    place, a page of zeros and a page of another seed's file all differ. ``size`` (bytes) need not be a multiple of 8.
    """

    def make(size: int, seed: int = 0, name: str = "source.bin") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            for start in range(0, size, 4 << 20):
                file.write(_words(start, min(size, start + (4 << 20)), seed))
        return path

    return make


@pytest.fixture
def require_userfaultfd() -> None:
    """Fail, not skip, where userfaultfd does not work: a run that proves nothing must not be green."""
    from postcopy_kernel.userfaultfd import probe_features

    try:
        features = probe_features()
    except OSError as error:
        pytest.fail(f"userfaultfd does not work here: {error}")
    assert int(features), "the kernel offers userfaultfd without a single feature"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process or a descriptor; end the strays, so that only this test is red."""
    global _children_before
    if _started.any:
        _children_before = _children()
    before, descriptors = _children_before, _descriptors()
    _started.any = False
    zygote.sessions.clear()
    previous = os.environ.get("POSTCOPY_TEST_ID")
    os.environ["POSTCOPY_TEST_ID"] = uuid.uuid4().hex
    yield
    strays = _vanished(lambda: _strays(before)) if _started.any else set()
    if previous is None:
        del os.environ["POSTCOPY_TEST_ID"]
    else:
        os.environ["POSTCOPY_TEST_ID"] = previous
    told = [f"process {pid} ({_describe(pid)})" for pid in strays]
    for pid in strays:
        _end(pid)
    opened = _vanished(lambda: _opened(descriptors))
    told += [f"descriptor {number} ({target})" for number, target in opened.items()]
    assert not told, f"left behind: {'; '.join(told)}"


def _words(start: int, end: int, seed: int) -> bytes:
    """The bytes ``start`` to ``end`` of a source file of ``seed``; ``start`` is a multiple of 8."""
    import numpy

    mask = numpy.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    words = numpy.arange(start // 8, (end + 7) // 8, dtype="<u8") ^ mask
    return words.astype("<u8").tobytes()[: end - start]


def _vanished(look: Callable[[], Found]) -> Found:
    """Repeat ``look`` until it finds nothing or PATIENCE is over; return what it found last."""
    limit, pause = time.monotonic() + PATIENCE, 0.01
    while (found := look()) and time.monotonic() < limit:
        gc.collect()  # a Popen or a socket in a reference cycle is not a leak
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
    return found


def _files_in(path: Path) -> set[str]:
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir() or file.is_symlink()}
    return {name for name in found if name != "private/lock" and not name.startswith("private/rescue/")}


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _children() -> set[int]:
    """Children of the test process, zombies too: the test must wait for them."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found.update(map(int, task.joinpath("children").read_text().split()))
    return found


def _strays(before: set[int]) -> set[int]:
    marked = set()
    for pid in _processes():
        with suppress(OSError):
            if zygote.of_this_test(pid):
                marked.add(pid)
    return ((marked | _children()) - before) - {os.getpid()}


def _describe(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "gone by now"
    return "not waited for" if state == "Z" else command[:200]


def _end(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    with suppress(OSError):  # not our child, or waited for already
        os.waitpid(pid, 0)


def _descriptors() -> dict[int, str]:
    """What every open descriptor of this process refers to."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own descriptor
            found[int(entry.name)] = str(entry.readlink())
    return found


def _opened(before: dict[int, str]) -> dict[int, str]:
    """Descriptors that were not there before, or are something else now; hypothesis' own database excepted."""
    return {
        number: target
        for number, target in _descriptors().items()
        if before.get(number) != target and "/.hypothesis/" not in target
    }
