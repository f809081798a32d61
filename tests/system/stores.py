"""Real stores for tests: SeaweedFS as S3, and an HTTP server over a directory that misbehaves on demand."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.system.service import Service, environment, until

READY_WITHIN = 60.0
KEY, SECRET = "postcopy-test", "a-secret-that-must-not-be-shown"


class SeaweedFS:
    """One S3 server on free ports of the loopback interface; ``variables`` are what obstore needs to find it."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.directory = tempfile.mkdtemp(prefix="pc-weed-", dir="/tmp")
        ports = free_ports(8)
        self.port = ports[0]
        self.endpoint = f"http://127.0.0.1:{ports[0]}"
        self.variables = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }
        names: tuple[str, ...] = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc")
        names += ("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        options = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        options += ["-ip=127.0.0.1", f"-ip.bind={host}", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        options += [f"-dir={self.directory}", "-volume.max=50", "-master.volumeSizeLimitMB=64"]
        weed = Path(sys.executable).with_name("weed")
        assert weed.exists(), f"{weed} is missing: scripts/install --test"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(weed), "server", *options],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ
            | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "TMPDIR": self.directory},  # for its logs
        )

    def await_ready(self) -> None:
        """Returns when an object can be written."""
        import obstore
        import obstore.store

        store = obstore.store.S3Store(
            "ready", endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET, region="us-east-1",
            client_options={"allow_http": True}, retry_config={"max_retries": 0},
        )  # fmt: skip

        def writes() -> bool:
            assert self._process.poll() is None, self.log()
            with suppress(Exception):
                obstore.put(store, "ready", b"yes")
                return True
            time.sleep(0.2)
            return False

        until(writes, "SeaweedFS is ready", READY_WITHIN)

    def stand_still(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")[-3000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def s3() -> Iterator[SeaweedFS]:
    """One server for all tests, which use buckets or prefixes of their own."""
    server = SeaweedFS()
    try:
        server.await_ready()
        yield server
    finally:
        server.close()


def free_ports(count: int) -> list[int]:
    """Ports that are free now, outside the range that the system gives to clients."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


class HttpStore:
    """A directory over HTTP. ``what`` happens to paths with ``only`` in them: nothing, a status, "hang", "flip",
    "short", "drop", or bytes that come instead. ``asked`` counts the requests for each path."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        self.directory = directory
        self.what: str | bytes | int = ""
        self.only = ""  # concerns paths with this text only
        self.delay = 0.0
        self.asked: dict[str, int] = {}
        self._ended = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                store._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing is logged."""

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def chunks_asked(self) -> int:
        return sum(count for path, count in self.asked.items() if path.endswith(".cacnk"))

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        self.asked[path] = self.asked.get(path, 0) + 1
        what = self.what if self.only in path else ""
        if self.delay:
            time.sleep(self.delay)
        if what == "hang":
            self._ended.wait(60)
            return
        if isinstance(what, int):
            return self._send(request, what, b"")
        try:
            data = (self.directory / path).read_bytes()
        except OSError:
            return self._send(request, 404, b"")
        if isinstance(what, bytes):
            data = what
        elif what == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif what == "short":
            data = data[: len(data) // 2]
        self._send(request, 200, data, drop=what == "drop")

    def _send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, drop: bool = False) -> None:
        with suppress(OSError):
            request.send_response(status)
            request.send_header("Content-Length", str(len(data)))
            request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(data[: len(data) // 2] if drop else data)
            if drop:
                request.close_connection = True
                request.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def __enter__(self) -> HttpStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def postcopy(
    *words: str | Path, status: int = 0, within: float = 120.0, variables: Mapping[str, str] | None = None
) -> str:
    """What a command prints on stdout; or, when it must fail with ``status``, its one line on stderr."""
    command = [sys.executable, "-m", "postcopy", *map(str, words)]
    done = subprocess.run(command, env=environment(**(variables or {})), timeout=within, capture_output=True, text=True)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert SECRET not in done.stdout + done.stderr
    if status:
        lines = done.stderr.splitlines()
        assert len(lines) == 1 or done.stdout, done.stderr
        return done.stdout or done.stderr.strip()
    assert not done.stderr, done.stderr
    return done.stdout


def image(path: Path, pages: int, seed: int = 1, base: bytes = b"", changed: float = 1.0) -> bytes:
    """A file like a process's memory: a third zero pages, some that compress, some that do not. With ``base`` only a
    share of its pages is changed. Returns the content."""
    source = random.Random(seed)
    found = []
    for number in range(pages):
        kind = source.random()
        if base and source.random() >= changed:
            found.append(base[number * 4096 : (number + 1) * 4096])
        elif kind < 0.33:
            found.append(bytes(4096))
        elif kind < 0.8:
            found.append(source.randbytes(64) * 64)
        else:
            found.append(source.randbytes(4096))
    data = b"".join(found)
    path.write_bytes(data)
    return data


def program_of(service: Service) -> int:
    """The page source program of a supervisor."""
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"store-source-" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found
