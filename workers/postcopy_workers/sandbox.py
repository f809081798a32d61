"""The sandbox of a worker: what it gives up once everything is open, and before it has a second thread.

A worker reads the faults of a client that may be hostile, and places bytes of a source that may be. Should one of them
take it over, it holds its client's and its block's descriptors and nothing else: no capability, no path, no program to
start, no socket but Unix sockets.

A worker that calls a user's handler function is different: only the author knows whether the function reads files, uses
a network or starts programs. It keeps what its user may do (never a capability), unless ``--walls all`` says that the
function needs none of that once its module is imported.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence

from postcopy_kernel import landlock, seccomp
from postcopy_protocol import counters

AUTO, ALL, OFF = "auto", "all", "off"
SPARE_DESCRIPTORS = 64
"""Descriptors beyond those that a worker was given: its channel, its eventfd and its mappings need a few."""

_FILTER = seccomp.prepare()  # before the fork: every worker inherits it

Restrict = Callable[[], int]
"""Applies a restriction to this process; False where this machine has none of its kind. Raises OSError."""


def enter_cgroups(cgroups: Sequence[int]) -> None:
    """Move this process into the cgroups whose ``cgroup.procs`` these are. Raises OSError."""
    for procs in cgroups:
        os.write(procs, b"0\n")
        os.close(procs)


def enter(option: str, given: int, *, runs_handler: bool) -> tuple[int, list[str]]:
    """Give up what this worker does not need; ``given`` is how many descriptors it was given, ``option`` is that of
    ``--walls``. Returns the bits of ``counters.SANDBOX``, and a text for each restriction that failed."""
    failures: list[str] = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would be a copy of the client's memory
    active = counters.NO_CAPABILITIES | counters.NO_NEW_PRIVILEGES  # given up before, here or in the custodian
    if option == ALL or (option == AUTO and not runs_handler):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = min(hard, given + SPARE_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        active |= _try("Landlock", landlock.restrict, counters.LANDLOCK, failures)
        if _FILTER is not None:
            active |= _try("the seccomp filter", _FILTER.restrict, counters.SECCOMP, failures)
    return active, failures


def _try(name: str, restrict: Restrict, bit: int, failures: list[str]) -> int:
    try:
        return bit if restrict() else 0
    except OSError as error:
        failures.append(f"{name} is not in force: {error}")
        return 0
