"""SOURCE as a user types it, and the rule for the names of RAM blocks.

======================================  ================================================================================
``PATH`` or ``file:///PATH``            a file of this machine (``./`` before a name that looks like another form)
``handler:MODULE:FUNCTION?size=SIZE``   pages made by a Python function, in the worker
``zero:SIZE``                           zeros
``qemu-ram:FILE``                       the RAM of a VM, one block for each of QEMU's, in a mapped-ram file of QEMU
``qemu-ram:FILE?block=BLOCK``           one of them
``ipc://PATH/BLOCK``                    a block of a page source program on this machine
``tcp://HOST:PORT/BLOCK``               a block of a page source program on another one
``store:STORE/NAME``                    a snapshot that ``postcopy pack`` made; STORE is a directory or a URL
``peers:URL,...,store:STORE/NAME``      the same; page source programs of other hosts are asked first, in this order
======================================  ================================================================================

Only the syntax is checked, not whether the file or the function exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from .errors import BadInput
from .sizes import parse_size

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.ASCII)
_NAME_RULE = "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first"
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A local file. A relative ``path`` is relative to the supervisor's working directory."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class HandlerSource:
    """A function that makes pages; ``size`` in bytes."""

    module: str
    function: str
    size: int

    def __str__(self) -> str:
        return f"handler:{self.module}:{self.function}?size={self.size}"


@dataclass(frozen=True, slots=True)
class ZeroSource:
    """``size`` bytes of zeros."""

    size: int

    def __str__(self) -> str:
        return f"zero:{self.size}"


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """A block of a page source program; ``endpoint`` is ZeroMQ's (``ipc://...`` or ``tcp://...``). ``shown``: what the
    user typed where a program of ours serves it."""

    endpoint: str
    block: str
    shown: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.shown or f"{self.endpoint}/{self.block}"


@dataclass(frozen=True, slots=True)
class StoreSource:
    """The snapshot ``name`` in ``store``: a directory, or the URL of an object store. ``peers`` may have its pages too:
    the nearest comes first."""

    store: str
    name: str
    peers: tuple[RemoteSource, ...] = ()

    @property
    def location(self) -> str:
        """STORE/NAME."""
        return f"{self.store}{'' if self.store.endswith('/') else '/'}{self.name}"

    def __str__(self) -> str:
        store = f"store:{self.location}"
        return f"peers:{','.join(map(str, self.peers))},{store}" if self.peers else store


@dataclass(frozen=True, slots=True)
class Advice:
    """What a page source says of a remote block before it is served: its size in bytes and its identity."""

    size: int
    identity: str


@dataclass(frozen=True, slots=True)
class QemuRamSource:
    """A RAM block in a mapped-ram file of QEMU, by QEMU's name of it. Empty: all of them, each as a block."""

    path: str
    block: str = ""

    def __str__(self) -> str:
        return f"qemu-ram:{self.path}?block={self.block}" if self.block else f"qemu-ram:{self.path}"


Source = FileSource | HandlerSource | ZeroSource | RemoteSource | QemuRamSource | StoreSource

STORE_SCHEMES = ("s3", "gs", "az", "http", "https")
READ_ONLY_SCHEMES = ("http", "https")
MOST_PEERS = 16


def is_block_name(name: str) -> bool:
    """Whether a RAM block may have this name."""
    return _NAME.fullmatch(name) is not None


def parse_block_name(name: str) -> str:
    """The name itself. Raises BadInput if no RAM block may have it."""
    if not is_block_name(name):
        raise BadInput(f"{name!r} is no name for a block: {_NAME_RULE}")
    return name


def parse_named(text: str) -> tuple[str, Source]:
    """``NAME=SOURCE``. Raises BadInput."""
    name, equals, source = text.partition("=")
    if not equals:
        raise BadInput(f"{text!r}: write NAME=SOURCE, such as ram0=weights.bin")
    return parse_block_name(name), parse_source(source)


def parse_source(text: str) -> Source:
    """Parse a SOURCE. ``str()`` of the result is an equivalent SOURCE. Raises BadInput."""
    if not text or "\0" in text:
        raise BadInput(f"{text!r} is no source: name a file, handler:MODULE:FUNCTION?size=SIZE or zero:SIZE")
    if text.startswith("zero:"):
        return ZeroSource(parse_size(text.removeprefix("zero:")))
    if text.startswith("handler:"):
        return _handler(text)
    if text.startswith("file:"):
        return _file_url(text)
    if text.startswith(("ipc://", "tcp://")):
        return _remote(text)
    if text.startswith("qemu-ram:"):
        path, _, block = text.removeprefix("qemu-ram:").partition("?block=")
        if not path:
            raise BadInput(f"{text!r}: write qemu-ram:FILE or qemu-ram:FILE?block=BLOCK")
        return QemuRamSource(path, block)
    if text.startswith("store:"):
        return parse_location(text.removeprefix("store:"))
    if text.startswith("peers:"):
        return _peers(text)
    if _SCHEME.match(text):
        known = "a path, file:///, handler:, zero:, qemu-ram:, ipc://, tcp://, store: or peers:"
        raise BadInput(f"{text!r}: unknown kind of source; use {known}")
    return FileSource(text)


def _peers(text: str) -> StoreSource:
    hosts, comma, place = text.removeprefix("peers:").partition(",store:")
    if not comma:
        raise BadInput(f"{text!r}: end it with ,store:STORE/NAME: peers are checked against the index there")
    peers = tuple(parse_source(host) for host in hosts.split(","))
    others = [peer for peer in peers if not isinstance(peer, RemoteSource)]
    if others or len(set(peers)) < len(peers) or len(peers) > MOST_PEERS:
        raise BadInput(f"{text!r}: write peers:tcp://HOST:PORT/BLOCK,...,store:STORE/NAME, up to {MOST_PEERS} peers")
    return replace(parse_location(place), peers=tuple(peer for peer in peers if isinstance(peer, RemoteSource)))


def parse_location(text: str) -> StoreSource:
    """STORE/NAME, where a snapshot is. Raises BadInput."""
    store, name = _split(check_store(text).rstrip("/"))
    name = name.removesuffix(".caibx")
    if not is_block_name(name):
        raise BadInput(f"{_shown(text)}: the last part names the snapshot, as in s3://BUCKET/PREFIX/NAME: {_NAME_RULE}")
    return StoreSource(check_store(store), name)


def check_store(text: str) -> str:
    """STORE as it was typed: a directory, or the URL of a store that exists. Raises BadInput, without showing what may
    be a secret."""
    if not text or "\0" in text:
        raise BadInput("name a store: a directory, s3://BUCKET/PREFIX, gs://, az://, or http(s):// to read")
    scheme, colon, rest = text.partition("://")
    if not colon:
        return text
    if scheme not in STORE_SCHEMES:
        raise BadInput(f"{_shown(text)}: a store is a directory, s3://, gs://, az://, or http(s):// to read")
    if "@" in rest or "?" in rest or "#" in rest:
        raise BadInput(
            f"{_shown(text)}: '@', '?' and '#' do not belong into the URL of a store; "
            "keys come from the environment (AWS_ACCESS_KEY_ID ...) or from the files of the store's own tools"
        )
    if not rest.strip("/") or rest.startswith("/"):
        raise BadInput(f"{text!r}: write {scheme}://{'HOST' if scheme in READ_ONLY_SCHEMES else 'BUCKET'}/PREFIX/NAME")
    return text


def _split(text: str) -> tuple[str, str]:
    """STORE and NAME; a NAME alone is in the current directory. A URL without a NAME has none."""
    store, slash, name = text.rpartition("/")
    if not slash:
        return ".", text
    if store.endswith((":/", ":")):
        return text, ""
    return store or "/", name


def _shown(text: str) -> str:
    """A URL as far as it holds no secret."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        return repr(text)
    where = re.split("[?#]", rest)[0].rpartition("@")[2]
    return f"{scheme}://{where}"


def _file_url(text: str) -> FileSource:
    path = unquote(text.removeprefix("file://"))
    if not text.startswith("file:///") or "\0" in path:
        raise BadInput(f"{text!r}: a file URL names an absolute path of this machine, file:///PATH")
    return FileSource(path)


def _handler(text: str) -> HandlerSource:
    function, _, query = text.removeprefix("handler:").partition("?")
    module, _, name = function.partition(":")
    key, _, size = query.partition("=")
    dotted = all(part.isidentifier() for part in module.split("."))
    if key != "size" or not dotted or not name.isidentifier():
        raise BadInput(f"{text!r}: write handler:MODULE:FUNCTION?size=SIZE, such as handler:pages:make?size=1G")
    return HandlerSource(module, name, parse_size(size))


def _remote(text: str) -> RemoteSource:
    endpoint, _, block = text.rpartition("/")
    scheme, _, place = endpoint.partition("://")
    if not is_block_name(block) or not place:
        raise BadInput(f"{text!r}: write {text[:3]}://{'PATH' if text[:3] == 'ipc' else 'HOST:PORT'}/BLOCK")
    if scheme == "ipc" and not place.startswith("/"):
        raise BadInput(f"{text!r}: the socket of an ipc endpoint is an absolute path, ipc:///PATH/BLOCK")
    if scheme == "tcp":
        host, _, port = place.rpartition(":")
        if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 1 << 16:
            raise BadInput(f"{text!r}: write tcp://HOST:PORT/BLOCK with a port from 1 to 65535")
    return RemoteSource(endpoint, block)
