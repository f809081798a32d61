"""The supervisor's side of the custodian: start it or adopt a predecessor's, give it duplicates, order forks, start it
anew when it dies."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from postcopy_kernel import crashpoints, descriptors, process
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Adopt, Dismiss, Drop, ForkWorker, Keep, Message, WhenOrphaned

log = logging.getLogger(__name__)
BUFFER = 4 << 20
END_SECONDS = 3.0


class CustodianClient:
    """``keep`` and ``drop`` are remembered: a new custodian is given everything that the old one kept, and the workers
    that ``adopt`` names."""

    def __init__(self, directory: str, orphans: WhenOrphaned, *, device: bool) -> None:
        """``device``: workers make their own userfaultfd through /dev/userfaultfd, for which they need no rights."""
        self._device = device
        self._directory = directory
        self._orphans = orphans
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._unsent: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.channel: socket.socket | None = None
        self.pid = 0

    def start(self) -> socket.socket:
        """A new custodian; returns the channel to listen to. Raises OSError when there is no room for it (processes,
        memory, descriptors)."""
        self.reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        ours.setblocking(False)
        command = [sys.executable, "-m", "postcopy_workers.custodian", "--channel", str(theirs.fileno())]
        command += ["--directory", self._directory]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command if self._device else [*command, "--keep-privileges"],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=crashpoints.environment(self.pid == 0, "custodian."),
                )
            pidfd = process.pidfd_open(self._process.pid)
        except OSError:
            ours.close()
            self._give_up()
            raise
        self._is_at(ours, self._process.pid, pidfd)
        for key, (meta, fds) in self._kept.items():
            self._send(Keep(key, meta), fds)
        return ours

    def _give_up(self) -> None:
        """There is no descriptor to hold what has been started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def take_over(self, channel: socket.socket, pid: int, pidfd: int) -> None:
        """The custodian of a predecessor is ours from now on."""
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._is_at(channel, pid, pidfd)

    def _is_at(self, channel: socket.socket, pid: int, pidfd: int) -> None:
        self.channel, self.pid, self._pidfd = channel, pid, pidfd
        self._unsent.clear()
        self._send(self._orphans, ())

    def adopt(
        self, worker: int, incarnation: int, pid: int, pidfd: int, keys: Sequence[str], assignment: bytes
    ) -> None:
        """A worker that this custodian has not forked."""
        self._send(Adopt(worker, incarnation, pid, tuple(keys), assignment), (pidfd,))

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        """Duplicates of ``fds`` under ``key``; the caller keeps its own open until ``drop``."""
        self._kept[key] = (meta, tuple(fds))
        self._send(Keep(key, meta), fds)

    def drop(self, key: str) -> None:
        if self._kept.pop(key, None) is not None:
            self._send(Drop(key), ())

    def forget(self, key: str) -> None:
        """Drop what a predecessor kept and we never had."""
        self._send(Drop(key), ())

    def fork(self, worker: int, incarnation: int, keys: Sequence[str], assignment: bytes) -> None:
        self._send(ForkWorker(worker, incarnation, tuple(keys), assignment), ())

    def _send(self, message: Message, fds: Sequence[int]) -> None:
        if self.channel is None:
            return
        self._unsent.append((encode(message), tuple(fds)))
        self.flush()

    def flush(self) -> None:
        """Send what the custodian would not take before; called again and again until nothing is left."""
        while self._unsent and self.channel is not None:
            data, fds = self._unsent[0]
            try:
                descriptors.send_message(self.channel, data, fds)
            except BlockingIOError:
                return
            except OSError as error:
                # EBADF: the client left while its word waited. Anything else: the custodian is gone, which its channel
                # says.
                log.debug("a word to the custodian is not sent: %s", error)
            self._unsent.popleft()

    @property
    def behind(self) -> bool:
        """Is anything still unsent?"""
        return bool(self._unsent)

    def kill(self) -> None:
        """It does not answer: its channel will end, and another takes its place."""
        self._kill()

    def lost(self) -> None:
        """Its channel has ended. It is killed first if it lives: left alone, it would replace workers by itself, and
        two lives would read one userfaultfd."""
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
        """Wait for its end, then insist."""
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
        """Orderly: dismissed, it ends with its last worker."""
        self._send(Dismiss(), ())
        self._close()
        self.reap()

    def step_aside(self) -> None:
        """Leave everything to a successor, once all that was said is sent."""
        deadline = time.monotonic() + END_SECONDS
        while self._unsent and self.channel is not None and time.monotonic() < deadline:
            select.select([], [self.channel], [], 0.1)
            self.flush()
        if self._unsent:
            log.error("the custodian does not take its last %d words", len(self._unsent))
        self._close()
