"""``postcopy stop`` and ``postcopy resume``: end the supervisor, or the quarantine of a client."""

from __future__ import annotations

from typing import Annotated

import typer

from ..queries import Control
from .options import RuntimeDir


def stop(
    keep_workers: Annotated[
        bool, typer.Option("--keep-workers", help="Leave clients and workers for a successor (serve --recover).")
    ] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """End the supervisor and wait until it has ended."""
    with Control(runtime_dir) as control:
        pid = control.stop(keep_workers=keep_workers)
        print(f"the supervisor in {control.directory} (pid {pid}) has ended")
        if keep_workers:
            print("its clients and workers continue; take them over with: postcopy serve ... --recover")


def resume(
    client: Annotated[
        int, typer.Argument(metavar="CLIENT", min=0, max=2**63 - 1, help="Number of the client in status.")
    ],
    runtime_dir: RuntimeDir = None,
) -> None:
    """End the quarantine of a client: start a new worker, forget its crashes, fetch the pages that it was denied."""
    with Control(runtime_dir) as control:
        healing = control.resume(client)
        print(
            f"client {client} continues"
            + (f"; {healing} pages that it was denied are being fetched" if healing else "")
        )
