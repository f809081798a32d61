"""The codec: what goes in comes out, and whatever comes in is a message or BadMessage."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from postcopy_protocol import codec, messages, return_path
from postcopy_protocol.codec import MAX_BYTES, MAX_ITEMS, MAX_TEXT, MESSAGES, decode, encode, shape_of
from postcopy_protocol.errors import BadInput, BadMessage, BadVersion
from postcopy_protocol.messages import VERSION, Message
from tests.simulated.effort import effort

EVERY = tuple(MESSAGES.values())
U64 = (1 << 64) - 1
quick, long = effort(60), effort(400)


def field_values(kind: type[Message], name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values of one field, from its annotation."""
    if hint is int:
        shape = shape_of(kind)
        lowest = dict(shape.integers)[shape.names.index(name)]
        return st.integers(lowest, U64) | st.sampled_from((lowest, 0, 1 << 32, U64))
    if get_origin(hint) is tuple:
        return st.lists(field_values(kind, name, get_args(hint)[0]), max_size=4).map(tuple)
    if isinstance(hint, type) and issubclass(hint, Message):
        return message_of(hint)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        bytes: st.binary(max_size=40),
    }
    return plain[hint]


def message_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: field_values(kind, name, hints[name]) for name in shape_of(kind).names})


any_message = st.sampled_from(EVERY).flatmap(message_of)


def as_words(message: Message) -> list[Any]:
    return list(msgpack.unpackb(encode(message)))


def refuses(data: bytes) -> str:
    with pytest.raises(BadMessage) as caught:
        decode(data, expect=EVERY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Message]) -> None:
    @quick
    @given(message_of(kind))
    def survives(message: Message) -> None:
        data = encode(message)
        assert decode(data, expect=(kind,)) == message
        assert decode(memoryview(data), expect=EVERY) == message

    survives()


def test_tags_are_unique_and_all_messages_known() -> None:
    ours = {**vars(messages), **vars(return_path)}
    kinds = [kind for kind in ours.values() if isinstance(kind, type) and issubclass(kind, Message)]
    assert len(MESSAGES) == len(kinds) - 1
    assert all(0 < tag < 128 for tag in MESSAGES), "a tag is one byte on the wire"


def test_the_head_is_what_the_specification_says() -> None:
    assert encode(messages.Goodbye()) == bytes([0x92, VERSION, messages.Goodbye.TAG])


def test_text_for_people_is_made_to_fit() -> None:
    refused = decode(encode(messages.Refused("failed", "\udcff" + "ä" * 5000)), expect=(messages.Refused,))
    assert refused.reason.startswith("\\udcffä") and MAX_TEXT - 2 < len(refused.reason.encode()) <= MAX_TEXT
    assert decode(encode(messages.Hello("\udcff", "native")), expect=(messages.Hello,)).name == "\\udcff"


@pytest.mark.parametrize(
    "message",
    [
        messages.OpenBlock("\udcff", "private"),
        messages.OpenBlock("x" * (MAX_TEXT + 1), "private"),
        messages.Attached(1 << 64, 0),
        messages.StatusAnswer(bytes(MAX_BYTES + 1)),
        messages.ForkWorker(1, 1, ("key",) * (MAX_ITEMS + 1), b""),
        messages.ForkWorker(1, 1, ("k" * (MAX_TEXT + 1),), b""),
    ],
)
def test_what_the_other_side_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(BadInput):
        encode(message)
    assert encode(messages.Goodbye()) == b"\x92\x01\x06"


# --- whatever comes in ------------------------------------------------------------------------------------------------


@long
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x93\x01\x03\xd9\x02\xc3\x28")
def test_random_bytes_are_a_message_or_bad_message(data: bytes) -> None:
    with suppress(BadMessage):
        decode(data, expect=EVERY)


@long
@given(any_message, st.data())
def test_mutated_messages_are_a_message_or_bad_message(message: Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert"))):
            case "set":
                raw[place] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[place + 1 :]
            case "insert":
                raw[place:place] = data.draw(st.binary(max_size=9))
    with suppress(BadMessage):
        decode(bytes(raw), expect=EVERY)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), U64)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=20,
)


@long
@given(st.sampled_from(EVERY), st.lists(json_like, max_size=16))
def test_fields_of_the_wrong_shape_are_bad_message(kind: type[Message], body: list[Any]) -> None:
    try:
        message = decode(msgpack.packb([VERSION, kind.TAG, *body]), expect=(kind,))
    except (BadMessage, UnicodeEncodeError):
        return
    assert isinstance(message, kind)
    assert as_words(message)[2:] == [list(part) if isinstance(part, tuple) else part for part in body]


BOMBS = {
    "nested arrays": b"\x91" * 5000,
    "nested wide arrays": b"\xdc\x0f\xff" * 1200,
    "nested maps": b"\x81\x01" * 5000,
    "nested inside a message": b"\x93\x01\x01" + b"\x91" * 5000 + b"\xc0",
    "array of 2**32-1": b"\xdd\xff\xff\xff\xff",
    "map of 2**32-1": b"\xdf\xff\xff\xff\xff",
    "str of 2**32-1": b"\x93\x01\x03\xdb\xff\xff\xff\xff",
    "bin of 2**32-1": b"\x93\x01\x03\xc6\xff\xff\xff\xff",
    "ext of 2**32-1": b"\x93\x01\x03\xc9\xff\xff\xff\xff\x00",
    "timestamp": b"\x93\x01\x06\xd6\xff\x00\x00\x00\x00",
    "fixext": b"\x93\x01\x06\xd4\x05\x00",
    "long str": msgpack.packb([1, 3, "x" * (MAX_TEXT + 1), "private"]),
    "long bin": msgpack.packb([1, 70, bytes(MAX_BYTES + 1)]),
    "long list": msgpack.packb([1, 82, 1, 1, ["k"] * (MAX_ITEMS + 1), b""]),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_bad_message(data: bytes) -> None:
    refuses(data)


WRONG = {
    "not a list": msgpack.packb({1: 6}),
    "nil": b"\xc0",
    "empty list": b"\x90",
    "version alone": b"\x91\x01",
    "unknown tag": b"\x92\x01\x7f",
    "tag of the base class": b"\x92\x01\x00",
    "tag is a text": msgpack.packb([1, "Goodbye"]),
    "tag is true": msgpack.packb([1, True, "a", "b"]),
    "trailing byte": encode(messages.Goodbye()) + b"\x00",
    "cut": encode(messages.Attached(7, 1 << 40))[:-1],
    "field too many": msgpack.packb([1, 6, 0]),
    "field too few": msgpack.packb([1, 23, 0]),
    "bool for int": msgpack.packb([1, 23, True, 0]),
    "int for bool": msgpack.packb([1, 60, 1]),
    "float for int": msgpack.packb([1, 23, 1.0, 0]),
    "negative": msgpack.packb([1, 23, -1, 0]),
    "below the only negative": msgpack.packb([1, 41, 1, "lost", -2, 0, ""]),
    "bin for str": msgpack.packb([1, 3, b"ram0", "private"]),
    "str for bin": msgpack.packb([1, 50, 1, "offsets"]),
    "nil for str": msgpack.packb([1, 3, None, "private"]),
    "no UTF-8": b"\x94\x01\x03\xa1\xff\xa1p",
    "list of the wrong things": msgpack.packb([1, 82, 1, 1, ["key", 1], b""]),
    "map for list": msgpack.packb([1, 82, 1, 1, {}, b""]),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_wrong_messages_are_bad_message(data: bytes) -> None:
    refuses(data)


def test_nested_messages_are_judged_like_others() -> None:
    region = messages.RegionGrant(1, "private", 4096, 4096, 0)
    assignment = messages.Assignment(
        1, 1, "a", "", 0, 1, -1, 2, 3, -1, 0, True, "", "auto", -1, (), (region,), "native", -1
    )
    words = as_words(assignment)
    assert words[-3] == [[1, "private", 4096, 4096, 0]]
    for wrong in ([1], [[1]], [[1, "private", 4096, -1, 0, False]], [[1, "private", 4096, 4096, 0, 0]]):
        refuses(msgpack.packb([*words[:-3], wrong, *words[-2:]]))


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_a_message_is_like_a_frozen_dataclass_with_slots(kind: type[Message]) -> None:
    names = kind.__match_args__
    message = kind(*names)
    assert message == kind(**{name: name for name in names}) == replace(message)
    assert tuple(field.name for field in fields(message)) == names == tuple(vars(message.__class__)["__slots__"])
    assert len({message, replace(message)}) == 1 and not hasattr(message, "__dict__")
    assert repr(message) == f"{kind.__name__}({', '.join(f'{name}={name!r}' for name in names)})"
    for name in (*names, "other"):
        with pytest.raises(FrozenInstanceError):
            setattr(message, name, 1)
        with pytest.raises(FrozenInstanceError):
            delattr(message, name)
        with pytest.raises(TypeError):
            kind(*names, 1)
        if name in names:
            assert replace(message, **{name: 1}) != message


def test_a_message_that_is_not_expected_is_named() -> None:
    with pytest.raises(BadMessage, match="Goodbye is not expected here"):
        decode(encode(messages.Goodbye()), expect=(messages.Hello,))


def test_tag_and_version_in_longer_integers_are_read_too() -> None:
    assert decode(b"\xdc\x00\x02\xcc\x01\xcd\x00\x06", expect=EVERY) == messages.Goodbye()


@pytest.mark.parametrize("rest", [b"\x06", b"\xc7\x01\x05\x00", b"\x81\xa1k\xc0", b"\xcb" + bytes(8), b""])
def test_a_future_version_is_named_whatever_it_holds(rest: bytes) -> None:
    with pytest.raises(BadVersion, match=rf"version {VERSION + 1} .* version {VERSION}$"):
        decode(bytes([0x92, VERSION + 1]) + rest, expect=EVERY)


def test_memory_that_is_not_in_one_piece_is_bad_message() -> None:
    with pytest.raises(BadMessage):
        decode(memoryview(bytes(16))[::2], expect=EVERY)


# --- batches of offsets -----------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, U64), max_size=50))
def test_offsets_survive_as_little_endian(offsets: list[int]) -> None:
    data = codec.pack_offsets(offsets)
    assert codec.unpack_offsets(data) == tuple(offsets)
    assert [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)] == offsets


@pytest.mark.parametrize("data", [b"\0", bytes(7), bytes(9), bytes(MAX_BYTES + 8)], ids=len)
def test_bad_batches_are_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        codec.unpack_offsets(data)


@pytest.mark.parametrize("offset", [-1, 1 << 64])
def test_an_offset_that_is_no_u64_is_not_packed(offset: int) -> None:
    with pytest.raises(BadInput):
        codec.pack_offsets([0, offset])
