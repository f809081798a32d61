"""Clones of a virtual machine on one block: each guest reads all of its memory, and writes to pages of its own.

    python examples/kvm_clones.py --clones 8 --memory 64M

A block that is mapped ``private`` is guest memory: KVM faults on missing pages like any thread, and a page that a
guest writes to becomes its own. So clean pages are in memory once, for all clones. The guest is 50 bytes of machine
code: it adds up the first word of each page, writes to every hundredth, and stops. Its memory is saved afterwards as a
diff: only the pages that it has written to. Needs /dev/kvm.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import mmap
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import postcopy
from postcopy_protocol.sizes import parse_size

PAGE = 4096
CODE_AT, STRIDE, PORT = PAGE, 100, 0x10
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_GET_VCPU_MMAP_SIZE, KVM_RUN = 0xAE01, 0xAE41, 0xAE04, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_SET_REGS = 0x4020AE46, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
EXIT_IO, EXIT_HLT = 2, 5


def guest_code(pages: int) -> bytes:
    """32-bit code: the sum of the first words of pages 2 to ``pages`` goes to PORT; then it writes, and stops."""
    return b"".join(
        (
            b"\xbe" + struct.pack("<I", 2 * PAGE),  # mov esi, the first page
            b"\xb9" + struct.pack("<I", pages - 2),  # mov ecx, how many
            b"\x31\xc0",  # xor eax, eax
            b"\x03\x06",  # again: add eax, [esi]
            b"\x81\xc6" + struct.pack("<I", PAGE),  # add esi, 4096
            b"\x49\x75\xf5",  # dec ecx; jnz again
            b"\x66\xba" + struct.pack("<H", PORT) + b"\xef",  # mov dx, PORT; out dx, eax
            b"\xbe" + struct.pack("<I", 2 * PAGE),
            b"\xb9" + struct.pack("<I", (pages - 2) // STRIDE),
            b"\x89\x0e",  # again: mov [esi], ecx
            b"\x81\xc6" + struct.pack("<I", STRIDE * PAGE),
            b"\x49\x75\xf5",
            b"\xf4",  # hlt
        )
    )


def make_image(path: Path, size: int) -> int:
    """Guest memory at rest; returns the sum that the guest must find."""
    with path.open("wb") as file:
        noise = random.Random(1)
        words = [noise.getrandbits(32) for _ in range(size // PAGE)]
        for number, word in enumerate(words):
            file.write((guest_code(size // PAGE) if number == 1 else struct.pack("<I", word)).ljust(PAGE, b"\0"))
    return sum(words[2:]) & 0xFFFFFFFF


class Processor:
    """A virtual machine with one processor. ``memory``: (address in the guest, bytes, address here)."""

    def __init__(self, memory: list[tuple[int, int, int]], entry: int) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        for slot, (guest, size, here) in enumerate(memory):
            fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", slot, 0, guest, size, here))
        self.processor = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
        self.state = mmap.mmap(self.processor, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        self.descriptors = (self.processor, machine, kvm)
        special = bytearray(312)
        fcntl.ioctl(self.processor, KVM_GET_SREGS, special)
        for number in range(6):  # cs, ds, es, fs, gs, ss: flat, 32 bits
            kind = 11 if number == 0 else 3
            struct.pack_into("=QIH8B", special, 24 * number, 0, 0xFFFFFFFF, 8, kind, 1, 0, 1, 1, 0, 1, 0)
        struct.pack_into("=Q", special, 224, struct.unpack_from("=Q", special, 224)[0] | 1)  # cr0: protected mode
        fcntl.ioctl(self.processor, KVM_SET_SREGS, special)
        fcntl.ioctl(self.processor, KVM_SET_REGS, struct.pack("=18Q", *[0] * 16, entry, 2))  # rip, rflags

    def run(self) -> bool:
        """Run until the guest uses its port (True), or stops (False)."""
        while True:
            try:
                fcntl.ioctl(self.processor, KVM_RUN, 0)
                break
            except InterruptedError:
                continue  # this process was stopped and went on
        reason = struct.unpack_from("=I", self.state, 8)[0]
        if reason not in (EXIT_IO, EXIT_HLT):
            raise SystemExit(f"the guest stopped for reason {reason}")
        return bool(reason == EXIT_IO)

    @property
    def port_at(self) -> int:
        """Where the word at the port is in ``state``."""
        return int(struct.unpack_from("=Q", self.state, 40)[0])

    def close(self) -> None:
        self.state.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


def run(memory: int, size: int) -> int:
    """Run the guest whose memory is ``size`` bytes at ``memory``; returns what it has written to PORT."""
    processor = Processor([(0, size, memory)], CODE_AT)
    found = 0
    while processor.run():
        found = struct.unpack_from("=I", processor.state, processor.port_at)[0]
    processor.close()
    return found


def own_pages(address: int, pages: int) -> list[int]:
    """Pages that this process has written to: present, and no longer those of the block (bit 61 of pagemap)."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = struct.unpack(f"={pages}Q", pagemap.read(8 * pages))
    return [page for page, entry in enumerate(entries) if entry >> 63 and not entry >> 61 & 1]


def save_diff(block: postcopy.Block, address: int, path: Path) -> int:
    """Write the guest's own pages to a sparse file at their places; returns how many there are."""
    dirty = own_pages(address, block.size // PAGE)
    with path.open("wb") as file:
        file.truncate(block.size)
        for page in dirty:
            file.seek(page * PAGE)
            file.write(block.buf[page * PAGE : (page + 1) * PAGE])
    return len(dirty)


def clone(directory: str, expected: int, diff: Path) -> int:
    """One clone, in a process of its own. Exit status 0: it found the right sum, and its diff has the right pages."""
    with postcopy.attach("guest", directory) as block:
        view = (ctypes.c_ubyte * block.size).from_buffer(block.buf)
        address = ctypes.addressof(view)
        right = run(address, block.size) == expected
        dirty = save_diff(block, address, diff)
        del view
        return int(not right or dirty != (block.size // PAGE - 2) // STRIDE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clones", type=int, default=8)
    parser.add_argument("--memory", type=parse_size, default=64 << 20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        image = Path(place, "guest.mem")
        expected = make_image(image, asked.memory)
        with postcopy.Supervisor({"guest": image}) as supervisor:
            begun = time.monotonic()
            children = []
            for number in range(asked.clones):
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        status = clone(supervisor.runtime_dir, expected, Path(place, f"{number}.diff"))
                    finally:
                        os._exit(status)
                children.append(pid)
            failed = sum(bool(os.waitpid(pid, 0)[1]) for pid in children)
            taken = time.monotonic() - begun
        dirty = sum(path.stat().st_blocks * 512 for path in Path(place).glob("*.diff"))
        print(f"{asked.clones} clones, {failed} wrong, {taken:.2f} s; their diffs have {dirty >> 10} KiB")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
