"""The law of the door: what a client may say, when, and what each refusal is called. The supervisor's side, sans-I/O.

One ``AttachConversation`` a connection. ``on_message`` checks every message of the client: its order and its figures.
What it cannot check (is there such a block, may this user attach, does the kernel register the range) is the
supervisor's: it reports what it granted by ``opened`` and takes back what failed by ``withdraw`` (Mapped),
``refuse_userfaultfd`` and ``refuse_resume``.

::

    state      hears              and then
    ---------  -----------------  ------------------------------------------------
    strange    Hello              greeted
    greeted    OfferUserfaultfd   ready
    greeted    OfferBackEnd       ready (vhost-user only)
    greeted    Resume             ready; resumed() gives back what the client had
    ready      OpenBlock          ready; opened() makes the block known
    ready      Mapped             ready; the region is known
    ready      Unmap              ready; the region is forgotten
    greeted,   Goodbye            gone: nothing more is heard
    ready

A refusal changes nothing: after it the conversation is where it was, and the client may go on. Refusals whose code is
in ``FATAL`` say that the two do not understand each other: the supervisor closes the connection of a stranger after
them, not that of a client whose memory it serves.

A client is not believed: it may be of another user. Its numbers are checked here before anything is done with them,
and what it may make us remember is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .errors import BadMessage, BadVersion, PostcopyError
from .geometry import PAGE_SIZES, AddressSpace, Region, page_count
from .messages import (
    REFUSALS,
    BlockOpened,
    Goodbye,
    Hello,
    Mapped,
    Message,
    OfferBackEnd,
    OfferUserfaultfd,
    OpenBlock,
    Refused,
    RegionGrant,
    Resume,
    Unmap,
)
from .sources import is_block_name

KINDS = ("native", "vhost-user")
MODES = ("private", "shared")
FROM_CLIENT = (Hello, OfferUserfaultfd, OpenBlock, Mapped, Unmap, Goodbye, Resume, OfferBackEnd)
"""What the supervisor expects at its door."""

MAX_REGIONS = 64
MAX_NAME = 64
"""Characters of a client's name that are kept."""

FATAL = frozenset({"bad-message", "bad-version", "bad-descriptor"})


class Refusal(PostcopyError):
    """Why a message is refused: ``code`` is one of REFUSALS, the text is one line for people."""

    def __init__(self, code: str, reason: str) -> None:
        if code not in REFUSALS:
            raise ValueError(f"{code} is no refusal of the protocol")
        super().__init__(reason)
        self.code = code
        self.reason = reason

    @property
    def fatal(self) -> bool:
        """Does it say that the two do not understand each other?"""
        return self.code in FATAL

    def message(self) -> Refused:
        return Refused(self.code, self.reason)

    @classmethod
    def of(cls, error: BadMessage) -> Refusal:
        """The refusal that answers what ``decode`` could not take."""
        return cls("bad-version" if isinstance(error, BadVersion) else "bad-message", str(error))


class Stage(Enum):
    """How far a conversation has come."""

    STRANGE = "strange"
    GREETED = "greeted"
    READY = "ready"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Grant:
    """A block as it was opened for this client; the mode is that of the latest OpenBlock."""

    block: int
    mode: str
    pages: int
    page_size: int


class AttachConversation:
    """What one client has said so far. ``name`` and ``kind`` are empty until it has said Hello."""

    def __init__(self) -> None:
        self.stage = Stage.STRANGE
        self.name = ""
        self.kind = ""
        self.blocks: dict[int, Grant] = {}
        self.regions = AddressSpace()

    # --- heard ------------------------------------------------------------------------------------------------------

    def on_message(self, message: Message, descriptors: int) -> None:
        """Take a message that came with so many descriptors. Raises Refusal and then has changed nothing."""
        word, expected = type(message).__name__, type(message).DESCRIPTORS
        if descriptors != expected:
            raise Refusal("bad-descriptor", f"{word} came with {descriptors} descriptors, not {expected}")
        match message:
            case Hello():
                self._hello(message)
            case OfferUserfaultfd() | Resume():
                self._at(message, Stage.GREETED)
                self.stage = Stage.READY
            case OfferBackEnd():
                self._at(message, Stage.GREETED)
                if self.kind != "vhost-user":
                    raise Refusal("bad-message", "only a vhost-user front-end has a back-end to offer")
                self.stage = Stage.READY
            case OpenBlock():
                self._at(message, Stage.READY)
                _open(message)
            case Mapped():
                self._at(message, Stage.READY)
                self._mapped(message)
            case Unmap():
                self._at(message, Stage.READY)
                self._forget(message.block, message.address)
            case Goodbye():
                self._at(message, Stage.GREETED, Stage.READY)
                self._goodbye()
            case _:
                raise Refusal("bad-message", f"{word} is nothing that a client says")

    def _at(self, message: Message, *stages: Stage) -> None:
        if self.stage not in stages:
            raise Refusal("bad-message", f"{type(message).__name__} is out of order: the client is {self.stage.value}")

    def _hello(self, message: Hello) -> None:
        self._at(message, Stage.STRANGE)
        if message.kind not in KINDS:
            raise Refusal("bad-message", f"a client is {' or '.join(KINDS)}, nothing else")
        # The name is shown on terminals: no control characters, no endless one.
        self.name = "".join(letter if letter.isprintable() else "?" for letter in message.name[:MAX_NAME])
        self.kind = message.kind
        self.stage = Stage.GREETED

    def _mapped(self, message: Mapped) -> None:
        grant = self.blocks.get(message.block)
        if grant is None:
            raise Refusal("no-such-block", f"block {message.block} is not open: OpenBlock comes before Mapped")
        if len(self.regions) >= MAX_REGIONS:
            raise Refusal("limit", f"a client may have {MAX_REGIONS} regions")
        if message.offset + message.length > grant.pages * grant.page_size:
            raise Refusal("bad-range", f"the block ends at {grant.pages * grant.page_size}, before the region does")
        try:
            self.regions.add(
                Region(message.block, grant.mode, message.address, message.length, message.offset), grant.page_size
            )
        except BadMessage as error:
            raise Refusal("bad-range", str(error)) from None

    def _forget(self, block: int, address: int) -> Region:
        found = self.regions.find(address)
        if found is None or found[0].address != address or found[0].block != block:
            raise Refusal("bad-range", f"no region of block {block} starts at {address:#x}")
        return self.regions.remove(address)

    def _goodbye(self) -> None:
        self.stage = Stage.GONE
        self.regions = AddressSpace()

    # --- told by the supervisor -------------------------------------------------------------------------------------

    def opened(self, block: int, mode: str, pages: int, page_size: int) -> None:
        """The supervisor answers OpenBlock with BlockOpened: from now on the block may be mapped."""
        if mode not in MODES or page_size not in PAGE_SIZES or pages < 1:
            raise ValueError(f"no block is {mode} with {pages} pages of {page_size}")
        self.blocks[block] = Grant(block, mode, pages, page_size)

    def refuse_userfaultfd(self) -> None:
        """What came with the offer is no userfaultfd, or of no use: the client may offer another."""
        if self.stage is Stage.READY:
            self.stage = Stage.GREETED

    def refuse_resume(self) -> None:
        """The client is not the one that it says: it may offer a userfaultfd instead."""
        self.refuse_userfaultfd()

    def resumed(self, regions: Iterable[RegionGrant]) -> None:
        """What the client had before its connection ended. Blocks that it had opened are opened by ``opened``."""
        self.regions = AddressSpace(
            Region(region.block, region.mode, region.address, region.length, region.offset) for region in regions
        )

    def withdraw(self, block: int, address: int) -> Region:
        """The supervisor refuses a Mapped that was in order, such as one that the kernel did not register."""
        return self._forget(block, address)


def _open(message: OpenBlock) -> None:
    if message.mode not in MODES:
        raise Refusal("bad-message", f"a block is opened {' or '.join(MODES)}, nothing else")
    if not is_block_name(message.name):
        raise Refusal("no-such-block", "no block can have that name")


def mapping_length(opened: BlockOpened) -> int:
    """Bytes to map for a block. Raises BadMessage when its figures do not fit together (for clients)."""
    if opened.page_size not in PAGE_SIZES or opened.size < 1:
        raise BadMessage(f"block {opened.name} of {opened.size} bytes has pages of {opened.page_size}")
    if opened.pages != page_count(opened.size, opened.page_size):
        raise BadMessage(f"block {opened.name} of {opened.size} bytes has {opened.pages} pages of {opened.page_size}")
    return opened.pages * opened.page_size
