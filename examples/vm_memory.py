"""Look at the memory of a running Linux VM from four processes: which kernel it is, and which processes it has.

    postcopy source qemu --listen ipc:///run/vm/pages --migration unix:/run/vm/migration --qmp /run/vm/qmp.sock
    postcopy serve ram=ipc:///run/vm/pages/pc.ram
    python examples/vm_memory.py ram

Each of four processes attaches and searches a quarter of the memory while it arrives. The list of processes is found
without symbols: the idle task is named ``swapper/0``, and all tasks are in one circular list. In x86_64 guests of up to
1 GiB the low 30 bits of an address of kernel data are the place in memory. ``drgn`` and ``volatility3`` do all this
for any kernel; ``block.buf`` is the memory that they need.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import postcopy

PROCESSES = 4
BANNER = rb"Linux version [0-9][ -~]+ #[0-9][ -~]+(?=\n)"
IDLE = rb"swapper/0\0{7}"  # the name of a task: 16 bytes
IN_MEMORY = (1 << 30) - 1
KERNEL_IMAGE = 0xFFFFFFFF80000000  # addresses from here on are of the kernel's own code and data
IMAGE_STEP = (1 << 21) - 1  # it lies anywhere, in such steps
REACH = 4096  # bytes of a task before its name
MOST = 10_000


def search(name: str, part: int) -> list[tuple[bytes, int]]:
    """What is found in one part of the memory: text and place. Runs in a process of its own."""
    with postcopy.attach(name) as block:
        piece = -(-block.size // PROCESSES)
        start, end = part * piece, min((part + 1) * piece + 256, block.size)
        block.ensure(start, end - start)  # wait until it has arrived
        return [(match[0], start + match.start()) for match in re.finditer(BANNER + b"|" + IDLE, block.buf[start:end])]


def word(memory: memoryview, at: int) -> int:
    (found,) = struct.unpack_from("<Q", memory, at)
    return int(found)


def names(memory: memoryview, idle: int, link: int) -> Iterator[int]:
    """Places of the names of all tasks, if their list is ``link`` bytes before a name. Stops where that is wrong."""
    at = idle - link
    for _ in range(MOST):
        following = word(memory, at)
        if following >= KERNEL_IMAGE:  # the idle task again
            return
        place, back = following & IN_MEMORY, at
        if following >> 47 != 0x1FFFF or following % 8 or place + link + 16 > len(memory):
            return
        if (word(memory, place + 8) ^ back) & IMAGE_STEP:  # each one points back at the one before
            return
        yield place + link
        at = place


def tasks(memory: memoryview, idle: int) -> list[int]:
    """Places of the names of all tasks: by the layout of the structure that gives the longest list."""
    links = range(8, min(REACH, idle), 8)
    return max((list(names(memory, idle, link)) for link in links), key=len, default=[])


def numbers(memory: memoryview, found: list[int]) -> list[int]:
    """Their process ids: the first is 1, they grow, and each stands there twice (process and thread group)."""
    for before in range(8, REACH, 4):
        pairs = [struct.unpack_from("<II", memory, at - before) for at in found]
        ids = [pid for pid, group in pairs if pid == group]
        if len(ids) == len(found) and ids[0] == 1 and ids == sorted(set(ids)):
            return ids
    return [0] * len(found)


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "ram"
    with ProcessPoolExecutor(PROCESSES) as pool:
        found = [one for part in pool.map(search, [name] * PROCESSES, range(PROCESSES)) for one in part]
    banners = [text for text, _ in found if text.startswith(b"Linux")]
    if not banners:
        print("no Linux kernel is in there", file=sys.stderr)
        return 1
    print(banners[0].decode())
    with postcopy.attach(name) as block:
        lists = [tasks(block.buf, at) for text, at in found if text.startswith(b"swapper")]
        chosen = max(lists, key=len, default=[])
        for pid, at in zip(numbers(block.buf, chosen), chosen, strict=True):
            print(f"{pid:6}  {bytes(block.buf[at : at + 16]).partition(bytes(1))[0].decode(errors='replace')}")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main())
