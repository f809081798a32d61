"""Attach with the whole service behind it: supervisor, custodian, workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest

import postcopy
from postcopy.queries import Control
from tests.conftest import SourceFile
from tests.system.test_client_block import in_child

PAGE = 4096
PATIENCE = 20.0
SIZE = 3_000_017
NOBODY = 65534

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

Serve = Callable[..., postcopy.Supervisor]


@pytest.fixture
def serve(runtime_dir: Path) -> Iterator[Serve]:
    """``serve(blocks, **options) -> Supervisor`` in the runtime directory of the test."""
    with ExitStack() as stack:

        def start(blocks: dict[str, str | os.PathLike[str]], **options: Any) -> postcopy.Supervisor:
            supervisor = stack.enter_context(postcopy.Supervisor(blocks, runtime_dir, **options))
            stack.callback(lambda: _sound(supervisor))
            return supervisor

        yield start


def _sound(supervisor: postcopy.Supervisor) -> None:
    log = supervisor.log()
    assert "Traceback" not in log, log


def status(directory: Path) -> dict[str, Any]:
    with Control(directory) as control:
        return control.status(audit=True)


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(SIZE, seed=1)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, SIZE])
def test_every_byte_in_both_modes(
    serve: Serve, runtime_dir: Path, source_file: SourceFile, mode: str, size: int
) -> None:
    path = source_file(size, seed=2)
    serve({"ram0": path})
    with postcopy.attach("ram0", runtime_dir, mode=mode) as block:
        assert block.size == size
        assert bytes(block.buf) == path.read_bytes()


def test_several_blocks_are_one_client(serve: Serve, runtime_dir: Path, source_file: SourceFile) -> None:
    paths = {f"ram{n}": source_file(300_000 + n, seed=n, name=f"source{n}") for n in range(5)}
    serve(dict(paths))
    with ExitStack() as stack:
        blocks = [stack.enter_context(postcopy.attach(name, runtime_dir)) for name in paths]
        again = stack.enter_context(postcopy.attach("ram0", runtime_dir, mode="shared"))
        for block in [*blocks, again]:
            assert bytes(block.buf) == paths[block.name].read_bytes()
        clients = status(runtime_dir)["clients"]
        assert [client["pid"] for client in clients] == [os.getpid()]
        assert len(clients[0]["blocks"]) == 6
    deadline = time.monotonic() + 15
    while (document := status(runtime_dir))["clients"]:  # its worker ends first
        assert time.monotonic() < deadline, document["clients"]
    assert document["totals"]["polluted"] == 0


def test_attach_touch_close_many_times(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    data, took = path.read_bytes(), []
    for n in range(21):
        begun = time.monotonic()
        with postcopy.attach("ram0", runtime_dir, mode=("private", "shared")[n % 2]) as block:
            offset = n * 100_003 % SIZE
            assert block.buf[offset] == data[offset]
            took.append(time.monotonic() - begun)
    # Some milliseconds where the machine has nothing else to do: `scripts/bench attach`.
    assert statistics.median(took[1:]) < 1.0, took
    assert status(runtime_dir)["totals"]["polluted"] == 0


def test_copy_on_write_and_sharing(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as mine, postcopy.attach("ram0", runtime_dir, mode="shared") as ours:
        mine.buf[10] = data[10] ^ 0xFF  # a write is the first touch of this page
        assert ours.buf[10] == data[10]
        ours.buf[5 * PAGE] = data[5 * PAGE] ^ 0xFF
        program = (
            "import postcopy, sys\n"
            "with postcopy.attach('ram0', sys.argv[1], mode=sys.argv[2]) as block:\n"
            f"    print(block.buf[10], block.buf[{5 * PAGE}], block.buf[{5 * PAGE + 1}])\n"
        )
        for mode in ("private", "shared"):
            command = [sys.executable, "-c", program, str(runtime_dir), mode]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
            wanted = [data[10], data[5 * PAGE] ^ 0xFF, data[5 * PAGE + 1]]
            assert [int(word) for word in done.stdout.split()] == wanted
        assert bytes(mine.buf[11:PAGE]) == data[11:PAGE]


def test_ensure_prefetch_resident(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path}, fault_around="4K")
    with postcopy.attach("ram0", runtime_dir) as block:
        assert block.resident() == 0.0
        block.ensure(PAGE, 3 * PAGE)
        assert block.resident(PAGE, 3 * PAGE) == 1.0
        assert block.resident() == pytest.approx(3 / block.pages)
        block.prefetch(100 * PAGE, 50 * PAGE)
        limit = time.monotonic() + PATIENCE
        while block.resident(100 * PAGE, 50 * PAGE) < 1.0:
            assert time.monotonic() < limit
            time.sleep(0.005)
        block.ensure()
        assert block.resident() == 1.0
        assert hashlib.sha256(block.buf).digest() == hashlib.sha256(path.read_bytes()).digest()


def test_numpy(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    with postcopy.attach("ram0", runtime_dir) as block:
        array = numpy.asarray(block)
        assert array.ctypes.data == block.mapping.address
        assert (array == numpy.fromfile(path, dtype="u1")).all()
        words = numpy.frombuffer(block.buf, dtype="<u4", count=SIZE // 4)
        assert (words == numpy.fromfile(path, dtype="<u4", count=SIZE // 4)).all()
        del array, words


def test_system_calls_on_missing_pages(serve: Serve, runtime_dir: Path, path: Path, tmp_path: Path) -> None:
    serve({"ram0": path})
    with postcopy.attach("ram0", runtime_dir) as block:
        with (tmp_path / "copy").open("wb", buffering=0) as file:
            assert file.write(block.buf) == SIZE
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
        with (tmp_path / "copy").open("rb", buffering=0) as file:
            assert file.readinto(block.buf) == SIZE


def test_many_threads_touch_at_once(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as block, ThreadPoolExecutor(8) as pool:

        def digest(part: int) -> bool:
            piece = slice(part * SIZE // 16, (part + 1) * SIZE // 16)
            return hashlib.sha256(block.buf[piece]).digest() == hashlib.sha256(data[piece]).digest()

        assert all(pool.map(digest, [*range(16), *range(15, -1, -1)]))


# --- other processes --------------------------------------------------------------------------------------------------


def digest_of(block: postcopy.Block) -> str:
    with block:
        return hashlib.sha256(block.buf).hexdigest()


def test_a_block_goes_to_spawned_workers(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    with postcopy.attach("ram0", runtime_dir, mode="shared") as block:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            digests = set(pool.map(digest_of, [block, block, block]))
        assert digests == {hashlib.sha256(path.read_bytes()).hexdigest()}
        with pickle.loads(pickle.dumps(block)) as other:
            assert other.buf[7] == block.buf[7]


def test_forked_multiprocessing_works(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as block:
        block.buf[3] = 77
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=lambda: queue.put((block.buf[3], bytes(block.buf[4:]) == data[4:])))
        process.start()
        process.join(PATIENCE)
        assert queue.get() == (77, True)
        queue.close()
        process.close()


def test_a_forks_child_is_a_client_of_its_own(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path}, fault_around="4K")
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as block, postcopy.attach("ram0", runtime_dir, mode="shared") as ours:
        block.buf[5] = data[5] ^ 0xFF
        block.buf[9 * PAGE] = data[9 * PAGE] ^ 0xFF

        def check() -> bool:
            kept = block.buf[5] == data[5] ^ 0xFF and block.buf[9 * PAGE] == data[9 * PAGE] ^ 0xFF
            pids = {client["pid"] for client in status(runtime_dir)["clients"]}
            block.buf[6] = 1
            rest = bytes(block.buf[10 * PAGE :]) == data[10 * PAGE :] and bytes(ours.buf) == data
            return kept and rest and pids == {os.getpid(), os.getppid()}

        assert in_child(check) == 0
        assert block.buf[6] == data[6]
        assert bytes(block.buf[10 * PAGE :]) == data[10 * PAGE :]
    assert status(runtime_dir)["totals"]["polluted"] == 0


def test_a_fork_after_the_release(serve: Serve, runtime_dir: Path, path: Path) -> None:
    """A complete block is released: nothing is registered any more. A child of then works all the same."""
    serve({"ram0": path})
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure()
        limit = time.monotonic() + PATIENCE
        while not status(runtime_dir)["clients"][0]["released"]:
            assert time.monotonic() < limit
            time.sleep(0.01)
        block.buf[0] = 200
        assert in_child(lambda: block.buf[0] == 200 and bytes(block.buf[1:]) == data[1:]) == 0
        assert bytes(block.buf[1:]) == data[1:]


def test_a_fork_in_c_code_gets_a_signal(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    program = (
        "import ctypes, os, postcopy, sys\n"
        "block = postcopy.attach('ram0', sys.argv[1])\n"
        "value = block.buf[0]\n"
        "pid = ctypes.CDLL(None).fork()\n"
        "if pid == 0:\n    os._exit(block.buf[100000] == 0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), block.buf[100000])\n"
        "block.close()\n"
    )
    command = [sys.executable, "-c", program, str(runtime_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split() == [str(-signal.SIGSEGV), str(path.read_bytes()[100_000])]
    assert status(runtime_dir)["totals"]["polluted"] == 0


# --- other users ------------------------------------------------------------------------------------------------------

AS_NOBODY = (
    # Another user may not see where Python lives.
    "import os, sys, postcopy, postcopy.client, postcopy.errors, postcopy.watching\n"
    f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    "try:\n"
    "    with postcopy.attach('ram0', sys.argv[1], mode=sys.argv[2]) as block:\n"
    "        read = os.pipe()\n"
    "        os.write(read[1], block.buf[200000:200016])\n"  # in the kernel's mode
    "        print(bytes(block.buf[:8]).hex(), os.read(read[0], 16).hex())\n"
    "except postcopy.AttachDenied as error:\n"
    "    print('denied', error)\n"
)


def as_nobody(directory: Path, mode: str) -> list[str]:
    command = [sys.executable, "-c", AS_NOBODY, str(directory), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_an_allowed_user_without_any_right(serve: Serve, runtime_dir: Path, path: Path, mode: str) -> None:
    serve({"ram0": path}, **{"allow_uid" if mode == "private" else "shared_uid": [NOBODY]})
    data = path.read_bytes()
    assert as_nobody(runtime_dir, mode) == [data[:8].hex(), data[200_000:200_016].hex()]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_denied(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    assert as_nobody(runtime_dir, "private")[0] == "denied"


# --- size and number --------------------------------------------------------------------------------------------------


def test_a_block_larger_than_the_machines_memory(serve: Serve, runtime_dir: Path, tmp_path: Path) -> None:
    path, size = tmp_path / "sparse", 100 << 30
    with path.open("wb") as file:
        file.truncate(size)
        for place in (0, 77 << 30, size - 16):
            file.seek(place)
            file.write(b"here I am, truly")
    serve({"ram0": path})
    for mode in ("private", "shared"):
        with postcopy.attach("ram0", runtime_dir, mode=mode) as block:
            assert block.size == len(block.buf) == size
            for place in (0, 77 << 30, size - 16):
                assert bytes(block.buf[place : place + 16]) == b"here I am, truly"
            assert block.buf[50 << 30] == 0
            block.ensure(90 << 30, 1 << 20, timeout=PATIENCE)
            assert 0 < block.resident() < 0.001
            assert block.resident(90 << 30, 1 << 20) == 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # KiB


def test_clients_come_and_go_from_many_threads(serve: Serve, runtime_dir: Path, path: Path) -> None:
    serve({"ram0": path})
    data = path.read_bytes()
    with ThreadPoolExecutor(6) as pool:

        def once(n: int) -> bool:
            with postcopy.attach("ram0", runtime_dir, mode=("private", "shared")[n % 2]) as block:
                return block.buf[n * 9973 % SIZE] == data[n * 9973 % SIZE]

        assert all(pool.map(once, range(60)))
    assert threading.active_count() < 20
    assert status(runtime_dir)["totals"]["polluted"] == 0


# --- the end ----------------------------------------------------------------------------------------------------------


def test_after_the_end_what_came_stays_and_the_rest_is_lost(serve: Serve, runtime_dir: Path, path: Path) -> None:
    supervisor = serve({"ram0": path}, fault_around="4K")
    data = path.read_bytes()
    with postcopy.attach("ram0", runtime_dir) as block, postcopy.attach("ram0", runtime_dir, mode="shared") as ours:
        block.ensure(0, 10 * PAGE)
        ours.ensure(0, 10 * PAGE)
        supervisor.close()
        assert bytes(block.buf[: 10 * PAGE]) == bytes(ours.buf[: 10 * PAGE]) == data[: 10 * PAGE]
        for one in (block, ours):
            with pytest.raises(postcopy.PageLost, match="ended"):
                one.ensure(timeout=PATIENCE)
        with pytest.raises(postcopy.NoSupervisor):
            postcopy.attach("ram0", runtime_dir)


def test_a_supervisor_that_cannot_start_says_why(runtime_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(postcopy.PostcopyError, match="missing"):
        postcopy.Supervisor({"ram0": tmp_path / "missing"}, runtime_dir)


def test_a_supervisor_in_a_directory_of_its_own(path: Path) -> None:
    with postcopy.Supervisor({"ram0": path}, fault_around="64K", log_level="debug") as supervisor:
        directory = Path(supervisor.runtime_dir)
        with postcopy.attach("ram0", directory) as block:
            assert block.buf[77] == path.read_bytes()[77]
    assert not directory.exists()
    supervisor.close()
