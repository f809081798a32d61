"""The expected contents of a block, for checking touches: a file, zeros, or a Python function.

``parse`` reads the value of ``--verify``: a path, ``zeros``, or ``handler:MODULE:FUNCTION`` with the function of the
block's source, which is called here again."""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from typing import Protocol

from ..errors import BadInput


class ExpectedBytes(Protocol):
    """Returns the bytes that must be at ``offset``."""

    def __call__(self, offset: int, length: int, /) -> bytes: ...


HANDLER = "handler:"
ZEROS = "zeros"


def parse(text: str) -> ExpectedBytes:
    """Raises BadInput, and OSError for a file that cannot be read."""
    if text == ZEROS:
        return lambda offset, length: bytes(length)
    if text.startswith(HANDLER):
        return _handler(text)
    file = os.open(text, os.O_RDONLY)

    def expected(offset: int, length: int) -> bytes:
        return os.pread(file, length, offset)

    weakref.finalize(expected, os.close, file)
    return expected


def size_of(text: str) -> int | None:
    """Size of a block with these contents; None: any size."""
    return None if text == ZEROS or text.startswith(HANDLER) else os.stat(text).st_size


def _handler(text: str) -> ExpectedBytes:
    module, colon, name = text.removeprefix(HANDLER).partition("?")[0].partition(":")
    if not (module and colon and name):
        raise BadInput(f"--verify {text!r}: write handler:MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, as in a worker: a file there never replaces another module
    try:
        handler = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--verify {text}: {error}") from error

    def expected(offset: int, length: int) -> bytes:
        made = handler(offset, length)
        return bytes(length) if made is None else bytes(made)

    return expected
