"""A block in a client, with the fake supervisor of this folder: what the client promises by itself."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy
import pytest

import postcopy
from postcopy import client
from tests.conftest import SourceFile
from tests.system.fake_supervisor import PAGE, FakeSupervisor

PATIENCE = 10.0
SIZE = 20 * PAGE + 123

pytestmark = [
    pytest.mark.usefixtures("require_userfaultfd"),
    pytest.mark.leaves_files("the fake supervisor does not tidy up"),
]


@pytest.fixture
def data(source_file: SourceFile) -> bytes:
    return source_file(SIZE, seed=3).read_bytes()


@pytest.fixture
def begin(runtime_dir: Path, source_file: SourceFile) -> Iterator[Callable[..., FakeSupervisor]]:
    """``begin(**options) -> FakeSupervisor`` with the block ``ram0``; blocks that a test leaves attached are closed."""
    with ExitStack() as stack:

        def start(**options: object) -> FakeSupervisor:
            return stack.enter_context(FakeSupervisor(runtime_dir, {"ram0": source_file(SIZE, seed=3)}, **options))

        yield start
        for one in list(client._clients.values()):
            for block in list(one.blocks):
                block.close()


def in_child(check: Callable[[], bool]) -> int:
    """Exit status (negative: signal) of a forked child: 0 when ``check`` holds there."""
    pid = os.fork()
    if pid == 0:
        status = 9
        faulthandler.disable()  # a SIGSEGV that is wanted needs no story
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_every_byte_is_the_files(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes, mode: str
) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir, mode=mode) as block:
        assert (block.name, block.size, block.page_size, block.mode) == ("ram0", SIZE, PAGE, mode)
        assert len(block) == len(block.buf) == SIZE
        assert not block.buf.readonly
        assert bytes(block.buf) == data


def test_resident_counts_what_came(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        assert block.resident() == 0.0
        block.ensure(PAGE, 1)
        block.ensure(3 * PAGE, 2 * PAGE)
        assert block.resident() == 3 / 21
        assert block.resident(3 * PAGE, PAGE + 1) == 1.0
        assert block.resident(PAGE, 2 * PAGE) == 0.5
        assert block.resident(5, 0) == 1.0


def test_prefetch_returns_at_once_and_the_pages_come(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(slow=[5 * PAGE])
    with postcopy.attach("ram0", runtime_dir) as block:
        block.prefetch(6 * PAGE, 4 * PAGE)
        limit = time.monotonic() + PATIENCE
        while block.resident(6 * PAGE, 4 * PAGE) < 1.0:
            assert time.monotonic() < limit
            time.sleep(0.002)
        begun = time.monotonic()
        block.prefetch(5 * PAGE, PAGE)  # this one never comes
        assert time.monotonic() - begun < 5.0


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, SIZE + 1), (SIZE + 1, None), (5, -1)])
@pytest.mark.parametrize("method", ["ensure", "prefetch", "resident"])
def test_a_range_outside_the_block_is_refused(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, method: str, offset: int, length: int | None
) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as block, pytest.raises(ValueError, match="ram0"):
        getattr(block, method)(offset, length)


def test_a_lost_page_is_named(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(lost=[7 * PAGE])
    with postcopy.attach("ram0", runtime_dir) as block:
        with pytest.raises(postcopy.PageLost, match=f"ram0.*{7 * PAGE}") as caught:
            block.ensure()
        assert (caught.value.block, caught.value.offset) == ("ram0", 7 * PAGE)
        block.ensure(8 * PAGE)


def test_after_an_orderly_end_missing_pages_are_lost_and_say_why(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    service = begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure(0, PAGE)
        service.end()
        assert bytes(block.buf[:PAGE]) == data[:PAGE]
        with pytest.raises(postcopy.PageLost, match="told to"):
            block.ensure()


def test_ensure_gives_up_in_time_and_the_block_still_closes(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path
) -> None:
    begin(slow=[PAGE])
    other = postcopy.attach("ram0", runtime_dir)  # keeps the session: nobody is woken by its end
    block = postcopy.attach("ram0", runtime_dir)
    begun = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        block.ensure(timeout=0.2)
    assert isinstance(caught.value, postcopy.PostcopyError)
    assert 0.2 <= time.monotonic() - begun < 2.0
    block.close()  # a helper thread still sleeps in the memory: it is woken and sent away
    assert time.monotonic() - begun < 5.0
    limit = time.monotonic() + PATIENCE
    while any(thread.name == "postcopy-ensure" for thread in threading.enumerate()):
        assert time.monotonic() < limit
        time.sleep(0.002)
    other.close()


def test_ctrl_c_ends_ensure(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(slow=[0])
    program = (
        "import postcopy, sys\n"
        "block = postcopy.attach('ram0', sys.argv[1])\n"
        "try:\n    print('waiting', flush=True)\n    block.ensure()\n"
        "except KeyboardInterrupt:\n    block.close(); print('interrupted', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(runtime_dir)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        limit = time.monotonic() + PATIENCE
        while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < 2:  # the second thread is ensure()'s
            assert time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        try:
            assert process.stdout.readline() == b"interrupted\n"
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_ensure_lets_other_threads_run(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(slow=[0])
    with postcopy.attach("ram0", runtime_dir) as block:
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                block.ensure(timeout=2.0)
            except TimeoutError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        turns = 0
        while thread.is_alive():
            turns += 1
            time.sleep(0.001)
        assert caught
        assert turns > 50


def test_numpy_sees_the_memory_itself(begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        array = numpy.asarray(block)
        assert array.shape == (SIZE,)
        assert array.dtype == numpy.uint8
        array[5] = 200
        assert block.buf[5] == 200
        assert array[6:].tobytes() == data[6:]
        words = numpy.frombuffer(block.buf, dtype="<u8", count=20 * PAGE // 8)
        assert words[100] == 100 ^ (3 * 0x9E3779B97F4A7C15 % 2**64)
        del array, words


@pytest.mark.parametrize(
    "take",
    [
        lambda block: block.buf[3:9],
        numpy.asarray,
        lambda block: numpy.frombuffer(block.buf, "u1"),
        lambda block: memoryview(block.buf),
    ],
    ids=["slice", "asarray", "frombuffer", "memoryview"],
)
def test_close_refuses_while_views_exist_and_nothing_breaks(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes, take: Callable[[postcopy.Block], object]
) -> None:
    begin()
    block = postcopy.attach("ram0", runtime_dir)
    view = take(block)
    with pytest.raises(BufferError, match="views"):
        block.close()
    assert bytes(view)[:3] in (data[:3], data[3:6])  # type: ignore[call-overload]
    assert bytes(block.buf) == data
    del view
    gc.collect()
    block.close()
    block.close()
    with pytest.raises(ValueError, match="closed"):
        _ = block.buf


def test_an_error_is_not_hidden_by_the_views_in_its_frames(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path
) -> None:
    begin()
    block = postcopy.attach("ram0", runtime_dir)
    with pytest.raises(ZeroDivisionError), block:
        piece = block.buf[:5]
        print(piece[0] / 0)
    del piece
    block.close()


def test_a_view_taken_before_close_is_dead_not_dangerous(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path
) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        view = block.buf
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_a_pickle_attaches(begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir, mode="shared") as block:
        pickled = pickle.dumps(block)
        assert len(pickled) < 300
        with pickle.loads(pickled) as other:
            assert (other.name, other.mode, other.runtime_dir) == ("ram0", "shared", str(runtime_dir))
            assert bytes(other.buf) == data
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(block)


def test_private_writes_stay_private_and_shared_ones_are_seen(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as mine, postcopy.attach("ram0", runtime_dir, mode="shared") as ours:
        mine.buf[0] ^= 0xFF
        ours.buf[PAGE] ^= 0xFF
        assert mine.buf[0] == data[0] ^ 0xFF
        assert ours.buf[0] == data[0]
        assert mine.buf[PAGE] == data[PAGE] ^ 0xFF


# --- forks ------------------------------------------------------------------------------------------------------------


def test_a_forks_child_keeps_private_writes_and_faults_by_itself(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    begin()
    with postcopy.attach("ram0", runtime_dir) as block, postcopy.attach("ram0", runtime_dir, mode="shared") as ours:
        block.buf[5] = data[5] ^ 0xFF

        def check() -> bool:
            kept = block.buf[5] == data[5] ^ 0xFF
            block.buf[6] = data[6] ^ 0xFF
            rest = bytes(block.buf[PAGE:]) == data[PAGE:] and ours.buf[0] == data[0]
            block.ensure()
            ours.close()
            return kept and rest and in_child(lambda: block.buf[6] == data[6] ^ 0xFF) == 0

        assert in_child(check) == 0
        assert block.buf[6] == data[6]
        assert ours.buf[2 * PAGE] == data[2 * PAGE]


def test_a_child_that_cannot_attach_gets_a_signal_never_zeros(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure(0, PAGE)
        service.end()
        with caplog.at_level(logging.CRITICAL):
            assert in_child(lambda: block.buf[5 * PAGE] == 0) == -signal.SIGSEGV
            assert in_child(lambda: block.buf[0] == 0) == -signal.SIGSEGV

            def ensure_says_why() -> bool:
                try:
                    block.ensure()
                except postcopy.PageLost as error:
                    return "after a fork" in str(error)
                return False

            assert in_child(ensure_says_why) == 0


def test_a_child_is_not_attached_to_another_block_of_the_same_name(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The inherited mapping is of the old memfd: a new supervisor's worker would place pages that nobody sees here."""
    begin().end(signal.SIGKILL)
    with FakeSupervisor(runtime_dir, {"ram0": Path(__file__)}), caplog.at_level(logging.CRITICAL):
        first = postcopy.attach("ram0", runtime_dir)
        first.ensure()
    (runtime_dir / "door").unlink(missing_ok=True)
    other = begin()
    with first:
        assert in_child(lambda: first.buf[0] == 0) == -signal.SIGSEGV
        other.end(signal.SIGKILL)  # it would not answer the parent, which resumes in order to close


def test_a_fork_in_c_code_gets_a_signal_never_zeros(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin()
    program = (
        "import ctypes, os, postcopy, sys\n"
        "block = postcopy.attach('ram0', sys.argv[1])\n"
        "if (pid := os.fork()) == 0:\n    os._exit(0)\n"  # lets its child inherit, and must take that back
        "os.waitpid(pid, 0)\n"
        "pid = ctypes.CDLL(None).fork()\n"
        "if pid == 0:\n    value = block.buf[0]\n    os._exit(value)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), block.buf[8])\n"
    )
    command = [sys.executable, "-c", program, str(runtime_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    wanted = (1 ^ (3 * 0x9E3779B97F4A7C15 % 2**64)) & 0xFF
    assert done.stdout.split() == [str(-signal.SIGSEGV), str(wanted)]


def test_forks_while_other_threads_attach_do_not_deadlock(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    begin()
    stop, failures = threading.Event(), []

    def attach_and_close() -> None:
        try:
            while not stop.is_set():
                with postcopy.attach("ram0", runtime_dir) as block:
                    assert block.buf[PAGE] == data[PAGE]
        except Exception as error:
            failures.append(error)

    with postcopy.attach("ram0", runtime_dir) as block:
        threads = [threading.Thread(target=attach_and_close) for _ in range(3)]
        for thread in threads:
            thread.start()

        def check() -> bool:
            with postcopy.attach("ram0", runtime_dir) as own:
                return block.buf[0] == data[0] and own.buf[0] == data[0]

        try:
            assert [in_child(check) for _ in range(15)] == [0] * 15
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
    assert not failures


def test_a_fork_does_not_wait_for_a_conversation(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(deaf=["OpenBlock"])
    caught: list[BaseException] = []

    def attach() -> None:
        try:
            postcopy.attach("ram0", runtime_dir, timeout=4.0)
        except postcopy.AttachTimeout as error:
            caught.append(error)

    thread = threading.Thread(target=attach)
    thread.start()
    begun = time.monotonic()
    assert in_child(lambda: True) == 0
    assert time.monotonic() - begun < 3.0
    thread.join(PATIENCE)
    assert caught


# --- trouble with the supervisor --------------------------------------------------------------------------------------


def test_a_supervisor_that_knows_nothing_of_watchers(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin(old=True)
    with postcopy.attach("ram0", runtime_dir, timeout=20) as block:
        assert block.buf[0] == block.buf[0]


@pytest.mark.parametrize("deaf", ["Hello", "OfferUserfaultfd", "OpenBlock", "AskOrphanPolicy", "Mapped"])
def test_no_answer_is_a_timeout(begin: Callable[..., FakeSupervisor], runtime_dir: Path, deaf: str) -> None:
    begin(deaf=[deaf])
    begun = time.monotonic()
    with pytest.raises(postcopy.AttachTimeout):
        postcopy.attach("ram0", runtime_dir, timeout=0.2)
    assert time.monotonic() - begun < 2.0


def test_a_timeout_does_not_spoil_what_is_attached(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    begin(deaf=["Unmap"])
    with postcopy.attach("ram0", runtime_dir) as block:
        client._clients[str(runtime_dir)]._session.connection.usable = False  # type: ignore[union-attr]
        with postcopy.attach("ram0", runtime_dir) as other:  # a new session beside the spoilt one
            assert other.session is not block.session
            assert bytes(other.buf) == bytes(block.buf) == data
            other.session.connection.usable = False  # or closing would wait for the deaf one


def test_attached_memory_outlives_the_supervisors_sudden_end(
    begin: Callable[..., FakeSupervisor], runtime_dir: Path, data: bytes
) -> None:
    service = begin()
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure()
        service.end(signal.SIGKILL)
        assert bytes(block.buf) == data
        with pytest.raises(postcopy.NoSupervisor):
            postcopy.attach("ram0", runtime_dir)


def test_no_such_block(begin: Callable[..., FakeSupervisor], runtime_dir: Path) -> None:
    begin()
    with pytest.raises(postcopy.NoSuchBlock, match="other"):
        postcopy.attach("other", runtime_dir)
    with pytest.raises(postcopy.BadInput, match="readable"):
        postcopy.attach("ram0", runtime_dir, mode="readable")


def test_nobody_there(runtime_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(postcopy.NoSupervisor, match="no attach socket"):
        postcopy.attach("ram0", runtime_dir)
    with pytest.raises(postcopy.NoSupervisor):
        postcopy.attach("ram0", tmp_path / "nowhere")
    with pytest.raises(postcopy.BadInput, match="too long"):
        postcopy.attach("ram0", tmp_path / ("x" * 120))
