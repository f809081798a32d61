"""Questions of the command line, which come over the router: short ones are answered at once, long ones in steps.

The status of hundreds of clients takes tens of milliseconds of the main thread, where remote requests and pages pass.
Between two steps the main loop handles what has arrived. When messages arrive without a pause, the answers still get
their share of time. Yielding the processor after each step is not done: it halved the longest remote faults on a quiet
machine, and made a status last for many seconds on a busy one.

One long answer is in work at a time. The same question, asked again before work on it begins, gets the same answer, so
many askers cost no more than two answers. Once work has begun the answer may be older than the next asker's knowledge,
and that one gets an answer of its own."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from postcopy_protocol import counters, messages
from postcopy_protocol.errors import BadInput

from ..blocks import RamBlock
from ..exports import Exports
from ..parts import Parts
from . import status
from .audit import Auditor
from .page_history import page_history

LONG = (messages.AskStatus, messages.AskEvents)
QUESTIONS = (*LONG, messages.AskStop, messages.AskStory, messages.AskResume, messages.AskExport, messages.AskProgress)
SHARE = 3  # while messages arrive without a pause, one part in so many of the time goes to long answers
Answering = Generator[None, None, messages.Message]
"""Steps of a fraction of a millisecond, and in the end the answer. May raise BadInput, with one line for people."""


class Stopper(Protocol):
    """Ends the supervisor. Raises BadInput when that cannot be done as asked."""

    def ask(self, keep_workers: bool = False) -> None: ...


class LongAnswerer(Protocol):
    """Begins the answer to a question of LONG."""

    def begin(self, question: messages.Message) -> Answering: ...


class AnswerSender(Protocol):
    """Takes finished answers, and the exceptions of those that failed."""

    def send_answer(self, identity: bytes, answer: messages.Message) -> None: ...
    def report_bug(self, what: object, error: Exception) -> None: ...


@dataclass(slots=True)
class _Task:
    question: messages.Message
    askers: list[bytes]
    answering: Answering | None = None


class LongAnswers:
    """The queue of questions whose answers are made in steps. ``open``: the first is in work, or next."""

    def __init__(self, answerer: LongAnswerer, sender: AnswerSender) -> None:
        self.open: deque[_Task] = deque()
        self._answerer, self._sender = answerer, sender
        self._due = 0.0

    def ask(self, asker: bytes, question: messages.Message) -> None:
        """Queue a question. An asker that repeats it gets as many answers."""
        for task in self.open:
            if task.answering is None and task.question == question:
                task.askers.append(asker)
                return
        self.open.append(_Task(question, [asker]))

    def work(self, messages_wait: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        """Make steps until none is left, or until messages wait and the answers have had their share of time."""
        while self.open:
            begun = clock()
            if begun < self._due and messages_wait():
                return
            self.step()
            now = clock()
            self._due = now + (now - begun) * (SHARE - 1)

    def step(self) -> None:
        """Make one step of the first answer."""
        task = self.open[0]
        try:
            if task.answering is None:
                task.answering = self._answerer.begin(task.question)
            next(task.answering)
            return
        except StopIteration as done:
            answer: messages.Message = done.value
        except BadInput as error:
            answer = messages.ControlRefused(str(error))
        except Exception as error:
            self._sender.report_bug(task.question, error)
            answer = messages.ControlRefused("it cannot be answered because of a bug; the supervisor's log says more")
        self.open.popleft()
        for asker in task.askers:
            self._sender.send_answer(asker, answer)

    def finish(self) -> None:
        """Finish every answer: the supervisor ends, and no asker may wait in vain."""
        while self.open:
            self.step()


class Queries:
    """Answers questions from the parts."""

    def __init__(self, parts: Parts, exports: Exports, auditor: Auditor, stopper: Stopper) -> None:
        self._parts, self._exports, self._auditor, self._stopper = parts, exports, auditor, stopper

    def begin(self, question: messages.Message) -> Answering:
        """The answer to a question of LONG, in steps."""
        match question:
            case messages.AskStatus(audit):
                if audit:
                    yield from self._auditor.now()
                document = yield from status.document(self._parts)
                return messages.StatusAnswer(document.encode())
            case messages.AskEvents(after):
                events = yield from status.listed(self._parts.event_log.documents(after))
                return messages.EventsAnswer(events.encode())
        raise BadInput(f"{type(question).__name__} is no question")

    def answer(self, question: messages.Message) -> messages.Message:
        """The answer to any other question; ControlRefused, with one line for people, when there is none."""
        try:
            match question:
                case messages.AskStop(keep_workers):
                    self._stopper.ask(keep_workers)
                    return messages.StopAnswer(os.getpid())
                case messages.AskStory(name, offset):
                    return messages.StoryAnswer(
                        json.dumps(page_history(self._parts, self._block(name), offset)).encode()
                    )
                case messages.AskResume(client):
                    return self._resume(client)
                case messages.AskExport(name, path):
                    return self._export(name, path)
                case messages.AskProgress(job, cancel):
                    return self._progress(job, cancel)
            raise BadInput(f"{type(question).__name__} is no question")
        except BadInput as error:
            return messages.ControlRefused(str(error))

    def _block(self, name: str) -> RamBlock:
        blocks = self._parts.blocks
        if name not in blocks:
            raise BadInput(f"no block {name} here; there are {', '.join(sorted(blocks))}")
        return blocks[name]

    def _resume(self, number: int) -> messages.Message:
        client = self._parts.clients.by_number.get(number)
        if number and client is None:
            raise BadInput(f"there is no client {number} here")
        self._parts.pool.resume(number)
        return messages.ResumeAnswer(number, client.counters[counters.DENIED] if client and client.counters else 0)

    def _export(self, name: str, path: str) -> messages.Message:
        block = self._block(name)
        self._parts.zero.prepare_export(block)
        return self._exports.start(block, path).progress()

    def _progress(self, job: int, cancel: bool) -> messages.Message:
        export = self._exports.get(job)
        if export is None:
            raise BadInput(f"there is no export {job}")
        if cancel and export.running:
            export.cancel()
            self._parts.zero.give_up(export.block)
        return export.progress()
