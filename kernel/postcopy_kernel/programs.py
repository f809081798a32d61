"""How one of our programs starts another: with the same interpreter, and without the current directory on its path.

``python -m`` looks for modules in the current directory first. Others may write there (/tmp), and what they write would
run with the rights of the supervisor.

Example::

    subprocess.Popen(command("postcopy_supervisor", "ram0=weights.bin"), env=environment())
"""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """The command line of ``python -m MODULE``. ``-P`` leaves out the current directory; ``-I`` is passed on."""
    return [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Our environment, without the entries of PYTHONPATH that are empty or relative: they name the current directory,
    or something in it. Everything else in the environment is the operator's word."""
    kept = dict(os.environ)
    entries = kept.pop("PYTHONPATH", "").split(os.pathsep)
    if absolute := [entry for entry in entries if os.path.isabs(entry)]:
        kept["PYTHONPATH"] = os.pathsep.join(absolute)
    return kept
