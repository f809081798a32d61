"""The supervisor's side of the custodian: start it, give it duplicates, order forks, start it anew when it dies."""

from __future__ import annotations

import collections
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Sequence

from postcopy_kernel import crashpoints, descriptors
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Dismiss, Drop, ForkWorker, Keep, Message

log = logging.getLogger(__name__)
BUFFER = 4 << 20


class Custody:
    """``keep`` and ``drop`` are remembered: a new custodian is given everything that the old one kept."""

    def __init__(self, directory: str, *, device: bool) -> None:
        """``directory``: the runtime directory. ``device``: workers make their own userfaultfd through
        /dev/userfaultfd, for which they need no rights."""
        self._directory = directory
        self._device = device
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        self._unsent: collections.deque[tuple[bytes, tuple[int, ...]]] = collections.deque()
        self._process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.pid = 0

    def start(self) -> socket.socket:
        """A new custodian; returns the channel to listen to."""
        self.reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        ours.setblocking(False)
        command = [sys.executable, "-m", "postcopy_workers.custodian", "--channel", str(theirs.fileno())]
        command += ["--directory", self._directory]
        with theirs:
            self._process = subprocess.Popen(
                command if self._device else [*command, "--keep-privileges"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=crashpoints.environment(self.pid == 0, "custodian."),
            )
        self.channel, self.pid = ours, self._process.pid
        self._unsent.clear()
        for key, (meta, fds) in self._kept.items():
            self._send(Keep(key, meta), fds)
        return ours

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        """Duplicates of ``fds`` under ``key``; the caller keeps its own open until ``drop``."""
        self._kept[key] = (meta, tuple(fds))
        self._send(Keep(key, meta), fds)

    def drop(self, key: str) -> None:
        if self._kept.pop(key, None) is not None:
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

    def lost(self) -> None:
        """Its channel has ended. It is killed first if it lives: left alone, it would replace workers by itself, and
        two lives would read one userfaultfd."""
        if self._process is not None:
            self._process.kill()
        self._close()

    def _close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = None

    def reap(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(5)
            self._process = None

    def end(self) -> None:
        """Orderly: dismissed, it ends with its last worker."""
        self._send(Dismiss(), ())
        self._close()
        self.reap()
