"""What can go wrong, by whose fault it is.

::

    PostcopyError
     |-- NoSupervisor             nobody listens in that runtime directory
     |-- NoSuchBlock              the supervisor has no RAM block of that name
     |-- AttachDenied             the supervisor does not let this user in
     |-- AttachTimeout            the attach was not answered in time
     |-- PageLost                 a page that its source cannot supply; it is never zeros
     |-- UserfaultfdUnavailable   this process cannot have a userfaultfd
     |-- BadMessage               what came over the wire is not a message of ours (the other side's fault)
     |    `-- BadVersion          ... because the other side speaks another version
     `-- BadInput                 a size, a name or a SOURCE that a person typed (the person's fault)

Every text is one line that says what, where and what to do.
"""

from __future__ import annotations


class PostcopyError(Exception):
    """Base of everything that this project raises on purpose."""


class NoSupervisor(PostcopyError):
    """No supervisor answers in the runtime directory."""


class NoSuchBlock(PostcopyError):
    """The supervisor serves no RAM block of that name."""


class AttachDenied(PostcopyError):
    """The supervisor refuses this client (its user is not on the allow list)."""


class AttachTimeout(PostcopyError):
    """The supervisor did not answer an attach in time."""


class PageLost(PostcopyError):
    """A page of ``block`` at byte ``offset`` cannot be supplied. ``offset`` is -1 where it is not known.

    A handler function raises it with its reason alone; whoever knows block and offset raises it with them. Pickles.
    """

    def __init__(self, message: str = "", *, block: str = "", offset: int = -1) -> None:
        super().__init__(message or _lost(block, offset))
        self.reason = message
        self.block = block
        self.offset = offset

    def __reduce__(self) -> tuple[object, ...]:
        return (_page_lost, (self.reason, self.block, self.offset))


def _page_lost(message: str, block: str, offset: int) -> PageLost:
    """Rebuild from a pickle, which cannot pass keyword arguments to an exception."""
    return PageLost(message, block=block, offset=offset)


def _lost(block: str, offset: int) -> str:
    place = f" at offset {offset}" if offset >= 0 else ""
    return f"a page of {block or 'the block'}{place} is lost: its source cannot supply it"


class UserfaultfdUnavailable(PostcopyError):
    """This process cannot make a userfaultfd, and the supervisor has no /dev/userfaultfd to lend."""


class BadMessage(PostcopyError):
    """Bytes that are no message of ours, or a message that is not expected here."""


class BadVersion(BadMessage):
    """A message of another version of the protocol."""


class BadInput(PostcopyError, ValueError):
    """What a person typed cannot be understood; also a text that the wire cannot carry."""
