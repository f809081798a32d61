"""An operator's requests to the supervisor: status, stop, export. A DEALER to its ROUTER, one request at a time.

Only the supervisor's own user may send them: the socket is in ``private/``. A plain connect finds out first whether a
process listens, because ZeroMQ would wait for one."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
from collections.abc import Collection
from contextlib import closing
from typing import Any, TypeVar

import zmq

from postcopy_kernel import polling
from postcopy_kernel.process import lock_holder, pidfd_open
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
from postcopy_protocol.runtime_paths import LOCK, router_endpoint, runtime_directory

from .errors import AttachDenied, BadMessage, NoSupervisor, PostcopyError

TIMEOUT = 10.0

Answer = TypeVar("Answer", bound=Message)
Found = TypeVar("Found", dict[str, Any], list[Any])


class Control:
    """A connection to the router of the supervisor in ``runtime_dir``; a context manager.

    Raises NoSupervisor when no process listens there, AttachDenied when it is another user's, PostcopyError for
    requests that it refuses or does not answer within ``timeout`` seconds."""

    def __init__(self, runtime_dir: str | os.PathLike[str] | None = None, timeout: float = TIMEOUT) -> None:
        explicit = None if runtime_dir is None else os.fspath(runtime_dir)
        self.directory = os.path.abspath(runtime_directory(explicit, os.environ))
        self._timeout = timeout
        self._path = router_endpoint(self.directory).removeprefix("ipc://")
        self.check_listening()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        address: Any = os.fsencode(router_endpoint(self.directory))  # a path may be no UTF-8
        sock.connect(address)
        return sock

    def check_listening(self) -> None:
        """Raise NoSupervisor when no process listens; faster than waiting for an answer."""
        _check_listening(self._path, self.directory, self._timeout)

    def status(self, *, audit: bool = False) -> dict[str, Any]:
        """The status document (see the README for its fields). ``audit``: look for polluted pages first."""
        return self._json(self._ask(AskStatus(audit), StatusAnswer).document, dict)

    def _json(self, document: bytes, kind: type[Found]) -> Found:
        try:
            found = json.loads(document)
        except ValueError as error:
            raise BadMessage(f"the supervisor in {self.directory} sent a document that is not JSON") from error
        if not isinstance(found, kind):
            raise BadMessage(f"the supervisor in {self.directory} sent a document that is not a {kind.__name__}")
        return found

    def stop(self, *, keep_workers: bool = False, timeout: float = 60.0) -> int:
        """End the supervisor and wait until its process has ended; returns its pid."""
        pid = int(self.status()["pid"])
        try:
            pidfd = pidfd_open(pid)  # before the request: afterwards the pid may belong to another process
        except ProcessLookupError as error:
            raise NoSupervisor(f"the supervisor in {self.directory} has just ended") from error
        try:
            self._ask(AskStop(keep_workers), StopAnswer)
            poll = polling.poll()
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
        """The history of one page."""
        return self._json(self._ask(AskStory(name, offset), StoryAnswer).document, dict)

    def resume(self, client: int) -> int:
        """End a client's quarantine; the number of pages that are fetched again."""
        return self._ask(AskResume(client), ResumeAnswer).unpoisoning

    def export(self, name: str, path: str) -> ExportProgress:
        """Begin to write a block to ``path``. Call ``progress`` at least every 10 s, or it is cancelled."""
        return self._ask(AskExport(name, os.path.abspath(path)), ExportProgress)

    def progress(self, job: int, *, cancel: bool = False) -> ExportProgress:
        """How far an export is; ``cancel`` ends it."""
        return self._ask(AskProgress(job, cancel), ExportProgress)

    def _ask(self, request: Message, answer: type[Answer]) -> Answer:
        try:
            data = self._exchange(encode(request))
        except BaseException:
            # After a timeout or a Ctrl-C the answer may still arrive: the next request would take it for its own.
            self._socket.close(0)
            self._socket = self._connect()
            raise
        expected: Collection[type[Message]] = (answer, ControlRefused)
        message: Message = decode(data, expect=expected)
        if isinstance(message, answer):
            return message
        assert isinstance(message, ControlRefused)
        raise PostcopyError(message.reason)

    def _exchange(self, request: bytes) -> bytes:
        self._socket.send(request, zmq.DONTWAIT)
        if not self._socket.poll(int(self._timeout * 1000)):
            raise PostcopyError(
                f"the supervisor in {self.directory} does not answer within {self._timeout} s; is it stopped or busy?"
            )
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_listening(path: str, directory: str, timeout: float) -> None:
    """Raise NoSupervisor unless a process listens. To ZeroMQ the connection looks like a peer that left again."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise AttachDenied(f"{path}: only the user who runs the supervisor may send requests") from error
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
                if pid := lock_holder(f"{directory}/{LOCK}"):
                    raise NoSupervisor(
                        f"the supervisor in {directory} (process {pid}) is starting and not ready yet: "
                        "it may be waiting for a page source (see its log)"
                    ) from error
                raise NoSupervisor(
                    f"no supervisor is running in {directory}; start one: "
                    f"postcopy serve NAME=FILE --runtime-dir {directory}"
                ) from error
            raise PostcopyError(f"{path}: {error.strerror or error}") from error
