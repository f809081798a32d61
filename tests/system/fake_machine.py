"""A simulated Firecracker: ``python fake_machine.py SOCKET FILE JSON`` is indistinguishable for a page-fault handler.

It maps anonymous memory, registers it, connects, and sends the list of regions with its userfaultfd. Then it obeys one
order a line on stdin and answers one line of JSON on stdout:

    touch N SEED    N threads read every page, each in an order of its own; how many pages are wrong
    touch1 PAGE     read one page: is it right?
    balloon FIRST COUNT   give pages back (MADV_DONTNEED): from now on they must be zeros
    write PAGE      write to one page: from now on it must be that
    kvm             run a guest of KVM in the memory (see examples/kvm_clones.py); what it has found

The JSON has the profile: "regions" (sizes in pages, by offset), "version" of the body, "keep" (whether it keeps its own
userfaultfd), "close" (the socket, right after sending), "pieces" (of the body), "huge".
"""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import random
import socket
import sys
import threading
import time

from postcopy_kernel.memory import DONTNEED, Mapping
from postcopy_kernel.userfaultfd import Feature, open_userfaultfd

PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def read(address: int, length: int) -> bytes:
    """Without the GIL, so that other threads go on while this one waits."""
    found = ctypes.create_string_buffer(length)
    _libc.memcpy(found, address, length)
    return found.raw


class Machine:
    def __init__(self, path: str, file: str, profile: dict[str, object]) -> None:
        self.file = os.open(file, os.O_RDONLY)
        self.changed: dict[int, bytes] = {}
        self.lock = threading.Lock()
        sizes: list[int] = profile["regions"]  # type: ignore[assignment]
        self.memory = [Mapping.anonymous(size * PAGE) for size in sizes]
        self.userfaultfd = open_userfaultfd()
        self.userfaultfd.handshake(Feature.EVENT_REMOVE)
        self.addresses: list[int] = []
        for size, memory in zip(sizes, self.memory, strict=True):
            self.userfaultfd.register(memory.address, size * PAGE)
            self.addresses += [memory.address + page * PAGE for page in range(size)]
        self.socket = self.send(path, sizes, profile)
        if not profile.get("keep", True):
            self.userfaultfd.close()
        if profile.get("close"):
            self.socket.close()

    def send(self, path: str, sizes: list[int], profile: dict[str, object]) -> socket.socket:
        body = []
        for number, (size, memory) in enumerate(zip(sizes, self.memory, strict=True)):
            region = {
                "base_host_virt_addr": memory.address,
                "size": size * PAGE,
                "offset": sum(sizes[:number]) * PAGE,
            }
            version = str(profile.get("version", "1.12"))
            if version in ("1.7", "1.12"):
                region["page_size_kib"] = PAGE
            if version in ("1.12", "2.0"):
                region["page_size"] = PAGE
            body.append(region)
        data = json.dumps(body).encode()
        half = len(data) // int(str(profile.get("pieces", 1)))
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(path)
        fds = array.array("i", [self.userfaultfd.fd])
        channel.sendmsg([data[:half]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        while data := data[half:]:
            time.sleep(0.05)
            channel.sendall(data[:half])
        return channel

    def expected(self, page: int) -> bytes:
        return self.changed.get(page) or os.pread(self.file, PAGE, page * PAGE).ljust(PAGE, b"\0")

    def right(self, page: int) -> bool:
        return read(self.addresses[page], PAGE) == self.expected(page)

    def touch(self, threads: int, seed: int) -> int:
        wrong: list[int] = []

        def walk(number: int) -> None:
            pages = list(range(len(self.addresses)))
            random.Random(seed + number).shuffle(pages)
            wrong.extend(page for page in pages if not self.right(page))

        all_threads = [threading.Thread(target=walk, args=(number,)) for number in range(threads)]
        for thread in all_threads:
            thread.start()
        for thread in all_threads:
            thread.join()
        return len(wrong)

    def balloon(self, first: int, count: int) -> bool:
        for page in range(first, first + count):
            self.changed[page] = bytes(PAGE)
        for page in range(first, first + count):  # pages of different regions are not neighbours
            _libc.madvise(ctypes.c_void_p(self.addresses[page]), ctypes.c_size_t(PAGE), DONTNEED)
        return True

    def write(self, page: int) -> bool:
        self.changed[page] = b"\x55" * PAGE
        ctypes.memset(self.addresses[page], 0x55, PAGE)
        return True

    def kvm(self) -> int:
        from examples.kvm_clones import run

        return run(self.memory[0].address, self.memory[0].length)


def main() -> None:
    machine = Machine(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order, *words = line.split()
        orders = {
            "kvm": machine.kvm,
            "touch": machine.touch,
            "touch1": machine.right,
            "balloon": machine.balloon,
            "write": machine.write,
        }
        print(json.dumps(orders[order](*map(int, words))), flush=True)  # type: ignore[operator]


assert mmap.PAGESIZE == PAGE
if __name__ == "__main__":
    main()
