"""Mapped-ram files of QEMU as sources: one file, a block for each RAM block of the VM."""

from __future__ import annotations

import os
from collections.abc import Container

from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.qemu_format import QemuBlock, offered_names
from postcopy_protocol.qemu_ram_file import read_index
from postcopy_protocol.sources import QemuRamSource, parse_block_name


def sources_of(name: str, source: QemuRamSource, taken: Container[str]) -> dict[str, QemuRamSource]:
    """The sources of all blocks of a file, as NAME.BLOCK. Raises BadInput."""
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadInput(f"{name}: cannot open {source.path}: {error.strerror}") from None
    try:
        blocks = _index(descriptor, source.path)
    finally:
        os.close(descriptor)
    found = {}
    for offered, block in zip(offered_names(blocks), blocks, strict=True):
        full = parse_block_name(f"{name}.{offered}")
        if full in taken:
            raise BadInput(f"the name {full} is used twice: every block needs a name of its own")
        found[full] = QemuRamSource(source.path, block.name)
    return found


def block_of(descriptor: int, source: QemuRamSource) -> QemuBlock:
    """The block in an open file. Raises BadInput."""
    blocks = _index(descriptor, source.path)
    for block in blocks:
        if block.name == source.block:
            return block
    raise BadInput(f"{source.path} has no RAM block {source.block}: it has {', '.join(one.name for one in blocks)}")


def _index(descriptor: int, path: str) -> tuple[QemuBlock, ...]:
    try:
        return read_index(lambda offset, length: os.pread(descriptor, length, offset), os.fstat(descriptor).st_size)
    except (BadMessage, OSError) as error:
        raise BadInput(f"{path}: {error if isinstance(error, BadMessage) else error.strerror}") from None
