"""Sizes as users write them: ``4096``, ``4K``, ``1.5G``. Powers of 1024."""

from __future__ import annotations

import re

from .errors import BadInput

LARGEST = 1 << 52
"""Four PiB: more than a process can map."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,20})([KMGT]?)", re.ASCII)


def parse_size(text: str, *, zero: bool = False) -> int:
    """Bytes of a size such as ``123``, ``4K`` or ``100G``. ``zero``: whether 0 is allowed. Raises BadInput."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise BadInput(f"{text!r} is no size: write a whole number, with K, M, G or T behind it or nothing")
    size = int(match[1]) * _UNITS[match[2]]
    if size > LARGEST:
        raise BadInput(f"{text!r} is too large: a size has at most {format_size(LARGEST)}")
    if not size and not zero:
        raise BadInput(f"{text!r}: the size must not be 0")
    return size


def format_size(size: int) -> str:
    """A size for people, with at most one decimal: ``4K``, ``1.5G``, ``123``. ``parse_size`` reads the whole ones."""
    unit = next((unit for unit in "TGMK" if size >= _UNITS[unit]), "")
    whole, rest = divmod(size, _UNITS[unit])
    if not rest:
        return f"{whole}{unit}"
    return f"{size / _UNITS[unit]:.1f}{unit}"
