"""Options that several commands share, and how typer calls the validators of ``postcopy_protocol.arguments``."""

from __future__ import annotations

from typing import Annotated

import typer

from postcopy_protocol.arguments import MODES, RUNTIME_DIR_HELP, one_of

RuntimeDir = Annotated[str | None, typer.Option("--runtime-dir", metavar="DIR", help=RUNTIME_DIR_HELP)]
Mode = Annotated[
    str, typer.Option("--mode", metavar="|".join(MODES), help="private: copy-on-write; shared: all clients see writes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds for attaching.")]

mode_of = one_of(*MODES)
