"""A guest of KVM that does what it is asked through a port: adds up a page, or fills one. Its faults are real ones.

Its memory begins at guest address 0; its code is in a page of its own, at 1 GiB. What is asked is the address of a
page. Bits 1 to 11 are how many more pages to add up; with bit 0 set the next word at the port fills the page.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from examples.kvm_clones import Processor

PAGE = 4096
CODE_AT = 1 << 30
CODE = bytes.fromhex(
    "e510"  # again: in eax, 0x10
    "a801 7524"  # test al, 1; jnz fill
    "89c6 89c1"  # mov esi, eax; mov ecx, eax
    "d1e9 81e1ff070000 41 c1e10a"  # shr ecx, 1; and ecx, 0x7ff; inc ecx; shl ecx, 10
    "81e600f0ffff 31c0"  # and esi, 0xfffff000; xor eax, eax
    "0306 83c604 49 75f8"  # next: add eax, [esi]; add esi, 4; dec ecx; jnz next
    "e710 ebd6"  # out 0x10, eax; jmp again
    "2500f0ffff 89c7"  # fill: and eax, 0xfffff000; mov edi, eax
    "e510 b900040000 f3ab"  # in eax, 0x10; mov ecx, 1024; rep stosd
    "e710 ebc2"  # out 0x10, eax; jmp again
)
MOST_PAGES = 2048


class Guest:
    """A guest whose memory is ``size`` bytes at ``address`` in this process."""

    def __init__(self, address: int, size: int) -> None:
        self.code = mmap.mmap(-1, PAGE)
        self.code[: len(CODE)] = CODE
        here = ctypes.addressof(ctypes.c_char.from_buffer(self.code))
        self.processor = Processor([(0, size, address), (CODE_AT, PAGE, here)], CODE_AT)
        self.processor.run()  # up to its first question

    def sum(self, offset: int, pages: int = 1) -> int:
        """The guest reads the pages from ``offset`` on, at most MOST_PAGES: the sum of their words."""
        return self._ask(offset | pages - 1 << 1)

    def fill(self, offset: int, word: int) -> None:
        """The guest fills the page with ``word``."""
        self._put(offset | 1)
        self.processor.run()
        self._ask(word)

    def _put(self, word: int) -> None:
        struct.pack_into("=I", self.processor.state, self.processor.port_at, word)

    def _ask(self, word: int) -> int:
        self._put(word)
        self.processor.run()  # up to its answer
        answer = int(struct.unpack_from("=I", self.processor.state, self.processor.port_at)[0])
        self.processor.run()  # up to its next question
        return answer

    def close(self) -> None:
        self.processor.close()


def sum_of(page: bytes | memoryview) -> int:
    """What the guest finds in such a page."""
    return int(sum(struct.unpack(f"<{len(page) // 4}I", page)) & 0xFFFFFFFF)
