"""One connection of a migration: bytes from the socket to the parser, and answers back. Nothing waits."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.qemu_format import MAGIC_BYTES, MAX_PIECE
from postcopy_protocol.qemu_stream import Event, StreamParser
from postcopy_protocol.runtime_paths import SOCKET_PATH_BYTES

BUFFER = 1 << 20
MAX_UNSENT = 4 << 20  # bytes of answers that QEMU has not read


class Listener:
    """Where QEMU connects to: ``unix:PATH`` or ``tcp:HOST:PORT``, as QEMU itself writes it. Raises BadInput,
    PostcopyError."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        kind, _, place = uri.partition(":")
        self._path = ""
        if kind == "unix":
            self._path = place
            if not place.startswith("/") or len(os.fsencode(place)) > SOCKET_PATH_BYTES:
                raise BadInput(f"{uri!r}: write unix:PATH, an absolute path of at most {SOCKET_PATH_BYTES} bytes")
        else:
            host, _, port = place.rpartition(":")
            if kind != "tcp" or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
                raise BadInput(f"{uri!r} is no place for a migration: write unix:PATH or tcp:HOST:PORT")
        try:
            self.socket = self._listen_unix() if self._path else _listen_tcp(host.strip("[]"), int(port))
        except OSError as error:
            raise PostcopyError(f"cannot listen at {uri}: {error.strerror}") from None
        self.socket.setblocking(False)

    def _listen_unix(self) -> socket.socket:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(self._path)
            raise PostcopyError(f"another program listens at {self.uri}: end it, or choose another path")
        with suppress(OSError):
            if stat.S_ISSOCK(os.lstat(self._path).st_mode):
                os.unlink(self._path)
        made = socket.socket(socket.AF_UNIX)
        before = os.umask(0o077)  # only QEMU of this user, or of root, may connect
        try:
            made.bind(self._path)
            made.listen(4)
        except BaseException:
            made.close()
            raise
        finally:
            os.umask(before)
        return made

    def accept(self) -> socket.socket | None:
        """The next connection, if there is one."""
        try:
            accepted, _ = self.socket.accept()
        except OSError:
            return None
        accepted.setblocking(False)
        return accepted

    def close(self) -> None:
        if self.socket.fileno() >= 0:
            self.socket.close()
            if self._path:
                with suppress(OSError):
                    os.unlink(self._path)


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(4)
    except BaseException:
        made.close()
        raise
    return made


class Channel:
    """A connection and its parser."""

    def __init__(self, connection: socket.socket, parser: StreamParser) -> None:
        self.socket, self.parser = connection, parser
        self.received = 0  # bytes
        self.ended = False
        self.foreign = False  # does it begin as a migration of its own?
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._unsent = b""
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> list[Event] | None:
        """Receive what is there and parse it; None: the connection has ended. Raises BadMessage, BlockingIOError."""
        if not (size := self._receive()):
            return None
        if not self.received:
            self.foreign = self._view[:4] == MAGIC_BYTES
        self.received += size
        self._filled += size
        return self._parse()

    def discard(self) -> bool:
        """Receive what is there, for nothing; False: the connection has ended. Raises BlockingIOError."""
        self._filled = 0
        return self._receive() > 0

    def _receive(self) -> int:
        try:
            size = self.socket.recv_into(self._view[self._filled :])
        except (BlockingIOError, InterruptedError):
            raise BlockingIOError from None
        except OSError:  # reset, or closed
            size = 0
        self.ended = not size
        return size

    def _parse(self) -> list[Event]:
        taken, events = self.parser.parse(self._view[: self._filled])
        left = self._filled - taken
        if left:
            self._view[:left] = self._view[taken : self._filled]
        self._filled = left
        return events

    def send(self, data: bytes) -> bool:
        """Send an answer, now or by ``flush``. False: the connection is gone, or QEMU does not read."""
        self._unsent += data
        return self.flush()

    def flush(self) -> bool:
        """Send what was kept."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                return len(self._unsent) <= MAX_UNSENT
            except OSError:
                return False
        return True

    def close(self) -> None:
        self.socket.close()


assert BUFFER > 2 * MAX_PIECE
