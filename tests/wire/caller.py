"""A program at the attach socket that sends what a test wants, in any order and shape."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from postcopy_kernel.descriptors import close_all, receive_message
from postcopy_kernel.memory import DONTFORK, Mapping
from postcopy_kernel.userfaultfd import Userfaultfd, open_userfaultfd
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import (
    Attached,
    BlockOpened,
    Ending,
    Hello,
    Mapped,
    Message,
    OfferUserfaultfd,
    OpenBlock,
    Refused,
    Released,
    Resumed,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)

FROM_SUPERVISOR = (Welcome, UserfaultfdAccepted, BlockOpened, Attached, Unmapped, Refused, Ending, Released, Resumed)
PATIENCE = 15.0
Wanted = TypeVar("Wanted", bound=Message)


class Caller:
    """A connection. Descriptors that came are in ``fds``; all that it opened is closed with it."""

    def __init__(self, directory: Path | str, patience: float = PATIENCE) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(patience)
        self.socket.connect(f"{directory}/door")
        self.fds: list[int] = []
        self.ufd: Userfaultfd | None = None

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes as they are, waiting while the supervisor takes none."""
        socket.send_fds(self.socket, [data], list(fds)) if fds else self.socket.send(data)

    def say(self, message: Message, fds: Sequence[int] = ()) -> None:
        self.raw(encode(message), fds)

    def hear(self) -> Message | None:
        """The next message; None: the connection has ended. Fails after the patience."""
        self.socket.settimeout(PATIENCE)
        data, _, _, _ = self.socket.recvmsg(
            0, 0, socket.MSG_PEEK
        )  # waits with the timeout, which recvmsg below has not
        del data
        try:
            received = receive_message(self.socket)
        except ConnectionResetError:
            return None
        self.fds += received.fds
        return decode(received.data, expect=FROM_SUPERVISOR) if received.data else None

    def get(self, wanted: type[Wanted]) -> Wanted:
        """The next message, which must be this."""
        message = self.hear()
        assert isinstance(message, wanted), message
        return message

    def refusal(self) -> str:
        """The code of the refusal that must come next."""
        return self.get(Refused).code

    def ended(self) -> bool:
        """Does the supervisor close the connection, whatever it says before?"""
        while self.hear() is not None:
            pass
        return True

    # --- a proper conversation, step by step --------------------------------------------------------------------------

    def hello(self, name: str = "caller") -> Welcome:
        self.say(Hello(name, "native"))
        return self.get(Welcome)

    def offer(self) -> Userfaultfd:
        self.ufd = open_userfaultfd(device=self.fds[-1] if self.fds else None)
        self.say(OfferUserfaultfd(), [self.ufd.fd])
        self.get(UserfaultfdAccepted)
        return self.ufd

    def open(self, name: str = "ram0", mode: str = "shared") -> tuple[BlockOpened, int]:
        """The answer, and the descriptor of the block."""
        self.say(OpenBlock(name, mode))
        answer = self.get(BlockOpened)
        return answer, self.fds[-2]

    def map(self, opened: BlockOpened, memory: int, shared: bool = True) -> Mapping:
        mapping = Mapping.of(memory, opened.pages * opened.page_size, shared=shared)
        mapping.advise(DONTFORK)
        return mapping

    def attach(self, name: str = "ram0", mode: str = "shared") -> Mapping:
        """The whole conversation."""
        self.hello()
        self.offer()
        opened, memory = self.open(name, mode)
        mapping = self.map(opened, memory, mode == "shared")
        self.say(Mapped(opened.block, mapping.address, mapping.length, 0))
        self.get(Attached)
        return mapping

    def close(self) -> None:
        self.socket.close()
        close_all(self.fds)
        self.fds.clear()
        if self.ufd is not None:
            with suppress(OSError):
                self.ufd.close()
            self.ufd = None

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def die_after(directory: str, steps: int) -> None:
    """Say the first ``steps`` words of a conversation, then end without another."""
    caller = Caller(directory)
    if steps > 0:
        caller.hello()
    if steps > 1:
        caller.offer()
    if steps > 2:
        opened, memory = caller.open()
    if steps > 3:
        mapping = caller.map(opened, memory)
        caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
    if steps > 4:
        caller.get(Attached)
    os._exit(7)
