"""Pages that a source pushes unasked: the stream that its ``listening`` gets, and the threads that run it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.geometry import page_count
from postcopy_protocol.return_path import MAX_RANGE_BYTES

from .answers import Answer, Buffer, answer_of, lost_answer

MAX_PUSHING = 64  # threads that run ``listening`` of sources

log = logging.getLogger(__name__)


class StreamEnded(PostcopyError):
    """The supervisor no longer listens to this stream: stop pushing."""


SendAnswer = Callable[[Answer], object]  # sends an answer from any thread


class PushStream:
    """A listening supervisor, as a source sees it: pages may be pushed to it that it has not asked for.

    Calls wait while as many bytes are in flight as the supervisor accepts. They raise StreamEnded when it is gone, has
    everything, or has started again (then ``listening`` is called again too).

    Example::

        def listening(self, stream):
            for offset in range(0, self.size, self.page_size):
                stream.push(offset, self.read(offset, min(self.page_size, self.size - offset)))
    """

    def __init__(self, size: int, page_size: int, send: SendAnswer) -> None:
        self.size = size
        self.page_size = page_size
        self._send = send
        self._changed = threading.Condition()
        self._window = 0
        self._ended = False

    def push(self, offset: int, data: Buffer | None, length: int = 0) -> None:
        """Send pages from ``offset`` on: whole ones, unless they end at ``size``. None: ``length`` bytes of zeros."""
        length = length if data is None else len(data)
        padded = self._padded(offset, length)
        self._pass(padded, answer_of(data, offset, length, padded))

    def lost(self, offset: int, length: int, reason: str) -> None:
        """Report pages that cannot be supplied."""
        padded = self._padded(offset, length)
        self._pass(0, lost_answer(offset, padded, reason))

    def _padded(self, offset: int, length: int) -> int:
        """The length in whole pages. Raises BadInput."""
        end = page_count(self.size, self.page_size) * self.page_size
        padded = page_count(length, self.page_size) * self.page_size
        whole = length == padded or offset + length == self.size
        if offset % self.page_size or not whole or not 0 < padded <= MAX_RANGE_BYTES or not 0 <= offset <= end - padded:
            raise BadInput(f"{length} bytes at {offset} are no whole pages of {self.page_size} in {self.size} bytes")
        return padded

    def _pass(self, cost: int, answer: Answer) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._window >= cost)
            if self._ended:
                raise StreamEnded("the supervisor no longer listens to this stream")
            self._window -= cost
        self._send(answer)

    @property
    def ended(self) -> bool:
        """Does the supervisor no longer listen? For a ``listening`` that waits for something to push."""
        return self._ended

    def grant(self, window: int) -> None:
        """Allow this many bytes from now on."""
        with self._changed:
            self._window = window
            self._changed.notify_all()

    def end(self) -> None:
        """Make every call raise StreamEnded."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


Listening = Callable[[PushStream], object]  # the ``listening`` of a source


class Pushers:
    """The threads that push, MAX_PUSHING at most."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()

    def start(self, name: str, listening: Listening, stream: PushStream) -> bool:
        """Run ``listening`` of the source of this name in a thread. False: there are too many."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) >= MAX_PUSHING:
            log.warning("%d threads push already: %s is not pushed", MAX_PUSHING, name)
            return False
        thread = threading.Thread(target=_push, args=(listening, stream), name="pusher", daemon=True)
        self._threads.add(thread)
        thread.start()
        return True


def _push(listening: Listening, stream: PushStream) -> None:
    try:
        listening(stream)
    except StreamEnded:
        pass
    except BaseException:  # the source's own: pages that are not pushed will be asked for
        log.exception("listening of a source failed")
