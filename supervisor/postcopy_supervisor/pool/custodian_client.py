"""The supervisor's side of the custodian: start or take over one, give it duplicates of descriptors, order forks."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from postcopy_kernel import crashpoints, descriptors, process, programs
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Adopt, Dismiss, Drop, ForkWorker, Keep, Message, WhenOrphaned

log = logging.getLogger(__name__)
BUFFER = 4 << 20
END_SECONDS = 3.0


class Store(Protocol):
    """Another place for what the custodian keeps, in case that it dies together with the supervisor."""

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None: ...
    def drop(self, key: str) -> None: ...
    def retain(self, keys: Collection[str]) -> None: ...
    def clear(self) -> None: ...
    def flush(self) -> None: ...


class CustodianClient:
    """Remembers what ``keep`` and ``drop`` were given: a new custodian gets everything that the old one kept, and the
    workers that ``adopt`` names."""

    def __init__(
        self,
        directory: str,
        orphans: WhenOrphaned,
        *,
        device: bool,
        log_format: str = "text",
        stores: Sequence[Store] = (),
    ) -> None:
        """``device``: workers make their userfaultfd through /dev/userfaultfd, for which they need no privilege."""
        self._stores = tuple(stores)
        self._device, self._directory, self._orphans = device, directory, orphans
        self._log_format = log_format
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._unsent: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.channel: socket.socket | None = None
        self.pid = 0

    def start(self) -> socket.socket:
        """Start a new custodian; returns its channel. Raises OSError when processes, memory or descriptors are
        exhausted."""
        self.reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        ours.setblocking(False)
        options = ["--channel", str(theirs.fileno()), "--directory", self._directory, "--log-format", self._log_format]
        options += [] if self._device else ["--keep-privileges"]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    programs.command("postcopy_workers.custodian", *options),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=crashpoints.environment(self.pid == 0, "custodian."),
                )
            pidfd = process.pidfd_open(self._process.pid)
        except OSError:
            ours.close()
            self._abandon_process()
            raise
        self._connect(ours, self._process.pid, pidfd)
        for key, (meta, fds) in self._kept.items():
            self._send(Keep(key, meta), fds)
        return ours

    def _abandon_process(self) -> None:
        """Kill what has been started: no descriptor is left for its pidfd."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def take_over(self, channel: socket.socket, pid: int, pidfd: int) -> None:
        """Use the custodian of the previous supervisor from now on."""
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._connect(channel, pid, pidfd)

    def _connect(self, channel: socket.socket, pid: int, pidfd: int) -> None:
        self.channel, self.pid, self._pidfd = channel, pid, pidfd
        self._unsent.clear()
        self._send(self._orphans, ())

    def adopt(
        self, worker: int, incarnation: int, pid: int, pidfd: int, keys: Sequence[str], assignment: bytes
    ) -> None:
        """Give it a worker that it has not forked."""
        self._send(Adopt(worker, incarnation, pid, tuple(keys), assignment), (pidfd,))

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        """Give it duplicates of ``fds`` under ``key``; the caller keeps its own open until ``drop``."""
        self._kept[key] = (meta, tuple(fds))
        for store in self._stores:
            store.keep(key, meta, fds)
        self._send(Keep(key, meta), fds)

    def drop(self, key: str) -> None:
        if self._kept.pop(key, None) is not None:
            self._send(Drop(key), ())
            for store in self._stores:
                store.drop(key)

    def tidy_stores(self) -> None:
        """After a take-over, or at a fresh start: nothing stays in the stores that is not kept any more."""
        for store in self._stores:
            store.retain(self._kept.keys())

    def fill_stores(self) -> None:
        """Give the stores everything again: the runtime directory was removed."""
        for key, (meta, fds) in self._kept.items():
            for store in self._stores:
                store.keep(key, meta, fds)

    def forget(self, key: str) -> None:
        """Drop what the previous supervisor kept and this one never had."""
        self._send(Drop(key), ())

    def fork(self, worker: int, incarnation: int, keys: Sequence[str], assignment: bytes) -> None:
        self._send(ForkWorker(worker, incarnation, tuple(keys), assignment), ())

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        if self.channel is None:
            return
        self._unsent.append((encode(message), tuple(fds)))
        self.flush()

    def flush(self) -> None:
        """Send what the custodian did not take before; called at every tick until nothing is left."""
        for store in self._stores:
            store.flush()
        while self._unsent and self.channel is not None:
            data, fds = self._unsent[0]
            try:
                descriptors.send_message(self.channel, data, fds)
            except BlockingIOError:
                return
            except OSError as error:
                # EBADF: the client left while its message waited. Anything else: the custodian is gone, and its channel
                # reports that.
                log.debug("a message to the custodian is not sent: %s", error)
            self._unsent.popleft()

    @property
    def behind(self) -> bool:
        """Is anything still unsent?"""
        return bool(self._unsent)

    def kill(self) -> None:
        """Kill a custodian that does not answer: its channel ends, and another is started."""
        self._kill()

    def lost(self) -> None:
        """Its channel has ended. It is killed if it still lives: an orphan replaces workers on its own, and then two
        processes would read one userfaultfd."""
        self._kill()
        self._close()

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                process.pidfd_signal(self._pidfd, signal.SIGKILL)

    def _close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = None

    def reap(self) -> None:
        """Wait for its end, then kill it."""
        if self._pidfd < 0:
            return
        if not process.pidfd_exited(self._pidfd, END_SECONDS):
            self._kill()
            process.pidfd_exited(self._pidfd, END_SECONDS)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._process is not None:
            self._process.wait(END_SECONDS)
            self._process = None

    def end(self) -> None:
        """End it in order: once dismissed, it ends with its last worker."""
        self._send(Dismiss(), ())
        self._close()
        self.reap()
        for store in self._stores:
            store.clear()

    def step_aside(self) -> None:
        """Leave everything to a later supervisor, after sending what is queued."""
        deadline = time.monotonic() + END_SECONDS
        while self._unsent and self.channel is not None and time.monotonic() < deadline:
            select.select([], [self.channel], [], 0.1)
            self.flush()
        if self._unsent:
            log.error("the custodian does not read its last %d messages", len(self._unsent))
        self._close()
