"""The desk: questions whose answers take long, worked out in steps of a fraction of a millisecond.

The status of hundreds of clients takes tens of milliseconds of the main thread, where remote requests and pages pass.
Between two steps the main loop hears what has come; who speaks without a pause still leaves the desk its share.
To yield the processor after each step made the longest remote faults half as long on a quiet machine, and a status
last for many seconds on a busy one: it is not done.

One answer is in work at a time. Who asks the same before it is begun gets it, too, so that many askers cost no more
than two; once it is begun it may tell of less than the next asker knows already, and he gets one of his own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import ControlRefused, Message

Answering = Generator[None, None, Message]
"""Steps, and in the end the answer. May raise BadInput, with one line for people."""
SHARE = 3
"""Of the time, one part in so many is the desk's while the main loop always has something else to hear."""


@dataclass(slots=True)
class _Task:
    question: Message
    askers: list[bytes]
    answering: Answering | None = None


class Desk:
    """``begin``: how a question is answered. ``say``: to whom, what. ``bug``: a question, and what went wrong."""

    def __init__(
        self,
        begin: Callable[[Message], Answering],
        say: Callable[[bytes, Message], None],
        bug: Callable[[object, Exception], None],
    ) -> None:
        self.open: deque[_Task] = deque()
        """The first is in work, or is next."""
        self._begin = begin
        self._say = say
        self._bug = bug
        self._due = 0.0

    def ask(self, asker: bytes, question: Message) -> None:
        """It is answered by and by. The same asker may ask the same again: it gets as many answers."""
        for task in self.open:
            if task.answering is None and task.question == question:
                task.askers.append(asker)
                return
        self.open.append(_Task(question, [asker]))

    def work(self, spoken_to: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        """Steps, until nothing is left, or somebody speaks to the house and the desk has had its share."""
        while self.open:
            begun = clock()
            if begun < self._due and spoken_to():
                return
            self.step()
            now = clock()
            self._due = now + (now - begun) * (SHARE - 1)

    def step(self) -> None:
        """One, of the first answer that is not ready."""
        task = self.open[0]
        try:
            if task.answering is None:
                task.answering = self._begin(task.question)
            next(task.answering)
            return
        except StopIteration as done:
            answer: Message = done.value
        except BadInput as error:
            answer = ControlRefused(str(error))
        except Exception as error:
            self._bug(task.question, error)
            answer = ControlRefused("it cannot be answered because of a bug; the supervisor's log says more")
        self.open.popleft()
        for asker in task.askers:
            self._say(asker, answer)

    def finish(self) -> None:
        """Everything at once: the house ends, and nobody shall wait for an answer in vain."""
        while self.open:
            self.step()
