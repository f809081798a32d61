"""casync's index: the worked example of the format byte by byte, any index there and back, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.caibx import (
    DIGESTS,
    SHA256,
    SHA512_256,
    Index,
    chunk_of_path,
    chunk_path,
    digest_of,
    format_index,
    index_of,
    parse_index,
)
from postcopy_protocol.errors import BadInput

PAGE = 4096
IMAGE = b"A" * PAGE + bytes(PAGE) + b"A" * PAGE + b"tail"


def index_of_image(digest: str = SHA256) -> Index:
    chunks = [IMAGE[at : at + PAGE] for at in range(0, len(IMAGE), PAGE)]
    return index_of(((digest_of(chunk, digest), len(chunk)) for chunk in chunks), PAGE, digest)


def test_the_worked_example() -> None:
    data = format_index(index_of_image())
    assert len(data) == 264
    assert data[:0x48].hex() == (
        "3000000000000000f99f127b9c4d8296" + "0000000000000000" + "0010000000000000" * 3
        + "ffffffffffffffff7d41172f119e5be7" + "0010000000000000"
    )  # fmt: skip
    assert data[0x48:0x68].hex() == "6896d9ea3f73a4434f5832bc65714e7d066f177373f36f34dc8a6f735daa41b1"
    assert data[0xB8:0xC0].hex() == "0430000000000000"
    assert data[0xE0:].hex() == "00" * 16 + "3000000000000000" + "d800000000000000" + "d1ec49550e054f4b"
    other = format_index(index_of_image(SHA512_256))
    assert other[0x17] == 0x20 and other[0x48:0x4C].hex() == "e2adb3b3"


@pytest.mark.parametrize("digest", DIGESTS)
def test_where_things_are(digest: str) -> None:
    index = parse_index(format_index(index_of_image(digest)))
    assert (index.size, len(index), index.largest, index.digest) == (len(IMAGE), 4, PAGE, digest)
    assert [index.span(number) for number in range(4)] == [(0, 4096), (4096, 8192), (8192, 12288), (12288, 12292)]
    assert [index.at(offset) for offset in (0, 4095, 4096, 12291)] == [0, 0, 1, 3]
    assert list(index.within(4000, 200)) == [0, 1] and list(index.within(12288, 4)) == [3]
    assert len(index.unique()) == 3 and index.id(0) == index.id(2)


def test_paths() -> None:
    chunk = hashlib.sha256(b"").digest()
    path = chunk_path(chunk)
    assert path == f"{chunk.hex()[:4]}/{chunk.hex()}.cacnk" and chunk_of_path(path) == chunk
    for wrong in ("", "x.caibx", path[5:], path.upper(), path[:-1], "0000/" + path[5:], path.replace(".cacnk", "")):
        assert chunk_of_path(wrong) is None


lengths = st.lists(st.integers(1, 1 << 20), max_size=30)


@given(lengths, st.sampled_from(DIGESTS), st.randoms(use_true_random=False))
def test_any_index_there_and_back(lengths: list[int], digest: str, random: object) -> None:
    index = index_of(((hashlib.sha256(b"%d" % n).digest(), n) for n in lengths), 1 << 20, digest)
    again = parse_index(format_index(index))
    assert (list(again.ends), again.ids, again.largest, again.digest) == (
        list(index.ends),
        index.ids,
        index.largest,
        digest,
    )
    assert again.size == sum(lengths) and list(again.items()) == list(index.items())


@given(st.data())
def test_an_edited_index_is_refused_or_still_consistent(data: st.DataObject) -> None:
    """A changed id or flag cannot be seen here; everything else is."""
    good = bytearray(format_index(index_of_image()))
    how = data.draw(st.sampled_from(["flip", "cut", "add", "any"]))
    if how == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        good = good[: data.draw(st.integers(0, len(good) - 1))]
    elif how == "add":
        good += data.draw(st.binary(min_size=1, max_size=99))
    else:
        good = bytearray(data.draw(st.binary(max_size=400)))
    try:
        index = parse_index(bytes(good))
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert how == "flip"
        starts = [index.span(number) for number in range(len(index))]
        assert all(0 < end - start <= index.largest for start, end in starts)


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (0, 47, "head"),
        (16, 1 << 40, "feature flags"),
        (24, 1 << 30, "chunk sizes"),
        (32, 0, "chunk sizes"),
        (40, 4095, "chunk sizes"),
        (64, 0, "do not follow"),
        (104, 4096, "do not follow"),
        (256, 0, "tail"),
        (248, 0, "tail"),
    ],
)
def test_what_is_wrong_is_named(at: int, value: int, why: str) -> None:
    data = bytearray(format_index(index_of_image()))
    data[at : at + 8] = value.to_bytes(8, "little")
    with pytest.raises(BadInput, match=why):
        parse_index(bytes(data))


def test_an_empty_image_and_a_chunk_that_is_too_large() -> None:
    assert parse_index(format_index(index_of([], PAGE))).size == 0
    with pytest.raises(BadInput, match="more than 4096 bytes"):
        parse_index(format_index(index_of([(bytes(32), 4097)], PAGE)))
