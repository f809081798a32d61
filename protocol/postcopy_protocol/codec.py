"""Messages to bytes and back. ``decode`` is strict: any input gives a message or BadMessage.

A message is msgpack ``[VERSION, tag, field, ...]``. The fields, their order and their types are the annotations of the
dataclass, so a message is defined in one place only. Nested dataclasses are plain lists of their fields: the field that
holds them fixes their shape.

``decode`` checks the version, then that the tag is expected here, then number, type and range of the fields; nothing
may follow. ``True`` is not 1, a bin is not a str, there are no maps, floats, nils or extension types. msgpack itself
refuses a length beyond the bytes at hand before it allocates, and nesting beyond its fixed stack.

``encode`` trusts its message. Only text for people is shortened and made valid, so that the receiver can accept it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
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

# Positions of descriptors are -1 for "none", as are block and offset of a report about neither.
_NONE = -1
_ASSIGNMENT_PLACES = (
    "userfaultfd",
    "client_pidfd",
    "quit_eventfd",
    "statistics_page",
    "control_page",
    "device",
    "cgroup",
    "copied_map",
)
_LOWEST = {
    "BlockGrant": {"memory": _NONE, "received": _NONE, "source": _NONE},
    "Assignment": dict.fromkeys(_ASSIGNMENT_PLACES, _NONE),
    "Report": {"block": _NONE, "offset": _NONE},
}

# Text for people: shortened and made valid by encode, instead of refused by decode.
_PROSE = frozenset({"reason", "detail", "Hello.name"})
# Paths may have bytes that are no UTF-8: these are surrogates in Python, and travel as those bytes.
_PATHS = frozenset({"AskExport.path", "BlockNote.source", "Assignment.endpoint", "Assignment.handler_path"})

MessageType = TypeVar("MessageType", bound=Message)

MESSAGES: dict[int, type[Message]] = {
    kind.TAG: kind
    for kind in (*vars(messages).values(), *vars(return_path).values())
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}
"""Every message by its tag."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the codec knows of one class. Positions count its fields from 0."""

    names: tuple[str, ...]
    types: tuple[type, ...]
    """As msgpack returns them: int, bool, str, bytes, or tuple for a list."""
    integers: tuple[tuple[int, int], ...]
    """Position and smallest value. The largest is 2**64-1, as in msgpack."""
    lists: tuple[tuple[int, type], ...]
    """Position and type of the items: str, or a nested message."""
    prose: tuple[int, ...]
    texts: tuple[int, ...]
    """Positions of texts that must be valid UTF-8."""
    read: Callable[[Message], tuple[object, ...]]


_shapes: dict[type[Message], _Shape] = {}


def shape_of(kind: type[Message]) -> _Shape:
    """The shape of a class, made when it is first used. Raises TypeError for a field that has no form on the wire."""
    shape = _shapes.get(kind)
    if shape is None:
        shape = _shapes[kind] = _shape(kind)
    return shape


def _shape(kind: type[Message]) -> _Shape:
    hints = get_type_hints(kind)
    names = kind.__match_args__
    items = tuple(_item(hints[name]) for name in names)
    lowest = _LOWEST.get(kind.__name__, {})
    return _Shape(
        names=names,
        types=tuple(hints[name] if item is None else tuple for name, item in zip(names, items, strict=True)),
        integers=tuple((position, lowest.get(name, 0)) for position, name in enumerate(names) if hints[name] is int),
        lists=tuple((position, item) for position, item in enumerate(items) if item is not None),
        texts=tuple(p for p, n in enumerate(names) if hints[n] is str and f"{kind.__name__}.{n}" not in _PATHS),
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


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises BadInput for a field that no decoder accepts: no UTF-8, too long, 2**64."""
    shape = _shapes.get(type(message)) or shape_of(type(message))
    values: tuple[object, ...] = (VERSION, message.TAG, *shape.read(message))
    if shape.prose or shape.lists:
        values = _mended(shape, values, 2)
    try:
        # A new packer costs 60 ns more than a shared one, and two threads share no state.
        data: bytes = msgpack.Packer(unicode_errors="surrogateescape").pack(values)
    except (ValueError, OverflowError, TypeError) as error:
        raise BadInput(f"{type(message).__name__} cannot be sent: {error}") from error
    for position in shape.texts:
        if not _is_valid(values[2 + position]):
            raise BadInput(f"{type(message).__name__} cannot be sent: {shape.names[position]} is not valid UTF-8")
    if len(data) > MAX_TEXT:
        _measure(type(message).__name__, values)
    return data


def _measure(name: str, values: Iterable[object]) -> None:
    """Raise BadInput for a field that the receiver would refuse as too long."""
    for value in values:
        if isinstance(value, str) and len(value.encode("utf-8", "surrogateescape")) > MAX_TEXT:
            raise BadInput(f"{name} cannot be sent: it has a text of more than {MAX_TEXT} bytes")
        if isinstance(value, bytes) and len(value) > MAX_BYTES:
            raise BadInput(f"{name} cannot be sent: it has {len(value)} bytes in one field, {MAX_BYTES} may be")
        if isinstance(value, tuple | list):
            if len(value) > MAX_ITEMS:
                raise BadInput(f"{name} cannot be sent: it has a list of {len(value)} items, {MAX_ITEMS} may be")
            _measure(name, value)


def _mended(shape: _Shape, values: tuple[object, ...], skip: int) -> tuple[object, ...]:
    """The fields with text for people made valid, and nested messages as lists of their fields."""
    mended: list[Any] = list(values)
    for position in shape.prose:
        mended[skip + position] = _fit(mended[skip + position])
    for position, item in shape.lists:
        if issubclass(item, Message):
            inner = shape_of(item)
            mended[skip + position] = [_mended(inner, inner.read(part), 0) for part in mended[skip + position]]
    return tuple(mended)


def _is_valid(text: Any) -> bool:
    """Whether the text can be encoded: no surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fit(text: str) -> str:
    """Text as valid UTF-8 of at most MAX_TEXT bytes."""
    if text.isascii() and len(text) <= MAX_TEXT:
        return text
    return text.encode("utf-8", "backslashreplace")[:MAX_TEXT].decode("utf-8", "ignore")


def decode(data: bytes | memoryview, *, expect: Collection[type[MessageType]]) -> MessageType:
    """The message in ``data``, one of the classes in ``expect``. Raises only BadMessage."""
    try:
        values = msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            unicode_errors="surrogateescape",
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
    return _message(values, expect)


def _message(values: object, expect: Collection[type[MessageType]]) -> MessageType:
    if type(values) is not tuple or not values or type(values[0]) is not int:
        raise BadMessage("not a message: it does not begin with a version")
    _refuse_version(values[0])
    if len(values) == 1 or type(values[1]) is not int:
        raise BadMessage("not a message: no tag follows the version")
    kind = MESSAGES.get(values[1])
    if kind is None or kind not in expect:
        raise BadMessage(f"{kind.__name__ if kind else f'tag {values[1]}'} is not expected here")
    try:
        return _build(kind, values[2:])  # type: ignore[return-value]  # kind is in expect
    except ValueError as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None


def _build(kind: type[Message], values: tuple[object, ...]) -> Message:
    """The message with these fields. Raises ValueError. One comparison checks the types of all fields."""
    shape = _shapes.get(kind) or shape_of(kind)
    if tuple(map(type, values)) != shape.types:
        raise ValueError(_mismatch(shape, values))
    for position, lowest in shape.integers:
        if values[position] < lowest:  # type: ignore[operator]  # it is an int
            raise ValueError(f"{shape.names[position]} is below {lowest}")
    for position in shape.texts:
        if not _is_valid(values[position]):
            raise ValueError(f"{shape.names[position]} is not valid UTF-8")
    return kind(*(_unnested(shape, values) if shape.lists else values))


def _unnested(shape: _Shape, values: tuple[object, ...]) -> list[Any]:
    """The fields with lists converted to nested messages. Raises ValueError."""
    converted: list[Any] = list(values)
    for position, item in shape.lists:
        wanted = str if item is str else tuple
        if any(type(part) is not wanted or (item is str and not _is_valid(part)) for part in converted[position]):
            raise ValueError(f"{shape.names[position]} is no list of {item.__name__}")
        if issubclass(item, Message):
            converted[position] = tuple([_build(item, part) for part in converted[position]])
    return converted


def _mismatch(shape: _Shape, values: tuple[object, ...]) -> str:
    if len(values) != len(shape.types):
        return f"{len(values)} fields instead of {len(shape.types)}"
    wrong = zip(shape.names, shape.types, values, strict=True)
    return next(f"{name} is no {wanted.__name__}" for name, wanted, value in wrong if type(value) is not wanted)


def _refuse_version(version: int | None) -> None:
    if version not in (None, VERSION):
        raise BadVersion(f"the message speaks version {version} of the protocol, this program speaks version {VERSION}")


def _peek_version(data: bytes | memoryview) -> int | None:
    """The version of a message that cannot be parsed: a later version may use formats that this one refuses."""
    try:
        unpacker = msgpack.Unpacker(max_buffer_size=64)
        unpacker.feed(bytes(data[:16]))
        unpacker.read_array_header()
        version = unpacker.unpack()
    except Exception:  # the first failure is the one to report
        return None
    return version if type(version) is int else None


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


def pack_offsets(offsets: Iterable[int]) -> bytes:
    """Offsets as little-endian u64. Raises BadInput for one that is no u64."""
    values = tuple(offsets)
    try:
        return struct.pack(f"<{len(values)}Q", *values)
    except struct.error as error:
        raise BadInput(f"an offset is no unsigned integer of 64 bits: {error}") from error


def unpack_offsets(data: bytes | memoryview) -> tuple[int, ...]:
    """The offsets of a packed batch. Raises BadMessage for a partial offset, or more than MAX_OFFSETS."""
    count, rest = divmod(len(data), 8)
    if rest or count > MAX_OFFSETS:
        raise BadMessage(f"a batch of offsets of {len(data)} bytes is no list of at most {MAX_OFFSETS} u64")
    return struct.unpack(f"<{count}Q", data)
