"""Advice of page sources before the start, and the security of the connections to them.

A remote block's size is not known before its source has been asked. So ``serve`` asks first, and waits (with a warning)
while no source listens at the endpoint. tcp needs CURVE keys, or an option that allows it to be plain."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.curve_keys import KeyPair, read_keys
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.return_path import MAX_RANGE_BYTES, Advise, Advised, SourceRefused, features_at
from postcopy_protocol.sources import Advice, RemoteSource, Source
from postcopy_wire.addresses import unknown_host, use_family

from ..settings import Settings

log = logging.getLogger(__name__)

ASK_SECONDS = 0.5
WARN_SECONDS = 5.0
FRAME_LIMIT = MAX_RANGE_BYTES + (64 << 10)


Stopped = Callable[[], str]
"""Why not to wait for a source any longer; empty: wait. It may raise AskedToEnd."""


class AskedToEnd(Exception):
    """The supervisor is to end in order while it waits for a source: that is no failure."""


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE: our own pair, and the public key by which a source is known. All are Z85 texts."""

    public: bytes
    secret: bytes
    source: bytes


def load_keys(secret_file: str, source_file: str) -> Keys:
    """Read keys from files that ``postcopy keygen`` makes. Raises BadInput."""
    if not source_file:
        raise BadInput("--curve-secret needs --source-key FILE too, the public key by which the source is known")
    ours, source = _read(secret_file, secret=True), _read(source_file, secret=False)
    return Keys(ours.public, ours.secret or b"", source.public)


def _read(path: str, *, secret: bool) -> KeyPair:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if secret and os.fstat(file.fileno()).st_mode & 0o077:
                raise BadInput(f"{path} can be read by others: chmod 600 {path}, or make new keys if it was read")
            return read_keys(file.read(1 << 16), path, secret=secret)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


class SourceAccess:
    """How sources are reached: the ZeroMQ context, and the keys for tcp."""

    def __init__(self, settings: Settings) -> None:
        """Raises BadInput for keys that cannot be loaded."""
        self.context: zmq.Context[Any] = zmq.Context()
        self._settings = settings
        self._keys = load_keys(settings.curve_secret, settings.source_key) if settings.curve_secret else None

    def ask(self, known: Mapping[str, Advice], stopped: Stopped) -> dict[str, Advice]:
        """Advice on all remote blocks by our names; what is ``known`` is not asked for. Waits for sources that are
        absent. Raises BadInput when ``stopped`` gives a reason, or a source refuses a block."""
        advice = dict(known)
        unknown = {name: source for name, source in self._settings.sources.items() if name not in known}
        for endpoint, blocks in by_endpoint(unknown).items():
            found = self._ask(endpoint, sorted(set(blocks.values())), stopped)
            advice |= {name: found[theirs] for name, theirs in blocks.items()}
        return advice

    def secure(self, channel: zmq.Socket[Any], endpoint: str) -> None:
        """Set up a socket for its next connect. Raises BadInput for a tcp endpoint without keys or ``--plain-tcp``."""
        channel.curve_server = 0  # sets the mechanism back to none: a tcp source may have been connected before
        if not endpoint.startswith("tcp://"):
            return
        if self._keys is not None:
            channel.curve_publickey, channel.curve_secretkey = self._keys.public, self._keys.secret
            channel.curve_serverkey = self._keys.source
        elif not self._settings.plain_tcp:
            raise BadInput(
                f"{endpoint}: tcp needs keys (--curve-secret FILE --source-key FILE, made by postcopy keygen), "
                "or --plain-tcp on a network that you trust with every byte"
            )

    def close(self) -> None:
        """After all sockets are closed."""
        self.context.term()

    def _ask(self, endpoint: str, names: Sequence[str], stopped: Stopped) -> dict[str, Advice]:
        channel = self.context.socket(zmq.DEALER)
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for an absent source, or it is asked many times at once
        channel.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        try:
            self.secure(channel, endpoint)
            use_family(channel, endpoint)
            address: Any = os.fsencode(endpoint)  # a path may be no UTF-8
            channel.connect(address)
            return _ask_until_advised(channel, endpoint, names, self._settings.page_size, stopped)
        except zmq.ZMQError as error:
            raise BadInput(f"source {endpoint}: {error.strerror}") from None
        finally:
            channel.close()


def by_endpoint(sources: Mapping[str, Source]) -> dict[str, dict[str, str]]:
    """Remote blocks by endpoint: our name of each, and its name there."""
    found: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, RemoteSource):
            found.setdefault(source.endpoint, {})[name] = source.block
    return found


def _ask_until_advised(
    channel: zmq.Socket[Any], endpoint: str, names: Sequence[str], page_size: int, stopped: Stopped
) -> dict[str, Advice]:
    known: dict[str, Advice] = {}
    # A handshake that fails looks like an absent source: CURVE says nothing to a peer with the wrong key.
    doubt = ", or one of us has the wrong key" if channel.mechanism == zmq.CURVE else ""
    warned, asked = time.monotonic() - WARN_SECONDS + 0.5, -ASK_SECONDS
    while len(known) < len(names):
        if why := stopped():
            raise BadInput(f"the source at {endpoint} does not answer: {why}")
        now = time.monotonic()
        if now - warned >= WARN_SECONDS:
            warned = now
            reason = unknown_host(endpoint) or f"it does not answer yet{doubt}"
            log.warning("waiting for the source at %s: %s", endpoint, reason)
        # With IMMEDIATE only an existing connection can be written to, and it may end at any moment.
        events = channel.poll(100, zmq.POLLIN | (zmq.POLLOUT if now - asked >= ASK_SECONDS else 0))
        if events & zmq.POLLOUT:
            asked = now
            with suppress(zmq.Again):
                for name in names:
                    if name not in known:
                        channel.send(encode(Advise(name, page_size, features_at(endpoint))), zmq.DONTWAIT)
        if events & zmq.POLLIN:
            message = _advised(channel.recv_multipart()[0], endpoint, names)
            known[message.name] = Advice(message.size, message.identity)
    return known


def _advised(frame: bytes, endpoint: str, names: Sequence[str]) -> Advised:
    try:
        message = decode(frame, expect=(Advised, SourceRefused))
    except BadMessage as error:
        raise BadInput(f"the source at {endpoint} is no page source, or of another version: {error}") from None
    if isinstance(message, SourceRefused):
        raise BadInput(f"the source at {endpoint} refuses block {message.name} ({message.code}): {message.reason}")
    assert isinstance(message, Advised)
    if message.name not in names:
        raise BadInput(f"the source at {endpoint} offers a block {message.name} that was not requested")
    return message
