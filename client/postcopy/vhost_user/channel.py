"""The stream socket to a back-end: one question, one answer, every wait with a timeout.

A back-end may sleep in a page fault on its message thread and answer only when the page has arrived. So a wait may be
long; it ends early when the connection or the back-end's process ends."""

from __future__ import annotations

import array
import errno
import select
import socket
from contextlib import suppress

from postcopy_kernel.descriptors import Credentials, close_all, descriptors_in, peer_credentials, peer_pidfd
from postcopy_protocol.vhost_conversation import Question
from postcopy_protocol.vhost_user import MOST_DESCRIPTORS, Frame, FrameReader, VhostUserError

from ..deadline import Deadline
from ..errors import BackEndGone, BackEndTimeout, PostcopyError


class Channel:
    """A connection to the back-end that listens at ``path``. Raises BackEndGone when there is none."""

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout
        self._reader = FrameReader()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> None:
        try:
            self._socket.connect(self.path)
        except OSError as error:
            reasons = {errno.ENOENT: "no such socket", errno.ECONNREFUSED: "no process listens"}
            reason = reasons.get(error.errno or 0, error.strerror)
            raise BackEndGone(
                f"no vhost-user back-end at {self.path}: {reason}; start it as the server of that socket"
            ) from None
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def credentials(self) -> Credentials:
        """Of the process that made the listening socket, usually the back-end itself."""
        return peer_credentials(self._socket)

    def pidfd(self) -> int:
        """A pidfd of that process (the caller's to close). Raises BackEndGone."""
        try:
            return peer_pidfd(self._socket)
        except OSError as error:
            raise BackEndGone(f"the process that made {self.path} is gone ({error.strerror})") from None

    @property
    def hung_up(self) -> bool:
        """Whether the back-end has closed the connection. Never waits."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def ask(self, question: Question) -> Frame | None:
        """Send a question and return the answer's frame, or None without an answer. The caller owns its descriptors.

        Raises BackEndGone (it hung up), BackEndTimeout, VhostUserError (malformed frame)."""
        self.send(question)
        return self.receive(question.request.name) if question.answered else None

    def send(self, question: Question) -> None:
        """Send header, payload and descriptors in one message, as the specification demands."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", question.fds))] if question.fds else []
        data, deadline = memoryview(question.data), Deadline(self.timeout)
        while data:
            try:
                sent = self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, question.request.name)
                continue
            except OSError as error:
                raise self._gone(question.request.name) from error
            data, rights = data[sent:], []

    def receive(self, what: str, timeout: float | None = None) -> Frame:
        """The next frame. ``what`` names it in error messages."""
        deadline = Deadline(self.timeout if timeout is None else timeout)
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    self._reader.wanted, socket.CMSG_SPACE(4 * (MOST_DESCRIPTORS + 1)), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, what)
                continue
            except OSError as error:
                raise self._gone(what) from error
            fds = descriptors_in(ancillary)
            if flags & socket.MSG_CTRUNC:
                close_all(fds)
                raise VhostUserError("framing", f"the answer to {what} came with too many descriptors")
            if not data:
                raise self._gone(what)
            if (frame := self._feed(data, fds)) is not None:
                return frame

    def _feed(self, data: bytes, fds: tuple[int, ...]) -> Frame | None:
        try:
            return self._reader.feed(data, fds)
        except VhostUserError:
            close_all(self._reader.dropped())
            raise

    def _wait(self, event: int, deadline: Deadline, what: str) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        if not poll.poll(deadline.milliseconds()):
            raise BackEndTimeout(f"the back-end at {self.path} did not answer {what} within {deadline.seconds} s")

    def _gone(self, what: str) -> PostcopyError:
        return BackEndGone(f"the back-end at {self.path} closed the connection at {what}; its own log says why")

    def close(self) -> None:
        close_all(self._reader.dropped())
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def close_frame(frame: Frame | None) -> None:
    """Close the descriptors of a frame that is not used."""
    if frame is not None:
        close_all(frame.fds)


def is_listening(path: str) -> bool:
    """Whether a process listens at ``path``. Read from /proc, because the back-end would take a connection for a
    front-end."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as lines:
        return any(line.rstrip("\n").endswith(" " + path) and " 00010000 " in line for line in lines)
