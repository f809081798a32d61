"""A model of Linux as far as the fault path asks it: memfds, address spaces, userfaultfds, threads asleep on pages.

It stands behind ``Calls`` of the fault handler, takes the real request numbers and the real structures, and answers as
the kernel does, unpleasant sides included (measured on 6.18; ``tests/kernel`` asks the real one the same questions):

* EEXIST wakes nobody; a COPY that stops midway has woken the first part and says EAGAIN with the bytes done; ESRCH and
  EINVAL leave the result field alone; everything says EAGAIN while an event is unread.
* A touch through a mapping that is not registered makes a zero page for everybody, without a word to anyone.
* A read message is not given again: only a WAKE makes its thread fault anew. A signal does too.
* An empty pool of huge pages says EEXIST for an absent page, and SEEK_DATA finds data in every hugetlb memfd.

A thread touches one page, once. What a write stores is one byte, the page's first, so that the rest of the page still
tells where it came from. A woken thread does not run at once but when ``run`` is called: anything may happen between.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from postcopy_kernel import abi

CACHE = "the page in the page cache"
POISON = "a poison marker"
SIGBUS = "SIGBUS"
SIGSEGV = "SIGSEGV"
WRITE, MINOR = 1, 4

Entry = bytes | str
"""A page-table entry: CACHE, POISON, or the bytes of a page of the process's own."""
Message = tuple[int, int, int]
"""Event, flags (or what stands there), address."""


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@dataclass(eq=False)
class Memory:
    """A memfd. ``room``: pages that still fit (None: any number)."""

    pages_of_it: int
    page_size: int = 4096
    pages: dict[int, bytes] = field(default_factory=dict)
    room: int | None = None

    @property
    def huge(self) -> bool:
        return self.page_size > 4096

    @property
    def size(self) -> int:
        return self.pages_of_it * self.page_size

    def zeros(self) -> bytes:
        return bytes(self.page_size)


@dataclass(eq=False)
class File:
    """A regular file, as far as lseek asks it."""

    size: int


@dataclass(eq=False)
class Userfaultfd:
    """Waiters whose message nobody has read, those whose message was read, and events."""

    space: Space
    pending: list[Thread] = field(default_factory=list)
    read: list[Thread] = field(default_factory=list)
    events: deque[Message] = field(default_factory=deque)


@dataclass(eq=False)
class Area:
    """A mapping (VMA). ``memory`` None: anonymous. ``registered``: who is told of its faults."""

    start: int
    end: int
    memory: Memory | None
    offset: int
    shared: bool
    registered: Userfaultfd | None = None
    minor: bool = False

    def index(self, address: int) -> int:
        assert self.memory is not None
        return (address - self.start + self.offset) // self.memory.page_size


@dataclass(eq=False)
class Space:
    """An address space: its mappings and page table (page address: entry)."""

    name: str
    page_size: int = 4096
    alive: bool = True
    areas: list[Area] = field(default_factory=list)
    table: dict[int, Entry] = field(default_factory=dict)

    def find(self, address: int) -> Area | None:
        return next((area for area in self.areas if area.start <= address < area.end), None)

    def split(self, address: int) -> None:
        """What an innocent MADV_DONTDUMP up to ``address`` does."""
        area = self.find(address)
        if area is None or area.start == address:
            return
        tail = Area(address, area.end, area.memory, area.offset + address - area.start, area.shared)
        tail.registered, tail.minor, area.end = area.registered, area.minor, address
        self.areas.append(tail)


@dataclass(eq=False)
class Thread:
    """One touch of one page. ``outcome``: the bytes it found there, or a signal; None while it has none."""

    space: Space
    address: int
    write: int | None
    asleep_on: Userfaultfd | None = None
    flags: int = 0
    outcome: bytes | str | None = None
    faults: int = 0


class Kernel:
    """All descriptors and all memory. ``seen`` is called with every thread whose touch has ended."""

    def __init__(self, seen: Callable[[Thread], None] = lambda thread: None) -> None:
        self.seen = seen
        self.spaces: list[Space] = []
        self.woken: list[Thread] = []
        self.locks: dict[Hashable, tuple[int, int]] = {}  # record locks, by the life that holds one
        self._descriptors: dict[int, Memory | File | Userfaultfd] = {}
        self._readable: list[tuple[int, int, Callable[[int, int], bytes | None]]] = []

    # --- setting the scene --------------------------------------------------------------------------------------------

    def open(self, thing: Memory | File | Userfaultfd) -> int:
        number = 100 + len(self._descriptors)
        self._descriptors[number] = thing
        return number

    def space(self, name: str, page_size: int = 4096) -> Space:
        self.spaces.append(Space(name, page_size))
        return self.spaces[-1]

    def readable(self, start: int, length: int, read: Callable[[int, int], bytes | None]) -> None:
        """What COPY finds at these addresses of its caller: ``read(offset, length)``; None is EFAULT."""
        self._readable.append((start, start + length, read))

    # --- what threads do ----------------------------------------------------------------------------------------------

    def touch(self, space: Space, address: int, write: int | None = None) -> Thread:
        thread = Thread(space, address, write)
        self._access(thread)
        return thread

    def run(self, thread: Thread) -> None:
        """A woken thread goes on, which means that it touches its page again."""
        self.woken.remove(thread)
        if thread.space.alive:
            self._access(thread)

    def signal(self, thread: Thread) -> None:
        """A signal is handled during the wait: the thread faults again, and there is a second message."""
        ufd = thread.asleep_on
        assert ufd is not None
        (ufd.pending if thread in ufd.pending else ufd.read).remove(thread)
        self._access(thread)

    def _access(self, thread: Thread) -> None:
        space, address = thread.space, thread.address - thread.address % thread.space.page_size
        thread.asleep_on = None
        area = space.find(address)
        if area is None:
            return self._finish(thread, SIGSEGV)
        if space.table.get(address) == POISON:
            return self._finish(thread, SIGBUS)
        if address not in space.table and not self._map(thread, area, address):
            return
        entry = space.table[address]
        found = area.memory.pages[area.index(address)] if entry == CACHE and area.memory is not None else entry
        assert isinstance(found, bytes)
        if thread.write is not None:
            stored = bytes((thread.write,)) + found[1:]
            if entry == CACHE and area.shared and area.memory is not None:
                area.memory.pages[area.index(address)] = stored
            else:
                space.table[address] = stored
        self._finish(thread, found)

    def _map(self, thread: Thread, area: Area, address: int) -> bool:
        """No entry yet: is there one now, or does the thread sleep?"""
        if area.memory is None:
            if area.registered is not None:
                return self._sleep(thread, area.registered, address, 0)
            thread.space.table[address] = bytes(thread.space.page_size)
            return True
        memory, index = area.memory, area.index(address)
        if index not in memory.pages:
            if area.registered is not None:
                return self._sleep(thread, area.registered, address, 0)
            memory.pages[index] = memory.zeros()  # for everybody, and nobody is told
        elif area.registered is not None and area.minor:
            return self._sleep(thread, area.registered, address, MINOR)
        thread.space.table[address] = CACHE
        return True

    def _sleep(self, thread: Thread, ufd: Userfaultfd, address: int, flags: int) -> bool:
        thread.asleep_on, thread.flags = ufd, flags | (0 if thread.write is None else WRITE)
        thread.address = address
        thread.faults += 1
        ufd.pending.append(thread)
        return False

    def _finish(self, thread: Thread, outcome: bytes | str) -> None:
        thread.outcome = outcome
        self.seen(thread)

    def die(self, space: Space) -> None:
        """SIGKILL: the address space is gone, and with it whoever waited."""
        space.alive = False
        for area in space.areas:
            if area.registered is not None:
                area.registered.pending.clear()
                area.registered.read.clear()
                area.registered.events.clear()
        space.areas.clear()
        space.table.clear()

    def punch(self, memory: Memory, page: int) -> None:
        """Punch a hole: the page is gone for everybody; private copies of it stay."""
        memory.pages.pop(page, None)
        for space in self.spaces:
            for area in space.areas:
                if area.memory is memory:
                    address = area.start + page * memory.page_size - area.offset
                    if area.start <= address < area.end and space.table.get(address) == CACHE:
                        del space.table[address]

    # --- what a worker calls ------------------------------------------------------------------------------------------

    def messages(self, descriptor: int, limit: int) -> list[Message]:
        """read(2): faults come before events."""
        ufd = self._userfaultfd(descriptor)
        taken: list[Message] = []
        while ufd.pending and len(taken) < limit:
            thread = ufd.pending.pop(0)
            ufd.read.append(thread)
            taken.append((abi.EventKind.PAGEFAULT, thread.flags, thread.address))
        while ufd.events and len(taken) < limit:
            taken.append(ufd.events.popleft())
        return taken

    def lseek(self, descriptor: int, offset: int, whence: int) -> int:
        thing = self._descriptors[descriptor]
        assert not isinstance(thing, Userfaultfd)
        if whence == os.SEEK_END:
            return thing.size + offset
        assert isinstance(thing, Memory) and whence in (os.SEEK_DATA, os.SEEK_HOLE)
        if not 0 <= offset < thing.size:
            raise failure(errno.ENXIO)
        if thing.huge:
            return offset if whence == os.SEEK_DATA else thing.size
        wanted = whence == os.SEEK_DATA
        for page in range(offset // thing.page_size, thing.pages_of_it):
            if (page in thing.pages) == wanted:
                return max(offset, page * thing.page_size)
        if wanted:
            raise failure(errno.ENXIO)
        return thing.size

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        memory = self._whole_page(descriptor, length, offset)
        return memory.pages.get(offset // length, memory.zeros())  # a hole reads as zeros and stays one

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        memory = self._whole_page(descriptor, len(data), offset)
        memory.pages[offset // len(data)] = bytes(data)
        return len(data)

    def _whole_page(self, descriptor: int, length: int, offset: int) -> Memory:
        memory = self._descriptors[descriptor]
        assert isinstance(memory, Memory) and not memory.huge and offset % length == 0
        assert length == memory.page_size and offset < memory.size
        return memory

    def _userfaultfd(self, descriptor: int) -> Userfaultfd:
        ufd = self._descriptors[descriptor]
        assert isinstance(ufd, Userfaultfd)
        return ufd

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        ufd = self._userfaultfd(descriptor)
        if request == abi.UFFDIO_WAKE:
            start, length = struct.unpack_from("=QQ", argument)
            self._check_range(ufd, start, length)
            self._wake(ufd, start, length)
            return 0
        if request == abi.UFFDIO_COPY:
            start, source, length, mode = struct.unpack_from("=QQQQ", argument)
            result = 32
        else:
            start, length, mode = struct.unpack_from("=QQQ", argument)
            source, result = 0, 24
        if ufd.events:
            struct.pack_into("=q", argument, result, -errno.EAGAIN)
            raise failure(errno.EAGAIN)
        self._check_range(ufd, start, length)
        if mode & ~1:
            raise failure(errno.EINVAL)
        if not ufd.space.alive:
            raise failure(errno.ESRCH)
        done, code = self._pages(ufd, request, start, source, length)
        struct.pack_into("=q", argument, result, done or -code)
        if not done:
            raise failure(code)
        if not mode & 1:
            self._wake(ufd, start, done)
        if done != length:
            raise failure(errno.EAGAIN)
        return 0

    @staticmethod
    def _check_range(ufd: Userfaultfd, start: int, length: int) -> None:
        if not length or (start | length) % ufd.space.page_size:
            raise failure(errno.EINVAL)

    def _wake(self, ufd: Userfaultfd, start: int, length: int) -> None:
        for threads in (ufd.pending, ufd.read):
            woken = [thread for thread in threads if start <= thread.address < start + length]
            threads[:] = [thread for thread in threads if thread not in woken]
            for thread in woken:
                thread.asleep_on = None
            self.woken += woken

    def _pages(self, ufd: Userfaultfd, request: int, start: int, source: int, length: int) -> tuple[int, int]:
        """Bytes done, and the errno that stopped it."""
        space, size = ufd.space, ufd.space.page_size
        area = space.find(start)
        if area is None or start + length > area.end or area.registered is None:
            return 0, errno.ENOENT
        for done in range(0, length, size):
            address = start + done
            if request == abi.UFFDIO_COPY:
                code = self._copy(space, area, address, source + done)
            elif request == abi.UFFDIO_CONTINUE:
                code = self._continue(space, area, address)
            elif request == abi.UFFDIO_POISON:
                code = errno.EEXIST if address in space.table else 0
                if not code:
                    space.table[address] = POISON
            else:
                raise AssertionError(f"request {request:#x} has no place on the fault path")
            if code:
                return done, code
        return length, 0

    def _copy(self, space: Space, area: Area, address: int, source: int) -> int:
        memory, size = area.memory, space.page_size
        if memory is None or not area.shared:  # an anonymous page of the process's own
            if space.table.get(address, POISON) != POISON:
                return errno.EEXIST
            content = self._read_user(source, size)
            if content is None:
                return errno.EFAULT
            space.table[address] = content
            return 0
        index = area.index(address)
        if memory.room == 0:
            return errno.EEXIST if memory.huge else errno.ENOSPC  # before presence is looked at
        content = self._read_user(source, size)
        if content is None:
            return errno.EFAULT
        if index in memory.pages:
            return errno.EEXIST
        memory.pages[index] = content
        space.table[address] = CACHE
        if memory.room is not None:
            memory.room -= 1
        return 0

    @staticmethod
    def _continue(space: Space, area: Area, address: int) -> int:
        if area.memory is None:
            return errno.EINVAL
        if area.index(address) not in area.memory.pages:
            return errno.EFAULT
        if space.table.get(address, POISON) != POISON:
            return errno.EEXIST
        space.table[address] = CACHE
        return 0

    def _read_user(self, address: int, length: int) -> bytes | None:
        for start, end, read in self._readable:
            if start <= address and address + length <= end:
                return read(address - start, length)
        return None
