"""``postcopy restore firecracker``: load a snapshot through Firecracker's API and serve its memory."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack, closing
from typing import Annotated

import typer

from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sources import is_block_name

from ..errors import BadInput, PostcopyError
from .attach_firecracker import Serving, find_block, say, serve_machines
from .options import RuntimeDir, Timeout

BLOCK = "memory"
"""Name of the block where the command starts a supervisor of its own."""


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Restore a virtual machine; its memory comes when it is touched.", no_args_is_help=False)
    group.callback()(_restore)
    group.command("firecracker")(restore_firecracker)
    app.add_typer(group, name="restore")


def _restore() -> None:
    """Restore a virtual machine; its memory comes when it is touched."""


def restore_firecracker(
    snapshot: Annotated[str, typer.Option("--snapshot", metavar="FILE", help="The snapshot's state file.")],
    memory: Annotated[
        str, typer.Option("--memory", metavar="FILE|BLOCK", help="Its memory: a block of the supervisor, or a SOURCE.")
    ],
    api: Annotated[str, typer.Option("--api", metavar="SOCKET", help="The API socket of a Firecracker that waits.")],
    paused: Annotated[bool, typer.Option("--paused", help="Do not resume the machine.")] = False,
    timeout: Timeout = 30.0,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Load a snapshot into a Firecracker that waits, and serve its memory until the machine ends.

    --memory is the name of a block of a running supervisor; anything else (a path, a SOURCE) is served by a supervisor
    of this command's own."""
    from ..firecracker.listener import Listener

    with ExitStack() as stack:
        directory, block = _supervisor(stack, memory, runtime_dir)
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-fc-"))
        path = os.path.join(place, "memory.sock")
        listener = stack.enter_context(closing(Listener([path])))
        failures: list[PostcopyError] = []
        over = threading.Event()

        def load() -> None:
            from ..firecracker.api import load_snapshot

            try:
                load_snapshot(api, os.path.abspath(snapshot), path, resume=not paused, timeout=timeout)
                say(f"{snapshot} is loaded")
            except PostcopyError as error:
                failures.append(error)
                over.set()

        # Firecracker answers only when its first faults are resolved, so the machine is served meanwhile.
        threading.Thread(target=load, daemon=True).start()
        serve_machines(listener, Serving(directory, block, timeout), 1, over)
        if failures:
            raise failures[0]


def _supervisor(stack: ExitStack, memory: str, runtime_dir: str | None) -> tuple[str, str]:
    """Runtime directory and block: of the running supervisor, or of one that is started for this machine."""
    from ..supervisor import Supervisor

    directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
    if is_block_name(memory) and not os.path.exists(memory):
        find_block(directory, memory)
        return directory, memory
    if not (os.path.exists(memory) or ":" in memory):
        raise BadInput(f"--memory {memory}: there is no such file, and it is no name of a block or a SOURCE")
    return stack.enter_context(Supervisor({BLOCK: memory})).runtime_dir, BLOCK
