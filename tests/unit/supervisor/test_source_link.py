"""The link to a source over a wire that reorders, stalls, duplicates and drops, with a source that dies and comes back.
At rest no client waits for a page that has arrived, and every page was requested once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    Advise,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RequestRanges,
    SourceRefused,
    Staged,
    Staging,
    UseStaging,
    pack_ranges,
)
from tests.simulated.effort import effort
from tests.simulated.wire import LONGER, NAMES, OTHER, PAGE, PAGES, RIGHT, SIZES, Source, Supervisor, Word

which = st.integers(0, 99)
STYLES = ("whole", "staged", "staged", "pages", "zero", "lost", "first", "twice", "never")


class Path(RuleBasedStateMachine):
    """``out`` of the supervisor and ``back`` are the two directions of the wire."""

    def __init__(self) -> None:
        super().__init__()
        self.supervisor = Supervisor()
        self.source = Source()
        self.source.start(RIGHT)
        self.supervisor.memories = self.source.memories
        self.back: list[Word] = []
        self.clients = 0

    @property
    def out(self) -> list[Word]:
        return self.supervisor.out

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(client=st.integers(1, 3), block=st.integers(1, 2), page=st.integers(0, 7), window=st.integers(1, 4))
    def fault(self, client: int, block: int, page: int, window: int) -> None:
        self.supervisor.fault(client, block, page % PAGES[block], window)

    @rule(block=st.integers(1, 2), page=st.integers(0, 7), window=st.integers(1, 4))
    def background(self, block: int, page: int, window: int) -> None:
        self.supervisor.background(block, page % PAGES[block], window)

    @rule(client=st.integers(1, 3))
    def leave(self, client: int) -> None:
        self.supervisor.leave(client)

    # --- the wire -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.out and self.source.content)
    @rule(at=st.integers(-3, 3), style=st.sampled_from(STYLES))
    def deliver(self, at: int, style: str) -> None:
        self.back += self.source.hear(self.out.pop(max(0, at) % len(self.out)).message, style)

    @precondition(lambda self: self.back)
    @rule(at=st.integers(-3, 3))
    def deliver_back(self, at: int) -> None:
        self.supervisor.hear(self.back.pop(max(0, at) % len(self.back)))

    @rule()
    def deliver_all(self) -> None:
        """As ZeroMQ does: everything, in order."""
        for _ in range(20):
            self._exchange()

    def _exchange(self) -> None:
        if self.source.content:
            words, self.out[:] = self.out[:], []
            for word in words:
                self.back += self.source.hear(word.message)
        words, self.back = self.back, []
        for word in words:
            self.supervisor.hear(word)

    @precondition(lambda self: self.back)
    @rule(which=which)
    def twice(self, which: int) -> None:
        word = self.back[which % len(self.back)]
        if not isinstance(word.message, Staged):  # a slot is filled once; ZeroMQ delivers nothing twice
            self.back.append(word)

    @precondition(lambda self: self.out)
    @rule(which=which)
    def drop(self, which: int) -> None:
        self.out.pop(which % len(self.out))

    @precondition(lambda self: self.back)
    @rule(which=which)
    def drop_back(self, which: int) -> None:
        self.back.pop(which % len(self.back))

    @rule(seconds=st.sampled_from((0.25, 0.25, 1.0, 5.1, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.supervisor.tick(seconds)

    # --- the source ---------------------------------------------------------------------------------------------------

    @rule()
    def die(self) -> None:
        self.source.stop()

    @rule(content=st.sampled_from((RIGHT, RIGHT, OTHER, LONGER)))
    def start(self, content: str) -> None:
        self.source.start(content)

    @precondition(lambda self: self.source.listening())
    @rule(which=which, page=st.integers(0, 4), kind=st.integers(0, 2))
    def push(self, which: int, page: int, kind: int) -> None:
        streams = self.source.listening()
        self.back.append(self.source.pages(streams[which % len(streams)][0], 0, [(page * PAGE, PAGE)], kind))

    @rule(stream=st.integers(0, 2000), request=st.integers(0, 9), page=st.integers(0, 20), frames=st.integers(0, 2))
    def nonsense(self, stream: int, request: int, page: int, frames: int) -> None:
        """Pages of no stream, or of the wrong form: they change nothing."""
        known = self.supervisor.link._blocks
        number = sorted(known)[stream % len(known)] if known and stream % 2 else stream
        message = Pages(number, request, pack_ranges([(page * PAGE + 1, PAGE)]), b"\0", "")
        before = set(self.supervisor.received)
        self.supervisor.hear(Word(message, (PAGE,) * frames, OTHER))
        assert self.supervisor.received == before

    @rule(code=st.sampled_from(("limit", "denied", "out-of-phase", "no-such-block", "failed")), text=which)
    def refuse(self, code: str, text: int) -> None:
        self.back.append(Word(SourceRefused(code, "one", f"because {text}")))

    # --- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.supervisor.check()

    def teardown(self) -> None:
        """With a good source, a good wire and some time, no client waits and no request is open."""
        self.source.start(RIGHT)
        for _ in range(400):
            if self.supervisor.engine.idle and self.supervisor.link.state == "up":
                break
            self.supervisor.tick(0.25)
            self._exchange()
            self.supervisor.check()
        assert not self.supervisor.waiting and self.supervisor.engine.idle
        assert self.supervisor.link.state == "up"


TestPath = Path.TestCase
TestPath.settings = effort(300, 60)


# --- one case each ----------------------------------------------------------------------------------------------------


class Talk:
    """A supervisor and a source over a wire that behaves as ZeroMQ."""

    def __init__(self, patience: float = 5.0) -> None:
        self.supervisor = Supervisor(patience)
        self.source = Source()
        self.source.start(RIGHT)
        self.supervisor.memories = self.source.memories
        self.said: list[Message] = []

    def go(self, seconds: float = 0.0, style: str = "whole") -> None:
        """Time passes in ticks. Messages arrive at once while the source lives, and later if it does not."""
        for _ in range(max(1, int(seconds / 0.25))):
            if seconds:
                self.supervisor.tick(0.25)
            while self.supervisor.out and self.source.content:
                word = self.supervisor.out.pop(0)
                self.said.append(word.message)
                for answer in self.source.hear(word.message, style):
                    self.supervisor.hear(answer)
            self.supervisor.check()

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.supervisor.events]

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.said)


@pytest.fixture
def talk() -> Talk:
    talk = Talk()
    talk.go(1.0)
    assert talk.supervisor.link.state == "up"
    return talk


def test_the_conversation_begins_with_ping_advise_and_listen(talk: Talk) -> None:
    order = [type(message) for message in talk.said]
    assert order[:1] == [Ping]
    assert order.index(Advise) < order.index(Listen)
    assert talk.count(Advise) == len(NAMES)
    assert talk.kinds() == ["source"] and talk.supervisor.link.shown == "up"


def test_each_page_is_requested_once_however_many_clients_wait(talk: Talk) -> None:
    for page in range(8):
        for client in range(1, 9):
            talk.supervisor.fault(client, 1, page, 2)
        talk.supervisor.background(1, 0, 8)
    talk.go()
    assert Counter(talk.source.asked) == Counter(("one", page) for page in range(8))
    assert not talk.supervisor.waiting
    assert talk.supervisor.engine.deduplicated == 8 * 8 - 1, "all but the first found their page requested"


def test_a_request_of_a_client_that_left_serves_the_others(talk: Talk) -> None:
    talk.source.stop()
    talk.supervisor.fault(1, 1, 3, 1)
    talk.supervisor.fault(2, 1, 3, 1)
    talk.supervisor.leave(1)
    talk.source.start(RIGHT)
    talk.go(30)
    assert not talk.supervisor.waiting and (1, 3) in talk.supervisor.received


def test_a_long_absence_is_one_pause_and_one_recover(talk: Talk) -> None:
    talk.source.stop()
    talk.supervisor.fault(1, 1, 3, 1)
    talk.go(100)
    assert talk.supervisor.link.shown == "paused" and talk.kinds() == ["source", "pause"]
    asked = talk.count(Advise)
    talk.source.start(RIGHT)
    talk.go(1.5)
    assert talk.kinds() == ["source", "pause", "recover"] and not talk.supervisor.waiting
    assert talk.count(Advise) == asked + len(NAMES), "one Advise a block, however long it was away"


@pytest.mark.parametrize("waiting", [False, True])
def test_a_ping_reveals_an_unnoticed_restart(talk: Talk, waiting: bool) -> None:
    if waiting:
        talk.supervisor.fault(1, 1, 3, 1)
        talk.supervisor.out.clear()  # sent to the one that died
    talk.source.start(RIGHT)
    talk.go(2.5)
    assert talk.kinds() == ["source", "pause", "recover"]
    assert not talk.supervisor.waiting


@pytest.mark.parametrize("patience", [0.1, 0.3, 1.0])
def test_a_short_patience_does_not_flap(patience: float) -> None:
    talk = Talk(patience)
    talk.go(30)
    assert talk.kinds() == ["source"]
    talk.source.stop()
    talk.go(3)
    assert talk.kinds() == ["source", "pause"]


@pytest.mark.parametrize(
    ("content", "size", "identity"), [(OTHER, SIZES[1], OTHER), (LONGER, SIZES[1] + 7 * PAGE, RIGHT)]
)
def test_another_content_is_refused_with_both_values(talk: Talk, content: str, size: int, identity: str) -> None:
    talk.supervisor.fault(1, 1, 3, 1)
    talk.supervisor.out.clear()
    talk.source.start(content)
    talk.go(60)
    refusals = [detail for kind, detail in talk.supervisor.events if kind == "source-refused"]
    assert len(refusals) == len(NAMES), "each is reported once"
    assert f"{size} bytes of {identity}" in refusals[0] and f"it was {SIZES[1]} bytes of {RIGHT}" in refusals[0]
    assert talk.supervisor.waiting == {(1, 1, 3)} and talk.supervisor.link.shown == "paused"
    talk.source.start(RIGHT)
    talk.go(2.5)
    assert not talk.supervisor.waiting and talk.supervisor.link.shown == "up"


def test_late_answers_of_an_old_stream_are_ignored(talk: Talk) -> None:
    link = talk.supervisor.link
    old = link._streams[1]
    talk.source.start(RIGHT)
    talk.go(2.5)
    late = talk.source.pages(old, 0, [(0, PAGE)], 0)
    late.content = OTHER
    talk.supervisor.hear(late)
    assert not talk.supervisor.received and link._streams[1] != old


def test_background_pages_come_in_slots_that_are_used_again(talk: Talk) -> None:
    assert talk.count(UseStaging) == 1
    for page in range(8):
        talk.supervisor.background(1, page, 1)
    talk.go(style="staged")
    assert talk.supervisor.staged == 8 and len(talk.supervisor.received) == 8
    assert talk.source.staging is not None and talk.source.staging.slots == [None, None]
    assert talk.supervisor.link.pages == 8 and talk.supervisor.link.bytes == 8 * PAGE
    assert not talk.supervisor.link.flow.in_flight


def test_pages_in_slots_of_a_dead_source_are_ignored(talk: Talk) -> None:
    """Late messages about an old staging memory place nothing, and free no slot of the new one."""
    talk.supervisor.background(1, 3, 1)
    late = [word for out in talk.supervisor.out for word in talk.source.hear(out.message, "staged")]
    assert [type(word.message) for word in late] == [Staged]
    talk.supervisor.out.clear()
    talk.source.start(RIGHT)
    talk.go(0.75)
    talk.supervisor.background(1, 5, 1)
    other = [word for out in talk.supervisor.out for word in talk.source.hear(out.message, "staged")]
    talk.supervisor.out.clear()
    talk.go(3)
    assert talk.count(UseStaging) == 2 and talk.source.staging is not None
    for word in late + other:
        talk.supervisor.hear(word)
    talk.go(20, "staged")
    assert {(1, 3), (1, 5)} <= talk.supervisor.received


def test_advising_again_brings_a_new_staging_memory(talk: Talk) -> None:
    talk.source.hear(Advise("one", PAGE, ("staging",)))
    assert talk.source.staging is None
    words = talk.source.hear(Listen(max(talk.source.conversation.streams), 0))  # type: ignore[union-attr]
    assert [type(word.message) for word in words] == [Staging]


@pytest.mark.parametrize(
    ("offset", "length", "complaint"),
    [(0, 0, "no part"), (1, PAGE, "aligned"), (8 * PAGE, PAGE, "no part"), (0, 5 * PAGE, "slot of")],
)
def test_pages_in_a_slot_obey_the_rules_of_pages(talk: Talk, offset: int, length: int, complaint: str) -> None:
    stream = next(number for number, block in talk.supervisor.link._blocks.items() if block == 1)
    with pytest.raises(BadMessage, match=complaint):
        talk.supervisor.link.on_staged(Staged(stream, 1, offset, length, 1, 0), 4 * PAGE, talk.supervisor.now)
    assert talk.supervisor.link.on_staged(Staged(stream + 99, 1, offset, length, 1, 0), PAGE, 0.0) is None


def test_a_link_is_finished_when_every_block_is_complete(talk: Talk) -> None:
    link = talk.supervisor.link
    for block in NAMES:
        assert not link.finished
        link.complete(block)
    assert link.finished


def test_a_pong_from_before_the_loss_brings_no_advise(talk: Talk) -> None:
    """It proves only that the source lived once. An Advise to an absent source would be queued."""
    old = talk.supervisor.link._nonce
    talk.source.stop()
    talk.go(20)
    talk.supervisor.out.clear()
    talk.supervisor.hear(Word(Pong(old)))
    assert not talk.supervisor.out
    talk.supervisor.hear(Word(Pong(talk.supervisor.link._nonce)))
    assert [type(word.message) for word in talk.supervisor.out] == [Advise, Advise]


def test_a_slow_source_is_advised_once() -> None:
    """Its Pongs come one by one, over more than a second. Pings from before the Advise cause no other Advise."""
    supervisor = Supervisor()
    for _ in range(3):
        supervisor.tick(0.25)
    nonces = [word.message.nonce for word in supervisor.out if isinstance(word.message, Ping)]
    for nonce in nonces:
        supervisor.hear(Word(Pong(nonce)))
        supervisor.tick(1.1)
    assert len(nonces) > 1
    assert sum(isinstance(word.message, Advise) for word in supervisor.out) == len(NAMES)
    supervisor.hear(Word(Pong(nonces[-1] + 1)))
    assert sum(isinstance(word.message, Advise) for word in supervisor.out) == 2 * len(NAMES)


def test_a_source_that_refuses_everything_is_asked_once_a_second(talk: Talk) -> None:
    """It advises, but refuses every request as out of phase: requests are no more frequent than Advises."""
    talk.supervisor.fault(1, 1, 3, 1)
    before = talk.count(RequestRanges)
    for _ in range(40):
        talk.supervisor.tick(0.25)
        while talk.supervisor.out:
            message = talk.supervisor.out.pop(0).message
            talk.said.append(message)
            strange = isinstance(message, RequestRanges)
            answers = [Word(SourceRefused("out-of-phase", "", "no"))] if strange else talk.source.hear(message)
            for answer in answers:
                talk.supervisor.hear(answer)
    assert talk.count(RequestRanges) - before <= 12
    assert talk.supervisor.waiting


def test_pages_that_a_live_source_never_answers_are_lost(talk: Talk) -> None:
    talk.supervisor.fault(1, 1, 3, 2)
    talk.go(31, "never")
    assert talk.supervisor.waiting, "a source that gives up a read after 30 s sends the reason, so there is time for it"
    talk.go(20, "never")
    assert not talk.supervisor.waiting and talk.supervisor.lost == {(1, 3), (1, 4)}
    assert talk.kinds() == ["source"], "the source is not away"
    talk.supervisor.hear(talk.source.pages(talk.supervisor.link._streams[1], 0, [(3 * PAGE, PAGE)], 0))
    assert talk.supervisor.lost == {(1, 4)}, "a late answer is used"


def test_a_stray_advised_changes_nothing(talk: Talk) -> None:
    numbers = dict(talk.supervisor.link._streams)
    talk.supervisor.hear(Word(Advised("one", 77, SIZES[1], RIGHT, ())))
    talk.supervisor.hear(Word(Advised("three", 78, SIZES[1], RIGHT, ())))
    assert talk.supervisor.link._streams == numbers and talk.kinds() == ["source", "source-nonsense", "source-nonsense"]


def test_one_stream_number_for_two_blocks_is_nonsense() -> None:
    supervisor = Supervisor()
    supervisor.tick(1)
    supervisor.hear(Word(Pong(1)))
    supervisor.hear(Word(Advised("one", 7, SIZES[1], RIGHT, ())))
    supervisor.hear(Word(Advised("two", 7, SIZES[2], RIGHT, ())))
    assert supervisor.link.state == "advising" and supervisor.events[-1][0] == "source-nonsense"


def test_refusals_are_reported_once_and_not_without_end(talk: Talk) -> None:
    for number in range(1000):
        talk.supervisor.hear(Word(SourceRefused("limit", "one", f"reason {number}")))
        talk.supervisor.hear(Word(SourceRefused("limit", "one", "the same")))
    assert talk.kinds().count("source-refused") <= 16
    assert talk.supervisor.link.state == "up"


def test_complete_is_sent_once_and_pings_go_on(talk: Talk) -> None:
    link = talk.supervisor.link
    for block in NAMES:
        link.complete(block)
    talk.go(20)
    assert talk.count(Complete) == len(NAMES)
    assert talk.kinds() == ["source"], "a Listen for a stream that has ended would be refused"
    assert not talk.source.listening()


def test_a_restarted_source_is_sent_what_is_complete(talk: Talk) -> None:
    """Otherwise it would push all of it again."""
    talk.supervisor.link.complete(1)
    talk.go(2)
    talk.source.stop()
    talk.source.start(RIGHT)
    talk.go(5)
    assert talk.kinds() == ["source", "pause", "recover"]
    assert talk.count(Complete) == 2 and [name for _, name in talk.source.listening()] == ["two"]
