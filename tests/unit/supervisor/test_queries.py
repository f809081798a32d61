"""The desk: long answers in steps, while the service goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import AskEvents, AskStatus, ControlRefused, Message, StatusAnswer
from postcopy_supervisor.observe.desk import SHARE, Answering, Desk

STEPS = 4
STATUS = AskStatus(False)


class Place:
    """A desk whose answers take STEPS steps, each a millisecond of a clock of its own, and say when they were begun."""

    def __init__(self) -> None:
        self.now = 0.0
        self.begun: list[Message] = []
        self.said: list[tuple[bytes, Message]] = []
        self.bugs: list[object] = []
        self.fails: Exception | None = None
        self.desk = Desk(
            self._begin, lambda asker, answer: self.said.append((asker, answer)), lambda *bug: self.bugs.append(bug)
        )

    def _begin(self, question: Message) -> Answering:
        self.begun.append(question)
        number = len(self.begun)
        for _ in range(STEPS):
            self.now += 0.001
            yield
            if self.fails:
                raise self.fails
        return StatusAnswer(b"%d" % number)

    def work(self, spoken_to: Iterator[bool]) -> None:
        self.desk.work(lambda: next(spoken_to), lambda: self.now)

    def silence(self) -> Iterator[bool]:
        while True:
            yield False

    def noise(self) -> Iterator[bool]:
        while True:
            yield True


def test_nothing_is_done_until_somebody_works_and_then_all_of_it() -> None:
    place = Place()
    place.desk.ask(b"one", STATUS)
    assert not place.begun
    place.work(place.silence())
    assert place.said == [(b"one", StatusAnswer(b"1"))] and not place.desk.open


def test_somebody_who_speaks_is_heard_after_each_step() -> None:
    place, heard = Place(), 0
    place.desk.ask(b"one", STATUS)
    while place.desk.open:
        before = place.now
        place.work(place.noise())
        assert place.now - before <= 0.0011, "a step and no more"
        heard += 1
        place.now += 0.0001
        assert heard < 1000
    assert heard > STEPS


def test_who_speaks_without_a_pause_leaves_the_desk_its_share() -> None:
    place = Place()
    place.desk.ask(b"one", STATUS)
    for _ in range(STEPS * 10 * SHARE):
        place.work(place.noise())
        place.now += 0.0001
    assert place.said and place.now <= 0.001 * STEPS * SHARE * 1.5 + 0.0001 * STEPS * 10 * SHARE


def test_two_who_ask_the_same_before_it_is_begun_get_one_answer_and_a_later_one_a_fresh_one() -> None:
    place = Place()
    for asker in (b"one", b"two", b"two"):
        place.desk.ask(asker, STATUS)
    place.desk.ask(b"other", AskEvents(7))
    place.desk.step()
    place.desk.ask(b"late", STATUS)
    place.desk.finish()
    assert place.begun == [STATUS, AskEvents(7), STATUS]
    first, fresh = StatusAnswer(b"1"), StatusAnswer(b"3")
    assert place.said == [
        (b"one", first), (b"two", first), (b"two", first), (b"other", StatusAnswer(b"2")), (b"late", fresh),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [BadInput("no such thing"), KeyError(7)])
def test_what_cannot_be_answered_is_said_and_the_next_one_is_answered(error: Exception) -> None:
    place = Place()
    place.fails = error
    place.desk.ask(b"one", STATUS)
    place.desk.ask(b"two", AskEvents(0))
    place.desk.step()
    place.desk.step()
    place.fails = None
    place.work(place.silence())
    (one, refused), (two, _) = place.said
    assert (one, two) == (b"one", b"two") and isinstance(refused, ControlRefused)
    assert ("no such thing" in refused.reason) == isinstance(error, BadInput)
    assert bool(place.bugs) == isinstance(error, KeyError)
