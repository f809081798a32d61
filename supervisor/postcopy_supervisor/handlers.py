"""Handler blocks: can their functions be imported? Asked before the supervisor says that it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable

from postcopy_kernel import programs
from postcopy_protocol.errors import BadInput
from postcopy_protocol.sources import HandlerSource, Source


def check_handlers(sources: Iterable[Source], directory: str, timeout: float) -> None:
    """Import the functions in a process of its own, as a worker will: no code of a user runs in the supervisor. Raises
    BadInput for the first that cannot be imported."""
    details = [f"{source.module}:{source.function}" for source in sources if isinstance(source, HandlerSource)]
    if not details:
        return
    command = programs.command("postcopy_workers.handlers", directory, *details)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=programs.environment(),
        process_group=0,  # with all that the modules have started, should it hang
    ) as asked:
        try:
            answer, _ = asked.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(asked.pid, signal.SIGKILL)
            raise BadInput(
                f"handlers {', '.join(details)} are not imported within {timeout:g} s (--handler-timeout)"
            ) from None
    reason = answer.decode("utf-8", "replace")
    if not reason and asked.returncode:
        reason = f"cannot import {', '.join(details)}: the module ends its process with status {asked.returncode}"
    if reason:
        raise BadInput(f"{reason}; modules are looked for on Python's path, then in {directory}")
