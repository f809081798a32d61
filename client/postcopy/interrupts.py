"""Signals during an attach: they are held while descriptors are between two owners, and let through while it waits.

A handler, such as Ctrl-C's, may raise at any instruction; a descriptor that was just received would stay open for ever.
In a process of several threads another one may take the signal; then this is a matter of microseconds, as before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Faults must reach their handler: the kernel ends a process that blocks them.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGABRT}
_HELD = frozenset(signal.valid_signals() - _FAULTS)
_thread = threading.local()


@contextmanager
def held() -> Iterator[None]:
    """Signals of this thread wait until the end of the block, or until ``allowed``."""
    outer = getattr(_thread, "before", None)
    _thread.before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    before = _thread.before
    try:
        yield
    finally:
        _thread.before = outer
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def allowed() -> Iterator[None]:
    """Inside ``held``: signals come through, as for a wait of any length."""
    before = getattr(_thread, "before", None)
    if before is None:
        yield
        return
    inside = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, inside)
