"""Death at a named step: ``POSTCOPY_CRASH_AT=POINT[:N]`` ends a process by SIGKILL at its N-th passing of that point.

For tests of what every other process must bear: any process may be killed at any instruction, and these are the
instructions between which the order of things matters. Every process that is started with the variable obeys it, each
by a count of its own; a worker only in its first life and a custodian only in its first, or its successors would die of
it too.

Nothing of it costs anything when the variable is not set: steps on the way of a fault are wrapped where a process
begins, and only if a point of theirs is armed (``before``, ``around``, ``watched``); elsewhere ``at`` compares two
words.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

VARIABLE = "POSTCOPY_CRASH_AT"

POINTS = {
    # a worker, local block
    "worker.read": "a fault is read, nothing is placed",
    "worker.copied": "the page is in the block, not marked (a shared client runs already)",
    "worker.marked": "placed and marked, a private client is not woken",
    "worker.woken": "a private client is woken, nothing more is done",
    # a worker, remote block
    "worker.unasked": "a fault is read, the supervisor is not asked",
    "worker.asked": "the supervisor is asked",
    "worker.told": "the supervisor has said Wake, the client is not woken",
    # the supervisor at the door: between what a client says and what it is told
    "door.Hello": "a client has said it, no answer",
    "door.Welcome": "it is told, no userfaultfd yet",
    "door.OfferUserfaultfd": "the userfaultfd is here, not kept by the custodian",
    "door.UserfaultfdAccepted": "it is kept, and the client knows",
    "door.OpenBlock": "a client has said it, no answer",
    "door.BlockOpened": "the client has the block's memory",
    "door.Mapped": "the client has mapped it, nothing is registered",
    "door.Attached": "the client may touch it, as it knows",
    "door.Unmap": "a client has said it, its worker still serves the region",
    "door.Unmapped": "the client may unmap it, as it knows",
    "door.Goodbye": "a client has said it, everything of it is still here",
    "door.Resume": "a client is back after a supervisor's death, no answer",
    "door.Resumed": "it is told that everything is as it was",
    # the supervisor, remote block
    "page.arrived": "a source's page is here, not placed",
    "page.placed": "placed, not marked",
    "page.marked": "placed and marked, no worker is told",
    # a supervisor that takes over
    "takeover.asked": "the custodian has been asked for what it keeps",
    "takeover.half": "some of what it keeps is here",
    "takeover.judged": "all of it is here and fits, nothing is changed yet",
    "takeover.moved": "clients and workers are ours, nobody is answered yet",
    "takeover.ready": "it is ready, its predecessor's clients have not spoken",
    # the custodian
    "custodian.forked": "a worker is forked, the supervisor does not know",
    "custodian.announced": "the supervisor has its pidfd, the worker may not live yet",
    "custodian.released": "the worker lives",
    "custodian.kept": "something more is kept",
    # a page source
    "source.asked": "ranges are asked for, nothing is read",
    "source.answered": "the answer is under way",
}
"""Every point, and what is so when a process dies there."""

_point, _left = "", 0


def arm(word: str) -> None:
    """Take ``POINT[:N]``; empty: none. Raises ValueError for a point that there is not."""
    global _point, _left
    point, colon, number = word.partition(":")
    if word and (point not in POINTS or (colon and not number.isdecimal())):
        raise ValueError(f"{VARIABLE}={word}: there is no such point; there are {', '.join(POINTS)}")
    _point, _left = point, int(number or "1")


def disarm() -> None:
    """Not in this process."""
    arm("")


def armed(*points: str) -> bool:
    """Does this process die at one of these?"""
    return _point in points


def environment(first: bool, prefix: str) -> dict[str, str]:
    """The environment of a process whose points begin with ``prefix``: only its first life dies of them."""
    if first or not _point.startswith(prefix):
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name != VARIABLE}


def at(point: str) -> None:
    """This step is passed."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def before(point: str, act: Callable[P, R]) -> Callable[P, R]:
    """``act``, or where this point is armed, ``act`` with the point before it."""
    return around(point, act, "")


def around(point: str, act: Callable[P, R], behind: str) -> Callable[P, R]:
    """``act``, or where one of the two is armed, ``act`` between these points."""
    if not armed(point, behind) or not _point:
        return act

    def with_points(*told: P.args, **named: P.kwargs) -> R:
        at(point)
        answer = act(*told, **named)
        at(behind)
        return answer

    return with_points


def watched(thing: T, method: str, point: str, behind: str) -> T:
    """``thing``, or where one of these points is armed, a stand-in for it whose ``method`` is between them."""
    if not armed(point, behind) or not _point:
        return thing
    return cast(T, _StandIn(thing, method, around(point, getattr(thing, method), behind)))


class _StandIn:
    def __init__(self, thing: object, method: str, act: Callable[..., object]) -> None:
        self._thing = thing
        setattr(self, method, act)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


arm(os.environ.get(VARIABLE, ""))
