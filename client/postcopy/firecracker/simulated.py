"""A simulated Firecracker: ``python -m postcopy.firecracker.simulated SOCKET FILE PROFILE``.

A page-fault handler cannot tell it from a real one. It maps anonymous memory, registers it, connects, and sends the
list of regions with its userfaultfd. Then it obeys one order a line on stdin, and answers each by a line of JSON:

    touch N SEED         N threads read every page, each in an order of its own; how many pages are wrong
    touch1 PAGE          read one page: is it right?
    edges                read the last page of each region, then every page in order; how many are wrong
    system N SEED        as ``touch``, but system calls read the pages
    balloon FIRST COUNT  give pages back (MADV_DONTNEED): from now on they must be zeros
    write PAGE           write to one page: from now on it must be that
    race N SEED          N times: give some pages back and read them at once, while other threads read all over
    report               what was wrong, how often; the times of first reads, and of giving back, in seconds

FILE has the bytes that the memory must have. PROFILE is JSON: "regions" (sizes in pages, by offset), "version" of the
body (1.1, 1.7, 1.12, 2.0), "keep" (its own userfaultfd), "close" (the socket, right after sending), "pieces" (of the
body), "extra" (descriptors behind the userfaultfd), "page_size". Regions lie in memory in reverse order, side by side,
as a real one's do.

Threads read by ``hashlib`` and write by system calls: both release the GIL while they wait for a page.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from postcopy_kernel.memory import DONTNEED, PAGE_4K, Mapping
from postcopy_kernel.userfaultfd import Feature, open_userfaultfd

RACERS = 2
"""Threads that read all over during ``race``."""
BATCH = 8
"""Pages that ``race`` gives back at a time."""


class Machine:
    """The memory of one machine, and what each of its pages must be."""

    def __init__(self, path: str, file: str, profile: dict[str, Any]) -> None:
        self.profile = profile
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.page_size = int(profile.get("page_size", PAGE_4K))
        self.file = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self.sizes: list[int] = profile["regions"]
        self.pages = sum(self.sizes)
        self.memory = Mapping.anonymous(self.pages * self.page_size, self.page_size)
        self.userfaultfd = open_userfaultfd()
        self.userfaultfd.handshake(Feature.EVENT_REMOVE)
        self.userfaultfd.register(self.memory.address, self.memory.length)
        self.starts = self._layout()
        self.at = [start + page * self.page_size for start, size in self.starts for page in range(size)]
        self.view = self.memory.view()
        self.changed: dict[int, bytes] = {}  # pages that are not those of the file any more
        self.versions = [0] * self.pages  # odd while a page is being changed
        self.touched = bytearray(self.pages)
        self.wrong = Counter[str]()
        self.first_reads: list[float] = []
        self.removals: list[float] = []
        self._send()
        if not profile.get("keep", True):
            self.userfaultfd.close()
        if profile.get("close"):
            self.socket.close()

    def _layout(self) -> list[tuple[int, int]]:
        """Where each region begins in the memory, and its pages: the first one is last."""
        end, starts = self.memory.length, []
        for size in self.sizes:
            end -= size * self.page_size
            starts.append((end, size))
        return starts

    def body(self) -> list[dict[str, int]]:
        """The list of regions, as this version says it."""
        version, body, offset = str(self.profile.get("version", "1.12")), [], 0
        for start, size in self.starts:
            length = size * self.page_size
            region = {"base_host_virt_addr": self.memory.address + start, "size": length, "offset": offset}
            if version in ("1.7", "1.12"):
                region["page_size_kib"] = self.page_size  # in bytes, in spite of its name
            if version in ("1.12", "2.0"):
                region["page_size"] = self.page_size
            body.append(region)
            offset += length
        return body

    def _send(self) -> None:
        data = json.dumps(self.body()).encode()
        piece = -(-len(data) // int(self.profile.get("pieces", 1)))
        extra = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(self.profile.get("extra", 0))]
        socket.send_fds(self.socket, [data[:piece]], [self.userfaultfd.fd, *extra])
        for fd in extra:
            os.close(fd)
        for at in range(piece, len(data), piece):
            time.sleep(0.05)
            self.socket.sendall(data[at : at + piece])

    # --- reading ------------------------------------------------------------------------------------------------------

    def expected(self, page: int) -> bytes:
        if page in self.changed:
            return self.changed[page]
        return os.pread(self.file, self.page_size, page * self.page_size).ljust(self.page_size, b"\0")

    def page(self, page: int) -> memoryview:
        return self.view[self.at[page] : self.at[page] + self.page_size]

    def right(self, page: int, read: Callable[[memoryview], bytes] | None = None) -> bool:
        """Read a page, which may be missing, and compare it. A page that changes meanwhile is not compared."""
        version, expected = self.versions[page], digest(self.expected(page))
        begun = time.perf_counter()
        found = (read or digest)(self.page(page))
        if not self.touched[page]:
            self.touched[page] = 1
            self.first_reads.append(time.perf_counter() - begun)
        if found == expected or version % 2 or version != self.versions[page]:
            return True
        self.wrong[self._kind(page)] += 1
        return False

    def _kind(self, page: int) -> str:
        """What a wrong page looks like. It is read again."""
        found = bytes(self.page(page))
        if found == self.expected(page):
            return "right when read again"
        if not any(found):
            return "zeros"
        return "old bytes" if page in self.changed else "other bytes"

    def touch(self, threads: int, seed: int, read: Callable[[memoryview], bytes] | None = None) -> int:
        wrong: list[int] = []

        def walk(number: int) -> None:
            pages = list(range(self.pages))
            random.Random(seed + number).shuffle(pages)
            wrong.extend(page for page in pages if not self.right(page, read))

        together([lambda number=number: walk(number) for number in range(threads)])  # type: ignore[misc]
        return len(wrong)

    def edges(self) -> int:
        ends = [sum(self.sizes[: number + 1]) - 1 for number in range(len(self.sizes))]
        return sum(not self.right(page) for page in (*ends, *range(self.pages)))

    def system(self, threads: int, seed: int) -> int:
        return self.touch(threads, seed, digest_by_system_calls)

    # --- changing -----------------------------------------------------------------------------------------------------

    def balloon(self, first: int, count: int) -> bool:
        for page in range(first, first + count):
            self.remove(page)
        return True

    def remove(self, page: int) -> None:
        """Give one page back. The call returns when the handler has read the event."""
        self.versions[page] += 1
        begun = time.perf_counter()
        self.memory.advise(DONTNEED, self.at[page], self.page_size)
        self.removals.append(time.perf_counter() - begun)
        self.changed[page] = bytes(self.page_size)
        self.touched[page] = 0
        self.versions[page] += 1

    def write(self, page: int) -> bool:
        self.versions[page] += 1
        data = b"\x55" * self.page_size
        with memory_file(data) as file:
            done = os.preadv(file, [self.page(page)], 0)  # the kernel writes, and waits for the page
            assert done == self.page_size
        self.changed[page] = data
        self.versions[page] += 1
        return True

    def race(self, times: int, seed: int) -> int:
        """Returns how many pages were wrong."""
        before, over = self.wrong.total(), threading.Event()

        def read_all_over(number: int) -> None:
            chance = random.Random(seed + number)
            while not over.is_set():
                self.right(chance.randrange(self.pages))

        def give_back() -> None:
            chance = random.Random(seed)
            try:
                for _ in range(times):
                    pages = sorted(chance.sample(range(self.pages), min(BATCH, self.pages)))
                    for page in pages:
                        self.remove(page)
                    for page in pages[::-1]:
                        self.right(page)
                    if chance.random() < 0.3:
                        self.write(pages[0])
            finally:
                over.set()

        readers = [lambda number=number: read_all_over(number + 1) for number in range(RACERS)]
        together([give_back, *readers])
        return self.wrong.total() - before

    def report(self) -> dict[str, Any]:
        return {"wrong": dict(self.wrong), "first_reads": self.first_reads, "removals": self.removals}


def digest(page: memoryview | bytes) -> bytes:
    """Without the GIL, so that other threads go on while this one waits for the page."""
    return hashlib.blake2b(page).digest()


def digest_by_system_calls(page: memoryview) -> bytes:
    """The kernel reads the page for us, and waits for it in ``write``."""
    with memory_file(page) as file:
        return digest(os.pread(file, len(page), 0))


class memory_file:
    """A file in memory with these bytes; ``with`` gives its descriptor."""

    def __init__(self, data: memoryview | bytes) -> None:
        self.file = os.memfd_create("page", os.MFD_CLOEXEC)
        written = os.pwrite(self.file, data, 0)
        assert written == len(data)

    def __enter__(self) -> int:
        return self.file

    def __exit__(self, *_: object) -> None:
        os.close(self.file)


def together(all_of: list[Callable[[], None]]) -> None:
    """Each in a thread of its own, until the last one has ended."""
    threads = [threading.Thread(target=one) for one in all_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def obey(machine: Machine, more: dict[str, Callable[..., Any]] | None = None) -> None:
    """Say that it is there, then do what stdin says."""
    print(json.dumps("ready"), flush=True)
    orders: dict[str, Callable[..., Any]] = {
        "touch": machine.touch,
        "touch1": machine.right,
        "edges": machine.edges,
        "system": machine.system,
        "balloon": machine.balloon,
        "write": machine.write,
        "race": machine.race,
        "report": machine.report,
        **(more or {}),
    }
    for line in sys.stdin:
        order, *words = line.split()
        print(json.dumps(orders[order](*map(int, words))), flush=True)


if __name__ == "__main__":
    obey(Machine(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
