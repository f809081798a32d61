"""numpy over a file whose pages are read when they are touched.

    python examples/numpy_lazy_file.py [FILE]

Starts a supervisor for FILE, attaches it, and reads two small parts. Prints how much of the file came.
Without FILE it makes a sparse one of 1 GiB. Needs the extra ``supervisor`` and numpy.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy

import postcopy


def make_file(directory: str) -> Path:
    """A sparse file of 1 GiB that ends with the numbers 0 to 999 as 8-byte floats."""
    path = Path(directory) / "numbers.bin"
    with path.open("wb") as file:
        file.truncate((1 << 30) - 8000)
        file.seek(0, 2)
        file.write(numpy.arange(1000, dtype="float64").tobytes())
    return path


def main(path: Path) -> None:
    with (
        postcopy.Supervisor({"numbers": path}) as supervisor,
        postcopy.attach("numbers", supervisor.runtime_dir, mode="private") as block,
    ):
        whole = block.size - block.size % 8
        numbers = numpy.frombuffer(block.buf[:whole], dtype="float64")
        print(f"{len(numbers)} numbers are usable, {block.resident():.2%} of the file has come")

        # Ask for the pages before numpy needs them: a missing page that numpy touches keeps Python's lock.
        tail = min(8000, whole)
        block.ensure(whole - tail, tail)
        print(f"sum of the last {tail // 8}: {numbers[-(tail // 8) :].sum()}")

        numbers[0] = 42.0  # mode private: this process alone sees the write, the file stays as it is
        print(f"the first is {numbers[0]} here, {block.resident():.2%} of the file has come")
        del numbers  # a block with a view alive cannot be closed


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(make_file(directory))
