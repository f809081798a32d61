"""The CURVE keys of a program that connects to page sources, and what it needs for each endpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from postcopy_protocol.curve_keys import KeyPair, read_keys
from postcopy_protocol.errors import BadInput

from .transport import TCP, PrepareSocket

if TYPE_CHECKING:
    import zmq


@dataclass(frozen=True, slots=True)
class Keys:
    """Our own pair, and the public key by which a source is known. All are Z85 texts."""

    public: bytes
    secret: bytes
    source: bytes


def load_keys(secret_file: str, source_file: str) -> Keys:
    """Read keys from files that ``postcopy keygen`` makes. Raises BadInput."""
    if not source_file:
        raise BadInput(f"{secret_file}: {KEYS} belong together: our keys, and the public key of the source")
    ours, source = read_key_file(secret_file, secret=True), read_key_file(source_file, secret=False)
    return Keys(ours.public, ours.secret or b"", source.public)


def read_key_file(path: str, *, secret: bool) -> KeyPair:
    """The keys in a file. Raises BadInput, also for a secret that other users can read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            if secret and os.fstat(file.fileno()).st_mode & 0o077:
                raise BadInput(f"{path} can be read by others: chmod 600 {path}, or make new keys if it was read")
            return read_keys(file.read(1 << 16), path, secret=secret)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


KEYS, PLAIN = "--curve-secret FILE --source-key FILE", "--plain-tcp"


def preparation(
    endpoint: str, keys: Keys | None, *, plain_tcp: bool, options: tuple[str, str] = (KEYS, PLAIN)
) -> PrepareSocket | None:
    """What makes a libzmq socket ready for this endpoint; None where no keys are needed. Raises BadInput, which names
    these ``options``, for a tcp endpoint with neither keys nor ``plain_tcp``."""
    if not endpoint.startswith(TCP):
        return None
    if keys is not None:
        return partial(_use_keys, keys)
    if not plain_tcp:
        raise BadInput(
            f"{endpoint}: tcp needs keys ({options[0]}, made by postcopy keygen), "
            f"or {options[1]} on a network that you trust with every byte"
        )
    return None


def _use_keys(keys: Keys, channel: zmq.Socket[bytes]) -> None:
    channel.curve_publickey, channel.curve_secretkey = keys.public, keys.secret
    channel.curve_serverkey = keys.source
