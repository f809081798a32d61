"""Status requests against a supervisor that answers late."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import zmq

from postcopy.errors import PostcopyError
from postcopy.queries import Control
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import StatusAnswer


def test_a_late_answer_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """Ctrl-C in ``postcopy load`` interrupts a status request; the last status must not be that old answer."""
    (tmp_path / "private").mkdir()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/private/router")
    timed_out = threading.Event()

    def answer() -> None:
        first, *_ = router.recv_multipart()
        assert timed_out.wait(20)
        router.send_multipart([first, encode(StatusAnswer(b'{"number": 1}'))])
        second, *_ = router.recv_multipart()
        router.send_multipart([second, encode(StatusAnswer(b'{"number": 2}'))])

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Control(tmp_path, timeout=0.2) as control:
            with pytest.raises(PostcopyError, match="does not answer"):
                control.status()
            timed_out.set()
            control._timeout = 20.0
            assert control.status() == {"number": 2}
        thread.join(20)
    finally:
        router.close(0)
        context.term()
