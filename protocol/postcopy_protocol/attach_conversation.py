"""The conversation on the attach socket: what a client may send, when, and what answers it. Both halves, sans-I/O.

::

    message            allowed in        answer                then
    -----------------  ----------------  --------------------  -------
    Hello              new               Welcome               greeted
    OfferUserfaultfd   greeted           UserfaultfdAccepted   ready
    OfferBackEnd       greeted           UserfaultfdAccepted   ready
    Resume             greeted           Resumed               ready
    OpenBlock          ready             BlockOpened           ready
    Mapped             ready             Attached              ready
    Unmap              ready             Unmapped              ready
    ListBlocks         greeted, ready    Blocks                -
    AskLoss            greeted, ready    Loss                  -
    AskOrphanPolicy    ready             OrphanPolicy          ready
    Goodbye            greeted, ready    -                     gone

``Refused`` may come in place of any answer and changes nothing: the conversation stays where it was.
``Released`` and ``Ending`` may come at any time.

``AttachConversation`` is the supervisor's half. A client is not trusted, it may run as another user: its numbers are
checked here before they are used, and what it can make the supervisor remember is bounded. ``AttachClient`` is the
client's half. Neither reads a socket or a clock, or owns a descriptor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from .codec import decode, encode, unpack_offsets
from .copied_map import OWN
from .display import printable
from .errors import AttachDenied, BadMessage, BadVersion, NoSuchBlock, NoSupervisor, PostcopyError
from .geometry import PAGE_SIZES, AddressSpace, Region, page_count
from .messages import (
    REFUSALS,
    AskLoss,
    AskOrphanPolicy,
    Attached,
    BlockOpened,
    Blocks,
    Ending,
    Goodbye,
    Hello,
    ListBlocks,
    Loss,
    Mapped,
    Message,
    OfferBackEnd,
    OfferUserfaultfd,
    OpenBlock,
    OrphanPolicy,
    Refused,
    RegionGrant,
    Released,
    Resume,
    Resumed,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)
from .runtime_paths import MAX_NAME
from .sources import is_block_name

KINDS = ("native", "vhost-user", "vm")
FOREIGN = KINDS[1:]
"""Kinds of clients whose memory is that of another process, for which a face of ours speaks."""
MODES = ("private", "shared", *OWN)
"""``OWN``: the client's own anonymous memory, into which the pages are copied. Only for the kind ``vm``."""
MAX_REGIONS = 64

FATAL = frozenset({"bad-message", "bad-version", "bad-descriptor"})
"""Refusals after which the supervisor closes the connection, unless it serves memory of this client already."""


class Stage(Enum):
    """How far a conversation has come."""

    NEW = "new"
    GREETED = "greeted"
    READY = "ready"
    GONE = "gone"


class Rule(NamedTuple):
    """Stages in which a message may be sent, its answer (None: there is none), and the stage after it (None: it stays
    as it is)."""

    allowed: tuple[Stage, ...]
    answer: type[Message] | None
    after: Stage | None


RULES: dict[type[Message], Rule] = {
    Hello: Rule((Stage.NEW,), Welcome, Stage.GREETED),
    OfferUserfaultfd: Rule((Stage.GREETED,), UserfaultfdAccepted, Stage.READY),
    OpenBlock: Rule((Stage.READY,), BlockOpened, Stage.READY),
    Mapped: Rule((Stage.READY,), Attached, Stage.READY),
    Unmap: Rule((Stage.READY,), Unmapped, Stage.READY),
    Goodbye: Rule((Stage.GREETED, Stage.READY), None, Stage.GONE),
    Resume: Rule((Stage.GREETED,), Resumed, Stage.READY),
    OfferBackEnd: Rule((Stage.GREETED,), UserfaultfdAccepted, Stage.READY),
    ListBlocks: Rule((Stage.GREETED, Stage.READY), Blocks, None),
    AskLoss: Rule((Stage.GREETED, Stage.READY), Loss, None),
    AskOrphanPolicy: Rule((Stage.READY,), OrphanPolicy, Stage.READY),
}
"""The table above. Both halves walk it."""

FROM_CLIENT = tuple(RULES)
"""Messages that the supervisor expects on its attach socket, by tag."""


class Refusal(PostcopyError):
    """Why a message is refused: ``code`` is one of REFUSALS, ``reason`` is one line for people."""

    def __init__(self, code: str, reason: str) -> None:
        if code not in REFUSALS:
            raise ValueError(f"{code} is no refusal of the protocol")
        super().__init__(reason)
        self.code = code
        self.reason = reason

    @property
    def fatal(self) -> bool:
        """Whether the two sides do not understand each other."""
        return self.code in FATAL

    def message(self) -> Refused:
        """The message that reports it."""
        return Refused(self.code, self.reason)

    @classmethod
    def of(cls, error: BadMessage) -> Refusal:
        """The refusal for bytes that ``decode`` did not accept."""
        return cls("bad-version" if isinstance(error, BadVersion) else "bad-message", str(error))


@dataclass(frozen=True, slots=True)
class Grant:
    """A block as it was opened for this client. ``mode`` is that of the latest OpenBlock."""

    block: int
    mode: str
    pages: int
    page_size: int


class AttachConversation:
    """What one client has sent so far. ``name`` and ``kind`` are empty before its Hello.

    ``on_message`` checks order and figures. Whether there is such a block, whether this user may attach and whether the
    kernel registers the range, only the supervisor can find out: it reports what it granted by ``opened`` and takes
    back what failed by ``withdraw`` (Mapped), ``refuse_userfaultfd`` and ``refuse_resume``.
    """

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.name = ""
        self.kind = ""
        self.blocks: dict[int, Grant] = {}
        self.regions = AddressSpace()

    def on_message(self, message: Message, descriptors: int) -> None:
        """Take a message that came with ``descriptors`` descriptors. Raises Refusal, and then has changed nothing."""
        name, expected = type(message).__name__, type(message).DESCRIPTORS
        if descriptors != expected:
            raise Refusal("bad-descriptor", f"{name} came with {descriptors} descriptors, not {expected}")
        rule = RULES.get(type(message))
        if rule is None:
            raise Refusal("bad-message", f"{name} is not a message of a client")
        if self.stage not in rule.allowed:
            raise Refusal("bad-message", f"{name} is out of order: the client is {self.stage.value}")
        match message:
            case Hello():
                self._greet(message)
            case OfferUserfaultfd() if self.kind == "vm":
                raise Refusal("bad-message", "a client of kind vm offers the userfaultfd of another process")
            case OfferBackEnd() if self.kind not in FOREIGN:
                raise Refusal("bad-message", f"only a client of kind {' or '.join(FOREIGN)} may offer another process")
            case OpenBlock():
                self._check_open(message)
            case Mapped():
                self._map(message)
            case Unmap():
                self._forget(message.block, message.address)
            case Goodbye():
                self.regions = AddressSpace()
        self.stage = rule.after or self.stage

    def _greet(self, message: Hello) -> None:
        if message.kind not in KINDS:
            raise Refusal("bad-message", f"the kind of a client is {' or '.join(KINDS)}")
        # The name is shown on terminals: no control characters, bounded length.
        self.name = printable(message.name[:MAX_NAME])
        self.kind = message.kind

    def _map(self, message: Mapped) -> None:
        grant = self.blocks.get(message.block)
        if grant is None:
            raise Refusal("no-such-block", f"block {message.block} is not open: OpenBlock comes before Mapped")
        if len(self.regions) >= MAX_REGIONS:
            raise Refusal("limit", f"a client may have {MAX_REGIONS} regions")
        end = grant.pages * grant.page_size
        if message.offset + message.length > end:
            raise Refusal("bad-range", f"the block ends at {end}, before the region does")
        region = Region(message.block, grant.mode, message.address, message.length, message.offset)
        if grant.mode in OWN and region in self.regions:
            return  # said again after a take-over, because the first answer was lost
        try:
            if grant.mode in OWN and any(region.shares_pages(other) for other in self.regions):
                raise BadMessage(f"the region at {message.address:#x} has pages that another region has too")
            self.regions.add(region, grant.page_size)
        except BadMessage as error:
            raise Refusal("bad-range", str(error)) from None

    def _forget(self, block: int, address: int) -> Region:
        found = self.regions.find(address)
        if found is None or found[0].address != address or found[0].block != block:
            raise Refusal("bad-range", f"no region of block {block} starts at {address:#x}")
        return self.regions.remove(address)

    def opened(self, block: int, mode: str, pages: int, page_size: int) -> None:
        """The supervisor answers OpenBlock with BlockOpened: the block may be mapped now."""
        if mode not in MODES or page_size not in PAGE_SIZES or pages < 1:
            raise ValueError(f"no block is {mode} with {pages} pages of {page_size}")
        self.blocks[block] = Grant(block, mode, pages, page_size)

    def refuse_userfaultfd(self) -> None:
        """The descriptor is no userfaultfd or is of no use: the client may offer another."""
        if self.stage is Stage.READY:
            self.stage = Stage.GREETED

    def refuse_resume(self) -> None:
        """The process is not that client: it may offer a userfaultfd instead."""
        self.refuse_userfaultfd()

    def resumed(self, regions: Iterable[RegionGrant]) -> None:
        """Restore the regions of a client that resumes. Its blocks are restored by ``opened``."""
        self.regions = AddressSpace(
            Region(region.block, region.mode, region.address, region.length, region.offset) for region in regions
        )

    def withdraw(self, block: int, address: int) -> Region:
        """Forget a region whose Mapped was in order, but that the supervisor refuses, as the kernel did."""
        return self._forget(block, address)

    def _check_open(self, message: OpenBlock) -> None:
        if message.mode not in MODES:
            raise Refusal("bad-message", f"the mode of a block is {' or '.join(MODES)}")
        if (message.mode in OWN) != (self.kind == "vm"):
            raise Refusal("bad-message", f"a client of kind {self.kind} cannot open a block {message.mode}")
        if self.kind == "vm" and self.blocks:
            raise Refusal("limit", "the memory of a vm is one block")
        if not is_block_name(message.name):
            raise Refusal("no-such-block", "no block can have that name")


Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class Question(Generic[Answer]):
    """A message to send, and the class of its answer."""

    message: Message
    answer: type[Answer]

    @property
    def data(self) -> bytes:
        """The bytes to send."""
        return encode(self.message)


_UNASKED = (Refused, Ending, Released)
_ERRORS: dict[str, type[PostcopyError]] = {
    "no-such-block": NoSuchBlock,
    "denied": AttachDenied,
    "limit": AttachDenied,
    "bad-version": BadMessage,
}


class AttachClient:
    """The client's half of one connection to the supervisor in ``directory`` (for error messages).

    A method such as ``hello`` gives the Question to send; descriptors are sent beside it by the caller. ``on_message``
    takes every message that comes and gives the answer when it is there. One question at a time.

    ``client`` is the client's number, ``released`` the numbers of blocks that are complete, and ``ending`` why the
    supervisor has ended (None while it serves).

    Example::

        conversation = AttachClient(directory)
        question = conversation.hello("cat", "native")
        send(question.data)
        while (welcome := conversation.on_message(*receive())) is None:
            pass
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.stage = Stage.NEW
        self.client = 0
        self.released: set[int] = set()
        self.ending: str | None = None
        self._question: Question[Message] | None = None

    @property
    def waiting(self) -> bool:
        """Whether an answer is still to come. After an exception it means that nothing more can be asked here."""
        return self._question is not None

    def hello(self, name: str, kind: str) -> Question[Welcome]:
        """Begin. The answer's descriptor, if any, is an open /dev/userfaultfd."""
        return self._ask(Hello(name, kind), Welcome)

    def offer_userfaultfd(self) -> Question[UserfaultfdAccepted]:
        """Send with it the client's own userfaultfd, before its handshake."""
        return self._ask(OfferUserfaultfd(), UserfaultfdAccepted)

    def offer_back_end(self) -> Question[UserfaultfdAccepted]:
        """Send with it the back-end's userfaultfd, after its handshake, and a pidfd of the back-end."""
        return self._ask(OfferBackEnd(), UserfaultfdAccepted)

    def resume(self, client: int) -> Question[Resumed]:
        """Go on as ``client``, on a new connection."""
        return self._ask(Resume(client), Resumed)

    def open_block(self, name: str, mode: str) -> Question[BlockOpened]:
        """The answer's descriptors are the block and its received map. The caller checks their sizes."""
        return self._ask(OpenBlock(name, mode), BlockOpened)

    def mapped(self, block: int, address: int, length: int, offset: int) -> Question[Attached]:
        """Report a region. When the answer is there, it may be touched."""
        return self._ask(Mapped(block, address, length, offset), Attached)

    def unmap(self, block: int, address: int) -> Question[Unmapped]:
        """Give up a region. When the answer is there, it may be unmapped."""
        return self._ask(Unmap(block, address), Unmapped)

    def list_blocks(self) -> Question[Blocks]:
        """Ask for the blocks that may be opened."""
        return self._ask(ListBlocks(), Blocks)

    def ask_loss(self, client: int, block: int, offset: int) -> Question[Loss]:
        """Ask why a page is lost; see AskLoss."""
        return self._ask(AskLoss(client, block, offset), Loss)

    def ask_orphan_policy(self) -> Question[OrphanPolicy]:
        """The answer's descriptor, if any, is the lifeline of the service."""
        return self._ask(AskOrphanPolicy(), OrphanPolicy)

    def goodbye(self) -> bytes:
        """The bytes to send before closing. Nothing answers."""
        self._check_order(Goodbye())
        self.stage = Stage.GONE
        return encode(Goodbye())

    def _ask(self, message: Message, answer: type[Answer]) -> Question[Answer]:
        if self._question is not None:
            raise ValueError(f"{type(self._question.message).__name__} is not answered yet")
        self._check_order(message)
        question = Question(message, answer)
        self._question = question  # type: ignore[assignment]  # read only: an answer is a Message
        return question

    def _check_order(self, message: Message) -> None:
        if self.stage not in RULES[type(message)].allowed:
            raise ValueError(f"{type(message).__name__} is out of order: the conversation is {self.stage.value}")

    def on_message(self, data: bytes, descriptors: int) -> Message | None:
        """Take a message that came with ``descriptors`` descriptors.

        Returns the answer to the question, None for a message that answers nothing. Raises what a refusal stands for
        (NoSuchBlock, AttachDenied, BadMessage, PostcopyError; the conversation can go on), NoSupervisor when it has
        ended and will not answer, and BadMessage. Unless it returns an answer, the caller closes the descriptors.
        """
        question = self._question
        expected = _UNASKED if question is None else (question.answer, *_UNASKED)
        message: Message = decode(data, expect=expected)
        least, most = 0, message.DESCRIPTORS
        if isinstance(message, BlockOpened):
            own = question is not None and isinstance(question.message, OpenBlock) and question.message.mode in OWN
            least, most = 2, 3 if own else 2
        if not least <= descriptors <= most:
            name = type(message).__name__
            raise BadMessage(f"the supervisor in {self.directory} sent {name} with {descriptors} descriptors")
        match message:
            case Released(block):
                self.released.add(block)
                return None
            case Ending(reason):
                self.ending = reason
                if question is not None:  # answers come in order: this one will not
                    raise NoSupervisor(f"the supervisor in {self.directory} has ended: {reason}")
                return None
            case Refused():
                if question is not None:
                    self._question = None
                    raise self._error(message)
                return None
        assert question is not None
        self._check(question.message, message)
        self._question = None
        self.stage = RULES[type(question.message)].after or self.stage
        return message

    def _check(self, asked: Message, answer: Message) -> None:
        """Raise BadMessage when the answer does not belong to what was asked."""
        match asked, answer:
            case _, Welcome(client):
                self.client = client
            case Resume(client), Resumed(released):
                self.client = client
                self.released.update(unpack_offsets(released))
            case OpenBlock(name, _), BlockOpened():
                mapping_length(answer)
                if answer.name != name:
                    raise BadMessage(f"the supervisor in {self.directory} opened another block than {name}")
            case ((Mapped(block, address) | Unmap(block, address)), (Attached() | Unmapped())):
                if (answer.block, answer.address) != (block, address):
                    raise BadMessage(f"the supervisor in {self.directory} answered for another range")

    def _error(self, refused: Refused) -> PostcopyError:
        """The exception that a refusal stands for."""
        kind = _ERRORS.get(refused.code)
        if kind is not None:
            return kind(f"{refused.reason} (supervisor in {self.directory})")
        return PostcopyError(f"the supervisor in {self.directory} refused ({refused.code}): {refused.reason}")


def mapping_length(opened: BlockOpened) -> int:
    """Bytes to map for a block: whole pages. Raises BadMessage when its figures contradict one another."""
    if opened.page_size not in PAGE_SIZES or opened.size < 1:
        raise BadMessage(f"block {opened.name} of {opened.size} bytes has pages of {opened.page_size}")
    if opened.pages != page_count(opened.size, opened.page_size):
        raise BadMessage(f"block {opened.name} of {opened.size} bytes has {opened.pages} pages of {opened.page_size}")
    return opened.pages * opened.page_size
