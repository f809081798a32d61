"""``postcopy keygen``: make a pair of CURVE keys for sources and supervisors that talk over tcp."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from postcopy_protocol.curve_keys import PUBLIC_ENDING, SECRET_ENDING, KeyPair, write_keys

from ..errors import BadInput, PostcopyError

_DEFAULT_NAME = "postcopy"


def keygen(
    place: Annotated[str, typer.Argument(metavar="DIR|FILE", help="A directory, or the name of the key pair.")],
) -> None:
    """Make a pair of CURVE keys: give FILE.key to the other side, keep FILE.key_secret."""
    import zmq

    name = os.path.join(place, _DEFAULT_NAME) if os.path.isdir(place) else place.removesuffix(PUBLIC_ENDING)
    if not os.path.basename(name):
        raise BadInput(f"{place} is not a directory: make it, or name a file in an existing directory")
    if not zmq.has("curve"):
        raise PostcopyError("this ZeroMQ was built without CURVE: pip install --force-reinstall pyzmq")
    keys = KeyPair(*zmq.curve_keypair())
    _write_new(name + SECRET_ENDING, write_keys(keys), 0o600)
    try:
        _write_new(name + PUBLIC_ENDING, write_keys(KeyPair(keys.public)), 0o644)
    except BaseException:
        os.unlink(name + SECRET_ENDING)  # half a pair would prevent the next attempt
        raise
    print(f"{name}{PUBLIC_ENDING}: give it to the other side\n{name}{SECRET_ENDING}: keep it here")


def _write_new(path: str, text: str, mode: int) -> None:
    """Write a new file. An existing file is never overwritten, because a key cannot be made again."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PostcopyError(f"{path} exists already: remove it first if it is not needed") from None
    except FileNotFoundError:
        raise PostcopyError(f"{path}: make the directory {os.path.dirname(path)} first") from None
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        os.unlink(path)  # half a key (full disk) would prevent the next attempt
        raise PostcopyError(f"{path} cannot be written: {error.strerror}") from None
