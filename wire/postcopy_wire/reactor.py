"""One epoll for everything that a router's thread waits for: descriptors, timers, sockets of libzmq."""

from __future__ import annotations

import contextlib
import select
import time
from typing import Protocol

from .newcomers import EventAction, Newcomers
from .transport import Action

AT_ONCE = 64  # events that are handled before epoll is asked again


class PolledSocket(Protocol):
    """A socket that must be asked whether it has messages: the descriptor of a libzmq socket is readable only once when
    something changed, and any send or receive may consume that."""

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
        self._newcomers: Newcomers | None = None
        self._newcomers_ready = self._newcomers_paused = False

    def watch(self, fd: int, act: Action) -> None:
        """Call ``act`` in ``turn`` when the descriptor is readable."""
        self.register(fd, lambda mask: act())

    def register(self, fd: int, act: EventAction, *, newcomer: bool = False) -> None:
        """As ``watch``; ``act`` receives epoll's event mask. A newcomer gets a small share of the thread's time."""
        if not newcomer:
            self.epoll.register(fd, select.EPOLLIN)
            self._actions[fd] = act
            return
        newcomers = self._newcomers
        if newcomers is None:
            newcomers = self._newcomers = Newcomers(self._pause_newcomers)
            self.watch(newcomers.epoll.fileno(), self._note_newcomers)
        newcomers.epoll.register(fd, select.EPOLLIN)
        newcomers.actions[fd] = act

    def modify(self, fd: int, events: int) -> None:
        """Wait for these events of epoll from now on."""
        epoll = self.epoll if self._newcomers is None or fd in self._actions else self._newcomers.epoll
        epoll.modify(fd, events)

    def poll_socket(self, socket: PolledSocket) -> None:
        """Receive from this socket in ``turn``. The caller watches its descriptors."""
        self._polled.append(socket)

    def forget(self, fd: int) -> None:
        """Undo ``watch``; to be called before the descriptor is closed."""
        epoll = self.epoll
        if self._actions.pop(fd, None) is None and self._newcomers is not None:
            epoll = self._newcomers.epoll
            self._newcomers.forget(fd)
        with contextlib.suppress(OSError):
            epoll.unregister(fd)

    def call_later(self, seconds: float, act: Action) -> None:
        """Call ``act`` in ``turn`` after this time."""
        self._timers.append((time.monotonic() + seconds, act))

    def again(self, fd: int, act: EventAction) -> None:
        """Call ``act`` with no event in the next turn: a peer's share of this one is used up."""
        if self._newcomers is not None and fd in self._newcomers.actions:
            self._newcomers.again(fd, act)
        else:
            self._again.append(act)

    def turn(self, seconds: float = -1) -> None:
        """Wait for events, at most ``seconds`` (below 0: no limit), and handle them."""
        if self._timers:
            seconds = self._run_timers(seconds)
        polled, again = self._polled, self._again
        if again or (polled and self._any_waits()) or (self._newcomers is not None and self._newcomer_waits()):
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
        if self._newcomers is not None and (self._newcomers_ready or self._newcomer_waits()):
            self._newcomers_ready = False
            self._newcomers.serve()

    def waiting(self) -> bool:
        """Would ``turn`` find an event without waiting?"""
        if self._again or self.epoll.poll(0, 1) or (self._polled and self._any_waits()):
            return True
        return self._newcomer_waits()

    def close_epolls(self) -> None:
        """Close the descriptors of the reactor itself."""
        self.epoll.close()
        if self._newcomers is not None:
            self._newcomers.epoll.close()

    def _any_waits(self) -> bool:
        """Asks every socket, because asking re-arms its descriptor."""
        waits = False
        for socket in self._polled:
            waits |= socket.waiting()
        return waits

    def _note_newcomers(self) -> None:
        self._newcomers_ready = True  # they are served after all others of this turn

    def _newcomer_waits(self) -> bool:
        """Is there a newcomer to be called again now?"""
        return self._newcomers is not None and self._newcomers.waits and not self._newcomers_paused

    def _pause_newcomers(self, seconds: float) -> None:
        assert self._newcomers is not None
        self._newcomers_paused = True
        self.epoll.modify(self._newcomers.epoll.fileno(), 0)
        self.call_later(seconds, self._resume_newcomers)

    def _resume_newcomers(self) -> None:
        assert self._newcomers is not None
        self._newcomers_paused = False
        self.epoll.modify(self._newcomers.epoll.fileno(), select.EPOLLIN)

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
