"""One epoll for everything that a router's thread waits for: descriptors, timers, sockets of libzmq."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from typing import Protocol

from .transport import Action

AT_ONCE = 64  # events that are handled before epoll is asked again

EventAction = Callable[[int], object]  # receives epoll's event mask of a descriptor


class PolledSocket(Protocol):
    """A socket that must be asked whether it has messages: the descriptor of a libzmq socket is readable only once when
    something changed, and any send or receive may consume that."""

    def fileno(self) -> int: ...
    def waiting(self) -> bool: ...
    def receive(self) -> None: ...


class Reactor:
    """For one thread."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self._actions: dict[int, EventAction] = {}
        self._timers: list[tuple[float, Action]] = []
        self._polled: list[PolledSocket] = []
        self._again: list[EventAction] = []

    def watch(self, fd: int, act: Action) -> None:
        """Call ``act`` in ``turn`` when the descriptor is readable."""
        self.register(fd, lambda mask: act())

    def register(self, fd: int, act: EventAction) -> None:
        """As ``watch``; ``act`` receives the event mask."""
        self.epoll.register(fd, select.EPOLLIN)
        self._actions[fd] = act

    def poll_socket(self, socket: PolledSocket) -> None:
        """Receive from this socket in ``turn``."""
        self.watch(socket.fileno(), lambda: None)  # it only ends the wait
        self._polled.append(socket)

    def forget(self, fd: int) -> None:
        """Undo ``watch``; to be called before the descriptor is closed."""
        self._actions.pop(fd, None)
        with contextlib.suppress(OSError):
            self.epoll.unregister(fd)

    def call_later(self, seconds: float, act: Action) -> None:
        """Call ``act`` in ``turn`` after this time."""
        self._timers.append((time.monotonic() + seconds, act))

    def again(self, act: EventAction) -> None:
        """Call ``act`` with no event in the next turn: a peer's share of this one is used up."""
        self._again.append(act)

    def turn(self, seconds: float = -1) -> None:
        """Wait for events, at most ``seconds`` (below 0: no limit), and handle them."""
        if self._timers:
            seconds = self._run_timers(seconds)
        polled, again = self._polled, self._again
        if again or (polled and self._any_waits()):
            seconds = 0
        self._again = []
        actions = self._actions
        for fd, mask in self.epoll.poll(seconds, AT_ONCE):
            act = actions.get(fd)
            if act is not None:  # else an action before it has closed it
                act(mask)
        for act in again:
            act(0)
        for socket in polled:
            socket.receive()

    def waiting(self) -> bool:
        """Would ``turn`` find an event without waiting?"""
        return bool(self._again) or bool(self.epoll.poll(0, 1)) or (bool(self._polled) and self._any_waits())

    def _any_waits(self) -> bool:
        """Asks every socket, because asking re-arms its descriptor."""
        waits = False
        for socket in self._polled:
            waits |= socket.waiting()
        return waits

    def _run_timers(self, seconds: float) -> float:
        """Run what is due; returns how long ``turn`` may wait then."""
        now = time.monotonic()
        due = [act for at, act in self._timers if at <= now]
        self._timers = [entry for entry in self._timers if entry[0] > now]
        for act in due:
            act()
        soonest = min((at for at, _ in self._timers), default=None)
        if soonest is None:
            return seconds
        wait = max(0.0, soonest - now)
        return wait if seconds < 0 else min(wait, seconds)
