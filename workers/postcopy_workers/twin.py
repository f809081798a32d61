"""Which fault loop runs here: the compiled twin, or its Python source.

Both are made of ``fault_loop.py`` and answer alike. The twin runs if it is there and compiled of this very source.
``POSTCOPY_PURE=1`` chooses the source. The choice is made when a custodian starts, and its workers inherit it.
``python -m postcopy_workers.twin`` prints it.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import source_hash
from typing import Any

from . import fault_loop

VARIABLE = "POSTCOPY_PURE"


def hash_of_source() -> str:
    """Of the files that a twin is compiled of: the build notes it in the twin."""
    found = b""
    for suffix in (".py", ".pxd"):
        with open(os.path.splitext(fault_loop.__file__)[0] + suffix, "rb") as file:
            found += file.read()
    return source_hash(found).hex()


def _choose() -> tuple[Any, str]:
    """The module whose loop runs, and why if it is the Python source."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        return fault_loop, f"{VARIABLE} is set"
    try:
        compiled = importlib.import_module(f"{__package__}.compiled_fault_loop")
    except ImportError:
        return fault_loop, "it is not compiled: scripts/install does that where a C compiler is"
    if hash_of_source() != compiled.HASH_OF_SOURCE:
        return fault_loop, "the compiled one is of another source: run scripts/install again"
    return compiled, ""


_chosen, reason = _choose()
COMPILED = not reason
FaultLoop: type[fault_loop.FaultLoop] = _chosen.FaultLoop
LocalRegion: type[fault_loop.LocalRegion] = _chosen.LocalRegion

if __name__ == "__main__":
    print("compiled" if COMPILED else f"Python ({reason})")
    sys.exit()
