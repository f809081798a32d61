"""A front-end's conversation with a back-end over a channel: every answer is checked against its request."""

from __future__ import annotations

from typing import Any

from postcopy_protocol.vhost_conversation import FrontEnd, Question
from postcopy_protocol.vhost_user import Frame, ProtocolFeature

from .channel import Channel, close_frame


class Conversation:
    """``talk`` makes the questions and checks the answers; it does no I/O. ``table_first``: rust-vmm's order."""

    def __init__(self, channel: Channel, *, table_first: bool = False) -> None:
        self.channel = channel
        self.talk = FrontEnd(table_first=table_first)

    def ask(self, question: Question) -> Any:
        """Send a question and return the value of its answer. Raises BackEndGone, BackEndTimeout, VhostUserError."""
        frame = self.channel.ask(question)
        return None if frame is None else self.check(question, frame)

    def check(self, question: Question, frame: Frame) -> Any:
        """The value of an answer. Closes its descriptors when it is refused."""
        try:
            return self.talk.heard(question, frame)
        except BaseException:
            close_frame(frame)
            raise

    def negotiate_protocol(self) -> None:
        """Protocol features, owner and number of queues; ``get_features`` comes before."""
        self.ask(self.talk.get_protocol_features())
        self.ask(self.talk.set_protocol_features())
        self.ask(self.talk.set_owner())
        if self.talk.protocol & ProtocolFeature.MQ:
            self.ask(self.talk.get_queue_num())
