"""A page-fault handler of a few lines: ``python fake_handler.py SOCKET FILE [FAULT...]``. It is right, but for FAULTs.

forgets    what was given back comes from the file again
wrong      one page has a wrong byte
across     reads on behind the end of a region
zeros      closes the userfaultfd of a machine after five copies
lazy       reads what comes after the first fault late
first      serves only its first machine
dies       at a list of regions that it cannot read
keeps      the userfaultfd of a machine that has ended
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from postcopy_kernel.memory import address_of
from postcopy_kernel.userfaultfd import PageFault, Remove, Status, Userfaultfd

PAGE = 4096
FAULTS = set(sys.argv[3:])


class Served:
    """One machine, in a thread of its own."""

    def __init__(self, ufd: Userfaultfd, regions: list[dict[str, int]], pidfd: int, file: bytes) -> None:
        self.ufd, self.regions, self.pidfd, self.file = ufd, regions, pidfd, file
        self.removed: set[int] = set()
        self.copied = 0

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.ufd.fd, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        waiting: list[PageFault] = []
        while True:
            ready = [fd for fd, _ in poll.poll(20 if waiting else 1000)]
            if self.pidfd in ready:
                if "keeps" not in FAULTS:
                    self.ufd.close()
                return
            if "lazy" in FAULTS and self.copied == 1:
                time.sleep(3.0)
            for event in self.ufd.read():
                if isinstance(event, Remove):
                    self.removed.update(range(event.start, event.end, PAGE))
                elif isinstance(event, PageFault):
                    waiting.append(event)
            waiting = [event for event in waiting if not self.place(event.address & ~(PAGE - 1))]
            if "zeros" in FAULTS and self.copied > 5:
                self.ufd.close()
                return

    def place(self, address: int) -> bool:
        """False: an event is unread; try again."""
        region = next(one for one in self.regions if 0 <= address - one["base_host_virt_addr"] < one["size"])
        offset = address - region["base_host_virt_addr"] + region["offset"]
        size = PAGE * (16 if "across" in FAULTS else 1)
        data = bytearray(self.file[offset : offset + size])
        if address in self.removed and "forgets" not in FAULTS:
            data = bytearray(PAGE)
        if "wrong" in FAULTS and offset == 7 * PAGE:
            data[100] ^= 1
        self.copied += 1
        with memoryview(data) as view:
            outcome = self.ufd.copy(address, address_of(view), len(data))
            if outcome.status in (Status.STALE, Status.PRESENT) and len(data) > PAGE:
                outcome = self.ufd.copy(address, address_of(view), PAGE)
        if outcome.status is Status.PRESENT:
            self.ufd.wake(address, PAGE)
        return outcome.status is not Status.RETRY


def main() -> None:
    file = Path(sys.argv[2]).read_bytes()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(sys.argv[1])
    listener.listen()
    served = 0
    while True:
        channel, _ = listener.accept()
        threading.Thread(target=meet, args=(channel, file)).start()
        served += 1
        while "first" in FAULTS:
            time.sleep(60)


def meet(channel: socket.socket, file: bytes) -> None:
    data, body = b"", None
    fds: list[int] = []
    while body is None:
        piece, more, _, _ = socket.recv_fds(channel, 65536, 16)
        data, fds = data + piece, fds + list(more)
        try:
            body = json.loads(data)
        except ValueError:
            if not piece and "dies" in FAULTS:
                os._exit(1)
            if not piece:
                break
    if body is None or not usable(body, fds):
        for fd in fds:
            os.close(fd)
        return
    for fd in fds[1:]:
        os.close(fd)
    pid = int.from_bytes(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    Served(Userfaultfd(fds[0]), body, os.pidfd_open(pid), file).serve()


def usable(body: Any, fds: list[int]) -> bool:
    return isinstance(body, list) and bool(fds) and "userfaultfd" in str(Path(f"/proc/self/fd/{fds[0]}").readlink())


if __name__ == "__main__":
    main()
