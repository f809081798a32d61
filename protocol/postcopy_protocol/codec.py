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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped, unused-ignore]

from . import messages, return_path
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

# Places of descriptors are -1 where there is none, so are block and offset of a report about neither. A file may be
# older than 1970.
_NONE = -1
_ASSIGNMENT_PLACES = (
    "userfaultfd",
    "client_pidfd",
    "quit_eventfd",
    "statistics_page",
    "control_page",
    "device",
    "cgroup",
)
_LOWEST = {
    "BlockGrant": {"memory": _NONE, "received": _NONE, "source": _NONE, "source_mtime_ns": -(1 << 63)},
    "Assignment": dict.fromkeys(_ASSIGNMENT_PLACES, _NONE),
    "BlockNote": {"source_mtime_ns": -(1 << 63)},
    "Report": {"block": _NONE, "offset": _NONE},
}

# Text for people: cut and mended on the way out instead of refused on the way in.
_PROSE = frozenset({"reason", "detail", "Hello.name"})

MessageType = TypeVar("MessageType", bound=Message)

MESSAGES: dict[int, type[Message]] = {
    kind.TAG: kind
    for kind in (*vars(messages).values(), *vars(return_path).values())
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}
"""Every message by its tag."""


# --- the shape of a message, from its annotations ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the codec knows of one class. Places count its fields from 0."""

    names: tuple[str, ...]
    types: tuple[type, ...]
    """As msgpack gives them: int, bool, str, bytes, or tuple for a list."""
    integers: tuple[tuple[int, int], ...]
    """Place and smallest value. msgpack itself knows none above 2**64-1."""
    lists: tuple[tuple[int, type], ...]
    """Place and type of the items: str, or a nested message."""
    prose: tuple[int, ...]
    read: Callable[[Message], tuple[object, ...]]


_shapes: dict[type[Message], _Shape] = {}


def shape_of(kind: type[Message]) -> _Shape:
    """Made when a class is first used. Raises TypeError for a field that has no form on the wire."""
    shape = _shapes.get(kind)
    if shape is None:
        shape = _shapes[kind] = _shape(kind)
    return shape


def _shape(kind: type[Message]) -> _Shape:
    hints = get_type_hints(kind)
    names = tuple(field.name for field in fields(kind))
    items = tuple(_item(hints[name]) for name in names)
    lowest = _LOWEST.get(kind.__name__, {})
    return _Shape(
        names=names,
        types=tuple(hints[name] if item is None else tuple for name, item in zip(names, items, strict=True)),
        integers=tuple((place, lowest.get(name, 0)) for place, name in enumerate(names) if hints[name] is int),
        lists=tuple((place, item) for place, item in enumerate(items) if item is not None),
        prose=tuple(p for p, name in enumerate(names) if not _PROSE.isdisjoint((name, f"{kind.__name__}.{name}"))),
        read=attrgetter(*names) if len(names) > 1 else lambda message: tuple(getattr(message, name) for name in names),
    )


def _item(hint: Any) -> type | None:
    """Type of the items of a list; None for a plain field."""
    if hint in (int, bool, str, bytes):
        return None
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        item = get_args(hint)[0]
        if item is str or (isinstance(item, type) and issubclass(item, Message)):
            return item
    raise TypeError(f"{hint} has no form on the wire")


# --- out --------------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises BadInput for what no decoder takes: no UTF-8, too long, 2**64."""
    shape = _shapes.get(type(message)) or shape_of(type(message))
    words: tuple[object, ...] = (VERSION, message.TAG, *shape.read(message))
    if shape.prose or shape.lists:
        words = _mended(shape, words, 2)
    try:
        # A packer of its own: it costs 60 ns more than one that is kept, and has no state for two threads to share.
        data: bytes = msgpack.Packer().pack(words)
    except (ValueError, OverflowError, TypeError) as error:
        raise BadInput(f"{type(message).__name__} cannot be sent: {error}") from error
    if len(data) > MAX_TEXT:
        _measure(type(message).__name__, words)
    return data


def _measure(name: str, words: Iterable[object]) -> None:
    """Refuse here what is too long there. Only long messages are looked at."""
    for word in words:
        if isinstance(word, str) and len(word.encode()) > MAX_TEXT:
            raise BadInput(f"{name} cannot be sent: it has a text of more than {MAX_TEXT} bytes")
        if isinstance(word, bytes) and len(word) > MAX_BYTES:
            raise BadInput(f"{name} cannot be sent: it has {len(word)} bytes in one field, {MAX_BYTES} may be")
        if isinstance(word, tuple | list):
            if len(word) > MAX_ITEMS:
                raise BadInput(f"{name} cannot be sent: it has a list of {len(word)} items, {MAX_ITEMS} may be")
            _measure(name, word)


def _mended(shape: _Shape, words: tuple[object, ...], skip: int) -> tuple[object, ...]:
    """Text for people made to fit, nested messages as the lists of their fields."""
    mended: list[Any] = list(words)
    for place in shape.prose:
        mended[skip + place] = _fit(mended[skip + place])
    for place, item in shape.lists:
        if issubclass(item, Message):
            inner = shape_of(item)
            mended[skip + place] = [_mended(inner, inner.read(part), 0) for part in mended[skip + place]]
    return tuple(mended)


def _fit(text: str) -> str:
    """Text for people, made to fit: UTF-8 of at most MAX_TEXT bytes."""
    if text.isascii() and len(text) <= MAX_TEXT:
        return text
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
    if type(words) is not tuple or not words or type(words[0]) is not int:
        raise BadMessage("not a message: it does not begin with a version")
    _refuse_version(words[0])
    if len(words) == 1 or type(words[1]) is not int:
        raise BadMessage("not a message: no tag follows the version")
    kind = MESSAGES.get(words[1])
    if kind is None or kind not in expect:
        raise BadMessage(f"{kind.__name__ if kind else f'tag {words[1]}'} is not expected here")
    try:
        return _build(kind, words[2:])  # type: ignore[return-value]  # kind is in expect
    except ValueError as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None


def _build(kind: type[Message], words: tuple[object, ...]) -> Message:
    """The message whose fields are ``words``. Raises ValueError. One comparison judges the types of all fields."""
    shape = _shapes.get(kind) or shape_of(kind)
    if tuple(map(type, words)) != shape.types:
        raise ValueError(_mismatch(shape, words))
    for place, lowest in shape.integers:
        if words[place] < lowest:  # type: ignore[operator]  # it is an int
            raise ValueError(f"{shape.names[place]} is below {lowest}")
    return kind(*(_unnested(shape, words) if shape.lists else words))


def _unnested(shape: _Shape, words: tuple[object, ...]) -> list[Any]:
    """Lists of fields as the nested messages that they are."""
    values: list[Any] = list(words)
    for place, item in shape.lists:
        wanted = str if item is str else tuple
        if any(type(part) is not wanted for part in values[place]):
            raise ValueError(f"{shape.names[place]} is no list of {item.__name__}")
        if issubclass(item, Message):
            values[place] = tuple([_build(item, part) for part in values[place]])
    return values


def _mismatch(shape: _Shape, words: tuple[object, ...]) -> str:
    if len(words) != len(shape.types):
        return f"{len(words)} fields instead of {len(shape.types)}"
    wrong = zip(shape.names, shape.types, words, strict=True)
    return next(f"{name} is no {wanted.__name__}" for name, wanted, word in wrong if type(word) is not wanted)


def _refuse_version(version: int | None) -> None:
    if version not in (None, VERSION):
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
