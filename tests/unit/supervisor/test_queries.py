"""Long answers are made in steps, while the service goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import AskEvents, AskStatus, ControlRefused, Message, StatusAnswer
from postcopy_supervisor.observe.queries import SHARE, Answering, LongAnswers

STEPS = 4
STATUS = AskStatus(False)


class Bench:
    """Answers that take STEPS steps, each a millisecond of a clock of its own, and say when they were begun."""

    def __init__(self) -> None:
        self.now = 0.0
        self.begun: list[Message] = []
        self.sent: list[tuple[bytes, Message]] = []
        self.bugs: list[object] = []
        self.fails: Exception | None = None
        self.answers = LongAnswers(self, self)

    def begin(self, question: Message) -> Answering:
        self.begun.append(question)
        number = len(self.begun)
        for _ in range(STEPS):
            self.now += 0.001
            yield
            if self.fails:
                raise self.fails
        return StatusAnswer(b"%d" % number)

    def send_answer(self, identity: bytes, answer: Message) -> None:
        self.sent.append((identity, answer))

    def report_bug(self, what: object, error: Exception) -> None:
        self.bugs.append((what, error))

    def work(self, messages_wait: Iterator[bool]) -> None:
        self.answers.work(lambda: next(messages_wait), lambda: self.now)

    def silence(self) -> Iterator[bool]:
        while True:
            yield False

    def noise(self) -> Iterator[bool]:
        while True:
            yield True


def test_nothing_is_done_before_work_and_then_all_of_it() -> None:
    bench = Bench()
    bench.answers.ask(b"one", STATUS)
    assert not bench.begun
    bench.work(bench.silence())
    assert bench.sent == [(b"one", StatusAnswer(b"1"))] and not bench.answers.open


def test_a_message_that_arrives_is_handled_after_each_step() -> None:
    bench, handled = Bench(), 0
    bench.answers.ask(b"one", STATUS)
    while bench.answers.open:
        before = bench.now
        bench.work(bench.noise())
        assert bench.now - before <= 0.0011, "a step and no more"
        handled += 1
        bench.now += 0.0001
        assert handled < 1000
    assert handled > STEPS


def test_messages_without_a_pause_leave_the_answers_their_share() -> None:
    bench = Bench()
    bench.answers.ask(b"one", STATUS)
    for _ in range(STEPS * 10 * SHARE):
        bench.work(bench.noise())
        bench.now += 0.0001
    assert bench.sent and bench.now <= 0.001 * STEPS * SHARE * 1.5 + 0.0001 * STEPS * 10 * SHARE


def test_equal_questions_before_work_begins_get_one_answer_and_a_later_one_its_own() -> None:
    bench = Bench()
    for asker in (b"one", b"two", b"two"):
        bench.answers.ask(asker, STATUS)
    bench.answers.ask(b"other", AskEvents(7))
    bench.answers.step()
    bench.answers.ask(b"late", STATUS)
    bench.answers.finish()
    assert bench.begun == [STATUS, AskEvents(7), STATUS]
    first, fresh = StatusAnswer(b"1"), StatusAnswer(b"3")
    assert bench.sent == [
        (b"one", first), (b"two", first), (b"two", first), (b"other", StatusAnswer(b"2")), (b"late", fresh),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [BadInput("no such thing"), KeyError(7)])
def test_a_question_without_an_answer_is_refused_and_the_next_one_is_answered(error: Exception) -> None:
    bench = Bench()
    bench.fails = error
    bench.answers.ask(b"one", STATUS)
    bench.answers.ask(b"two", AskEvents(0))
    bench.answers.step()
    bench.answers.step()
    bench.fails = None
    bench.work(bench.silence())
    (one, refused), (two, _) = bench.sent
    assert (one, two) == (b"one", b"two") and isinstance(refused, ControlRefused)
    assert ("no such thing" in refused.reason) == isinstance(error, BadInput)
    assert bool(bench.bugs) == isinstance(error, KeyError)
