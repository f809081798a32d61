"""A supervisor that says what a test wants to a page source, and the source program that it says it to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.curve_keys import KeyPair
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FROM_SOURCE,
    Advise,
    Advised,
    Listen,
    Pages,
    RequestRanges,
    SourceRefused,
    check_pages,
    pack_ranges,
)
from postcopy_protocol.templates import FIRST_REQUEST

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 30.0
PAGE = 4096

Kind = TypeVar("Kind", bound=Message)
Heard = tuple[Message, list[bytes]]


def environment() -> dict[str, str]:
    """That of this test, with the wings of this checkout to import from."""
    path = os.pathsep.join(str(ROOT / wing) for wing in ("protocol", "kernel", "wire", "sources", "client"))
    return {**os.environ, "PYTHONPATH": path}


class SourceProgram:
    """``python -m postcopy_sources WORDS`` (or another ``program``), ready when the constructor returns. At its end it
    must end in order on SIGTERM and must not have logged a traceback."""

    def __init__(self, *words: str, program: Sequence[str] = ("-m", "postcopy_sources"), ready: bool = True) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *program, *words],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env=environment(),
        )
        if ready:
            self.wait_for_log("ready:")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def endpoint(self) -> str:
        """Where it listens, the port that was chosen included."""
        return self.log().partition("ready:")[2].splitlines()[0].rpartition(" at ")[2]

    def log(self) -> str:
        if self._log.closed:
            return self._last_log
        return os.pread(self._log.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def wait_for_log(self, text: str) -> None:
        deadline = time.monotonic() + WITHIN
        while text not in self.log():
            assert self.process.poll() is None, f"the source ended: {self.log()}"
            assert time.monotonic() < deadline, f"{text!r} is not in the log: {self.log()}"
            time.sleep(0.01)

    def memory(self) -> int:
        """Bytes that are private to the program."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) << 10

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._close()
        return status

    def _close(self) -> None:
        self._last_log = self.log()
        self._log.close()

    def __enter__(self) -> SourceProgram:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log.closed:
            return
        status = self.end()
        if kind is None:
            assert status == 0, f"status {status}: {self._last_log}"
            assert "Traceback" not in self._last_log and "bug:" not in self._last_log, self._last_log


class ScriptedSupervisor:
    """Speaks the return path as a supervisor does: a ROUTER that connects. ``keys`` and ``source_key``: CURVE."""

    def __init__(
        self,
        endpoint: str,
        name: bytes = b"",
        keys: KeyPair | None = None,
        source_key: bytes = b"",
        high_water: int = 1000,
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTING_ID, name or b"postcopy-" + os.urandom(8).hex().encode()),
            (zmq.CONNECT_ROUTING_ID, b"s1"),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, 10),
            (zmq.SNDTIMEO, int(WITHIN * 1000)),
            (zmq.RCVHWM, high_water),
        ):
            self.socket.setsockopt(option, value)
        if keys is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public, keys.secret
            self.socket.curve_serverkey = source_key
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(endpoint)
        self.requests = FIRST_REQUEST - 3  # a few as any supervisor might count, the others as ours does (express.py)

    def handshake(self) -> bool:
        """Whether it succeeds."""
        from zmq.utils.monitor import recv_monitor_message

        assert self.monitor.poll(int(WITHIN * 1000)), "neither a handshake nor a refusal"
        return bool(recv_monitor_message(self.monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart([b"s1", *frames])

    def say(self, message: Message) -> None:
        self.send(encode(message))

    def hear(self, within: float = WITHIN) -> Heard | None:
        """What comes next; None when nothing does."""
        if not self.socket.poll(int(within * 1000)):
            return None
        name, head, *frames = self.socket.recv_multipart()
        assert name == b"s1"
        message: Message = decode(head, expect=FROM_SOURCE)
        return message, frames

    def expect(self, kind: type[Kind], within: float = WITHIN) -> Kind:
        """The next message, which is of this kind and has no raw frames unless it is Pages."""
        heard = self.hear(within)
        assert heard is not None, f"no {kind.__name__} within {within} s"
        message, frames = heard
        assert isinstance(message, kind), f"{message} instead of {kind.__name__}"
        assert not frames
        return message

    def refusal(self, message: Message | None = None) -> SourceRefused:
        if message is not None:
            self.say(message)
        return self.expect(SourceRefused)

    def advise(self, block: str, page_size: int = PAGE, features: tuple[str, ...] = ("zero", "push")) -> Advised:
        self.say(Advise(block, page_size, features))
        return self.expect(Advised)

    def listen(self, block: str, page_size: int = PAGE, window: int = 0) -> Advised:
        advised = self.advise(block, page_size)
        self.say(Listen(advised.stream, window))
        return advised

    def ask(self, advised: Advised, *ranges: tuple[int, int], urgent: bool = True) -> int:
        """The number of the request."""
        self.requests += 1
        self.say(RequestRanges(self.requests, advised.stream, urgent, pack_ranges(ranges)))
        return self.requests

    def pages(self, advised: Advised, page_size: int = PAGE) -> tuple[Pages, dict[int, bytes | str]]:
        """The next Pages, and by page what came: its bytes, or the reason why it is lost."""
        heard = self.hear()
        assert heard is not None, "no Pages"
        message, frames = heard
        assert isinstance(message, Pages), message
        assert message.stream == advised.stream
        found: dict[int, bytes | str] = {}
        for offset, length, kind, frame in check_pages(message, [len(one) for one in frames], page_size, advised.size):
            data = frames[frame] if kind == 0 else bytes(length)
            for place in range(0, length, page_size):
                found[offset + place] = data[place : place + page_size] if kind < 2 else message.reason
        return message, found

    def fetch(self, advised: Advised, *ranges: tuple[int, int], urgent: bool = True) -> dict[int, bytes | str]:
        """Ask, and gather all pages asked for, each of which must come once."""
        number = self.ask(advised, *ranges, urgent=urgent)
        wanted = {place for offset, length in ranges for place in range(offset, offset + length, PAGE)}
        found: dict[int, bytes | str] = {}
        while found.keys() != wanted:
            message, some = self.pages(advised)
            assert message.request == number
            assert not found.keys() & some.keys() and some.keys() <= wanted
            found |= some
        return found

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self._context.destroy(linger=0)

    def __enter__(self) -> ScriptedSupervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
