"""Sizes as people write them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.errors import BadInput
from postcopy_protocol.sizes import LARGEST, format_size, parse_size

quick = settings(deadline=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123", 123),
        ("4K", 4096),
        ("4k", 4096),
        (" 2M ", 2 << 20),
        ("100G", 100 << 30),
        ("1T", 1 << 40),
        ("4096T", LARGEST),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "-1",
        "+1",
        "1.5K",
        "1 K",
        "4KB",
        "4KiB",
        "0x10",
        "1e3",
        "1_000",
        "٤",
        "²",
        "4097T",
        "9" * 30,
        "nan",
        "4\0",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_size(text, zero=True)
    assert "\n" not in str(caught.value)


def test_zero_only_where_it_is_allowed() -> None:
    assert parse_size("0", zero=True) == parse_size("0G", zero=True) == 0
    with pytest.raises(BadInput):
        parse_size("0")


@quick
@given(st.text(max_size=30))
def test_any_text_is_a_size_or_bad_input(text: str) -> None:
    with suppress(BadInput):
        assert 0 <= parse_size(text, zero=True) <= LARGEST


@quick
@given(st.integers(0, 1 << 30), st.sampled_from("KMGT"))
def test_whole_sizes_are_read_back(number: int, unit: str) -> None:
    size = min(number * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}[unit], LARGEST)
    text = format_size(size)
    if "." not in text:
        assert parse_size(text, zero=True) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (1 << 30, "1G"), (LARGEST, "4096T")]
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text
