"""Who touches memory in these tests: threads without the GIL, and child processes.

A test that answers faults must never touch missing memory itself: a Python read of it sleeps with the GIL held, and the
line that would answer never runs. So threads touch by :func:`postcopy_kernel.memory.advise` (MADV_POPULATE_READ) or by
memmove, both of which let the GIL go, and everything that may go wrong for good happens in a child that can be killed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import select
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from postcopy_kernel import memory
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import Event, Feature, PageFault, RegisterMode, Userfaultfd, open_userfaultfd

PATIENCE = 10.0  # seconds until a wait is a failure
NO_FEATURES = Feature(0)


class Toucher:
    """A thread that populates ``[address, address + length)`` and keeps the errno (0: every page came)."""

    def __init__(self, address: int, length: int = PAGE, *, write: bool = False) -> None:
        self._advice = memory.POPULATE_WRITE if write else memory.POPULATE_READ
        self._result: int | None = None
        self._thread = threading.Thread(target=self._touch, args=(address, length), daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """The kernel's number of the thread."""
        assert self._thread.native_id is not None
        return self._thread.native_id

    def _touch(self, address: int, length: int) -> None:
        self._result = memory.advise(address, length, self._advice)

    def result(self) -> int:
        """Wait for the end of the touch."""
        self._thread.join(PATIENCE)
        assert self._result is not None, "the toucher still sleeps"
        return self._result

    @property
    def asleep(self) -> bool:
        return self._result is None


class Reader:
    """A thread that reads one byte at ``address`` as a program does, not by madvise: signals interrupt its wait."""

    def __init__(self, address: int) -> None:
        self._result = b""
        self._thread = threading.Thread(target=self._read, args=(address,), daemon=True)
        self._thread.start()
        assert self._thread.ident is not None
        self.ident = self._thread.ident

    def _read(self, address: int) -> None:
        self._result = fetch(address)

    def result(self) -> bytes:
        self._thread.join(PATIENCE)
        assert self._result, "the reader still sleeps"
        return self._result


class Child:
    """A forked process that runs ``body(socket)``; the other end of the SEQPACKET socket is ``self.socket``.

    Exits 0 when the body returns, 1 (traceback on stderr) when it raises. Leaving the block kills what still runs.
    """

    def __init__(self, body: Callable[[socket.socket], object]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.pid = os.fork()
        if self.pid == 0:
            self.socket.close()
            _run(body, theirs)
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        os.close(self.pidfd)
        self.socket.close()

    def kill(self) -> None:
        if self._status is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.exit_code()

    def exit_code(self) -> int:
        """Wait for the end: what it exited with, or the negative signal that ended it."""
        if self._status is None:
            assert readable(self.pidfd), "the child does not end"
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def ask(self, word: bytes = b"go") -> bytes:
        """Say a word and wait for the answer."""
        self.socket.send(word)
        return self.socket.recv(4096)


def _run(body: Callable[[socket.socket], object], theirs: socket.socket) -> None:
    code = 1
    faulthandler.disable()  # some are meant to die by SIGSEGV
    try:
        theirs.settimeout(PATIENCE)
        body(theirs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Arena:
    """``pages`` pages of a new memfd (or of anonymous memory), mapped shared, registered with a userfaultfd of ours."""

    def __init__(
        self,
        pages: int = 4,
        *,
        mode: RegisterMode = RegisterMode.MISSING,
        features: Feature = NO_FEATURES,
        anonymous: bool = False,
    ) -> None:
        self.length = pages * PAGE
        self.fd = -1 if anonymous else memory.create_memfd("arena", self.length)
        self.mapping = Mapping.anonymous(self.length) if anonymous else Mapping.of(self.fd, self.length)
        self.start = self.mapping.address
        self.ufd = open_userfaultfd()
        self.ufd.handshake(features)
        self.ioctls = self.ufd.register(self.start, self.length, mode)

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ufd.close()  # whoever still sleeps after a failure goes on with zeros
        self.mapping.close()
        if self.fd >= 0:
            os.close(self.fd)

    def page(self, number: int) -> int:
        return self.start + number * PAGE


class Page:
    """A page of known bytes to copy from, kept by the test."""

    def __init__(self, fill: bytes = b"x", pages: int = 1) -> None:
        self.bytes = fill * (pages * PAGE // len(fill))
        self._buffer = ctypes.create_string_buffer(self.bytes, len(self.bytes))
        self.address = ctypes.addressof(self._buffer)


def readable(thing: int | Userfaultfd | socket.socket, seconds: float = PATIENCE) -> bool:
    poll = select.poll()
    poll.register(thing, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def next_events(ufd: Userfaultfd, limit: int = 64) -> list[Event]:
    """The events that come next; waits for the first."""
    assert readable(ufd), "no message came"
    return ufd.read(limit)


def next_fault(ufd: Userfaultfd) -> PageFault:
    """The one fault that comes next."""
    (event,) = next_events(ufd, limit=1)
    assert isinstance(event, PageFault)
    return event


def fetch(address: int, length: int = 1) -> bytes:
    """Read memory without the GIL (string_at would keep it)."""
    target = ctypes.create_string_buffer(length)
    ctypes.memmove(target, address, length)
    return target.raw


def store(address: int, data: bytes) -> None:
    """Write memory without the GIL."""
    ctypes.memmove(address, data, len(data))


def use_up_descriptors() -> None:
    """Leave this process (a child) no descriptor to open, neither at the end nor in a hole below it."""
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    while os.open("/dev/null", os.O_RDONLY) < highest:
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
