"""What a front-end says at the supervisor's door: the back-end's userfaultfd, blocks, and where they are mapped."""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass

from postcopy_kernel.descriptors import close_all
from postcopy_kernel.memory import Mapping, data_runs
from postcopy_protocol.attach_conversation import mapping_length
from postcopy_protocol.codec import unpack_offsets
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.messages import (
    Attached,
    BlockOpened,
    Goodbye,
    Hello,
    Mapped,
    OfferBackEnd,
    OpenBlock,
    Resume,
    Resumed,
    UserfaultfdAccepted,
    Welcome,
)

from ..attach_socket import Door
from ..deadline import Deadline
from ..errors import PostcopyError

LOOK_AGAIN_SECONDS = 1.0
"""Between two looks for the successor of a supervisor that went without a word."""


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A block opened for a back-end: its memory (to be handed on) and its received map. Never touched here."""

    number: int
    name: str
    size: int
    page_size: int
    length: int
    memory: int
    received: Mapping

    @property
    def file(self) -> tuple[int, int]:
        """Device and inode of the memory: how it is recognised in the back-end's maps."""
        facts = os.fstat(self.memory)
        return facts.st_dev, facts.st_ino

    def strange_pages(self) -> int:
        """Pages that are there though nobody of ours has placed or begins to place them."""
        if self.page_size != PAGE_4K:
            return 0  # hugetlb calls its holes data
        marks = self.received.view()
        try:
            return sum(
                bytes(marks[first // PAGE_4K : last // PAGE_4K]).count(0)
                for first, last in data_runs(self.memory, 0, self.length)
            )
        finally:
            marks.release()

    def marks(self) -> bytes:
        """A copy of the received map: one byte a page, 2 is received."""
        with self.received.view(self.length // self.page_size) as view:
            return bytes(view)

    def mark(self, page: int) -> int:
        """The mark of one page: 0 is missing."""
        with self.received.view() as view:
            return view[page]

    def touched(self) -> list[int]:
        """Pages that somebody of ours has placed or is placing."""
        return [page for page, mark in enumerate(self.marks()) if mark]

    def close(self) -> None:
        os.close(self.memory)
        self.received.close()


class DoorSide:
    """A client of kind ``vhost-user``: its memory is the back-end's."""

    def __init__(self, directory: str, name: str, userfaultfd: int, pidfd: int, timeout: float) -> None:
        self.timeout = timeout
        self.name = name
        self._look_again = 0.0
        self.door = Door(directory, Deadline(timeout))
        try:
            welcome, device = self.door.ask(Hello(name, "vhost-user"), Welcome, Deadline(timeout))
            close_all(device)
            self.client = welcome.client
            self.door.ask(OfferBackEnd(), UserfaultfdAccepted, Deadline(timeout), (userfaultfd, pidfd))
        except BaseException:
            self.door.close()
            raise

    def close(self) -> None:
        self.door.close()

    def open(self, name: str) -> SharedBlock:
        """Raises NoSuchBlock and what else a refusal stands for."""
        answer, fds = self.door.ask(OpenBlock(name, "shared"), BlockOpened, Deadline(self.timeout))
        memory, received = fds
        try:
            length = mapping_length(answer)
            marks = Mapping.of(received, -(-answer.pages // mmap.PAGESIZE) * mmap.PAGESIZE, writable=False)
        except BaseException:
            os.close(memory)
            raise
        finally:
            os.close(received)
        return SharedBlock(answer.block, name, answer.size, answer.page_size, length, memory, marks)

    def announce(self, block: int, address: int, length: int, offset: int) -> None:
        """Say where the back-end has a block; when this returns, a worker listens."""
        self.door.ask(Mapped(block, address, length, offset), Attached, Deadline(self.timeout))

    @property
    def released(self) -> set[int]:
        """Numbers of the blocks that are whole."""
        self._listen()
        return self.door.released

    @property
    def ending(self) -> str | None:
        """Why the supervisor has ended, if it has said so."""
        self._listen()
        return self.door.ending

    def _listen(self) -> None:
        """Hear what is said unasked. A supervisor that went without a word may have a successor: it is looked for now
        and then, and knows our back-end by its number."""
        self.door.listen()
        if self.door.usable or self.door.ending is not None or time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
        with suppress(PostcopyError, OSError):
            self._resume()

    def _resume(self) -> None:
        door = Door(self.door.directory, Deadline(self.timeout))
        try:
            _, device = door.ask(Hello(self.name, "vhost-user"), Welcome, Deadline(self.timeout))
            close_all(device)
            resumed, _ = door.ask(Resume(self.client), Resumed, Deadline(self.timeout))
        except BaseException:
            door.close()
            raise
        door.released |= {*self.door.released, *unpack_offsets(resumed.released)}
        self.door.close()
        self.door = door

    def leave(self) -> None:
        """The back-end touches nothing of it any more."""
        if self.door.usable:
            self.door.say(Goodbye())
        self.door.close()
