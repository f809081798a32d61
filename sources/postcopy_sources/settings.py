"""The command line of ``postcopy source``, parsed and checked."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import NoReturn

from postcopy_protocol.curve_keys import PUBLIC_ENDING, KeyPair, read_keys
from postcopy_protocol.errors import BadInput
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sources import FileSource, parse_block_name, parse_named
from postcopy_wire.transport import TRANSPORTS, chosen_transport


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    files: dict[str, str]
    """Files by block name. With ``runtime_dir`` only the names count."""
    runtime_dir: str
    """Of the supervisor whose blocks are served; empty: files are served."""
    listen: str
    curve: KeyPair | None
    allow: tuple[bytes, ...]
    plain_tcp: bool
    identity: str
    readers: int
    read_timeout: float
    die_with_parent: int
    log_level: str
    transport: str


def parse(arguments: list[str]) -> Settings:
    """Settings of a command line; exits 2 with one line on wrong usage. Raises BadInput for values that are not valid,
    OSError for a key file that cannot be read."""
    given = _parser().parse_args(arguments)
    return Settings(
        files=_files(given.blocks)
        if given.runtime_dir is None
        else {parse_block_name(name): "" for name in given.blocks},
        runtime_dir="" if given.runtime_dir is None else runtime_directory(given.runtime_dir, os.environ),
        listen=given.listen,
        curve=_keys(given.curve_secret, secret=True) if given.curve_secret else None,
        allow=tuple(_keys(path, secret=False).public for place in given.allow_key for path in _public_files(place)),
        plain_tcp=given.plain_tcp,
        identity=given.identity,
        readers=given.readers,
        read_timeout=given.read_timeout,
        die_with_parent=given.die_with_parent,
        log_level=given.log_level,
        transport=chosen_transport(given.transport, os.environ),
    )


def _files(blocks: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for text in blocks:
        name, source = parse_named(text)
        if not isinstance(source, FileSource):
            raise BadInput(f"{text!r}: a page source program serves files; other sources are written in Python")
        if name in files:
            raise BadInput(f"the name {name} is used twice: every block needs a name of its own")
        files[name] = source.path
    return files


def _keys(path: str, *, secret: bool) -> KeyPair:
    with open(path, encoding="utf-8", errors="replace") as file:
        if secret and os.fstat(file.fileno()).st_mode & 0o077:
            raise BadInput(f"{path} can be read by others: chmod 600 {path}, or make new keys if it was read")
        return read_keys(file.read(1 << 16), path, secret=secret)


def _public_files(place: str) -> list[str]:
    """The file itself, or every public key of a directory."""
    if not os.path.isdir(place):
        return [place]
    found = sorted(entry.path for entry in os.scandir(place) if entry.name.endswith(PUBLIC_ENDING))
    if not found:
        raise BadInput(f"{place} has no file that ends in {PUBLIC_ENDING}")
    return found


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: write 0.1 to 86400 seconds")
    return value


def _threads(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r}: write 1 to 64")
    return int(text)


def _parser() -> _Parser:
    parser = _Parser(
        prog="postcopy source",
        description="Serve files as remote blocks: a supervisor started with NAME=ENDPOINT/NAME asks for their pages.",
        epilog="tcp needs CURVE keys (postcopy keygen). SIGTERM ends in order.",
    )
    add = parser.add_argument
    add("blocks", nargs="+", metavar="NAME=FILE", help="a block and its file (with --from: NAME)")
    add(
        "--from",
        dest="runtime_dir",
        metavar="RUNTIME_DIR",
        help="serve blocks of the supervisor there, as its pages arrive",
    )
    add("--listen", required=True, metavar="ENDPOINT", help="ipc:///PATH or tcp://HOST:PORT")
    add("--curve-secret", metavar="FILE", help="our own keys, the file that ends in .key_secret")
    add(
        "--allow-key",
        action="append",
        default=[],
        metavar="FILE",
        help="the public key of a supervisor that may connect, or a directory of them (repeat)",
    )
    add(
        "--plain-tcp",
        action="store_true",
        help="tcp without keys: any program that reaches the port can read everything",
    )
    add("--identity", default="", metavar="TEXT", help="what tells this content from others (default: 64 samples)")
    add("--readers", default=4, type=_threads, metavar="N", help="threads for reads that wait (default: 4)")
    add("--read-timeout", default=30.0, type=_seconds, metavar="SECONDS", help="a read that takes longer is lost")
    add("--die-with-parent", type=int, default=0, metavar="PID", help="end when the process PID, our parent, ends")
    add("--transport", choices=TRANSPORTS, help="ZeroMQ by native sockets or libzmq (default: native, which is faster)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser
