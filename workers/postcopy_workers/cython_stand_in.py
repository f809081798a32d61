"""What ``fault_loop`` uses of Cython and of C, for the interpreter: so it runs where Cython is not installed. Compiled,
the same names are those of ``fault_loop.pxd``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter_ns as clock
from typing import Any

from postcopy_protocol.counters import bucket

__all__ = ["bucket", "bytes_of", "clock", "compiled", "ioctl_of", "nogil", "read", "use_ioctl", "words_of"]

compiled: bool = False
nogil = nullcontext()


def bytes_of(view: memoryview) -> memoryview:
    """A pointer to bytes; here the view."""
    return view


def words_of(view: Any) -> Any:
    """A pointer to u64; here what it would point to."""
    return view


def ioctl_of(ioctl: Callable[..., Any]) -> Callable[..., Any]:
    """A pointer to ioctl(2), or to a function that calls ``ioctl``."""
    return ioctl


def use_ioctl(ioctl: Callable[..., Any]) -> None:
    """The function for those pointers, on this thread. Here each is its own."""


def read(userfaultfd: int, fields: Any) -> int:
    """read(2) of messages: bytes, 0 (interrupted, or none is there), or a negative errno. Here ``FaultLoop.read`` is
    used."""
    raise NotImplementedError
