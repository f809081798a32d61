"""Lives of workers on the simulated kernel, driven one system call at a time.

The code under test is plain and synchronous, so each life is a thread that stands still before every system call until
it is told to go on: ``step`` lets it make one call and run on to the next. That makes every interleaving of several
workers reachable, and killing one before or after any call is an exception thrown out of that call.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from typing import Any

from postcopy_kernel import abi
from postcopy_workers.placing import Calls
from tests.simulated.kernel import Kernel

PATIENCE = 30.0
NAMES = {
    abi.UFFDIO_COPY: "copy",
    abi.UFFDIO_CONTINUE: "continue",
    abi.UFFDIO_POISON: "poison",
    abi.UFFDIO_WAKE: "wake",
}


class Killed(BaseException):
    """SIGKILL, as the code under test cannot see it: nothing catches this."""


class Life:
    """One process's main thread. ``at`` names the call it stands before; ``end`` says how it ended."""

    def __init__(self, work: Callable[[Life], None]) -> None:
        self.at = ""
        self.end: BaseException | None = None
        self.over = False
        self.calls = 0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._kill = ""
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, work: Callable[[Life], None]) -> None:
        try:
            work(self)
        except BaseException as end:
            self.end = end
        self.over = True
        self._back.release()

    def _wait(self) -> None:
        assert self._back.acquire(timeout=PATIENCE), f"stuck behind {self.at}: it waits for something but a call"
        if self.over:
            self._thread.join(PATIENCE)
            # `raise` here, in the test, whatever the code under test did not mean to raise.
            if self.end is not None and not isinstance(self.end, (Killed, Exception)):
                raise self.end

    def step(self) -> None:
        """Make the call it stands before, and run to the next one."""
        self.calls += 1
        self._go.release()
        self._wait()

    def kill(self, when: str) -> None:
        """``before`` or ``after`` the call it stands before."""
        if not self.over:
            self._kill = when
            self._go.release()
            self._wait()
        assert self.over

    def call(self, name: str, perform: Callable[[], Any]) -> Any:
        """Inside the life: stand before a system call until told to make it."""
        if self._dying():
            raise Killed
        self.at = name
        self._back.release()
        self._go.acquire()
        if self._dying() == "before":
            raise Killed
        try:
            return perform()
        finally:
            if self._dying():
                raise Killed

    def _dying(self) -> str:
        return self._kill

    def calls_of(self, kernel: Kernel) -> Calls:
        """The port of the code under test, every call a place to stand."""
        return Calls(
            ioctl=lambda fd, request, buffer: self.call(NAMES[request], lambda: kernel.ioctl(fd, request, buffer)),
            lseek=lambda fd, offset, whence: int(self.call("lseek", lambda: kernel.lseek(fd, offset, whence))),
            pread=lambda fd, length, offset: bytes(self.call("pread", lambda: kernel.pread(fd, length, offset))),
            pwrite=lambda fd, data, offset: int(self.call("pwrite", lambda: kernel.pwrite(fd, data, offset))),
            lockf=lambda _, how, length, start: self._lock(kernel, how, start, start + length),
        )

    def _lock(self, kernel: Kernel, how: int, start: int, end: int) -> None:
        """A record lock: it waits while another life has it, and tries that cost nothing are not counted."""
        if how == fcntl.LOCK_UN:
            self.call("unlock", lambda: kernel.locks.pop(self))
            return

        def locked() -> bool:
            others = [at for life, at in kernel.locks.items() if isinstance(life, Life) and not life.over]
            if any(first < end and start < last for first, last in others):
                return False
            kernel.locks[self] = (start, end)
            return True

        while not self.call("lock", locked):
            self.calls -= 1
