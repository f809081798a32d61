"""The options of ``postcopy source``, validated."""

from __future__ import annotations

import os
from argparse import SUPPRESS, Namespace
from dataclasses import dataclass

from postcopy_kernel.log_queue import FORMATS
from postcopy_protocol import arguments as args
from postcopy_protocol.curve_keys import PUBLIC_ENDING, KeyPair
from postcopy_protocol.errors import BadInput
from postcopy_protocol.runtime_paths import runtime_directory, trusted_users
from postcopy_protocol.sources import FileSource, StoreSource, parse_block_name, parse_named
from postcopy_wire.curve import Keys, load_keys, read_key_file
from postcopy_wire.transport import TRANSPORTS, chosen_transport


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect to a tcp endpoint."""

    curve: KeyPair | None
    allow: tuple[bytes, ...]
    plain_tcp: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    files: dict[str, str]  # files by block name. With ``runtime_dir`` only the names count.
    snapshots: dict[str, StoreSource]  # by block name
    runtime_dir: str  # of the supervisor whose blocks are served; empty: files are served
    listen: str
    access: Access
    identity: str
    readers: int
    read_timeout: float
    die_with_parent: int
    log_level: str
    log_format: str
    transport: str
    copy_on_serve: bool
    chunk_cache: str | None
    chunk_cache_size: int
    for_serve: bool
    peer_keys: Keys | None
    plain_peers: bool
    record: bool
    replay: bool
    trust_uids: frozenset[int] = frozenset()


def parse(arguments: list[str]) -> Settings:
    """Settings of a command line; exits 2 with one line on wrong usage. Raises BadInput for values that are not valid,
    OSError for a key file that cannot be read."""
    typed = _parser().parse_args(arguments)
    if typed.runtime_dir is None:
        files, snapshots = _blocks(typed.blocks)
    else:
        files, snapshots = {parse_block_name(name): "" for name in typed.blocks}, {}
    return Settings(
        files=files,
        snapshots=snapshots,
        runtime_dir="" if typed.runtime_dir is None else runtime_directory(typed.runtime_dir, os.environ),
        listen=typed.listen,
        access=access_of(typed),
        identity=typed.identity,
        readers=typed.readers,
        read_timeout=typed.read_timeout,
        die_with_parent=typed.die_with_parent,
        log_level=typed.log_level,
        log_format=typed.log_format,
        transport=chosen_transport(typed.transport, os.environ),
        copy_on_serve=typed.copy_on_serve,
        chunk_cache=typed.chunk_cache,
        chunk_cache_size=typed.chunk_cache_size,
        for_serve=typed.for_serve,
        peer_keys=load_keys(typed.peer_secret, typed.peer_key) if typed.peer_secret else None,
        plain_peers=typed.plain_peers,
        record=typed.record_working_set,
        replay=typed.replay,
        trust_uids=frozenset(typed.trust_uid) | trusted_users(os.environ),
    )


def access_of(typed: Namespace) -> Access:
    """Read the keys. Raises BadInput, OSError."""
    return Access(
        curve=read_key_file(typed.curve_secret, secret=True) if typed.curve_secret else None,
        allow=tuple(
            read_key_file(path, secret=False).public for place in typed.allow_key for path in _public_files(place)
        ),
        plain_tcp=typed.plain_tcp,
    )


def _blocks(blocks: list[str]) -> tuple[dict[str, str], dict[str, StoreSource]]:
    """Files and snapshots by block name."""
    files: dict[str, str] = {}
    snapshots: dict[str, StoreSource] = {}
    for text in blocks:
        name, source = parse_named(text)
        if name in files or name in snapshots:
            raise BadInput(f"the name {name} is used twice: every block needs a name of its own")
        match source:
            case FileSource(path):
                files[name] = path
            case StoreSource():
                snapshots[name] = source
            case _:
                raise BadInput(
                    f"{text!r}: a page source program serves files and store:STORE/NAME; others are written in Python"
                )
    return files, snapshots


def _public_files(place: str) -> list[str]:
    """The file itself, or every public key of a directory."""
    if not os.path.isdir(place):
        return [place]
    found = sorted(entry.path for entry in os.scandir(place) if entry.name.endswith(PUBLIC_ENDING))
    if not found:
        raise BadInput(f"{place} has no file that ends in {PUBLIC_ENDING}")
    return found


def add_access(parser: args.Parser) -> None:
    """The options of Access."""
    add = parser.add_argument
    add("--curve-secret", metavar="FILE", help="own CURVE keys, the file that ends in .key_secret")
    help = "public CURVE key of a supervisor that may connect, or a directory of such keys (repeat)"
    add("--allow-key", action="append", default=[], metavar="FILE", help=help)
    parser.flag("--plain-tcp", "allow tcp without keys: anyone who reaches the port may read everything")


def _parser() -> args.Parser:
    parser = args.Parser(
        prog="postcopy source",
        description="Serve files as remote blocks: a supervisor started with NAME=ENDPOINT/NAME asks for their pages.",
        epilog="A running VM: postcopy source qemu --help. "
        "tcp endpoints need CURVE keys (see postcopy keygen). SIGTERM and SIGINT end the source in order.",
    )
    add = parser.add_argument
    help = "a block and its file, or store:STORE/NAME, a snapshot made by postcopy pack (with --from: NAME)"
    add("blocks", nargs="+", metavar="NAME=FILE", help=help)
    add("--from", dest="runtime_dir", metavar="RUNTIME_DIR", help="serve blocks of the supervisor there")
    help = "with --from: a user whose supervisor is trusted, beside this one and root (repeat)"
    parser.option("--trust-uid", args.user_id, [], "UID", help, repeat=True)
    add("--listen", required=True, metavar="ENDPOINT", help="ipc:///PATH or tcp://HOST:PORT")
    add_access(parser)
    parser.flag("--copy-on-serve", args.COPY_HELP)
    add("--identity", default="", metavar="TEXT", help="identifies this content (default: a hash of 64 samples)")
    parser.add_argument("--chunk-cache", default=None, metavar="DIR", help=args.CHUNK_CACHE_HELP)
    parser.option("--chunk-cache-size", args.size_or_zero, "10G", "SIZE", args.CHUNK_CACHE_SIZE_HELP)
    parser.flag("--record-working-set", args.RECORD_WORKING_SET_HELP)
    parser.flag("--replay", args.REPLAY_HELP)
    add("--peer-secret", default="", metavar="FILE", help="own CURVE keys towards the hosts of peers:tcp://...")
    add("--peer-key", default="", metavar="FILE", help="with --peer-secret: the public key by which they are known")
    parser.flag("--plain-peers", "allow peers:tcp://... without keys: others may read along")
    parser.option("--readers", args.count(1, 64), 4, "N", "threads for reads that wait")
    parser.option("--read-timeout", args.seconds(), 30.0, "SECONDS", "the pages of a read that takes longer are lost")
    help = "ZeroMQ by native sockets or libzmq (default: $POSTCOPY_TRANSPORT, else native, which is faster)"
    add("--transport", choices=TRANSPORTS, help=help)
    parser.choice("--log-level", args.LOG_LEVELS, "info", "the least important messages that are logged")
    help = "lines for people, one JSON object a line, or lines with priorities for journald, which knows the time"
    parser.choice("--log-format", FORMATS, "text", help)
    # For tests and for embedding: the source ends when its parent, this process id, ends.
    parser.option("--die-with-parent", args.count(0, 1 << 31), 0, "PID", SUPPRESS)
    # A supervisor has started it: errors are shown as its own.
    parser.add_argument("--for-serve", action="store_true", help=SUPPRESS)
    return parser
