"""A supervisor by the line, for tests of the custodian: the custodian, its workers and the clients are real.

``Script(directory, path)`` has one block, from a file or ``remote``; ``start`` runs a custodian; ``guest`` is a client
process whose worker it orders; ``die`` closes everything that a killed supervisor's kernel would close; ``take_over``
is the next supervisor.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from postcopy_kernel import memory
from postcopy_kernel.descriptors import close_all, close_others, create_eventfd, receive_message, send_message
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.memory import Mapping, create_memfd
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd, open_device, open_userfaultfd
from postcopy_protocol import counters
from postcopy_protocol.codec import decode, encode, pack_offsets, unpack_offsets
from postcopy_protocol.geometry import page_count
from postcopy_protocol.messages import (
    Adopt,
    Assignment,
    BlockGrant,
    ClientNote,
    CustodianReady,
    Dismiss,
    ForkFailed,
    ForkWorker,
    InventoryEnd,
    Keep,
    Kept,
    Message,
    RegionGrant,
    Report,
    RequestPages,
    TakeOver,
    Wake,
    WorkerExited,
    WorkerForked,
    WorkerHello,
)
from postcopy_protocol.received_map import FLAGS, PLACING, RECEIVED
from postcopy_protocol.runtime_paths import custodian_path, router_endpoint
from tests.kernel.touching import Child, fetch, store
from tests.system.service import alive, environment, until

PAGE = 4096
FROM_CUSTODIAN = (CustodianReady, WorkerForked, ForkFailed, WorkerExited, Kept, InventoryEnd)
PATIENCE = 30.0
Said = TypeVar("Said", bound=Message)


class Guest(Child):
    """A client: maps the block, hands over its userfaultfd, reads and writes words of 8 bytes when told to."""

    def __init__(self, memory_fd: int, pages: int, mode: str) -> None:
        super().__init__(lambda sock: _be_guest(sock, memory_fd, pages * PAGE, mode))
        self.socket.settimeout(PATIENCE)
        received = receive_message(self.socket, wait=True)
        self.mode, self.start, self.length = mode, int(received.data), pages * PAGE
        self.ufd = Userfaultfd(received.fds[0])
        self.ufd.handshake()
        self.ufd.register(self.start, self.length, RegisterMode.MISSING)

    def begin(self, page: int, write: bytes = b"") -> None:
        self.socket.send(struct.pack("<Q", page) + write)

    def answer(self) -> int:
        """The word that stood at the beginning of the page."""
        answer = self.socket.recv(64)
        assert answer, f"the client has ended with {self.exit_code()}"
        return int.from_bytes(answer, "little")

    def word(self, page: int) -> int:
        self.begin(page)
        return self.answer()

    def waits(self, seconds: float = 0.2) -> bool:
        """No answer within this time."""
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(64, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)
        return False


def _be_guest(sock: socket.socket, fd: int, length: int, mode: str) -> None:
    close_others({sock.fileno(), fd})  # whatever else the test holds, its supervisor's channel too
    sock.settimeout(None)
    if mode == "shared":
        mapping = Mapping.of(fd, length)
    else:
        mapping = Mapping.of(memory.reopen(fd, writable=False), length, shared=False)
    ufd = open_userfaultfd()
    send_message(sock, b"%d" % mapping.address, [ufd.fd], wait=True)
    while order := sock.recv(64):
        page = struct.unpack_from("<Q", order)[0]
        if order[8:]:
            store(mapping.address + page * PAGE, order[8:])
        sock.send(fetch(mapping.address + page * PAGE, 8))


@dataclass
class Inventory:
    """What a take-over brought; whoever has it owns the descriptors."""

    kept: dict[str, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    workers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """number: (incarnation, pid, pidfd)"""

    def close(self) -> None:
        for _, fds in self.kept.values():
            close_all(fds)
        close_all(pidfd for _, _, pidfd in self.workers.values())


class Script:
    def __init__(self, directory: Path, path: Path, *, remote: bool = False) -> None:
        self.directory = directory
        (directory / "private").mkdir(mode=0o700, exist_ok=True)
        self.path, self.remote = path, remote
        self.size = path.stat().st_size
        self.pages = page_count(self.size, PAGE)
        self.guests: list[Guest] = []
        self.own: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.inventory = Inventory()
        self.orders: dict[int, ForkWorker] = {}
        self.pidfds: dict[tuple[int, int], int] = {}
        self.pids: dict[tuple[int, int], int] = {}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router: zmq.Socket[bytes] | None = None
        self._requests: list[RequestPages] = []
        self.memory = self._mine(create_memfd("script", self.pages * PAGE))
        self.received = self._mine(create_memfd("script-map", page_count(self.pages + FLAGS, PAGE) * PAGE))
        self.quit, self.service = self._mine(create_eventfd()), self._mine(create_memfd("house", PAGE))
        os.pwrite(self.service, struct.pack("<Q", 1 << 20), counters.WINDOW_LIMIT * 8)
        self.file, self.device = self._mine(os.open(path, os.O_RDONLY)), self._mine(open_device())

    def _mine(self, fd: int) -> int:
        self.own.append(fd)
        return fd

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- log of the custodian ---\n{self.log()[-4000:]}", file=sys.stderr)
        for guest in self.guests:
            guest.__exit__(kind, error, trace)
        self.die()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5 if error is None else 0.1)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(10)
        self._context.term()
        (self.directory / "private/router").unlink(missing_ok=True)
        self._log.close()

    def log(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode("utf-8", "replace")

    # --- the custodian ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A custodian that keeps service and block."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = ["--channel", str(theirs.fileno()), "--directory", str(self.directory)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "postcopy_workers.custodian", *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._log,
                env=environment(),
            )
        self.channel = ours
        ours.settimeout(PATIENCE)
        self.hear(CustodianReady)
        self.say(Keep("house", b""), (self.quit, self.service, self.device))
        self.say(Keep("block/1", b"about the block"), (self.memory, self.received, self.file))

    def say(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        assert self.channel is not None
        send_message(self.channel, encode(message), fds, wait=True)

    def hear(self, expected: type[Said], within: float = PATIENCE) -> Said:
        """Wait for a message of this kind; pidfds of workers that are told of meanwhile are kept."""
        assert self.channel is not None
        self.channel.settimeout(within)
        while True:
            received = receive_message(self.channel, wait=True)
            assert received.data, f"the custodian has ended: {self.log()}"
            message: Message = decode(received.data, expect=FROM_CUSTODIAN)
            if isinstance(message, WorkerForked):
                self.pidfds[message.worker, message.incarnation] = self._mine(received.fds[0])
                self.pids[message.worker, message.incarnation] = message.pid
            else:
                assert not received.fds
            if isinstance(message, expected):
                return message

    def die(self) -> None:
        """Everything that the kernel closes when a supervisor is killed."""
        if self.channel is not None:
            self.channel.close()
        self.channel = None
        if self._router is not None:
            self._router.close()
        self._router = None
        close_all(self.own)
        self.own.clear()
        for guest in self.guests:
            if guest.ufd.fd >= 0:
                guest.ufd.close()
        self.inventory.close()
        self.inventory = Inventory()

    # --- clients ------------------------------------------------------------------------------------------------------

    def guest(self, mode: str = "private") -> Guest:
        """A client with a worker that has been ordered."""
        guest = Guest(self.memory, self.pages, mode)
        self.guests.append(guest)
        number = len(self.guests)
        figures = self._mine(create_memfd(f"figures-{number}", counters.PAGE_BYTES))
        note = ClientNote(number, "guest", "native", 0, guest.pid, False, False, self._regions(guest), ())
        self.say(Keep(f"client/{number}", encode(note)), (guest.ufd.fd, guest.pidfd, figures))
        self.order(number, 1)
        return guest

    def _regions(self, guest: Guest) -> tuple[RegionGrant, ...]:
        return (RegionGrant(1, guest.mode, guest.start, guest.length, 0),)

    def order(self, number: int, incarnation: int) -> None:
        keys = ("house", f"client/{number}", "block/1")
        order = ForkWorker(number, incarnation, keys, encode(self._assignment(number, incarnation)))
        self.orders[number] = order
        self.say(order)
        self.hear(WorkerForked)

    def _assignment(self, number: int, incarnation: int) -> Assignment:
        kind, source = ("remote", -1) if self.remote else ("file", 8)
        with self.path.open("rb") as file:
            stamp = bytes(Stamp.of(file.fileno()))
        block = BlockGrant(1, "ram0", self.size, PAGE, self.pages, kind, "", self.size, stamp, 6, 7, source)
        return Assignment(
            worker=number,
            incarnation=incarnation,
            name="guest",
            endpoint=router_endpoint(str(self.directory)),
            userfaultfd=3,
            client_pidfd=4,
            quit_eventfd=0,
            statistics_page=5,
            control_page=1,
            device=2,
            fault_around=PAGE,
            adaptive=False,
            handler_path="/",
            sandbox="off",
            cgroup=-1,
            blocks=(block,),
            regions=self._regions(self.guests[number - 1]),
            transport="native",
            copied_map=-1,
        )

    # --- the next supervisor ------------------------------------------------------------------------------------------

    def connect(self) -> socket.socket:
        """At the takeover socket, once the custodian accepts a connection."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(custodian_path(str(self.directory)))
        sock.settimeout(PATIENCE)
        return sock

    def take_over(self) -> Inventory:
        """The whole of it; from here on ``say`` and ``hear`` are with the same custodian again."""
        self.channel = self.connect()
        self.say(TakeOver(os.getpid()))
        self.inventory = Inventory()
        while True:
            received = receive_message(self.channel, wait=True)
            assert received.data, f"the custodian hung up: {self.log()}"
            message: Message = decode(received.data, expect=FROM_CUSTODIAN)
            if isinstance(message, Kept):
                self.inventory.kept[message.key] = (message.meta, received.fds)
            elif isinstance(message, WorkerForked):
                self.inventory.workers[message.worker] = (message.incarnation, message.pid, received.fds[0])
            else:
                assert isinstance(message, InventoryEnd), message
                assert message.kept == len(self.inventory.kept)
                assert message.workers == len(self.inventory.workers)
                return self.inventory

    def adopt(self, number: int) -> None:
        """Tell a new custodian of a worker that the old one forked."""
        order = self.orders[number]
        pid, pidfd = self.pids[number, order.incarnation], self.pidfds[number, order.incarnation]
        self.say(Adopt(number, order.incarnation, pid, order.keys, order.assignment), (pidfd,))

    def dismiss(self) -> None:
        """The orderly end of this script."""
        self.say(Dismiss())

    # --- workers ------------------------------------------------------------------------------------------------------

    def worker(self, number: int = 1, *, but: int = 0) -> int:
        """The pid of the worker of this number that lives, and is not ``but``."""

        def found() -> int:
            for pid in self.workers(number):
                if pid != but:
                    return pid
            return 0

        return until(found, f"worker {number} lives")

    def workers(self, number: int) -> list[int]:
        """Pids of all lives of this worker, by their name among all processes of this test."""
        mark = f"POSTCOPY_TEST_ID={os.environ['POSTCOPY_TEST_ID']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or (entry / "comm").read_text().strip() != f"postcopy-w{number}":
                    continue
                if mark in (entry / "environ").read_bytes() and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def kill_worker(self, number: int = 1) -> int:
        pid = self.worker(number)
        os.kill(pid, signal.SIGKILL)
        return pid

    # --- a remote block -----------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Bind the router, once in every supervisor's life."""
        (self.directory / "private/router").unlink(missing_ok=True)
        self._requests.clear()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.bind(router_endpoint(str(self.directory)))

    def asked(self, number: int = 1, within: float = PATIENCE) -> list[int]:
        """The pages that this worker asks for next. Each worker's hello is answered with an empty Wake, as the
        supervisor does: what the worker has asked for before may be lost, so its clients fault again."""
        router, deadline = self._router, time.monotonic() + within
        assert router is not None
        for other in self._requests:
            if other.worker == number:
                self._requests.remove(other)
                return [offset // PAGE for offset in unpack_offsets(other.offsets)]
        while router.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            identity, *_, data = router.recv_multipart()
            message = decode(data, expect=(WorkerHello, Report, RequestPages))
            if isinstance(message, WorkerHello):
                with contextlib.suppress(zmq.ZMQError):  # it has left again, and says hello to the next connection
                    router.send_multipart([identity, encode(Wake(0, b""))], zmq.DONTWAIT)
            if isinstance(message, RequestPages):
                if message.worker == number:
                    return [offset // PAGE for offset in unpack_offsets(message.offsets)]
                self._requests.append(message)  # of another worker, which does not ask twice
        raise AssertionError(f"worker {number} asked for nothing within {within:g} s")

    def place(self, memory_fd: int, received_fd: int, page: int) -> None:
        """As a supervisor does: mark placing, COPY through a userfaultfd of its own, mark received."""
        core = open_userfaultfd()
        core.handshake()
        mapping, stage = Mapping.of(memory_fd, self.pages * PAGE), Mapping.anonymous(PAGE)
        core.register(mapping.address, mapping.length)
        stage.view()[:] = self.path.read_bytes()[page * PAGE : (page + 1) * PAGE]
        with mmap.mmap(received_fd, 0) as states:
            states[page] = PLACING
            core.copy(mapping.address + page * PAGE, stage.address, PAGE)
            states[page] = RECEIVED
        core.close()
        mapping.close()
        stage.close()

    def wake(self, number: int, incarnation: int, page: int) -> None:
        assert self._router is not None
        self._router.send_multipart(
            [b"w%d.%d" % (number, incarnation), encode(Wake(1, pack_offsets([page * PAGE])))], zmq.DONTWAIT
        )
