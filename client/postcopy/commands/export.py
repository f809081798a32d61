"""``postcopy export``: the supervisor writes a whole block to a file."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from postcopy_protocol.messages import ExportProgress
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..errors import PostcopyError
from ..queries import Control
from .options import RuntimeDir

_ASK_EVERY = 0.2


def export(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    file: Annotated[str, typer.Argument(metavar="FILE")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Let the supervisor write a whole block to FILE."""
    parse_block_name(name)
    with Control(runtime_dir) as control:
        state = control.export(name, file)
        try:
            state = _follow(control, state)
        except KeyboardInterrupt:
            control.progress(state.job, cancel=True)
            raise
        if state.state != "done":
            raise PostcopyError(
                f"export of {name} to {os.path.abspath(file)} {state.state}: {state.detail or 'no reason'}"
            )
        print(f"{name}: {format_size(state.written)} written to {file}")


def _follow(control: Control, state: ExportProgress) -> ExportProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        bar = progress.add_task("export", total=state.size)
        while state.state == "running":
            time.sleep(_ASK_EVERY)
            state = control.progress(state.job)
            progress.update(bar, completed=state.written)
    return state
