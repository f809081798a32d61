"""Messages to bytes and back. The strict side of the wire: whatever comes in, ``decode`` gives a message or BadMessage.

A message is msgpack ``[VERSION, tag, field, ...]``. The fields, their order and their types are the annotations of the
dataclass, read once at import, so a message is written down in one place only. Nested dataclasses are plain lists of
their fields: their shape is fixed by the field that holds them.

Strict on the way in: the version first, then the tag among those expected here, the number of fields, type and range of
each, nothing behind. ``True`` is not 1, a bin is not a str, there are no maps, floats, nils or extension types.
msgpack refuses every length that exceeds the bytes at hand before it allocates, and nesting beyond its fixed stack.
On the way out a message is ours and believed; only text for people is made to fit, because a diagnosis that the other
side must refuse helps nobody.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped, unused-ignore]

from . import messages
from .errors import BadInput, BadMessage, BadVersion
from .messages import VERSION, Message

MAX_TEXT = 4096
"""Bytes of UTF-8 in a str."""
MAX_BYTES = 1 << 20
"""Bytes in a bin."""
MAX_ITEMS = 4096
"""Items of a list."""
MAX_OFFSETS = MAX_BYTES // 8
"""Offsets in one packed batch."""

_U64 = (1 << 64) - 1

# Places of descriptors are -1 where there is none, so are block and offset of a report about neither. A file may be
# older than 1970.
_NONE = -1
_LOWEST = {
    "BlockGrant": {"memory": _NONE, "received": _NONE, "source": _NONE, "source_mtime_ns": -(1 << 63)},
    "Assignment": dict.fromkeys(("userfaultfd", "client", "quit", "statistics", "house", "device"), _NONE),
    "Report": {"block": _NONE, "offset": _NONE},
}

# Text for people: cut and mended on the way out instead of refused on the way in.
_PROSE = frozenset({"reason", "detail"})

Check = Callable[[Any], Any]
"""Takes what msgpack gave, returns the value of the field, raises ValueError."""

MessageType = TypeVar("MessageType", bound=Message)

MESSAGES: dict[int, type[Message]] = {
    kind.TAG: kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}
"""Every message by its tag."""

# Made from the annotations when a class is first used.
_Writer = tuple[Callable[[Message], tuple[object, ...]], tuple[tuple[int, Check], ...]]
_writers: dict[type[Message], _Writer] = {}
_readers: dict[type[Message], tuple[Check, ...]] = {}


class _Own(threading.local):
    """A packer for each thread: reused, because making one costs more than packing; not shared, for it has state."""

    def __init__(self) -> None:
        self.pack: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True).pack


_own = _Own()


# --- out --------------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises BadInput when msgpack cannot carry a value (a text that is no UTF-8, 2**64)."""
    try:
        return _own.pack(_words(message, (VERSION, message.TAG)))
    except (ValueError, OverflowError, TypeError) as error:
        _own.__init__()  # type: ignore[misc]  # a packer that failed half-way is not trusted again
        raise BadInput(f"{type(message).__name__} cannot be sent: {error}") from error


def _words(message: Message, head: tuple[int, ...]) -> tuple[object, ...]:
    """``head`` and the fields, as msgpack takes them."""
    kind = type(message)
    writer = _writers.get(kind)
    if writer is None:
        writer = _writers[kind] = _writer(kind)
    read, adjust = writer
    words: tuple[object, ...] = head + read(message)
    if not adjust:
        return words
    mended = list(words)
    for place, mend in adjust:
        mended[len(head) + place] = mend(mended[len(head) + place])
    return tuple(mended)


def _writer(kind: type[Message]) -> _Writer:
    """How to read the fields of ``kind``, and what must be done to some of them."""
    names = [field.name for field in fields(kind)]
    adjust: list[tuple[int, Check]] = []
    for place, name in enumerate(names):
        hint = get_type_hints(kind)[name]
        if name in _PROSE:
            adjust.append((place, _fit))
        elif _nested(hint):
            adjust.append((place, lambda items: [_words(item, ()) for item in items]))
    if len(names) > 1:
        return attrgetter(*names), tuple(adjust)
    return (lambda message: tuple(getattr(message, name) for name in names)), tuple(adjust)


def _fit(text: str) -> str:
    """Text for people, made to fit: UTF-8 of at most MAX_TEXT bytes."""
    return text.encode("utf-8", "backslashreplace")[:MAX_TEXT].decode("utf-8", "ignore")


# --- in ---------------------------------------------------------------------------------------------------------------


def decode(data: bytes | memoryview, *, expect: Collection[type[MessageType]]) -> MessageType:
    """The message in ``data``, one of the classes in ``expect``. Raises BadMessage on anything else, never more."""
    try:
        words = msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, BufferError, RecursionError, msgpack.UnpackException) as error:
        _refuse_version(_peek_version(data))
        raise BadMessage(f"not a message: {_fit(str(error) or type(error).__name__)}") from None
    return _message(words, expect)


def _message(words: object, expect: Collection[type[MessageType]]) -> MessageType:
    if type(words) is not tuple or len(words) < 2 or type(words[0]) is not int or type(words[1]) is not int:
        raise BadMessage("not a message: it does not begin with [version, tag]")
    _refuse_version(words[0])
    kind = MESSAGES.get(words[1])
    if kind is None or kind not in expect:
        raise BadMessage(f"{kind.__name__ if kind else f'tag {words[1]}'} is not expected here")
    try:
        return _build(kind, words, 2)  # type: ignore[return-value]  # kind is in expect
    except ValueError as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None


def _build(kind: type[Message], words: tuple[object, ...], skip: int = 0) -> Message:
    checks = _readers.get(kind)
    if checks is None:
        checks = _readers[kind] = _reader(kind)
    if len(words) - skip != len(checks):
        raise ValueError(f"{len(words) - skip} fields instead of {len(checks)}")
    return kind(*[check(word) for check, word in zip(checks, words[skip:], strict=True)])


def _refuse_version(version: int | None) -> None:
    if version is not None and version != VERSION:
        raise BadVersion(f"the message speaks version {version} of the protocol, this program speaks version {VERSION}")


def _peek_version(data: bytes | memoryview) -> int | None:
    """The version of a message whose rest cannot be read: a later one may hold what we refuse."""
    try:
        unpacker = msgpack.Unpacker(max_buffer_size=64)
        unpacker.feed(bytes(data[:16]))
        unpacker.read_array_header()
        version = unpacker.unpack()
    except Exception:  # whatever it is, the first failure has been kept and is the one to tell
        return None
    return version if type(version) is int else None


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


# --- checks, one a field ----------------------------------------------------------------------------------------------


def _reader(kind: type[Message]) -> tuple[Check, ...]:
    """The checks of the fields of ``kind``, in order, from its annotations."""
    hints = get_type_hints(kind)
    lowest = _LOWEST.get(kind.__name__, {})
    return tuple(_check(hints[field.name], field.name, lowest.get(field.name, 0)) for field in fields(kind))


def _check(hint: Any, name: str, lowest: int) -> Check:
    if hint is int:
        return _integer(name, lowest)
    if hint is bool:
        return _exactly(bool, name)
    if hint is str:
        return _exactly(str, name)
    if hint is bytes:
        return _exactly(bytes, name)
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return _several(_check(get_args(hint)[0], name, 0), name)
    if isinstance(hint, type) and issubclass(hint, Message):
        return _inner(hint, name)
    raise TypeError(f"no wire form for {hint} of {name}")


def _integer(name: str, lowest: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= _U64:
            raise ValueError(f"{name} is no integer from {lowest} to 2**64-1")
        return value

    return check


def _exactly(wanted: type, name: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not wanted:
            raise ValueError(f"{name} is no {wanted.__name__}")
        return value

    return check


def _several(item: Check, name: str) -> Check:
    def check(value: Any) -> tuple[object, ...]:
        if type(value) is not tuple:
            raise ValueError(f"{name} is no list")
        return tuple([item(part) for part in value])

    return check


def _inner(kind: type[Message], name: str) -> Check:
    def check(value: Any) -> Message:
        if type(value) is not tuple:
            raise ValueError(f"{name} is no list of fields")
        return _build(kind, value)

    return check


def _nested(hint: Any) -> bool:
    """Is it a list of dataclasses?"""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return isinstance(item, type) and issubclass(item, Message)


# --- batches of offsets -----------------------------------------------------------------------------------------------


def pack_offsets(offsets: Iterable[int]) -> bytes:
    """Offsets as little-endian u64, one behind the other. Raises BadInput on one that is no u64."""
    values = tuple(offsets)
    try:
        return struct.pack(f"<{len(values)}Q", *values)
    except struct.error as error:
        raise BadInput(f"an offset is no unsigned integer of 64 bits: {error}") from error


def unpack_offsets(data: bytes | memoryview) -> tuple[int, ...]:
    """Offsets of a packed batch. Raises BadMessage when it is no whole number of them, or too long."""
    count, rest = divmod(len(data), 8)
    if rest or count > MAX_OFFSETS:
        raise BadMessage(f"a batch of offsets of {len(data)} bytes is no list of at most {MAX_OFFSETS} u64")
    return struct.unpack(f"<{count}Q", data)
