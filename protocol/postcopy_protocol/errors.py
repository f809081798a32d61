"""The exceptions of postcopy.

::

    PostcopyError
     |-- NoSupervisor             no supervisor answers in that runtime directory
     |-- NoSuchBlock              the supervisor has no RAM block of that name
     |-- AttachDenied             the supervisor does not let this user in
     |-- AttachTimeout            the attach was not answered in time
     |-- PageLost                 a page that its source cannot supply; it is never zeros
     |-- UserfaultfdUnavailable   this process cannot have a userfaultfd
     |-- BadMessage               what was received is not a valid message (the peer's fault)
     |    `-- BadVersion          ... because the peer uses another version
     `-- BadInput                 a size, a name or a SOURCE that a user typed (the user's fault)

Every text is one line: what, where and what to do.
"""

from __future__ import annotations

MOST_TEXT = 1000
"""Characters of a user's exception that are shown."""


class PostcopyError(Exception):
    """Base of all exceptions that this project raises on purpose."""


class NoSupervisor(PostcopyError):
    """No supervisor answers in the runtime directory."""


class NoSuchBlock(PostcopyError):
    """The supervisor serves no RAM block of that name."""


class AttachDenied(PostcopyError):
    """The supervisor refuses this client (its user is not on the allow list)."""


class AttachTimeout(PostcopyError):
    """The supervisor did not answer an attach in time."""


class PageLost(PostcopyError):
    """A page of ``block`` at byte ``offset`` cannot be supplied. ``offset`` is -1 if it is not known.

    A handler function raises it with a reason only; its caller raises it again with block and offset. Can be pickled.
    """

    def __init__(self, message: str = "", *, block: str = "", offset: int = -1) -> None:
        super().__init__(message or _lost(block, offset))
        self.reason = message
        self.block = block
        self.offset = offset

    def __reduce__(self) -> tuple[object, ...]:
        return (_page_lost, (self.reason, self.block, self.offset))


def _page_lost(message: str, block: str, offset: int) -> PageLost:
    """Rebuild from a pickle, which cannot pass keyword arguments."""
    return PageLost(message, block=block, offset=offset)


def _lost(block: str, offset: int) -> str:
    place = f" at offset {offset}" if offset >= 0 else ""
    return f"a page of {block or 'the block'}{place} is lost: its source cannot supply it"


class UserfaultfdUnavailable(PostcopyError):
    """This process cannot make a userfaultfd, and the supervisor has no /dev/userfaultfd to lend."""


class BadMessage(PostcopyError):
    """Bytes that are no valid message, or a message that is not expected here."""


class BadVersion(BadMessage):
    """A message of another version of the protocol."""


class BadInput(PostcopyError, ValueError):
    """User input that cannot be parsed; also a text that the wire cannot carry."""


def text_of(error: BaseException) -> str:
    """The text of an exception of a user's code: one bounded line of valid UTF-8, even where its ``__str__`` fails."""
    try:
        text = " ".join(str(error)[:MOST_TEXT].split())
        return text.encode("utf-8", "backslashreplace").decode()
    except BaseException:
        return "(its text cannot be made)"
