"""The walls of a worker: what it gives up once all that it needs is open, and before it has a second thread.

A worker reads the faults of a client that may be hostile, and places bytes of a source that may be. Should one of them
find a hole in it, it holds its client's descriptors and its block's, and nothing else: no capability, no path, no
program to start, no socket but to Unix sockets.

A worker that calls a user's handler function is another matter: the function may read files, ask a network or start a
program, and nobody but its author knows. It keeps what its user may do (never a capability), unless ``--walls all``
says that the function needs nothing of it once its module is imported.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence

from postcopy_kernel import landlock, seccomp
from postcopy_protocol import counters

AUTO, ALL, OFF = "auto", "all", "off"
DESCRIPTORS = 64
"""Numbers for descriptors beside those that a worker was given: its channel, its bell and what it maps need a few."""

_FILTER = seccomp.prepare()  # before the fork: every worker inherits it


def enter(cgroups: Sequence[int]) -> None:
    """Move this process into the cgroups whose ``cgroup.procs`` these are. Raises OSError."""
    for procs in cgroups:
        os.write(procs, b"0\n")
        os.close(procs)


def enter_sandbox_walls(which: str, held: int, *, runs_handler: bool) -> tuple[int, list[str]]:
    """Give up what this worker, which was given ``held`` descriptors, does not need; the bits of ``counters.SANDBOX``,
    and what went wrong, in words."""
    wrong: list[str] = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would be a copy of the client's memory
    standing = counters.NO_CAPABILITIES | counters.NO_NEW_PRIVILEGES  # given up before, here or in the custodian
    if which == ALL or (which == AUTO and not runs_handler):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = min(hard, held + DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        standing |= _tried("Landlock", landlock.restrict, counters.LANDLOCK, wrong)
        if _FILTER is not None:
            standing |= _tried("the seccomp filter", _FILTER.restrict, counters.SECCOMP, wrong)
    return standing, wrong


def _tried(name: str, restrict: Callable[[], int], bit: int, wrong: list[str]) -> int:
    try:
        return bit if restrict() else 0
    except OSError as error:
        wrong.append(f"{name} does not stand: {error}")
        return 0
