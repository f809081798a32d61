"""The copied map of a client whose memory is its own: what has become of each page there.

Pages of such a client (a virtual machine's anonymous memory) are copied from the block into its memory. It may give
them back (MADV_DONTNEED: a balloon, virtio-mem). From then on they are zeros: a page that came back from the block
would be old data, and nothing would complain. So each page has a state, one byte, in memory that outlives the worker:

    FRESH      as the block has it: a fault copies the page
    COPYING    a worker is copying it, or died in that moment: as FRESH
    COPIED     it was there. A fault can only mean that it was given back
    REMOVED    given back: zeros

Before the map lies one page into which the worker reads the messages of the userfaultfd. The kernel delivers a message
once, so a worker that dies with one in its hand would lose a removal: its successor looks there first.
"""

from __future__ import annotations

FRESH, COPYING, COPIED, REMOVED = range(4)

OWN = ("own", "own-wait", "own-kill")
"""Modes of a block in such a client, by what becomes of it at a lost page: SIGBUS; it waits; it is killed."""

MAP_AT = 4096
"""Where the map begins; before it are the messages that were read last."""


def size_of(pages: int) -> int:
    """Bytes of the memory that holds messages and map: whole pages of 4 KiB."""
    return MAP_AT + -(-pages // 4096) * 4096
