"""COPY alone: ``python -m benchmarks.copying FILE PIECE`` places a warm file into a block, and nothing else.

One process, one thread, one UFFDIO_COPY after another of PIECE bytes, straight from a mapping of the file (mapped and
read beforehand): the least that a Python program can do to fill a block. Prints the seconds that it took.
"""

from __future__ import annotations

import os
import sys
import time

from postcopy_kernel.memory import POPULATE_READ, Mapping, create_memfd
from postcopy_kernel.userfaultfd import RegisterMode, Status, open_userfaultfd


def main() -> None:
    """Place it all; raises OSError where the kernel does not do all of it."""
    path, piece = sys.argv[1], int(sys.argv[2])
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        held = Mapping.of(file.fileno(), length, writable=False)
    held.advise(POPULATE_READ)
    source = held.address
    block = Mapping.of(create_memfd("copying", length), length)
    with open_userfaultfd() as userfaultfd:
        userfaultfd.handshake()
        userfaultfd.register(block.address, length, RegisterMode.MISSING)
        copy, target = userfaultfd.copy, block.address
        begun = time.perf_counter()
        for offset in range(0, length, piece):
            if copy(target + offset, source + offset, piece).status is not Status.DONE:
                raise OSError(f"UFFDIO_COPY at {offset} did not place {piece} bytes")
        print(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
