"""Why a page is lost for a client, in the words of its source or handler function: for the client's PageLost.

A worker's report may still be on its way when the client asks. So its figures are read too, where the worker notes the
words before it makes the SIGBUS. Both are bounded, and so are the figures that are kept of clients that have ended."""

from __future__ import annotations

import os
from collections.abc import Mapping

from postcopy_protocol import counters, messages

from ..blocks import RamBlock
from ..event_log import EventLog, readable
from .client import Client, Clients

KINDS = ("handler-failed", "source-changed", "lost")
"""Kinds of events that say why a page is lost."""

UNKNOWN = messages.Loss("", 0, "")


class Losses:
    """Answers AskLoss."""

    def __init__(self, blocks: Mapping[int, RamBlock], clients: Clients, event_log: EventLog) -> None:
        self._blocks, self._clients, self._event_log = blocks, clients, event_log

    def answer(self, asker: Client, asked: messages.AskLoss) -> messages.Loss:
        """What is known of the page; nothing of another user's client."""
        number = asked.client or asker.number
        uid, noted = self._clients.figures_of(number)
        if asker.uid not in (uid, os.geteuid()) or noted is None:
            return UNKNOWN
        number_of_block, page = counters.place_of(noted[counters.POISONED])
        block = self._blocks.get(asked.block or number_of_block)
        if block is None:
            return UNKNOWN
        if asked.block:
            page = asked.offset // block.page_size
        reason = self._reported(block, page, number)
        if not reason and noted[counters.EXPLAINED] == counters.entry(block.number, page):
            reason = counters.reason(noted)
        return messages.Loss(block.name, page * block.page_size, readable(reason))

    def _reported(self, block: RamBlock, page: int, client: int) -> str:
        """The cause in the latest event about a page. A function that failed for another client may not have for this
        one."""
        first = page * block.page_size
        for event in reversed(list(self._event_log)):
            if event.kind not in KINDS or not event.concerns(block.name, first, first + block.page_size):
                continue
            if event.kind != "handler-failed" or event.where.get("client") == client:
                return str(event.where.get("cause", ""))
        return ""
