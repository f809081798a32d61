"""A page source that says what a test wants: the proper conversation, and whatever its script adds to each answer."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    Advise,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RangeKind,
    RequestRanges,
    pack_ranges,
    unpack_ranges,
)

PAGE = 4096
Frames = Sequence[bytes]
Script = Callable[["EvilSource", RequestRanges], Sequence[Frames]]


class EvilSource:
    """Serves ``path`` as block ``ram0``. ``before`` and ``after`` give messages that go out around the right answer of
    every request; ``right`` False: there is none. ``advised`` makes the answer to Advise."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.data += bytes(-len(self.data) % PAGE)
        self.size = path.stat().st_size
        self.before: Script = lambda _, __: ()
        self.after: Script = lambda _, __: ()
        self.right = True
        self.stream = 100
        self.peer = b""
        self.heard: list[Message] = []
        self.advised: Callable[[Advise], Frames] = self._advised
        self._directory = tempfile.TemporaryDirectory(prefix="pcs-", dir="/tmp")
        self.endpoint = f"ipc://{self._directory.name}/s"
        self._push: list[Frames] = []
        self._over = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, 5000)
        self._socket.bind(self.endpoint)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            if self._socket.poll(20):
                self.peer, frame = self._socket.recv_multipart()
                message = decode(frame, expect=FROM_SUPERVISOR)
                self.heard.append(message)
                self._answer(message)
            pushed, self._push = self._push, []
            for frames in pushed:
                self._say(frames)

    def _say(self, frames: Frames) -> None:
        self._socket.send_multipart([self.peer, *frames])

    def _answer(self, message: Message) -> None:
        match message:
            case Advise():
                self._say(self.advised(message))
            case Ping():
                self._say([encode(Pong(message.nonce))])
            case RequestRanges():
                said = [*self.before(self, message), *(self.pages(message),) * self.right, *self.after(self, message)]
                for frames in said:
                    self._say(frames)
            case Listen() | Complete():
                pass

    def _advised(self, message: Advise) -> Frames:
        self.stream += 1
        return [encode(Advised(message.name, self.stream, self.size, "evil", ()))]

    def push(self, *messages: Frames) -> None:
        """Queue unasked messages for the peer that spoke last."""
        self._push = [*self._push, *messages]

    def pages(self, message: RequestRanges) -> Frames:
        """The right answer."""
        ranges = unpack_ranges(message.ranges)
        head = Pages(message.stream, message.request, message.ranges, bytes([RangeKind.DATA]) * len(ranges), "")
        return [encode(head), *(self.data[offset : offset + length] for offset, length in ranges)]

    def listened(self) -> bool:
        return any(isinstance(message, Listen) for message in self.heard)

    def __enter__(self) -> EvilSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join(10)
        self._socket.close()
        self._context.term()
        self._directory.cleanup()


def odd(
    message: RequestRanges,
    *frames: bytes,
    ranges: Sequence[tuple[int, int]] = (),
    kinds: bytes = b"",
    stream: int = -1,
    request: int = -1,
) -> list[Frames]:
    """One Pages that is nearly an answer to ``message``: what is not given is right."""
    given = list(ranges) or unpack_ranges(message.ranges)
    head = Pages(
        message.stream if stream < 0 else stream,
        message.request if request < 0 else request,
        pack_ranges(given),
        kinds or bytes(len(given)),
        "",
    )
    return [[encode(head), *frames]]
