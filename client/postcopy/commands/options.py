"""Options that several commands share, and the values people type into them."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from postcopy_protocol.sizes import LARGEST, parse_size
from postcopy_protocol.sources import parse_block_name

from ..errors import BadInput

RuntimeDir = Annotated[
    str | None,
    typer.Option("--runtime-dir", metavar="DIR", help="Runtime directory [default: $POSTCOPY_RUNTIME_DIR, ...]."),
]
Mode = Annotated[str, typer.Option("--mode", metavar="private|shared", help="private: copy-on-write; shared.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds that attaching may take.")]


def place(text: str) -> int:
    """An offset or a length, where 0 is fine. Raises BadInput."""
    return parse_size(text, zero=True)


def page_place(text: str) -> tuple[str, int]:
    """Block and offset of BLOCK+OFFSET; the offset is a size (4096, 4K, 1M) or hexadecimal (0x1000). Raises
    BadInput."""
    name, plus, offset = text.partition("+")
    if not plus:
        raise BadInput(f"{text!r} names no page: write BLOCK+OFFSET, such as ram0+28K or ram0+0x7000")
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", offset):
        at = int(offset, 16)
        if at > LARGEST:
            raise BadInput(f"{offset!r} is too large: no block has so many bytes")
        return parse_block_name(name), at
    return parse_block_name(name), place(offset)


def names_mode(text: str) -> str:
    """A mode. Raises BadInput."""
    if text not in ("private", "shared"):
        raise BadInput(f"mode {text!r} is neither private nor shared")
    return text
