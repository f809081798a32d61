"""What a block must hold, to check touches against: a file, zeros, or what a Python function says.

``parse`` understands what people write after ``--verify``: a path, ``zeros``, or ``handler:MODULE:FUNCTION`` with the
function of a block's source, called here once more.
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from collections.abc import Callable

from ..errors import BadInput

Truth = Callable[[int, int], bytes]
"""(offset, length) -> the bytes that belong there."""

HANDLER = "handler:"
ZEROS = "zeros"


def parse(text: str) -> Truth:
    """Raises BadInput, and OSError for a file that cannot be read."""
    if text == ZEROS:
        return lambda offset, length: bytes(length)
    if text.startswith(HANDLER):
        return _rule(text)
    file = os.open(text, os.O_RDONLY)

    def truth(offset: int, length: int) -> bytes:
        return os.pread(file, length, offset)

    weakref.finalize(truth, os.close, file)
    return truth


def size_of(text: str) -> int | None:
    """Bytes that a block with these contents has; None: any number."""
    return None if text == ZEROS or text.startswith(HANDLER) else os.stat(text).st_size


def _rule(text: str) -> Truth:
    module, colon, name = text.removeprefix(HANDLER).partition("?")[0].partition(":")
    if not (module and colon and name):
        raise BadInput(f"--verify {text!r}: write handler:MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        rule = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--verify {text}: {error}") from error

    def truth(offset: int, length: int) -> bytes:
        made = rule(offset, length)
        return bytes(length) if made is None else bytes(made)

    return truth
