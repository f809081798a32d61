"""Real programs whose memory comes from a snapshot: ``python -m benchmarks.store_client KIND RUNTIME_DIR BLOCK SCALE``.

``numpy``  a process that starts, imports numpy, looks some hundred rows up in a table of 4 KiB rows, and multiplies
           them by the layers behind it
``kvm``    a guest of KVM, its memory the block: its code adds up a word of every STEPth page, and stops

Both print their result, which is checked. ``make`` writes the image of each."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import struct
import sys
from pathlib import Path
from types import ModuleType

import postcopy

PAGE, WIDTH, LAYER = 4096, 1024, 4 << 20
STEP = 24


def rows_of(scale: int) -> int:
    """Rows of the table: its size in pages."""
    return scale * 1024


def make(kind: str, path: str, scale: int) -> float:
    """Write the image, of some ``scale`` times 4 MiB; returns what the program must find."""
    if kind == "kvm":
        return _make_guest(Path(path), scale * 1024)
    import numpy

    chance = numpy.random.default_rng(1)
    table = chance.random((rows_of(scale), WIDTH), dtype="float32")
    layers = chance.random((max(1, scale // 8), WIDTH, WIDTH), dtype="float32") - numpy.float32(0.5)
    with open(path, "wb") as file:
        file.write(table.tobytes() + layers.tobytes())
    return _infer(table, layers)


def _infer(table: object, layers: object) -> float:
    import numpy

    rows, weights = numpy.asarray(table), numpy.asarray(layers)
    wanted = random.Random(5).sample(range(len(rows)), min(300, len(rows) // 8))
    found = rows[wanted].mean(axis=0)
    for layer in weights:
        found = numpy.tanh(found @ layer / 16)
    return round(float(found.sum()), 3)


def _numpy(block: postcopy.Block, scale: int) -> float:
    import numpy

    numbers = numpy.frombuffer(block.buf, dtype="float32")
    border = rows_of(scale) * WIDTH
    return _infer(numbers[:border].reshape(-1, WIDTH), numbers[border:].reshape(-1, WIDTH, WIDTH))


def _example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "kvm_clones.py"
    spec = importlib.util.spec_from_file_location("kvm_clones", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make_guest(path: Path, pages: int) -> int:
    """32-bit code in page 1: the sum of the first words of every STEPth page from page 2 on goes to a port."""
    count = (pages - 2) // STEP
    code = b"\xbe" + struct.pack("<I", 2 * PAGE) + b"\xb9" + struct.pack("<I", count) + b"\x31\xc0"
    code += b"\x03\x06\x81\xc6" + struct.pack("<I", STEP * PAGE) + b"\x49\x75\xf5"
    code += b"\x66\xba" + struct.pack("<H", _example().PORT) + b"\xef\xf4"
    noise = random.Random(1)
    words = [noise.getrandbits(32) for _ in range(pages)]
    with path.open("wb") as file:
        for number, word in enumerate(words):
            page = code.ljust(PAGE, b"\0") if number == 1 else struct.pack("<I", word) + noise.randbytes(PAGE - 4)
            file.write(page)
    return sum(words[2 + STEP * number] for number in range(count)) & 0xFFFFFFFF


def _kvm(block: postcopy.Block, scale: int) -> float:
    view = (ctypes.c_ubyte * block.size).from_buffer(block.buf)
    return float(_example().run(ctypes.addressof(view), block.size))


def main() -> int:
    kind, directory, name, scale = sys.argv[1:]
    block = postcopy.attach(name, directory, timeout=300.0)  # fifty at once on a busy machine
    print((_numpy if kind == "numpy" else _kvm)(block, int(scale)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
