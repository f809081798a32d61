"""CURVE: which supervisors may connect to this source. The keys are files of ``postcopy keygen``. libzmq asks for each
connection over ZAP (rfc.zeromq.org/spec/27), in a thread that sleeps otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

import zmq
from zmq.utils import z85

from postcopy_kernel.log_queue import about
from postcopy_protocol.curve_keys import KeyPair

_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"postcopy"

log = logging.getLogger(__name__)


def protect(socket: zmq.Socket[bytes], keys: KeyPair) -> None:
    """Make a socket that is not bound yet a CURVE server."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)


class Authenticator:
    """Accepts connections with one of the ``allowed`` public keys (Z85, 40 bytes each)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Collection[bytes]) -> None:
        self._allowed = frozenset(allowed)
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ENDPOINT)

    def open(self) -> None:
        """Start to answer. No connection is accepted before."""
        threading.Thread(target=self._run, name="authenticator", daemon=True).start()

    def _run(self) -> None:
        """Until the context ends."""
        with self._socket:
            try:
                while True:
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
            except zmq.ZMQError as error:
                if error.errno not in (zmq.ETERM, zmq.ENOTSOCK):
                    raise

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """version, request, domain, address, identity, mechanism, credentials -> version, request, status, text..."""
        known = len(request) == 7 and request[5] == b"CURVE" and len(request[6]) == 32
        if known and z85.encode(request[6]) in self._allowed:
            return [b"1.0", request[1], b"200", b"OK", b"", b""]
        address = request[3].decode("ascii", "replace") if len(request) > 3 else "?"
        log.warning("a supervisor at %s is refused: its key is not allowed", address, extra=about("refused", address))
        return [b"1.0", request[1] if len(request) > 1 else b"", b"400", b"this key is not allowed", b"", b""]
