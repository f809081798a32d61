"""What the command line asks over the router, and the answers: short ones at once, long ones at the desk."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from postcopy_protocol import counters
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import (
    AskEvents,
    AskExport,
    AskProgress,
    AskResume,
    AskStatus,
    AskStop,
    AskStory,
    ControlRefused,
    EventsAnswer,
    Message,
    ResumeAnswer,
    StatusAnswer,
    StopAnswer,
    StoryAnswer,
)

from .desk import Answering
from .page_history import story
from .status import listed

if TYPE_CHECKING:
    from ..blocks import RamBlock
    from ..main_loop import MainLoop


LONG = (AskStatus, AskEvents)
QUESTIONS = (*LONG, AskStop, AskStory, AskResume, AskExport, AskProgress)


def long_answer(house: MainLoop, message: Message) -> Answering:
    """The answer to a LONG question, in steps."""
    match message:
        case AskStatus(audit):
            if audit:
                yield from house.auditor.now()
            document = yield from house.document()
            return StatusAnswer(document.encode())
        case AskEvents(after):
            events = yield from listed(house.history.documents(after))
            return EventsAnswer(events.encode())
    raise BadInput(f"{type(message).__name__} is no question")


def answer(house: MainLoop, message: Message) -> Message:
    """The answer to any other question; what cannot be is ControlRefused, with one line for people."""
    try:
        match message:
            case AskStop(keep_workers):
                house.ask_to_end(keep_workers)
                return StopAnswer(os.getpid())
            case AskStory(name, offset):
                told = story(_block(house, name), offset, house.reception, house.paging, house.history)
                return StoryAnswer(json.dumps(told).encode())
            case AskResume(client):
                return _resume(house, client)
            case AskExport(name, path):
                return _export(house, name, path)
            case AskProgress(job, cancel):
                return _progress(house, job, cancel)
        raise BadInput(f"{type(message).__name__} is no question")
    except BadInput as error:
        return ControlRefused(str(error))


def _block(house: MainLoop, name: str) -> RamBlock:
    block = house.blocks.get(name)
    if block is None:
        raise BadInput(f"no block {name} here; there are {', '.join(sorted(house.blocks))}")
    return block


def _resume(house: MainLoop, number: int) -> Message:
    client = house.reception.clients.get(number)
    if number and client is None:
        raise BadInput(f"there is no client {number} here")
    house.workforce.resume(number)
    return ResumeAnswer(number, client.words[counters.DENIED] if client and client.words else 0)


def _export(house: MainLoop, name: str, path: str) -> Message:
    block = _block(house, name)
    house.zero.heal(block)
    return house.exports.start(block, path).progress()


def _progress(house: MainLoop, job: int, cancel: bool) -> Message:
    export = house.exports.get(job)
    if export is None:
        raise BadInput(f"there is no export {job}")
    if cancel and export.running:
        export.cancel()
        house.zero.give_up(export.block)
    return export.progress()
