"""A page source by hand: the proper conversation at an ipc or tcp endpoint, until ``flood`` is sent without end."""

from __future__ import annotations

import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    Advise,
    Advised,
    Listen,
    Pages,
    Ping,
    Pong,
    RangeKind,
    RequestRanges,
    SourceRefused,
    unpack_ranges,
)
from postcopy_protocol.zmtp import Buffer, Reader, frame, framed, opening


class RawSource:
    """Serves ``path`` as block ``ram0``."""

    def __init__(self, path: Path, *, tcp: bool) -> None:
        self.data = path.read_bytes()
        self.flood = b""
        self.flooded = self.connections = 0
        self._directory = tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp")
        self._listener = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self._listener.bind(("127.0.0.1", 0) if tcp else f"{self._directory.name}/s")
        self._listener.listen(16)
        self._over = False
        self._advised: set[socket.socket] = set()
        place = self._listener.getsockname()
        self.endpoint = f"tcp://127.0.0.1:{place[1]}" if tcp else f"ipc://{place}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._over:
            with suppress(OSError):
                connection, _ = self._listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        reader = Reader(1 << 20)
        with connection, suppress(OSError):
            connection.settimeout(0.1)
            connection.sendall(opening(kind=b"ROUTER"))
            while not self._over:
                if self.flood and reader.ready:
                    self.flooded += connection.send(self.flood)
                    continue
                with suppress(TimeoutError):
                    data = connection.recv(1 << 16)
                    if not data:
                        return
                    for message in reader.feed(data):
                        assert isinstance(message, bytes)
                        self._answer(connection, message)

    def _answer(self, connection: socket.socket, data: bytes) -> None:
        match decode(data, expect=FROM_SUPERVISOR):
            case Listen() | RequestRanges() if connection not in self._advised:
                refusal = SourceRefused("out-of-phase", "", "there is no stream here; advise first")
                connection.sendall(frame(encode(refusal)))
            case Advise(name):
                self._advised.add(connection)
                connection.sendall(frame(encode(Advised(name, 7, len(self.data), "raw", ()))))
            case Ping(nonce):
                connection.sendall(frame(encode(Pong(nonce))))
            case RequestRanges() as asked:
                ranges = unpack_ranges(asked.ranges)
                head = Pages(asked.stream, asked.request, asked.ranges, bytes([RangeKind.DATA]) * len(ranges), "")
                parts: list[Buffer] = [encode(head), *(self.data[at : at + length] for at, length in ranges)]
                connection.sendall(b"".join(framed(parts)))

    def __enter__(self) -> RawSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        self._directory.cleanup()
