"""A handler: a Python function that makes the pages of a local block.

    cd examples
    postcopy serve made='handler:handler:make?size=1G' &
    postcopy cat made --length 64

``make`` runs in the worker process of each client, so a crash or a hang in it affects that client only.
"""

from __future__ import annotations

import postcopy

ROW = 64  # bytes
FORBIDDEN = 512 << 20


def make(offset: int, length: int) -> bytes | None:
    """The bytes of a range of whole pages; None for zeros.

    The same range must always give the same bytes: several clients may ask for it, and so may a restarted worker.
    """
    if offset >= FORBIDDEN:
        raise postcopy.PageLost("the upper half of this block has no content")
    if offset >= 1 << 20:
        return None
    rows = range(offset // ROW, (offset + length) // ROW)
    return b"".join(f"row {row}".ljust(ROW - 1).encode() + b"\n" for row in rows)
