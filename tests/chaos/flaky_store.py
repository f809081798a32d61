"""``python -m tests.chaos.flaky_store DIRECTORY PORT SEED``: a directory over HTTP whose answers are often wrong.

One answer in EIGHT is late, an error, cut, or (chunks only) changed. No object fails more than twice in a row, so that
a third request gets it: what is given up stays lost for a while, and a client that needs it has to die."""

from __future__ import annotations

import random
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHANCE = 1 / 8
CHUNK_FAULTS = ("500", "503", "late", "short", "flip", "drop", "empty")
OTHER_FAULTS = ("500", "503", "late")
LATE = 0.7


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, directory: Path, port: int, seed: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.directory, self.chance = directory, random.Random(seed)
        self.failed: dict[str, int] = {}
        self.lock = threading.Lock()

    def handle_error(self, request: Any, address: Any) -> None:
        """A connection that is cut is no news."""

    def fault(self, path: str) -> str:
        """What is to go wrong with this answer; empty: nothing."""
        kinds = CHUNK_FAULTS if path.endswith(".cacnk") else OTHER_FAULTS
        with self.lock:
            if self.chance.random() >= CHANCE or self.failed.get(path, 0) >= 2:
                self.failed[path] = 0
                return ""
            self.failed[path] = self.failed.get(path, 0) + 1
            return self.chance.choice(kinds)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        fault = self.server.fault(path)
        if fault == "late":
            time.sleep(LATE)
        if fault in ("500", "503"):
            return self._send(int(fault), b"")
        try:
            data = (self.server.directory / path).read_bytes()
        except OSError:
            return self._send(404, b"")
        if fault == "flip":
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        self._send(200, {"short": data[: len(data) // 2], "empty": b""}.get(fault, data), drop=fault == "drop")

    do_HEAD = do_GET

    def _send(self, status: int, data: bytes, drop: bool = False) -> None:
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if drop else data)
            if drop:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""


def main() -> int:
    directory, port, seed = sys.argv[1:]
    server = Server(Path(directory), int(port), int(seed))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
