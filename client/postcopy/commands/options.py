"""Options that several commands share, and the values people type into them."""

from __future__ import annotations

from typing import Annotated

import typer

from postcopy_protocol.sizes import parse_size

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


def names_mode(text: str) -> str:
    """A mode. Raises BadInput."""
    if text not in ("private", "shared"):
        raise BadInput(f"mode {text!r} is neither private nor shared")
    return text
