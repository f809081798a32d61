"""Where libzmq is wanted: sockets of other machines, and CURVE. A ROUTER of libzmq, heard and spoken to in the turns of
ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq

from postcopy_protocol.zmtp import Buffer

from .router import FULL, NOBODY, SENT

AT_ONCE = 16
"""Messages that are heard before anybody else can be."""
# As plain numbers: an operation on pyzmq's enumeration costs more than handing over a frame.
_LAST = int(zmq.DONTWAIT)
_MORE = _LAST | int(zmq.SNDMORE)
_EVENTS, _SPOKEN = int(zmq.EVENTS), int(zmq.POLLIN)


class Libzmq:
    """``socket``: a ROUTER with ROUTER_MANDATORY; it is closed with us. ``heard`` is told a peer's routing id, and the
    frames of its message; it must not raise."""

    def __init__(self, socket: zmq.Socket[bytes], heard: Callable[[bytes, list[memoryview]], object]) -> None:
        self.socket = socket
        self._heard = heard
        # The method below pyzmq's own layer, which does nothing here but take a microsecond a frame.
        self._push: Callable[[Buffer, int], object] = super(zmq.Socket, socket).send

    def fileno(self) -> int:
        """Readable once when something has happened; what it is, ``waiting`` says."""
        return int(self.socket.getsockopt(zmq.FD))

    def waiting(self) -> bool:
        """Is there a message? To ask also makes the descriptor say the next one."""
        return bool(int(self.socket.get(_EVENTS)) & _SPOKEN)

    def hear(self) -> None:
        """What has come, as far as it is not too much."""
        receive = self.socket.recv
        for _ in range(AT_ONCE):
            if not self.waiting():
                return
            name = receive()
            frames = [receive(0, False)]
            while frames[-1].more:
                frames.append(receive(0, False))
            self._heard(name, [one.buffer for one in frames])

    def send(self, name: bytes, parts: Sequence[Buffer]) -> int:
        """SENT, FULL or NOBODY."""
        try:
            # Who cannot be reached is known at the first frame; once that is taken, so are the others.
            self._push(name, _MORE)
            for part in parts[:-1]:
                self._push(part, _MORE)
            self._push(parts[-1], _LAST)
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return NOBODY
        return SENT

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
