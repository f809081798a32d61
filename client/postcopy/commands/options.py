"""Options that several commands share, and how typer calls the validators of ``postcopy_protocol.arguments``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from postcopy_protocol.arguments import MODES, RUNTIME_DIR_HELP, one_of
from postcopy_protocol.runtime_paths import TRUST_UID, trusted_users

RuntimeDir = Annotated[str | None, typer.Option("--runtime-dir", metavar="DIR", help=RUNTIME_DIR_HELP)]
Mode = Annotated[
    str, typer.Option("--mode", metavar="|".join(MODES), help="private: copy-on-write; shared: all clients see writes.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds for attaching.")]


def _trust(uids: list[int] | None) -> None:
    """In the environment, because some commands attach in processes that they start."""
    if uids:
        os.environ[TRUST_UID] = ",".join(map(str, sorted(trusted_users(os.environ) | set(uids))))


TrustUid = Annotated[
    list[int] | None,
    typer.Option(
        "--trust-uid",
        metavar="UID",
        min=0,
        callback=_trust,
        help="A user whose supervisor is trusted, beside your own and root's (repeat).",
    ),
]

mode_of = one_of(*MODES)
