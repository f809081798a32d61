"""Both halves of the attach conversation: state machines that send anything in any order, and cases by refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_protocol import attach_conversation
from postcopy_protocol.attach_conversation import (
    FROM_CLIENT,
    KINDS,
    MAX_REGIONS,
    MODES,
    RULES,
    AttachClient,
    AttachConversation,
    Question,
    Refusal,
    Stage,
    mapping_length,
)
from postcopy_protocol.codec import decode, encode, pack_offsets
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.errors import AttachDenied, BadMessage, BadVersion, NoSuchBlock, NoSupervisor, PostcopyError
from postcopy_protocol.geometry import PAGE_2M, PAGE_4K
from postcopy_protocol.messages import (
    REFUSALS,
    AskLoss,
    Attached,
    BlockOpened,
    Blocks,
    Ending,
    Goodbye,
    Hello,
    Listed,
    Loss,
    Mapped,
    Message,
    OfferBackEnd,
    OfferUserfaultfd,
    OpenBlock,
    Refused,
    Released,
    Resume,
    Resumed,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)
from tests.simulated.effort import effort

BLOCKS = {0: (4, PAGE_4K), 1: (16, PAGE_4K), 2: (2, PAGE_2M)}
small = st.integers(0, 12)
blocks = st.sampled_from((0, 1, 2, 9))


def code_of(conversation: AttachConversation, message: Message, descriptors: int | None = None) -> str:
    """The refusal's code, or an empty text."""
    count = type(message).DESCRIPTORS if descriptors is None else descriptors
    try:
        conversation.on_message(message, count)
    except Refusal as refusal:
        assert decode(encode(refusal.message()), expect=(Refused,)).code == refusal.code
        return refusal.code
    return ""


class Door(RuleBasedStateMachine):
    """The conversation beside a model that is as plain as can be: a stage, opened blocks, taken pages of 4 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.door = AttachConversation()
        self.stage = Stage.NEW
        self.opened: dict[int, str] = {}
        self.regions: dict[int, Mapped] = {}

    @initialize(far=st.booleans())
    def begin(self, far: bool) -> None:
        """Half of the histories begin where regions may be mapped; otherwise few would come so far."""
        if far:
            self.hello("a", "native")
            self.offer()
            for block in BLOCKS:
                self.open(block, "private", True)

    def in_order(self, *stages: Stage) -> bool:
        return self.stage in stages

    @rule(name=st.text(max_size=80), kind=st.sampled_from((*KINDS, "", "other")))
    def hello(self, name: str, kind: str) -> None:
        fine = self.in_order(Stage.NEW) and kind in KINDS
        assert code_of(self.door, Hello(name, kind)) == ("" if fine else "bad-message")
        if fine:
            self.stage = Stage.GREETED
            assert self.door.kind == kind and len(self.door.name) <= 64
            assert self.door.name == "" or self.door.name.isprintable()

    @rule()
    def offer(self) -> None:
        fine = self.in_order(Stage.GREETED) and self.door.kind != "vm"
        assert code_of(self.door, OfferUserfaultfd()) == ("" if fine else "bad-message")
        if fine:
            self.stage = Stage.READY

    @rule()
    def offer_another_process(self) -> None:
        fine = self.in_order(Stage.GREETED) and self.door.kind != "native"
        assert code_of(self.door, OfferBackEnd()) == ("" if fine else "bad-message")
        if fine:
            self.stage = Stage.READY

    @rule()
    def userfaultfd_is_of_no_use(self) -> None:
        if self.stage is Stage.READY and not self.opened:
            self.stage = Stage.GREETED
            self.door.refuse_userfaultfd()

    @rule(block=st.sampled_from(sorted(BLOCKS)), mode=st.sampled_from((*MODES, "")), granted=st.booleans())
    def open(self, block: int, mode: str, granted: bool) -> None:
        vm = self.door.kind == "vm"
        fine = self.in_order(Stage.READY) and mode in MODES and (mode in OWN) == vm
        refused = "bad-message" if not fine else "limit" if vm and self.opened else ""
        assert code_of(self.door, OpenBlock(f"ram{block}", mode)) == refused
        fine = not refused
        if fine and granted:
            self.door.opened(block, mode, *BLOCKS[block])
            self.opened[block] = mode

    @rule(block=blocks, page=small, length=small, offset=small, skew=st.sampled_from((0, 0, 0, 1)), huge=st.booleans())
    def mapped(self, block: int, page: int, length: int, offset: int, skew: int, huge: bool) -> None:
        unit = PAGE_2M if huge else PAGE_4K
        message = Mapped(block, page * unit + skew, length * unit, offset * unit)
        expected = self.judge(message)
        assert code_of(self.door, message) == expected
        if not expected:
            self.regions[message.address] = message

    def judge(self, message: Mapped) -> str:
        if not self.in_order(Stage.READY):
            return "bad-message"
        if message.block not in self.opened:
            return "no-such-block"
        if len(self.regions) >= MAX_REGIONS:
            return "limit"
        pages, size = BLOCKS[message.block]
        aligned = not any(value % size for value in (message.address, message.length, message.offset))
        inside = message.address > 0 and message.length > 0 and message.offset + message.length <= pages * size
        if self.opened[message.block] in OWN and any(
            message.offset < other.offset + other.length and other.offset < message.offset + message.length
            for other in self.regions.values()
        ):
            return "bad-range"
        free = all(
            message.address + message.length <= other.address or other.address + other.length <= message.address
            for other in self.regions.values()
        )
        return "" if aligned and inside and free else "bad-range"

    @rule(block=blocks, page=small, huge=st.booleans(), by_supervisor=st.booleans())
    def unmap(self, block: int, page: int, huge: bool, by_supervisor: bool) -> None:
        address = page * (PAGE_2M if huge else PAGE_4K)
        known = address in self.regions and self.regions[address].block == block
        if by_supervisor and known:
            assert self.door.withdraw(block, address).address == address
        else:
            expected = "" if known else "bad-range"
            assert code_of(self.door, Unmap(block, address)) == (
                expected if self.in_order(Stage.READY) else "bad-message"
            )
        if known:
            del self.regions[address]

    @rule(kind=st.sampled_from(FROM_CLIENT), more=st.integers(1, 3))
    def too_many_descriptors(self, kind: type[Message], more: int) -> None:
        messages = {
            Hello: Hello("a", "native"),
            OpenBlock: OpenBlock("a", "private"),
            Mapped: Mapped(0, 0, 0, 0),
            Resume: Resume(1),
            AskLoss: AskLoss(0, 1, 0),
        }
        message = messages.get(kind) or (Unmap(0, 0) if kind is Unmap else kind())
        assert code_of(self.door, message, type(message).DESCRIPTORS + more) == "bad-descriptor"

    @rule()
    def supervisors_words_from_a_client(self) -> None:
        assert code_of(self.door, Welcome(1)) == "bad-message"

    @rule(sure=st.integers(0, 9))
    def goodbye(self, sure: int) -> None:
        if sure:
            return
        fine = self.in_order(Stage.GREETED, Stage.READY)
        assert code_of(self.door, Goodbye()) == ("" if fine else "bad-message")
        if fine:
            self.stage = Stage.GONE
            self.regions.clear()

    @invariant()
    def they_agree(self) -> None:
        assert self.door.stage is self.stage
        assert {block: grant.mode for block, grant in self.door.blocks.items()} == self.opened
        ours = [(region.block, region.address, region.length, region.offset) for region in self.door.regions]
        assert ours == [(m.block, m.address, m.length, m.offset) for _, m in sorted(self.regions.items())]


Door.TestCase.settings = effort(60, 40)
TestDoor = Door.TestCase


def ready(block: int = 1, mode: str = "private") -> AttachConversation:
    conversation = AttachConversation()
    conversation.on_message(Hello("test", "native"), 0)
    conversation.on_message(OfferUserfaultfd(), 1)
    conversation.on_message(OpenBlock("ram0", mode), 0)
    conversation.opened(block, mode, *BLOCKS[block])
    return conversation


def test_a_whole_conversation() -> None:
    conversation = ready()
    conversation.on_message(Mapped(1, PAGE_4K, 16 * PAGE_4K, 0), 0)
    (region,) = conversation.regions
    assert (region.mode, region.length) == ("private", 65536)
    assert code_of(conversation, Unmap(0, PAGE_4K)) == "bad-range", "it is a region of another block"
    conversation.on_message(Unmap(1, PAGE_4K), 0)
    conversation.on_message(Mapped(1, PAGE_4K, PAGE_4K, 0), 0)
    conversation.on_message(Goodbye(), 0)
    assert conversation.stage is Stage.GONE and not len(conversation.regions)
    assert code_of(conversation, Hello("again", "native")) == "bad-message"


def test_a_userfaultfd_must_come_with_its_offer() -> None:
    conversation = AttachConversation()
    conversation.on_message(Hello("test", "native"), 0)
    assert code_of(conversation, OfferUserfaultfd(), 0) == "bad-descriptor"
    assert code_of(conversation, OfferUserfaultfd()) == ""


def test_only_a_front_end_has_a_back_end() -> None:
    for kind, code in (("native", "bad-message"), ("vhost-user", "")):
        conversation = AttachConversation()
        conversation.on_message(Hello("test", kind), 0)
        assert code_of(conversation, OfferBackEnd(), 1) == "bad-descriptor"
        assert code_of(conversation, OfferBackEnd()) == code
        assert conversation.stage is (Stage.GREETED if code else Stage.READY)


def test_a_region_has_the_mode_of_the_latest_open() -> None:
    conversation = ready()
    conversation.on_message(Mapped(1, PAGE_4K, PAGE_4K, 0), 0)
    conversation.on_message(OpenBlock("ram0", "shared"), 0)
    conversation.opened(1, "shared", *BLOCKS[1])
    conversation.on_message(Mapped(1, 2 * PAGE_4K, PAGE_4K, PAGE_4K), 0)
    assert [region.mode for region in conversation.regions] == ["private", "shared"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a" * 65, "a\0"])
def test_a_name_that_no_block_has(name: str) -> None:
    assert code_of(ready(), OpenBlock(name, "private")) == "no-such-block"


@pytest.mark.parametrize(
    "mapped",
    [
        Mapped(1, PAGE_4K, 17 * PAGE_4K, 0),
        Mapped(1, PAGE_4K, PAGE_4K, 16 * PAGE_4K),
        Mapped(1, PAGE_4K, (1 << 64) - PAGE_4K, PAGE_4K),
        Mapped(1, (1 << 64) - PAGE_4K, 2 * PAGE_4K, 0),
        Mapped(1, 0, PAGE_4K, 0),
        Mapped(1, PAGE_4K, 0, 0),
    ],
)
def test_ranges_that_cannot_be(mapped: Mapped) -> None:
    conversation = ready()
    assert code_of(conversation, mapped) == "bad-range"
    assert not len(conversation.regions)


def test_huge_blocks_are_mapped_in_huge_pages() -> None:
    conversation = ready(block=2)
    assert code_of(conversation, Mapped(2, PAGE_4K, PAGE_2M, 0)) == "bad-range"
    assert code_of(conversation, Mapped(2, PAGE_2M, 2 * PAGE_2M, 0)) == ""


def test_what_a_client_makes_us_remember_is_bounded() -> None:
    conversation = ready()
    codes = [code_of(conversation, Mapped(1, page * PAGE_4K, PAGE_4K, 0)) for page in range(1, MAX_REGIONS + 2)]
    assert codes == [""] * MAX_REGIONS + ["limit"]


def test_refusals_are_those_of_the_protocol() -> None:
    with pytest.raises(ValueError, match="no refusal"):
        Refusal("because", "why")
    assert {code for code in REFUSALS if Refusal(code, "").fatal} == {"bad-message", "bad-version", "bad-descriptor"}
    assert Refusal.of(BadVersion("v")).code == "bad-version" and Refusal.of(BadMessage("m")).code == "bad-message"


def test_the_supervisor_grants_only_what_can_be() -> None:
    for mode, pages, size in (("both", 1, PAGE_4K), ("private", 0, PAGE_4K), ("private", 1, 8192)):
        with pytest.raises(ValueError, match="no block"):
            ready().opened(3, mode, pages, size)


def test_a_client_checks_the_figures_of_a_block() -> None:
    assert mapping_length(BlockOpened(1, "a", 4097, PAGE_4K, 2)) == 8192
    for wrong in ((4097, PAGE_4K, 1), (0, PAGE_4K, 0), (4096, 8192, 1), (4096, 0, 1)):
        with pytest.raises(BadMessage):
            mapping_length(BlockOpened(1, "a", *wrong))


def test_the_table_in_the_text_is_the_table_that_both_halves_walk() -> None:
    table = (attach_conversation.__doc__ or "").split("-  -------\n")[1].split("\n\n")[0]
    shown = {name: rest for name, *rest in (re.split(r"\s{2,}", line.strip()) for line in table.splitlines())}
    assert shown == {
        kind.__name__: [
            ", ".join(stage.value for stage in rule.allowed),
            rule.answer.__name__ if rule.answer else "-",
            rule.after.value if rule.after else "-",
        ]
        for kind, rule in RULES.items()
    }


# --- the client's half against the supervisor's -----------------------------------------------------------------------


class Pair(RuleBasedStateMachine):
    """A client asks the supervisor's half. Whatever the supervisor answers, both are at the same stage afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.client = AttachClient("/run/x")
        self.supervisor = AttachConversation()
        self.released: set[int] = set()
        self.dead = False

    def ask(self, make: Callable[[], Question[Any]], answer: Message | None, refuse: bool, fds: int = 0) -> bool:
        """Did the answer come? ``answer`` None: Ending in its place."""
        try:
            question = make()
        except ValueError:  # out of order: the supervisor would not take it either
            assert self.dead or self.client.stage is self.supervisor.stage
            return False
        assert question.data == encode(question.message)
        code = code_of(self.supervisor, question.message)
        if code or refuse:
            stage = self.client.stage
            if not code:  # what the supervisor itself finds wrong
                self.take_back(question.message)
            with pytest.raises(PostcopyError, match="rain"):
                self.client.on_message(encode(Refused(code or "failed", "rain")), 0)
            assert self.client.stage is stage and not self.client.waiting
            return False
        if answer is None:
            with pytest.raises(NoSupervisor, match="night"):
                self.client.on_message(encode(Ending("night")), 0)
            assert self.client.waiting and self.client.ending == "night"
            self.dead = True
            return False
        assert self.client.on_message(encode(Released(5)), 0) is None
        self.released.add(5)
        assert self.client.on_message(encode(answer), fds) == answer
        return True

    def take_back(self, message: Message) -> None:
        match message:
            case OfferUserfaultfd() | OfferBackEnd():
                self.supervisor.refuse_userfaultfd()
            case Resume():
                self.supervisor.refuse_resume()
            case Hello():
                self.supervisor = AttachConversation()
            case Mapped(block, address):
                self.supervisor.withdraw(block, address)

    @rule()
    def pause(self) -> None:
        """Nothing is said: a conversation that has ended offers no other step."""

    @precondition(lambda self: not self.dead)
    @rule(kind=st.sampled_from(KINDS), refuse=st.booleans(), device=st.booleans())
    def hello(self, kind: str, refuse: bool, device: bool) -> None:
        if self.ask(lambda: self.client.hello("x", kind), Welcome(3), refuse, int(device)):
            assert self.client.client == 3

    @precondition(lambda self: not self.dead)
    @rule(refuse=st.booleans(), back_end=st.booleans())
    def offer(self, refuse: bool, back_end: bool) -> None:
        make = self.client.offer_back_end if back_end else self.client.offer_userfaultfd
        self.ask(make, UserfaultfdAccepted(), refuse)

    @precondition(lambda self: not self.dead)
    @rule(refuse=st.booleans())
    def resume(self, refuse: bool) -> None:
        if self.ask(lambda: self.client.resume(8), Resumed(pack_offsets([1, 2])), refuse):
            assert self.client.client == 8
            self.released |= {1, 2}
            self.supervisor.resumed(())

    @precondition(lambda self: not self.dead)
    @rule(mode=st.sampled_from(MODES), refuse=st.booleans(), ends=st.integers(0, 5))
    def open(self, mode: str, refuse: bool, ends: int) -> None:
        opened = BlockOpened(1, "ram1", 16 * PAGE_4K - 7, PAGE_4K, 16) if ends else None
        if self.ask(lambda: self.client.open_block("ram1", mode), opened, refuse, 2):
            self.supervisor.opened(1, mode, 16, PAGE_4K)

    @precondition(lambda self: not self.dead)
    @rule(page=st.integers(1, 5), refuse=st.booleans(), unmap=st.booleans())
    def map_or_unmap(self, page: int, refuse: bool, unmap: bool) -> None:
        address = page * PAGE_4K
        if unmap:
            known = self.supervisor.regions.find(address) is not None
            self.ask(lambda: self.client.unmap(1, address), Unmapped(1, address), refuse and not known)
        else:
            self.ask(lambda: self.client.mapped(1, address, PAGE_4K, 0), Attached(1, address), refuse)

    @precondition(lambda self: not self.dead)
    @rule(refuse=st.booleans(), loss=st.booleans())
    def look(self, refuse: bool, loss: bool) -> None:
        """Questions that leave the conversation where it is."""
        if loss:
            self.ask(lambda: self.client.ask_loss(0, 1, PAGE_4K), Loss("ram1", PAGE_4K, "fire"), refuse)
        else:
            self.ask(self.client.list_blocks, Blocks((Listed("ram1", 7, PAGE_4K, False),)), refuse)

    @precondition(lambda self: not self.dead)
    @rule(sure=st.integers(0, 5))
    def goodbye(self, sure: int) -> None:
        if sure or self.client.stage not in RULES[Goodbye].allowed:
            return
        assert self.client.goodbye() == encode(Goodbye())
        self.supervisor.on_message(Goodbye(), 0)

    @invariant()
    def they_agree(self) -> None:
        assert self.client.stage is self.supervisor.stage or self.dead
        assert self.client.released == self.released


Pair.TestCase.settings = effort(60, 30)
TestPair = Pair.TestCase


def greeted() -> AttachClient:
    client = AttachClient("/run/x")
    client.hello("x", "native")
    client.on_message(encode(Welcome(1)), 0)
    return client


def attached() -> AttachClient:
    client = greeted()
    client.offer_userfaultfd()
    client.on_message(encode(UserfaultfdAccepted()), 0)
    return client


OPENED = BlockOpened(1, "ram0", 4097, PAGE_4K, 2)


@pytest.mark.parametrize(
    ("answer", "descriptors"),
    [
        (OPENED, 0),
        (OPENED, 1),
        (OPENED, 3),
        (Refused("failed", "no"), 1),
        (Released(1), 1),
        (BlockOpened(1, "ram1", 4097, PAGE_4K, 2), 2),
        (BlockOpened(1, "ram0", 4097, PAGE_4K, 1), 2),
        (BlockOpened(1, "ram0", 4097, 1000, 5), 2),
        (Attached(1, 4096), 0),
    ],
)
def test_an_answer_that_cannot_be_ends_the_conversation(answer: Message, descriptors: int) -> None:
    client = attached()
    client.open_block("ram0", "private")
    with pytest.raises(BadMessage):
        client.on_message(encode(answer), descriptors)
    assert client.waiting
    with pytest.raises(ValueError, match="OpenBlock is not answered yet"):
        client.open_block("ram0", "private")


@pytest.mark.parametrize("answer", [Attached(1, 2 * PAGE_4K), Attached(2, PAGE_4K)])
def test_an_answer_for_another_range(answer: Message) -> None:
    client = attached()
    client.mapped(1, PAGE_4K, PAGE_4K, 0)
    with pytest.raises(BadMessage, match="another range"):
        client.on_message(encode(answer), 0)


def test_messages_that_answer_nothing_are_noted() -> None:
    client = attached()
    assert client.on_message(encode(Released(4)), 0) is None
    assert client.on_message(encode(Refused("denied", "not you")), 0) is None, "nothing was asked"
    assert client.on_message(encode(Ending("night")), 0) is None
    assert client.released == {4} and client.ending == "night" and not client.waiting


@pytest.mark.parametrize(
    ("code", "kind"),
    [("no-such-block", NoSuchBlock), ("denied", AttachDenied), ("limit", AttachDenied), ("bad-version", BadMessage),
     ("failed", PostcopyError), ("something new", PostcopyError)],
)  # fmt: skip
def test_a_refusal_is_an_exception_of_its_kind_and_the_client_goes_on(code: str, kind: type[Exception]) -> None:
    client = attached()
    client.open_block("ram9", "private")
    with pytest.raises(kind, match=r"rain.*/run/x|/run/x.*rain"):
        client.on_message(encode(Refused(code, "because of rain")), 0)
    client.open_block("ram0", "private")
    assert client.on_message(encode(OPENED), 2) == OPENED
