"""What an attached client may try with what it holds: its own userfaultfd, a block's memory, the received map. Each
attack runs beside an honest client, which must read every byte, and after it a newcomer and a new worker must work."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, until, word

PAGES = 512
TOOLS = """
import errno, fcntl, mmap, struct
from postcopy.session import Session
from postcopy.deadline import Deadline

def own_userfaultfd():
    return next(int(n) for n in os.listdir('/proc/self/fd') if 'userfaultfd]' in link(n))

def link(n):
    try: return os.readlink(f'/proc/self/fd/{n}')
    except OSError: return ''

def attempt(act, *arguments):
    try: act(*arguments)
    except OSError as error: return errno.errorcode[error.errno]
    return 'allowed'

def opened(mode):
    session = Session(directory, Deadline(20))
    return session, session.open('ram0', mode, Deadline(20))
"""


@pytest.fixture
def served(runtime_dir: Path, source_file: SourceFile) -> Iterator[tuple[Service, Puppet, Path]]:
    """A service whose honest client has read half of the block; at the end it reads all, and so does a newcomer."""
    path = source_file(PAGES * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", background_rate=0) as service:
        honest = service.client()
        assert honest.do(f"words(b, {list(range(0, PAGES, 2))})") == [word(page * PAGE) for page in range(0, PAGES, 2)]
        yield service, honest, path
        service.kill_worker(honest)
        newcomer = service.client()
        for client in (honest, newcomer):
            assert client.do(f"check(b, {str(path)!r}, 'random')") == -1


def hostile(service: Service, mode: str | None) -> Puppet:
    client = service.client("ram0" if mode else None, mode or "private")
    client.do(TOOLS)
    return client


def test_cutting_growing_and_sealing(served: tuple[Service, Puppet, Path]) -> None:
    """A shared client holds a writable descriptor. A seal against later writable mappings would forbid every successor
    of every worker to map the block."""
    service, _, _ = served
    client = hostile(service, None)
    client.do("session, o = opened('shared')")
    for size in (0, PAGE, PAGES * PAGE * 2):
        assert client.do(f"attempt(os.ftruncate, o.memory, {size})") == "EPERM"
    for seal in ("F_SEAL_WRITE", "F_SEAL_FUTURE_WRITE", "F_SEAL_GROW", "F_SEAL_SEAL"):
        number = {"F_SEAL_FUTURE_WRITE": 16}.get(seal, f"fcntl.{seal}")
        assert client.do(f"attempt(fcntl.fcntl, o.memory, fcntl.F_ADD_SEALS, {number})") == "EPERM", seal
    assert client.do("attempt(os.pwrite, o.received, b'x', 0)") == "EBADF"
    assert client.do("attempt(mmap.mmap, o.received, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)") == "EACCES"


def test_holes_punched_without_pause(served: tuple[Service, Puppet, Path]) -> None:
    """A shared client may take pages out of the block: a client that misses one gets it again from the source."""
    service, honest, path = served
    client = hostile(service, None)
    client.do("session, o = opened('shared')")
    punch = "libc.fallocate(o.memory, 3, ctypes.c_long(0), ctypes.c_long(512 * 4096))"
    client.do("stop = False")
    client.do(f"def punching():\n    while not stop:\n        {punch}\n        time.sleep(0.001)\n")
    client.do("thread = threading.Thread(target=punching, daemon=True); thread.start()")
    for _ in range(5):
        assert honest.do(f"check(b, {str(path)!r}, 'random')", 60) == -1
    client.do("stop = True; thread.join()")


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_userfaultfd_that_does_not_block(served: tuple[Service, Puppet, Path], mode: str) -> None:
    """The flag is shared with the worker's duplicate: its faults are answered, and its worker does not spin."""
    service, _, _ = served
    client = hostile(service, mode)
    for page in (1, 3, 5):
        client.do("os.set_blocking(own_userfaultfd(), False)")
        assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
    worker = service.worker(client)
    client.do("os.set_blocking(own_userfaultfd(), False)")
    before, begun = cpu_seconds(worker), time.monotonic()
    time.sleep(1.5)
    assert cpu_seconds(worker) - before < 0.3 * (time.monotonic() - begun)


def cpu_seconds(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


LIES = {
    # Page 1 of the memory is announced as page 11 of the block: placing that one never ends the fault.
    "a false offset": ("private", "o.memory, 0", "announce(8192, 40960); touch(at + 4096)"),
    # Its own memory, in which the page that is in the block long since never appears.
    "its own memory": ("shared", "mine(), 0", "announce(8192, 0); touch(at)"),
    "protected": (
        "shared",
        "o.memory, 0",
        "announce(8192, 0); libc.madvise(at, 4096, 22); u.register(at, 4096, RegisterMode.MISSING | RegisterMode.WP);"
        "fcntl.ioctl(u.fileno(), 0xC018AA06, struct.pack('QQQ', at, 4096, 1)); touch(at, 23)",
    ),
    "mapped over": (
        "shared",
        "o.memory, 0",
        "announce(8192, 0); libc.munmap(at, 8192); remap(mine());u.register(at, 8192, RegisterMode.MISSING); touch(at)",
    ),
}
SPIN = """
from postcopy_kernel.userfaultfd import Userfaultfd, RegisterMode
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def mine():
    fd = os.memfd_create('mine'); os.ftruncate(fd, 8192); return fd
def announce(length, offset):
    session.connection.announce(o.number, at, length, offset, Deadline(20))
def remap(fd):
    libc.mmap(at, 8192, 3, mmap.MAP_SHARED | 0x10, fd, 0)
def touch(where, how=22):
    threading.Thread(target=libc.madvise, args=(where, 4096, how), daemon=True).start()
"""


@pytest.mark.parametrize("uid", [0, 65534])
@pytest.mark.parametrize("lie", LIES)
def test_a_fault_that_no_answer_ends(runtime_dir: Path, source_file: SourceFile, lie: str, uid: int) -> None:
    """A thread that faults again after each answer: its worker reports and slows that client, and does not spin."""
    mode, memory, act = LIES[lie]
    path = source_file(PAGES * PAGE)
    with Service(runtime_dir, f"ram0={path}", polluting=True, shared_uid="65534", fault_around="4K") as service:
        honest, client = service.client(), service.client(None)
        assert honest.do("words(b, [0, 2])") == [word(0), word(2 * PAGE)]
        client.do(f"become({uid})" if uid else "None")
        client.do(TOOLS + SPIN + f"session, o = opened({mode!r})")
        flags = "mmap.MAP_PRIVATE" if mode == "private" else "mmap.MAP_SHARED"
        client.do(f"at = libc.mmap(None, 8192, 3, {flags} | 0x4000, {memory}); u = Userfaultfd(own_userfaultfd())")
        client.do(act)
        until(lambda: service.events("repeating"), "it is reported")
        worker = next(found["worker_pid"] for found in service.status()["clients"] if found["pid"] == client.pid)
        before, begun = cpu_seconds(worker), time.monotonic()
        time.sleep(2)
        assert cpu_seconds(worker) - before < 0.15 * (time.monotonic() - begun)
        assert honest.do("words(b, [1, 3])") == [word(PAGE), word(3 * PAGE)]
        assert len(service.events("repeating")) == 1
        client.kill()


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("what", ["unregister", "minor", "protect", "unmap", "map over"])
def test_its_registration_undone(served: tuple[Service, Puppet, Path], mode: str, what: str) -> None:
    """Through its own userfaultfd a client may unregister what we registered, register it otherwise, or map something
    else there. Only this client can read wrong bytes then; no other client sees one."""
    service, honest, _ = served
    client = hostile(service, mode)
    client.do("from postcopy_kernel.userfaultfd import Userfaultfd, RegisterMode\nu = Userfaultfd(own_userfaultfd())")
    client.do("at, length = address(b), 512 * 4096")
    client.do(
        {
            "unregister": "u.unregister(at, length)",
            "minor": "u.unregister(at, length); attempt(u.register, at, length, RegisterMode.MINOR)",
            "protect": "u.unregister(at, length); attempt(u.register, at, length, RegisterMode.WP)",
            "unmap": "libc.munmap(ctypes.c_void_p(at + 4096), ctypes.c_size_t(length - 8192))",
            "map over": "libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(length), 3, 0x32, -1, ctypes.c_long(0))",
        }[what]
    )
    assert honest.do("words(b, [1, 511])") == [word(PAGE), word(511 * PAGE)]
    assert service.status()["state"] == "running"
    client.kill()
    until(lambda: not service.record(client), "it is forgotten")


def test_stopped_at_every_step(served: tuple[Service, Puppet, Path]) -> None:
    """A client that stands still, connected, attached or in the middle of a fault, delays no other client."""
    service, honest, _ = served
    clients = [hostile(service, None), hostile(service, "private"), hostile(service, "shared")]
    clients[0].do("session, o = opened('private')")
    clients[1].begin("words(b, list(range(512)))")
    for client in clients:
        client.kill(signal.SIGSTOP)
    assert honest.do("words(b, [7, 9])") == [word(7 * PAGE), word(9 * PAGE)]
    other = service.client("ram0", "shared")
    assert other.do("words(b, [11])") == [word(11 * PAGE)]
    for client in clients:
        client.kill(signal.SIGCONT)
    assert clients[1].answer() == [word(page * PAGE) for page in range(512)]


def test_a_crowd_of_attaches_in_one_process(served: tuple[Service, Puppet, Path]) -> None:
    """Connections by the hundred, each with a userfaultfd and a region: refused when it is too much, gone with it."""
    service, honest, _ = served
    client = hostile(service, None)
    client.do(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\nmany = []\n"
        "def crowd(count):\n"
        "    for _ in range(count):\n"
        "        try: many.append(opened('private'))\n"
        "        except Exception as error: many.append(repr(error))\n"
        "    return len(many)"
    )
    assert client.do("crowd(150)", 60) == 150
    assert honest.do("words(b, [13])") == [word(13 * PAGE)]
    client.kill()
    until(lambda: len(service.status()["clients"]) == 1, "the crowd is gone")
