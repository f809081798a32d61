"""Crash points for tests: ``POSTCOPY_CRASH_AT=POINT[:N]`` kills a process (SIGKILL) the N-th time it reaches a point.

Any process may be killed at any instruction; the points are the places where the order of steps matters. Every process
that is started with the variable obeys it and counts for itself. Of workers and custodians only the first incarnation
does, because its successors would die too.

Without the variable it costs nothing on the fault path: those steps are wrapped when a process starts, and only if
their point is armed (``before``, ``around``, ``watched``). Elsewhere ``at`` compares two strings.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from .programs import environment as environment_of_programs

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

VARIABLE = "POSTCOPY_CRASH_AT"

POINTS = {
    # a worker, local block
    "worker.read": "a fault is read, nothing is placed",
    "worker.copied": "the page is in the block, not marked (a shared client already runs)",
    "worker.marked": "placed and marked, a private client is not woken",
    "worker.woken": "a private client is woken, nothing more is done",
    # a worker, remote block
    "worker.unasked": "a fault is read, no request is sent",
    "worker.asked": "the request is sent to the supervisor",
    "worker.told": "the supervisor has sent Wake, the client is not woken",
    # a worker of a virtual machine
    "machine.read": "its messages are read, nothing is noted",
    # the supervisor on the attach socket: between a message of a client and its answer
    "door.Hello": "a client has sent it, no answer",
    "door.Welcome": "it is answered, no userfaultfd yet",
    "door.OfferUserfaultfd": "the userfaultfd is received, not kept by the custodian",
    "door.UserfaultfdAccepted": "it is kept, and the client knows",
    "door.OpenBlock": "a client has sent it, no answer",
    "door.BlockOpened": "the client has the block's memory",
    "door.Mapped": "the client has mapped it, nothing is registered",
    "door.Attached": "the client may touch it, as it knows",
    "door.Unmap": "a client has sent it, its worker still serves the region",
    "door.Unmapped": "the client may unmap it, as it knows",
    "door.Goodbye": "a client has sent it, nothing of it is removed",
    "door.Resume": "a client resumes after a supervisor's death, no answer",
    "door.Resumed": "it is answered",
    # the supervisor, remote block
    "page.arrived": "a page of a source is received, not placed",
    "page.placed": "placed, not marked",
    "page.marked": "placed and marked, no Wake is sent",
    # a supervisor that takes over
    "takeover.asked": "the custodian has been asked for what it keeps",
    "takeover.half": "some of it is received",
    "takeover.judged": "all of it is received and valid, nothing is changed yet",
    "takeover.moved": "clients and workers are adopted, no client is answered yet",
    "takeover.ready": "it is ready, its predecessor's clients have not resumed",
    # a supervisor that rescues clients of a service that has died altogether
    "rescue.fetched": "their descriptors are fetched, nothing is changed yet",
    "rescue.alone": "workers that survived are ended, no new one is started",
    # the custodian
    "custodian.forked": "a worker is forked, the supervisor does not know",
    "custodian.announced": "the supervisor has its pidfd, the worker does not run yet",
    "custodian.released": "the worker runs",
    "custodian.kept": "something more is kept",
    # a page source
    "source.asked": "ranges are requested, nothing is read",
    "source.answered": "the answer is sent",
}
"""Every point, and the state in which the process dies."""

_point, _left = "", 0


def arm(text: str) -> None:
    """Arm ``POINT[:N]``, or nothing for an empty text. Raises ValueError for an unknown point."""
    global _point, _left
    point, colon, number = text.partition(":")
    if text and (point not in POINTS or (colon and not number.isdecimal())):
        raise ValueError(f"{VARIABLE}={text}: unknown point; there are {', '.join(POINTS)}")
    _point, _left = point, int(number or "1")


def disarm() -> None:
    """Disarm this process."""
    arm("")


def armed(*points: str) -> bool:
    """Whether this process dies at one of these points."""
    return _point in points


def environment(first: bool, prefix: str) -> dict[str, str]:
    """The environment for a process whose points begin with ``prefix``: only the first incarnation gets it."""
    kept = environment_of_programs()
    if not first and _point.startswith(prefix):
        kept.pop(VARIABLE, None)
    return kept


def at(point: str) -> None:
    """This process reaches a point."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def before(point: str, act: Callable[P, R]) -> Callable[P, R]:
    """``act``; if this point is armed, with the point before it."""
    return around(point, act, "")


def around(point: str, act: Callable[P, R], behind: str) -> Callable[P, R]:
    """``act``; if one of the points is armed, between them."""
    if not armed(point, behind) or not _point:
        return act

    def with_points(*args: P.args, **named: P.kwargs) -> R:
        at(point)
        answer = act(*args, **named)
        at(behind)
        return answer

    return with_points


def watched(thing: T, method: str, point: str, behind: str) -> T:
    """``thing``; if one of the points is armed, a stand-in for it whose ``method`` is between them."""
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
