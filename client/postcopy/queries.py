"""What a person asks the supervisor: status, stop, export. A DEALER to its one ROUTER, one question at a time.

Only the supervisor's own user can: the socket is in ``private/``. Nothing listening there is noticed at once by a plain
connect, because ZeroMQ itself would wait for somebody to come.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
from collections.abc import Collection
from contextlib import closing
from types import TracebackType
from typing import Any, TypeVar

import zmq

from postcopy_kernel.process import pidfd_open
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import (
    AskEvents,
    AskExport,
    AskProgress,
    AskResume,
    AskStatus,
    AskStop,
    AskStory,
    ControlRefused,
    EventsAnswer,
    ExportProgress,
    Message,
    ResumeAnswer,
    StatusAnswer,
    StopAnswer,
    StoryAnswer,
)
from postcopy_protocol.runtime_paths import router_endpoint, runtime_directory

from .errors import AttachDenied, BadMessage, NoSupervisor, PostcopyError

TIMEOUT = 10.0

Answer = TypeVar("Answer", bound=Message)
Found = TypeVar("Found", dict[str, Any], list[Any])


class Control:
    """A connection to the router of the supervisor in ``runtime_dir``; a context manager.

    Raises NoSupervisor when nobody listens there, AttachDenied when it is another user's, PostcopyError for questions
    that it refuses or does not answer within ``timeout`` seconds.
    """

    def __init__(self, runtime_dir: str | os.PathLike[str] | None = None, timeout: float = TIMEOUT) -> None:
        explicit = None if runtime_dir is None else os.fspath(runtime_dir)
        self.directory = os.path.abspath(runtime_directory(explicit, os.environ))
        self._timeout = timeout
        endpoint = router_endpoint(self.directory)
        self._path = endpoint.removeprefix("ipc://")
        self.knock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    def knock(self) -> None:
        """Raise NoSupervisor when nobody listens (any more): sooner than by waiting for an answer."""
        _knock(self._path, self.directory, self._timeout)

    def status(self, *, audit: bool = False) -> dict[str, Any]:
        """The status document (see the README for its fields). ``audit``: look for polluted pages first."""
        return self._json(self._ask(AskStatus(audit), StatusAnswer).document, dict)

    def _json(self, document: bytes, kind: type[Found]) -> Found:
        try:
            found = json.loads(document)
        except ValueError as error:
            raise BadMessage(f"the supervisor in {self.directory} sent a document that is no JSON") from error
        if not isinstance(found, kind):
            raise BadMessage(f"the supervisor in {self.directory} sent a document that is no {kind.__name__}")
        return found

    def stop(self, *, keep_workers: bool = False, timeout: float = 60.0) -> int:
        """End the supervisor and wait until its process has ended; returns its pid."""
        pid = int(self.status()["pid"])
        try:
            pidfd = pidfd_open(pid)  # before the question: afterwards the number may be somebody else's
        except ProcessLookupError as error:
            raise NoSupervisor(f"the supervisor in {self.directory} has just ended") from error
        try:
            self._ask(AskStop(keep_workers), StopAnswer)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(int(timeout * 1000)):
                raise PostcopyError(f"the supervisor in {self.directory} (pid {pid}) has not ended after {timeout} s")
        finally:
            os.close(pidfd)
        return pid

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Events that are kept, with numbers greater than ``after``, oldest first."""
        events = self._json(self._ask(AskEvents(after), EventsAnswer).document, list)
        return [event for event in events if isinstance(event, dict)]

    def story(self, name: str, offset: int) -> dict[str, Any]:
        """What is known of one page's life."""
        return self._json(self._ask(AskStory(name, offset), StoryAnswer).document, dict)

    def resume(self, client: int) -> int:
        """End a client's quarantine; the number of pages that are healed by and by."""
        return self._ask(AskResume(client), ResumeAnswer).unpoisoning

    def export(self, name: str, path: str) -> ExportProgress:
        """Begin to write block ``name`` to ``path``. Ask ``progress`` at least every 10 s, or it is cancelled."""
        return self._ask(AskExport(name, os.path.abspath(path)), ExportProgress)

    def progress(self, job: int, *, cancel: bool = False) -> ExportProgress:
        """How far an export is; ``cancel`` ends it."""
        return self._ask(AskProgress(job, cancel), ExportProgress)

    def _ask(self, question: Message, answer: type[Answer]) -> Answer:
        self._socket.send(encode(question), zmq.DONTWAIT)
        if not self._socket.poll(int(self._timeout * 1000)):
            raise PostcopyError(
                f"the supervisor in {self.directory} does not answer within {self._timeout} s; is it stopped or busy?"
            )
        expected: Collection[type[Message]] = (answer, ControlRefused)
        message: Message = decode(self._socket.recv(), expect=expected)
        if isinstance(message, answer):
            return message
        assert isinstance(message, ControlRefused)
        raise PostcopyError(message.reason)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _knock(path: str, directory: str, timeout: float) -> None:
    """Raise NoSupervisor unless somebody listens. ZeroMQ takes the connection for a peer that changed its mind."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise AttachDenied(f"{path}: only the user who runs the supervisor may ask it") from error
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
                raise NoSupervisor(
                    f"no supervisor in {directory}; start one: postcopy serve NAME=FILE --runtime-dir {directory}"
                ) from error
            raise PostcopyError(f"{path}: {error.strerror or error}") from error
