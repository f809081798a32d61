"""The texts of exceptions that come from a user's code."""

from __future__ import annotations

import pytest

from postcopy_protocol.codec import encode
from postcopy_protocol.errors import MOST_TEXT, text_of
from postcopy_protocol.messages import Report


class Odd(Exception):
    def __init__(self, text: object) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        if isinstance(self.text, BaseException):
            raise self.text
        return self.text  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no\n such \t page"), "no such page"),
        (ValueError("caf\udce9"), "caf\\udce9"),
        (ValueError("x" * 10_000_000), "x" * MOST_TEXT),
        (KeyboardInterrupt(), ""),
        (Odd(ValueError("no")), "(its text cannot be made)"),
        (Odd(SystemExit(3)), "(its text cannot be made)"),
        (Odd(5), "(its text cannot be made)"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_text_of_an_exception(error: BaseException, text: str) -> None:
    assert text_of(error) == text
    encode(Report(1, "handler-failed", 1, 0, text_of(error)))
