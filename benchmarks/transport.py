"""``transport``: a remote fault over native sockets against one over libzmq (``POSTCOPY_TRANSPORT``), in turns.

Two supervisors run at the same time, one of each transport, with a page source and a client each; see ``compare``.
"""

from __future__ import annotations

import sys

from .bench import Bench
from .compare import MODES, Side, in_turns
from .figures import Pair, Row, ratio_row

TRANSPORTS = ("native", "libzmq")


def run(bench: Bench) -> list[Row]:
    """p50 of remote faults, shared and private, as a ratio of native sockets to libzmq."""
    native, libzmq = (Side(name, sys.executable, {"POSTCOPY_TRANSPORT": name}) for name in TRANSPORTS)
    pairs: dict[str, list[Pair]] = {mode: [] for mode in MODES}
    for number in range(bench.scale.pairs):
        for mode in MODES:
            bench.say(f"transport, {mode}: pair {number + 1} of {bench.scale.pairs}")
            pairs[mode].append(in_turns(bench, (native, libzmq), "remote", mode, turned=bool(number % 2)))
    return [
        ratio_row(f"remote fault p50, {mode}, native against libzmq, pinned", pairs[mode], labels=TRANSPORTS)
        for mode in MODES
    ]
