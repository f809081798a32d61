"""What a remote block needs: ``source``, the program at the other end of the return path, and ``keygen``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from postcopy_protocol.curve_keys import PUBLIC_ENDING, SECRET_ENDING, KeyPair, write_keys

from ..errors import BadInput, PostcopyError

_DEFAULT_NAME = "postcopy"


def add_to(app: typer.Typer) -> None:
    app.command()(keygen)


def source() -> None:
    """Serve files as remote blocks: NAME=FILE ... --listen ENDPOINT (see: postcopy source --help)."""
    raise typer.BadParameter("source stands first: postcopy source NAME=FILE ... --listen ENDPOINT")


def keygen(
    place: Annotated[str, typer.Argument(metavar="DIR|FILE", help="A directory, or the name of the pair.")],
) -> None:
    """Make a pair of CURVE keys: FILE.key is given to the other side, FILE.key_secret never leaves."""
    import zmq

    name = os.path.join(place, _DEFAULT_NAME) if os.path.isdir(place) else place.removesuffix(PUBLIC_ENDING)
    if not os.path.basename(name):
        raise BadInput(f"{place} is no directory yet: make it, or name a file in one that is")
    if not zmq.has("curve"):
        raise PostcopyError("this ZeroMQ was built without CURVE: pip install --force-reinstall pyzmq")
    keys = KeyPair(*zmq.curve_keypair())
    _write_new(name + SECRET_ENDING, write_keys(keys), 0o600)
    try:
        _write_new(name + PUBLIC_ENDING, write_keys(KeyPair(keys.public)), 0o644)
    except BaseException:
        os.unlink(name + SECRET_ENDING)  # half a pair would stand in the way of the next
        raise
    print(f"{name}{PUBLIC_ENDING}: give it to the other side\n{name}{SECRET_ENDING}: keep it here")


def _write_new(path: str, text: str, mode: int) -> None:
    """Never over what is there: a key that somebody relies on is not to be had again."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise PostcopyError(f"{path} exists already: take it away first, if nobody needs it") from None
    except FileNotFoundError:
        raise PostcopyError(f"{path}: there is no directory {os.path.dirname(path)}: make it first") from None
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        os.unlink(path)  # half a key (a full disk) would stand in the way of the next
        raise PostcopyError(f"{path} cannot be written: {error.strerror}") from None
