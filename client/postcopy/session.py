"""What one client is to the supervisor: a door connection, a userfaultfd, and the regions attached through them.

The userfaultfd stays open here as long as a region lives: the last reference that closes would turn every waiter's
page into zeros, and nobody but this process can be sure to hold one.
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass

from postcopy_kernel.descriptors import close_all
from postcopy_kernel.userfaultfd import Userfaultfd, open_userfaultfd
from postcopy_kernel.userfaultfd import UserfaultfdUnavailable as KernelUnavailable
from postcopy_protocol.attach_conversation import mapping_length
from postcopy_protocol.codec import unpack_offsets
from postcopy_protocol.messages import (
    Attached,
    BlockOpened,
    Goodbye,
    Hello,
    Mapped,
    OfferUserfaultfd,
    OpenBlock,
    Resume,
    Resumed,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)

from .attach_socket import Door
from .deadline import Deadline
from .errors import AttachDenied, BadMessage, NoSupervisor, PostcopyError, unavailable


@dataclass(frozen=True, slots=True)
class Opened:
    """A block that the supervisor has opened for us; whoever holds this owns both descriptors."""

    number: int
    name: str
    mode: str
    size: int
    page_size: int
    pages: int
    memory: int
    received: int

    @property
    def length(self) -> int:
        """Bytes to map: whole pages."""
        return self.pages * self.page_size

    def identity(self) -> tuple[int, int, int]:
        """What tells this block from another one of the same name in a later supervisor."""
        facts = os.fstat(self.memory)
        return facts.st_dev, facts.st_ino, self.pages

    def close(self) -> None:
        close_all((self.memory, self.received))


class Session:
    """One conversation from Hello to Goodbye, beyond the death of a supervisor if another takes over. Not thread-safe;
    see ``client.Client``."""

    def __init__(self, directory: str, deadline: Deadline) -> None:
        self.door = Door(directory, deadline)
        self.regions = 0
        self._resumable = True
        self._owed: list[Unmap] = []
        self._userfaultfd: Userfaultfd | None = None
        try:
            welcome, device = self.door.ask(Hello(_own_name(), "native"), Welcome, deadline)
            self.client = welcome.client
            self._userfaultfd = _make_userfaultfd(device)
            self.door.ask(OfferUserfaultfd(), UserfaultfdAccepted, deadline, (self._userfaultfd.fd,))
        except BaseException:
            self.abandon()
            raise

    @property
    def usable(self) -> bool:
        """Whether more can be asked of this supervisor through this connection."""
        self.door.listen()
        return self.door.usable and self.door.ending is None

    def resume(self, deadline: Deadline) -> bool:
        """Go on with a supervisor that has taken over from the one that died: it serves our regions already. False:
        there is nothing to resume, or nobody who knows us."""
        if not self._resumable or not self.regions or self.door.ending is not None or not self.door.hung_up:
            return False
        try:
            door = Door(self.door.directory, deadline)
        except NoSupervisor:  # not yet
            return False
        try:
            _, device = door.ask(Hello(_own_name(), "native"), Welcome, deadline)
            close_all(device)
            resumed, _ = door.ask(Resume(self.client), Resumed, deadline)
            door.released = self.door.released.union(unpack_offsets(resumed.released))
            self._settle(door, deadline)
        except AttachDenied:  # it is not the dead one's successor: what we have stays with our worker
            self._resumable = False
            door.close()
            return False
        except BaseException:
            door.close()
            raise
        self.door.close()
        self.door = door
        return True

    def open(self, name: str, mode: str, deadline: Deadline) -> Opened:
        """Ask for a block and check what came: a size that does not fit its descriptors would be a SIGBUS later."""
        answer, (memory, received) = self.door.ask(OpenBlock(name, mode), BlockOpened, deadline)
        block = Opened(
            answer.block, name, mode, answer.size, answer.page_size, answer.pages, memory=memory, received=received
        )
        try:
            _check(block, answer)
        except BaseException:
            self.door.usable = False
            block.close()
            raise
        return block

    def announce(self, number: int, address: int, length: int, deadline: Deadline) -> None:
        """Say where a block is mapped; when this returns, it may be touched."""
        answer, _ = self.door.ask(Mapped(number, address, length, 0), Attached, deadline)
        if (answer.block, answer.address) != (number, address):
            self.door.usable = False
            raise BadMessage(f"the supervisor in {self.door.directory} attached another range than asked for")
        self.regions += 1

    def owe(self, number: int, address: int) -> None:
        """A range is touched no more. Until that is said the supervisor takes it for ours, and refuses its addresses to
        what is attached there next."""
        self._owed.append(Unmap(number, address))

    def settle(self, deadline: Deadline) -> None:
        """Say what is owed; when this returns, it may be unmapped. What cannot be said now is said to a successor."""
        self._settle(self.door, deadline)

    def _settle(self, door: Door, deadline: Deadline) -> None:
        while self._owed:
            try:
                door.ask(self._owed[0], Unmapped, deadline)
            except PostcopyError:
                if not door.usable:
                    raise
            del self._owed[0]  # a refusal: it was heard before

    def wake(self, address: int, length: int) -> None:
        """Let every thread that sleeps in this range look again."""
        if self._userfaultfd is not None:
            with suppress(OSError):
                self._userfaultfd.wake(address, length)

    def end(self) -> None:
        """Goodbye: for a session without regions."""
        if self.door.usable:
            self.door.say(Goodbye())
        self.abandon()

    def abandon(self) -> None:
        """Close without a word: nothing is attached here, or (in a fork's child) it is somebody else's session."""
        self._resumable = False
        self.door.close()
        if self._userfaultfd is not None:
            self._userfaultfd.close()
            self._userfaultfd = None


def _own_name() -> str:
    """For people who read the status: the program, without its path."""
    path = sys.argv[0] if sys.argv else ""
    program = os.path.basename(os.path.dirname(path) if path.endswith("/__main__.py") else path)
    if program in ("", "-c", "-m"):
        program = "python"
    return program.encode("utf-8", "replace").decode()[:64]


def _make_userfaultfd(device: tuple[int, ...]) -> Userfaultfd:
    """A userfaultfd of this process, by the device that the supervisor lent us or by our own right."""
    try:
        if device and not stat.S_ISCHR(os.fstat(device[0]).st_mode):
            raise BadMessage("the supervisor lent a descriptor that is no /dev/userfaultfd")
        return open_userfaultfd(device=device[0] if device else None)
    except KernelUnavailable as error:
        raise unavailable(error) from error
    finally:
        close_all(device)


def _check(block: Opened, answer: BlockOpened) -> None:
    length = mapping_length(answer)
    if answer.name != block.name or not (_holds(block.memory, length) and _holds(block.received, block.pages)):
        raise BadMessage(f"the supervisor described block {block.name} in a way that cannot be")


def _holds(fd: int, length: int) -> bool:
    facts = os.fstat(fd)
    return stat.S_ISREG(facts.st_mode) and facts.st_size >= length
