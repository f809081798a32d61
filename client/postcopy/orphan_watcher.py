"""The watcher: a process beside a client that acts when every process of the service has died and none comes back.

A thread of the client could not: one that waits for a page inside a Python bytecode holds the GIL. So this is a program
of its own, started only where ``serve --on-orphan poison`` wants it, with nothing imported that it can do without (a
third of the start, and of the memory, of a program that imports postcopy).

It holds a duplicate of the client's userfaultfd, and the *lifeline*: the end of a pipe whose other end is with
supervisor and custodian. When both have died, the timeout is over, and no worker serves the client (it would hold a
lock of the received map), it answers faults itself: a page that the received map calls received is mapped (CONTINUE),
every other one is poisoned (SIGBUS), never zeros. A supervisor that rescues the client fetches descriptor 3, and sends
a new lifeline: then the watcher no longer reads the userfaultfd, and answers with the pages that it has poisoned, which
are placed and healed.

A program that speaks for another process (a vhost-user back-end, a virtual machine) starts one for that process. Of a
virtual machine, whose memory is its own, every missing page is poisoned: there is nothing to map.

``python -I -S orphan_watcher.py CLIENT_PID``; descriptors 3 and 4 are the ends of a SEQPACKET socket (orders come in at
4), 5 is the userfaultfd, 6 a pidfd of the client.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # collections.abc is half of the start
    from collections.abc import Callable

INBOX, USERFAULTFD, CLIENT, FIRST_FREE = 4, 5, 6, 7

# linux/userfaultfd.h; postcopy_kernel.abi has them all, with their sources, and a test compares them.
WAKE, CONTINUE, POISON = 0x8010AA02, 0xC020AA07, 0xC020AA08
MESSAGE = struct.Struct("=B7xQQQ")
PAGEFAULT = 0x12
RANGE = struct.Struct("=QQ")
RANGE_MODE = struct.Struct("=QQQq")
MESSAGES_AT_ONCE = 64

REGION = struct.Struct("=cQQQQQQ")  # b"R", block, client, address, length, offset, page size; with the received map
UNMAP = struct.Struct("=cQ")  # b"U", address
SERVED = struct.Struct("=cQ")  # b"S" of the client, b"T" of a rescuer: timeout in milliseconds; with the lifeline
POISONED = struct.Struct("=QQ")  # the answer to b"T" is b"P", then block and offset of each poisoned page
FOREVER = (1 << 64) - 1  # a timeout
MOST_NOTED = 4096

RECEIVED = 2
LIVES_AT = 1 << 40
FLOCK = struct.Struct("@hhqqi0q")
LOOK_SECONDS = 0.5  # between two looks whether the client's worker still lives, where no other process does


class Region:
    """``length`` bytes of a block from ``offset``, at ``address`` in the client."""

    def __init__(
        self, block: int, client: int, address: int, length: int, offset: int, page_size: int, map_fd: int
    ) -> None:
        self.block, self.client, self.address, self.length, self.offset = block, client, address, length, offset
        self.page_size, self.map_fd = page_size, map_fd
        self.received = mmap.mmap(map_fd, os.fstat(map_fd).st_size, prot=mmap.PROT_READ)

    @property
    def end(self) -> int:
        return self.address + self.length

    def has(self, address: int) -> bool:
        return self.address <= address < self.end

    def worker_lives(self) -> bool:
        """Does a worker hold its lock? A client can lock only for reading, which does not show here."""
        lock = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, LIVES_AT + self.client, 1, 0)
        found: int = FLOCK.unpack(fcntl.fcntl(self.map_fd, fcntl.F_GETLK, lock))[0]
        return found != fcntl.F_UNLCK


class Watch:
    """What to do when: pure. ``due`` is when the service is given up (seconds; None: not at all)."""

    def __init__(self) -> None:
        self.timeout_ms = FOREVER
        self.due: float | None = None
        self.acting = False

    def served(self, timeout_ms: int) -> None:
        """A supervisor serves the client, and this is its policy from now on."""
        self.timeout_ms, self.due, self.acting = timeout_ms, None, False

    def orphaned(self, now: float) -> None:
        """The lifeline has ended."""
        if self.due is None and not self.acting and self.timeout_ms != FOREVER:
            self.due = now + self.timeout_ms / 1000

    def tick(self, now: float, worker_lives: Callable[[], bool]) -> bool:
        """True: from now on faults are answered here."""
        if self.due is None or now < self.due:
            return False
        if worker_lives():
            self.due = now + LOOK_SECONDS
            return False
        self.due, self.acting = None, True
        return True


class Watcher:
    """The process: its descriptors and its loop."""

    def __init__(self, client_pid: int) -> None:
        self.watch = Watch()
        self.regions: list[Region] = []
        self.poisoned: list[tuple[int, int]] = []
        self.reported = False
        self.lifeline = -1
        self.inbox = socket.socket(fileno=INBOX)
        self.client_pid = client_pid
        self.poll = select.poll()
        for fd in (INBOX, CLIENT):
            self.poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Until the client has ended."""
        while True:
            wait = None if self.watch.due is None else max(0.0, self.watch.due - time.monotonic()) * 1000 + 1
            ready = {fd for fd, _ in self.poll.poll(wait)}
            if CLIENT in ready:
                return
            if self.lifeline in ready:
                self.drop_lifeline()
                self.watch.orphaned(time.monotonic())
            if INBOX in ready:
                self.obey()
            if self.watch.tick(time.monotonic(), self.worker_lives):
                self.begin()
            if self.watch.acting and USERFAULTFD in ready:
                self.answer_faults()

    def obey(self) -> None:
        data, ancillary, _, _ = self.inbox.recvmsg(64, socket.CMSG_SPACE(4))
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights)
        fd = fds[0] if fds else -1
        if data[:1] == b"R" and fd >= 0:
            _, block, client, address, length, offset, page_size = REGION.unpack(data)
            region = Region(block, client, address, length, offset, page_size, fd)
            # One at the same place is gone: its attach has failed after it was announced here.
            self.forget(lambda at: at.address < region.end and region.address < at.end)
            self.regions.append(region)
        elif data[:1] == b"U":
            address = UNMAP.unpack(data)[1]
            self.forget(lambda at: at.address == address)
        elif data[:1] in (b"S", b"T"):
            self.be_served(SERVED.unpack(data)[1], fd)
            if data[:1] == b"T":
                self.inbox.send(b"P" + b"".join(POISONED.pack(*one) for one in self.poisoned))
                self.poisoned.clear()

    def forget(self, gone: Callable[[Region], bool]) -> None:
        for region in filter(gone, self.regions):
            os.close(region.map_fd)
        self.regions = [region for region in self.regions if not gone(region)]

    def worker_lives(self) -> bool:
        return any(region.worker_lives() for region in self.regions)

    def be_served(self, timeout_ms: int, lifeline: int) -> None:
        self.drop_lifeline()
        if self.watch.acting:
            self.poll.unregister(USERFAULTFD)
        self.watch.served(timeout_ms)
        self.reported = False
        if lifeline >= 0:
            self.lifeline = lifeline
            self.poll.register(lifeline, 0)  # its end is reported all the same

    def drop_lifeline(self) -> None:
        if self.lifeline >= 0:
            self.poll.unregister(self.lifeline)
            os.close(self.lifeline)
        self.lifeline = -1

    def begin(self) -> None:
        """Wake all waiters: those that still miss a page fault again, and are reported here."""
        os.set_blocking(USERFAULTFD, False)
        self.poll.register(USERFAULTFD, select.POLLIN)
        for region in self.regions:
            self.wake(region.address, region.length)

    def wake(self, address: int, length: int) -> None:
        try:  # noqa: SIM105  contextlib would be one more import
            fcntl.ioctl(USERFAULTFD, WAKE, RANGE.pack(address, length))
        except OSError:  # the client's memory is gone
            pass

    def answer_faults(self) -> None:
        try:
            data = os.read(USERFAULTFD, MESSAGE.size * MESSAGES_AT_ONCE)
        except OSError:  # another process has answered; or the client's memory is gone
            return
        for event, _, address, _ in MESSAGE.iter_unpack(data):
            region = next((region for region in self.regions if region.has(address)), None)
            if event == PAGEFAULT and region is not None:
                self.resolve(region, address)

    def resolve(self, region: Region, address: int) -> None:
        place = (address - region.address) // region.page_size * region.page_size
        offset = region.offset + place
        page = region.address + place
        if region.received[offset // region.page_size] == RECEIVED and self.act(CONTINUE, page, region.page_size):
            return
        if not self.act(POISON, page, region.page_size):
            return
        self.report()
        if len(self.poisoned) < MOST_NOTED:
            self.poisoned.append((region.block, offset))

    def report(self) -> None:
        """Say once that pages are poisoned, and why. After an orderly end they all are already, and nothing is said."""
        if not self.reported:
            self.reported = True
            text = f"postcopy: no supervisor came back within {self.watch.timeout_ms / 1000:g} s: missing pages of "
            os.write(2, f"{text}process {self.client_pid} are SIGBUS from now on\n".encode())

    def act(self, request: int, page: int, length: int) -> bool:
        """Whether it is done; a page that is mapped already needs no more than a wake."""
        try:
            fcntl.ioctl(USERFAULTFD, request, bytearray(RANGE_MODE.pack(page, length, 0, 0)))
        except FileExistsError:
            self.wake(page, length)
        except OSError:
            return False
        return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the client, whose end ends this process
    with open("/proc/self/comm", "w") as name:
        name.write("postcopy-orphan")
    os.closerange(FIRST_FREE, os.sysconf("SC_OPEN_MAX"))
    Watcher(int(sys.argv[1])).run()
    os._exit(0)  # at once: while it holds the userfaultfd, the memory of a client that has ended may stay


if __name__ == "__main__":
    main()
