"""``postcopy cat``: attach a block and write its bytes to stdout."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from postcopy_protocol.arguments import offset as parse_offset
from postcopy_protocol.sources import parse_block_name

from ..client import attach
from ..errors import BadInput
from .options import Mode, RuntimeDir, Timeout, TrustUid, mode_of

PIECE = 1 << 20
"""Bytes that are populated and written at once."""


def cat(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    offset: Annotated[str, typer.Option("--offset", metavar="N", help="First byte.")] = "0",
    length: Annotated[str | None, typer.Option("--length", metavar="N", help="Bytes [default: to the end].")] = None,
    mode: Mode = "private",
    timeout: Timeout = 30.0,
    trust_uid: TrustUid = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Attach a block and write its bytes to stdout."""
    start, wanted = parse_offset(offset), None if length is None else parse_offset(length)
    with attach(parse_block_name(name), runtime_dir, mode_of(mode), timeout) as block:
        stop = block.size if wanted is None else start + wanted
        if start > block.size:
            raise BadInput(f"--offset {start} is beyond the end of block {name}, which has {block.size} bytes")
        if stop > block.size:
            raise BadInput(f"bytes {start} to {stop} are not inside block {name} of {block.size} bytes")
        sys.stdout.flush()
        for at in range(start, stop, PIECE):
            size = min(PIECE, stop - at)
            block.ensure(at, size)
            _write(block.buf, at, at + size)


def _write(memory: memoryview, start: int, stop: int) -> None:
    while start < stop:
        with memory[start:stop] as piece:
            start += os.write(sys.stdout.fileno(), piece)
