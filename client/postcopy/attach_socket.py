"""The client's end of the attach socket: one request, one answer, in order, with descriptors beside them.

The supervisor also sends notices without a request (Ending, Released). They are recorded when a message is read; no
thread waits for them, because they matter only before the next request.

After a timeout, a Ctrl-C or a malformed message an answer may still arrive, so no further request is possible:
``usable`` is False from then on. The end of the connection is not an error: attached blocks stay attached, because
workers outlive the supervisor."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from postcopy_kernel import polling
from postcopy_kernel.descriptors import (
    Received,
    TruncatedMessage,
    close_all,
    receive_message,
    send_message,
    socket_owners,
)
from postcopy_protocol.attach_conversation import AttachClient, Question
from postcopy_protocol.messages import Listed, Loss, Message
from postcopy_protocol.runtime_paths import check_owners, door_path, trusted_users

from .deadline import Deadline
from .errors import AttachDenied, AttachTimeout, BadMessage, NoSupervisor, PostcopyError
from .interrupts import allowed

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class OpenedBlock:
    """A block that the supervisor has opened for this client. The holder of this object owns its descriptors."""

    number: int
    name: str
    mode: str
    size: int
    page_size: int
    pages: int
    memory: int
    received: int
    copied: int = -1
    """The copied map of a client with memory of its own; see ``own``."""

    @property
    def length(self) -> int:
        """Bytes to map: whole pages."""
        return self.pages * self.page_size

    def identity(self) -> tuple[int, int, int]:
        """Distinguishes this block from a block of the same name in a later supervisor."""
        facts = os.fstat(self.memory)
        return facts.st_dev, facts.st_ino, self.pages

    def close(self) -> None:
        close_all(fd for fd in (self.memory, self.received, self.copied) if fd >= 0)

    def check(self) -> None:
        """Raises BadMessage when the size does not fit the descriptors, which would be a SIGBUS later."""
        if not (_holds(self.memory, self.length) and _holds(self.received, self.pages)):
            raise BadMessage(f"the supervisor sent block {self.name} with descriptors that are too small")


class AttachConnection:
    """A connection to the supervisor in ``directory``. Not thread-safe; ``client.Client`` serializes its users."""

    def __init__(self, directory: str, deadline: Deadline, trust: frozenset[int] = frozenset()) -> None:
        """``trust``: users whose supervisor is trusted, beside those of $POSTCOPY_TRUST_UID."""
        self.directory = directory
        self.usable = True
        self._trust = trust
        self._conversation = AttachClient(directory)
        self._socket = _connect(directory, deadline)

    @property
    def client(self) -> int:
        """The number that the supervisor has given this client."""
        return self._conversation.client

    @property
    def ending(self) -> str | None:
        """Why the supervisor has ended, if it gave a reason."""
        return self._conversation.ending

    @property
    def released(self) -> set[int]:
        """Numbers of the blocks that are complete."""
        return self._conversation.released

    #
    # Each raises the exception of a refusal (the connection stays usable), AttachTimeout, NoSupervisor (the connection
    # ended), BadMessage.

    def greet(self, name: str, kind: str, deadline: Deadline) -> tuple[int, ...]:
        """Say Hello. Returns a /dev/userfaultfd descriptor if the supervisor sent one.

        Raises AttachDenied for a supervisor that is not trusted: after its answer, because its own refusal says more,
        and before it gets a userfaultfd, which is a right over this process's memory."""
        fds = self._ask(self._conversation.hello(name, kind), deadline)[1]
        try:
            owners = socket_owners(self._socket, door_path(self.directory))
            check_owners(self.directory, owners, os.geteuid(), self._trust | trusted_users(os.environ))
        except BaseException as error:
            close_all(fds)
            if isinstance(error, OSError):
                raise _unreachable(error, self.directory, deadline) from error
            raise
        return fds

    def offer_userfaultfd(self, userfaultfd: int, deadline: Deadline) -> None:
        """Send the client's own userfaultfd."""
        self._ask(self._conversation.offer_userfaultfd(), deadline, (userfaultfd,))

    def offer_back_end(self, userfaultfd: int, pidfd: int, deadline: Deadline) -> None:
        """Send the userfaultfd and a pidfd of a vhost-user back-end."""
        self._ask(self._conversation.offer_back_end(), deadline, (userfaultfd, pidfd))

    def resume(self, name: str, kind: str, deadline: Deadline) -> AttachConnection:
        """A new connection to the supervisor that has taken over this client and its regions.

        Raises NoSupervisor (not yet started), AttachDenied (it does not know the client)."""
        successor = AttachConnection(self.directory, deadline, self._trust)
        try:
            close_all(successor.greet(name, kind, deadline))
            successor._ask(successor._conversation.resume(self.client), deadline)
        except BaseException:
            successor.close()
            raise
        successor.released.update(self.released)
        return successor

    def open(self, name: str, mode: str, deadline: Deadline) -> OpenedBlock:
        """Open a block. The caller owns its descriptors."""
        answer, fds = self._ask(self._conversation.open_block(name, mode), deadline)
        block = OpenedBlock(answer.block, name, mode, answer.size, answer.page_size, answer.pages, *fds)
        try:
            block.check()
        except BaseException:
            self.usable = False
            block.close()
            raise
        return block

    def announce(self, number: int, address: int, length: int, offset: int, deadline: Deadline) -> None:
        """Announce where a part of a block is mapped. After that it may be touched."""
        self._ask(self._conversation.mapped(number, address, length, offset), deadline)

    def unmap(self, number: int, address: int, deadline: Deadline) -> None:
        """Announce that a region is no longer touched. After that it may be unmapped."""
        self._ask(self._conversation.unmap(number, address), deadline)

    def list_blocks(self, deadline: Deadline) -> tuple[Listed, ...]:
        """The blocks that may be opened."""
        return self._ask(self._conversation.list_blocks(), deadline)[0].blocks

    def ask_loss(self, client: int, block: int, offset: int, deadline: Deadline) -> Loss:
        """Ask why a page is lost; see ``messages.AskLoss``."""
        return self._ask(self._conversation.ask_loss(client, block, offset), deadline)[0]

    def ask_orphan_policy(self, deadline: Deadline) -> tuple[int, int]:
        """Timeout in milliseconds and lifeline, which the caller owns; (0, -1) where missing pages are to wait."""
        answer, fds = self._ask(self._conversation.ask_orphan_policy(), deadline)
        if answer.poison and fds:
            return answer.timeout_ms, fds[0]
        close_all(fds)
        return 0, -1

    def say_goodbye(self) -> None:
        """End the conversation, if the connection still exists."""
        if self.usable:
            try:
                send_message(self._socket, self._conversation.goodbye())
            except OSError:
                self.usable = False

    def _ask(
        self, question: Question[Answer], deadline: Deadline, fds: Sequence[int] = ()
    ) -> tuple[Answer, tuple[int, ...]]:
        """Send a question and wait for the answer. The caller owns the answer's descriptors."""
        try:
            self._send(question.data, fds, deadline)
            while True:
                received = self._receive(deadline)
                message = self._take(received)
                if isinstance(message, question.answer):
                    return message, received.fds
        except BaseException:
            # An answer that may still arrive would be taken for that of the next question. A refusal is an answer.
            self.usable = self.usable and not self._conversation.waiting
            raise

    def _take(self, received: Received) -> Message | None:
        """The answer in a message; a notice is recorded, and gives None."""
        message = None
        try:
            message = self._conversation.on_message(received.data, len(received.fds))
        finally:
            if message is None:
                close_all(received.fds)
        return message

    def take_notices(self) -> None:
        """Record the notices that have arrived; never waits."""
        while self.usable:
            try:
                self._take(self._receive(Deadline(0)))
            except AttachTimeout:
                return
            except PostcopyError:
                self.usable = False

    @property
    def hung_up(self) -> bool:
        """Whether the supervisor has closed the connection, or died."""
        if self._socket.fileno() < 0:
            return False
        poll = polling.poll()
        poll.register(self._socket, 0)
        return bool(poll.poll(0))  # poll() reports POLLHUP even for an empty mask

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
                return  # it hung up; a refusal, sent before our request arrived, may be waiting

    def _receive(self, deadline: Deadline) -> Received:
        while True:
            self._wait(select.POLLIN, deadline)
            try:
                received = receive_message(self._socket)
                if not received.data:  # a reset is reported before the messages that arrived with it
                    received = receive_message(self._socket)
            except BlockingIOError:
                continue
            except TruncatedMessage as error:
                if error.errno == errno.EMFILE:
                    raise OSError(errno.EMFILE, error.strerror) from error
                raise BadMessage(
                    f"the supervisor in {self.directory} sent a message that is too long: {error.strerror}"
                ) from error
            if not received.data:
                raise self._gone()
            return received

    def _wait(self, event: int, deadline: Deadline) -> None:
        poll = polling.poll()
        poll.register(self._socket, event)
        with allowed():
            ready = poll.poll(deadline.milliseconds())
        if not ready:
            raise AttachTimeout(
                f"the supervisor in {self.directory} did not answer within {deadline.seconds} s; is it stopped or busy?"
            )

    def _gone(self) -> NoSupervisor:
        return NoSupervisor(f"the supervisor in {self.directory} closed the connection; ask: postcopy status")


def _connect(directory: str, deadline: Deadline) -> socket.socket:
    path = door_path(directory)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _limit_connect(sock, deadline)
        with allowed():
            sock.connect(path)
        return sock
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise _unreachable(error, directory, deadline) from error
        raise


def _limit_connect(sock: socket.socket, deadline: Deadline) -> None:
    """A connect waits for SO_SNDTIMEO while the socket's backlog is full. (A non-blocking connect fails at once.)"""
    left = deadline.remaining()
    if left is not None:
        microseconds = max(1, int(left * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", *divmod(microseconds, 1_000_000)))


def _unreachable(error: OSError, directory: str, deadline: Deadline) -> PostcopyError:
    if error.errno == errno.EAGAIN:
        return AttachTimeout(f"the supervisor in {directory} did not accept the connection within {deadline.seconds} s")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AttachDenied(
            f"no permission for the attach socket in {directory}: {error.strerror} (a user who connects "
            "without end is kept out for up to a minute: the supervisor's log says so)"
        )
    reasons = {
        errno.ENOENT: "no attach socket",
        errno.ECONNREFUSED: "the process that made its attach socket has ended",
    }
    reason = reasons.get(error.errno or 0, error.strerror)
    return NoSupervisor(f"no supervisor is running in {directory} ({reason}); start one: postcopy serve NAME=FILE")


def _holds(fd: int, length: int) -> bool:
    facts = os.fstat(fd)
    return stat.S_ISREG(facts.st_mode) and facts.st_size >= length
