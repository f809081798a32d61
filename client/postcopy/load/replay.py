"""A trace as the pattern of a load test: which client touches which page, and when."""

from __future__ import annotations

from ..errors import PostcopyError
from ..traces import Trace, read


def number_of(found: Trace, block: str) -> int:
    """The trace's number of ``block``, or of its only block. Raises PostcopyError."""
    numbers = {known.name: known.number for known in found.head.blocks}
    if block in numbers:
        return numbers[block]
    if len(numbers) == 1:
        return next(iter(numbers.values()))
    raise PostcopyError(f"{found.path} has no block {block}; it has {', '.join(sorted(numbers))}")


def share(path: str, block: str, index: int) -> list[tuple[int, int, bool]]:
    """(nanoseconds since the trace's first fault, page, whether it was a write) for toucher ``index``.

    It plays one of the trace's clients; several touchers may play the same. Raises PostcopyError, OSError."""
    found = read(path)
    number = number_of(found, block)
    faults = [fault for fault in found.faults if fault.block == number]
    if not faults:
        raise PostcopyError(f"{path} has no fault of block {block}")
    clients = sorted({fault.client for fault in faults})
    played = clients[index % len(clients)]
    return [(fault.at - faults[0].at, fault.page, fault.write) for fault in faults if fault.client == played]
