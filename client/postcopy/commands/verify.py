"""``postcopy verify``: attach a block and compare it with a file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Annotated

import typer

from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..block import Block
from ..client import attach
from ..errors import BadInput, PostcopyError
from .options import Mode, RuntimeDir, Timeout, TrustUid, mode_of

PIECE = 1 << 20
"""Bytes that are populated and compared at once."""

_SAMPLE_SEED = 2024


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    file: Annotated[str, typer.Argument(metavar="FILE")],
    mode: Mode = "private",
    sample: Annotated[
        float, typer.Option("--sample", metavar="FRACTION", help="Compare this share of the pages, chosen at random.")
    ] = 1.0,
    timeout: Timeout = 30.0,
    trust_uid: TrustUid = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Attach a block and compare it with FILE; print the first difference and exit 1 when there is one."""
    if not 0 < sample <= 1:
        raise BadInput(f"--sample {sample}: a fraction is more than 0 and at most 1")
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with attach(parse_block_name(name), runtime_dir, mode_of(mode), timeout) as block:
            compared = compare(block, fd, file, sample)
    finally:
        os.close(fd)
    print(f"{name}: {format_size(compared)} compared with {file}, identical")


def compare(block: Block, fd: int, file: str, sample: float = 1.0) -> int:
    """Compare ``block`` with an open file; returns the bytes compared. Raises PostcopyError with the first
    difference."""
    size = os.fstat(fd).st_size
    if size != block.size:
        raise PostcopyError(f"block {block.name} has {block.size} bytes, {file} has {size}")
    compared = 0
    for start, stop in pieces(block, sample):
        block.ensure(start, stop - start)
        wanted = os.pread(fd, stop - start, start)
        difference = first_difference(block.buf, start, wanted)
        if difference is None and len(wanted) < stop - start:  # the file was truncated during the comparison
            difference = start + len(wanted)
        if difference is not None:
            expected = wanted[difference - start : difference - start + 1]
            raise PostcopyError(
                f"block {block.name} differs from {file} first at offset {difference}: "
                f"{block.buf[difference]:#04x} instead of {f'{expected[0]:#04x}' if expected else 'nothing'}"
            )
        compared += stop - start
    return compared


def pieces(block: Block, sample: float) -> Iterator[tuple[int, int]]:
    """The ranges to compare, in order: all of the block, or pages chosen at random, the same pages every time."""
    if sample >= 1:
        yield from ((at, min(at + PIECE, block.size)) for at in range(0, block.size, PIECE))
        return
    wanted = max(1, round(block.pages * sample))
    for page in sorted(random.Random(_SAMPLE_SEED).sample(range(block.pages), wanted)):
        yield page * block.page_size, min((page + 1) * block.page_size, block.size)


def first_difference(memory: memoryview, start: int, wanted: bytes) -> int | None:
    """Offset of the first byte from ``start`` on that differs from ``wanted``; None: no difference."""
    found = bytes(memory[start : start + len(wanted)])
    if found == wanted:
        return None
    low, high = 0, len(wanted)  # found[:low] is equal, found[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found[low:middle] != wanted[low:middle] else (middle, high)
    return start + low
