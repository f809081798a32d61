"""Trace points: ``serve --trace request,wake`` logs what passes them, one line each, in the fields of an event.

    loop     the main loop is entered and left            quit     the word to end has come
    core     a fault of the supervisor's own mapping      foreign  any other descriptor: door, custodian, pidfd, clock
    request  somebody stands at a page: block and offset  place    the supervisor places pages
    wake     a worker is told to wake its client, or that a page is lost

Off by default, and then there is nothing in the way: the points are wrapped around methods only when somebody asks,
and remote pages then go the careful way instead of the lanes.
What a worker places from a file or a function passes the supervisor nowhere; ``serve --record`` shows that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postcopy_protocol.codec import decode, unpack_offsets
from postcopy_protocol.messages import Lost, Wake

from ..blocks import RamBlock
from ..listener import CoreFaults, ListenerEvent, QuitAsked
from .event_log import field

if TYPE_CHECKING:
    from ..main_loop import MainLoop

log = logging.getLogger("postcopy.trace")


def install(house: MainLoop, points: frozenset[str]) -> None:
    """Put the points that are asked for into a house that does not run yet."""
    if "loop" in points:
        _around(house, "run", lambda: say("loop", at="entry"), lambda: say("loop", at="exit"))
    if points & {"quit", "core", "foreign"}:
        _around(house, "_happened", functools.partial(_happening, points))
    if points & {"request", "place", "wake"}:
        _close_lanes(house)
    if "request" in points:
        _around(house.paging, "fault", _request)
    if "place" in points:
        _around(house.paging.placer, "place", _place)
    if "wake" in points:
        _around(house.paging.wakers, "send", functools.partial(_wake, house))


def _close_lanes(house: MainLoop) -> None:
    """Everything goes the careful way, past the points, and not by the lanes that know only the common case."""
    fast_paths = house.sources.fast_paths
    fast_paths.update(dict.fromkeys(fast_paths, lambda head, buffer: None))
    house.paging.learn = lambda data, waiter, block: None  # type: ignore[method-assign]


def say(point: str, **fields: int | str) -> None:
    """One line: ``trace.POINT key=value ...``."""
    told = " ".join(f"{key}={field(value)}" for key, value in fields.items())
    log.info("trace.%s %s", point, told)


def _around(owner: object, name: str, before: Callable[..., None], after: Callable[[], None] = lambda: None) -> None:
    method = getattr(owner, name)

    def traced(*arguments: Any, **named: Any) -> Any:
        before(*arguments, **named)
        try:
            return method(*arguments, **named)
        finally:
            after()

    setattr(owner, name, traced)


def _happening(points: frozenset[str], happening: ListenerEvent) -> None:
    kind = type(happening).__name__
    point = {CoreFaults: "core", QuitAsked: "quit"}.get(type(happening), "foreign")
    if point not in points:
        return
    if isinstance(happening, CoreFaults):
        return say(point, descriptor=kind, events=len(happening.events))
    message = getattr(happening, "message", None)
    say(point, descriptor=kind, **({"message": type(message).__name__} if message is not None else {}))


def _request(waiter: int, block: RamBlock, pages: Any, *more: Any, **named: Any) -> None:
    for page in pages:
        say("request", client=waiter, block=block.name, offset=page * block.page_size)


def _place(block: RamBlock, first: int, end: int, source: int) -> None:
    say("place", block=block.name, offset=first * block.page_size, length=(end - first) * block.page_size)


def _wake(house: MainLoop, worker: int, data: bytes) -> None:
    message = decode(data, expect=(Wake, Lost))
    names = {block.number: block.name for block in house.blocks.values()}
    if isinstance(message, Wake | Lost):
        for offset in unpack_offsets(message.offsets):
            lost = "lost" if isinstance(message, Lost) else "present"
            say("wake", worker=worker, block=names.get(message.block, "-"), offset=offset, page=lost)
