"""Page sources at the other end of a return path: the security of the connection, and the first advice.

A remote block's size is not known before its source has been asked, so ``serve`` asks first, and waits (saying so)
while nobody listens at the endpoint. tcp wants CURVE keys, or to be told by name that it may be plain.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.curve_keys import KeyPair, read_keys
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.return_path import MAX_RANGE_BYTES, Advise, Advised, SourceRefused, features_at

log = logging.getLogger(__name__)

ASK_SECONDS = 0.5
SAY_SECONDS = 5.0
FRAME_LIMIT = MAX_RANGE_BYTES + (64 << 10)


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE: our own pair, and the public key by which a source is known. All Z85 texts."""

    public: bytes
    secret: bytes
    source: bytes


def load_keys(secret_file: str, source_file: str) -> Keys:
    """Keys of files that ``postcopy keygen`` makes. Raises BadInput."""
    if not source_file:
        raise BadInput("--curve-secret wants --source-key FILE too, the public key by which the source is known")
    ours, source = _read(secret_file, secret=True), _read(source_file, secret=False)
    return Keys(ours.public, ours.secret or b"", source.public)


def _read(path: str, *, secret: bool) -> KeyPair:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if secret and os.fstat(file.fileno()).st_mode & 0o077:
                raise BadInput(f"{path} can be read by others: chmod 600 {path}, or make new keys if somebody has")
            return read_keys(file.read(1 << 16), path, secret=secret)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def secure(channel: zmq.Socket[Any], endpoint: str, keys: Keys | None, plain_tcp: bool) -> None:
    """Set up a socket for its next connect. Raises BadInput for a tcp endpoint that nobody has secured."""
    channel.curve_server = 0  # sets the mechanism back to none: a tcp source may have been connected before
    if not endpoint.startswith("tcp://"):
        return
    if keys is not None:
        channel.curve_publickey, channel.curve_secretkey = keys.public, keys.secret
        channel.curve_serverkey = keys.source
    elif not plain_tcp:
        raise BadInput(
            f"{endpoint}: tcp wants keys (--curve-secret FILE --source-key FILE, made by postcopy keygen), "
            "or --plain-tcp on a network that you trust with every byte"
        )


@dataclass(frozen=True, slots=True)
class Advice:
    """What a source says of a block."""

    size: int
    identity: str


def ask_advice(
    context: zmq.Context[Any],
    endpoint: str,
    names: Sequence[str],
    page_size: int,
    keys: Keys | None,
    plain_tcp: bool,
    stopped: Callable[[], str],
) -> dict[str, Advice]:
    """Ask a source for its blocks until it has answered for all. Raises BadInput when it refuses one, or when
    ``stopped`` gives a reason."""
    channel = context.socket(zmq.DEALER)
    channel.setsockopt(zmq.LINGER, 0)
    channel.setsockopt(zmq.IMMEDIATE, 1)  # who comes late is asked once, not for every time that he was not there
    channel.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
    try:
        secure(channel, endpoint, keys, plain_tcp)
        channel.connect(endpoint)
        return _ask(channel, endpoint, names, page_size, stopped)
    except zmq.ZMQError as error:
        raise BadInput(f"source {endpoint}: {error.strerror}") from None
    finally:
        channel.close()


def _ask(
    channel: zmq.Socket[Any], endpoint: str, names: Sequence[str], page_size: int, stopped: Callable[[], str]
) -> dict[str, Advice]:
    known: dict[str, Advice] = {}
    # A handshake that fails looks like nobody there: CURVE tells strangers nothing.
    doubt = ", or one of us has the wrong key" if channel.mechanism == zmq.CURVE else ""
    said, asked = time.monotonic() - SAY_SECONDS + 0.5, -ASK_SECONDS
    while len(known) < len(names):
        if why := stopped():
            raise BadInput(f"the source at {endpoint} does not answer: {why}")
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            log.warning("waiting for the source at %s: it does not answer yet%s", endpoint, doubt)
        # Only a connection that stands can be written to (IMMEDIATE), and it may end at any moment.
        events = channel.poll(100, zmq.POLLIN | (zmq.POLLOUT if now - asked >= ASK_SECONDS else 0))
        if events & zmq.POLLOUT:
            asked = now
            with suppress(zmq.Again):
                for name in names:
                    if name not in known:
                        channel.send(encode(Advise(name, page_size, features_at(endpoint))), zmq.DONTWAIT)
        if events & zmq.POLLIN:
            _hear(channel.recv_multipart()[0], endpoint, names, known)
    return known


def _hear(frame: bytes, endpoint: str, names: Sequence[str], known: dict[str, Advice]) -> None:
    try:
        message = decode(frame, expect=(Advised, SourceRefused))
    except BadMessage as error:
        raise BadInput(f"the source at {endpoint} is not one, or of another version: {error}") from None
    if isinstance(message, SourceRefused):
        raise BadInput(f"the source at {endpoint} refuses block {message.name} ({message.code}): {message.reason}")
    assert isinstance(message, Advised)
    if message.name not in names:
        raise BadInput(f"the source at {endpoint} is not one: it offers a block {message.name} that was not asked for")
    known[message.name] = Advice(message.size, message.identity)
