"""The client's end of the door: one question, one answer, in order, with descriptors beside them.

The supervisor also speaks unasked (Ending, Released); such words are noted whenever somebody listens. There is no
thread that listens all the time: nothing that they say is needed before the client asks for something.

After a timeout, a Ctrl-C or a message that makes no sense, an answer may still be under way, so nothing more can be
asked here: ``usable`` is False from then on. The end of the connection is no error by itself: what is attached stays
attached, because workers outlive the supervisor.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Sequence
from typing import TypeVar

from postcopy_kernel.descriptors import Received, TruncatedMessage, close_all, receive_message, send_message
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import BlockOpened, Ending, Message, Refused, Released
from postcopy_protocol.runtime_paths import door_path

from .deadline import Deadline
from .errors import AttachDenied, AttachTimeout, BadMessage, NoSupervisor, PostcopyError, refusal

Answer = TypeVar("Answer", bound=Message)

_EXACTLY: dict[type[Message], int] = {BlockOpened: 2}
"""Messages that must come with all their descriptors; the others may come with fewer."""


class Door:
    """A connection to the supervisor in ``directory``. Not thread-safe: its session's owner takes turns."""

    def __init__(self, directory: str, deadline: Deadline) -> None:
        self.directory = directory
        self.usable = True
        self.ending: str | None = None
        self.released: set[int] = set()
        self._socket = _connect(directory, deadline)

    def ask(
        self, question: Message, answer: type[Answer], deadline: Deadline, fds: Sequence[int] = ()
    ) -> tuple[Answer, tuple[int, ...]]:
        """Ask and wait for the answer; the caller owns the descriptors that come with it.

        Raises what a refusal stands for (the door stays usable), or AttachTimeout, NoSupervisor (it went away),
        BadMessage.
        """
        try:
            self._send(encode(question), fds, deadline)
            while True:
                message, received = self._next(answer, deadline)
                if isinstance(message, answer):
                    return message, received
                if isinstance(message, Refused):
                    break
                if isinstance(message, Ending):  # answers come in order: this one will not
                    raise NoSupervisor(f"the supervisor in {self.directory} has ended: {message.reason}")
        except BaseException:
            self.usable = False
            raise
        raise refusal(message, self.directory)

    def say(self, word: Message) -> None:
        """Say something that has no answer, if anybody listens."""
        try:
            send_message(self._socket, encode(word))
        except OSError:
            self.usable = False

    def listen(self) -> None:
        """Note what has been said unasked; never waits."""
        while self.usable:
            try:
                self._next(Ending, Deadline(0))
            except AttachTimeout:
                return
            except PostcopyError:
                self.usable = False

    @property
    def hung_up(self) -> bool:
        """Has the supervisor closed the connection, or died?"""
        if self._socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))  # only POLLHUP is told unasked

    def close(self) -> None:
        self.usable = False
        self._socket.close()

    def _send(self, data: bytes, fds: Sequence[int], deadline: Deadline) -> None:
        while True:
            try:
                send_message(self._socket, data, fds)
                return
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except (BrokenPipeError, ConnectionResetError):
                return  # it has hung up, perhaps with a last word: a refusal that did not wait for the question

    def _next(self, answer: type[Answer], deadline: Deadline) -> tuple[Message, tuple[int, ...]]:
        """The next message: the answer, a refusal, or a word unasked, which is noted here."""
        received = self._receive(deadline)
        try:
            message: Message = decode(received.data, expect=(answer, Refused, Ending, Released))
            self._check_descriptors(message, len(received.fds))
        except BaseException:
            close_all(received.fds)
            raise
        if isinstance(message, Ending):
            self.ending = message.reason
        elif isinstance(message, Released):
            self.released.add(message.block)
        return message, received.fds

    def _receive(self, deadline: Deadline) -> Received:
        while True:
            self._wait(select.POLLIN, deadline)
            try:
                received = receive_message(self._socket)
                if not received.data:  # a reset is told before the last words that came with it
                    received = receive_message(self._socket)
            except BlockingIOError:
                continue
            except TruncatedMessage as error:
                raise BadMessage(f"the supervisor in {self.directory} sent too much: {error.strerror}") from error
            if not received.data:
                raise self._gone()
            return received

    def _wait(self, event: int, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        if not poll.poll(deadline.milliseconds()):
            raise AttachTimeout(
                f"the supervisor in {self.directory} did not answer within {deadline.seconds} s; is it stopped or busy?"
            )

    def _check_descriptors(self, message: Message, count: int) -> None:
        wanted = _EXACTLY.get(type(message))
        if count > message.DESCRIPTORS or (wanted is not None and count != wanted):
            kind = type(message).__name__
            raise BadMessage(f"the supervisor in {self.directory} sent {kind} with {count} descriptors")

    def _gone(self) -> NoSupervisor:
        return NoSupervisor(f"the supervisor in {self.directory} closed the connection; ask: postcopy status")


def _connect(directory: str, deadline: Deadline) -> socket.socket:
    path = door_path(directory)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _limit_connect(sock, deadline)
        sock.connect(path)
        return sock
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise _unreachable(error, directory, deadline) from error
        raise


def _limit_connect(sock: socket.socket, deadline: Deadline) -> None:
    """A connect waits while the door's backlog is full, for SO_SNDTIMEO at most. (A non-blocking one fails at once.)"""
    left = deadline.remaining()
    if left is not None:
        microseconds = max(1, int(left * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", *divmod(microseconds, 1_000_000)))


def _unreachable(error: OSError, directory: str, deadline: Deadline) -> PostcopyError:
    if error.errno == errno.EAGAIN:
        return AttachTimeout(f"the supervisor in {directory} let nobody in within {deadline.seconds} s")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AttachDenied(f"no permission to enter {directory}: {error.strerror}")
    reason = {errno.ENOENT: "there is no door", errno.ECONNREFUSED: "its door is shut"}
    why = reason.get(error.errno or 0, error.strerror)
    return NoSupervisor(f"no supervisor in {directory}: {why}; start one: postcopy serve NAME=FILE")
