"""Text of others that people see: on terminals, control characters are orders."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with ``?`` in place of each character that cannot be printed."""
    return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)
