"""Command-line arguments: one validator for each kind of value, shared texts, and the parser of the serving programs.

A validator takes the text that was typed, returns the value, and raises BadInput. ``postcopy serve`` and
``postcopy source`` start before anything is imported, so they parse with ``Parser`` (standard library only). The other
commands use typer, and call the same validators.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from .errors import BadInput
from .sizes import LARGEST, parse_size
from .sources import parse_block_name

RUNTIME_DIR_HELP = (
    "directory of the supervisor's sockets (default: $POSTCOPY_RUNTIME_DIR, else $RUNTIME_DIRECTORY, "
    "else $XDG_RUNTIME_DIR/postcopy, else /run/postcopy)"
)
COPY_HELP = (
    "serve a copy of each file that no other program has (a reflink where the file system can): a later change of the "
    "file is then certain to have no effect"
)
CHUNK_CACHE_HELP = (
    "directory of the chunks of snapshots that this host keeps (default: $POSTCOPY_CHUNK_CACHE, else "
    "/var/cache/postcopy/chunks for root, else ~/.cache/postcopy/chunks)"
)
CHUNK_CACHE_SIZE_HELP = "bytes that the chunk cache may take; 0: no cache"
RECORD_WORKING_SET_HELP = "write which pages of snapshots are needed beside them, for --replay"
REPLAY_HELP = "send the recorded pages of snapshots first, before clients ask"
LOG_LEVELS = ("debug", "info", "warning", "error")
MODES = ("private", "shared")
LONGEST_SECONDS = 86400.0

_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,16}")

Value = TypeVar("Value", covariant=True)


class Validator(Protocol[Value]):
    """Turns the typed text into a value. Raises BadInput."""

    def __call__(self, text: str) -> Value: ...


def size(text: str) -> int:
    """Bytes: ``4096``, ``4K``, ``1G``; more than 0."""
    return parse_size(text)


def size_or_zero(text: str) -> int:
    """Bytes; 0 is allowed."""
    return parse_size(text, zero=True)


def offset(text: str) -> int:
    """Bytes, as a size (0, 4096, 28K) or hexadecimal (0x7000)."""
    if text[:2].lower() != "0x":
        return size_or_zero(text)
    if not _HEXADECIMAL.fullmatch(text):
        raise BadInput(f"{text!r} is no hexadecimal number of at most 64 bits")
    value = int(text, 16)
    if value > LARGEST:
        raise BadInput(f"{text!r} is too large: no block has so many bytes")
    return value


def address(text: str) -> int:
    """A 64-bit memory address: hexadecimal, or a size."""
    if text[:2].lower() == "0x" and _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    return offset(text)


def page(text: str) -> tuple[str, int]:
    """Block and offset of ``BLOCK+OFFSET``."""
    name, plus, at = text.partition("+")
    if not plus:
        raise BadInput(f"{text!r} names no page: write BLOCK+OFFSET, such as ram0+28K or ram0+0x7000")
    return parse_block_name(name), offset(at)


def seconds(low: float = 0.1, high: float = LONGEST_SECONDS) -> Validator[float]:
    """A number of seconds from ``low`` to ``high``."""

    def validate(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not low <= value <= high:  # also refuses nan
            raise BadInput(f"{text!r}: write {low:g} to {high:g} seconds")
        return value

    return validate


def count(low: int, high: int) -> Validator[int]:
    """A whole number from ``low`` to ``high``."""

    def validate(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= 20
        if not digits or not low <= int(text) <= high:
            raise BadInput(f"{text!r}: write a whole number from {low} to {high}")
        return int(text)

    return validate


user_id = count(0, (1 << 32) - 1)
"""A user or group id."""


def one_of(*names: str) -> Validator[str]:
    """One of a few words."""

    def validate(text: str) -> str:
        if text not in names:
            raise BadInput(f"{text!r} is none of {', '.join(names)}")
        return text

    return validate


def host_and_port(text: str) -> tuple[str, int]:
    """``HOST:PORT``; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadInput(f"{text!r}: write HOST:PORT, as in 127.0.0.1:9464")
    return host.strip("[]"), int(port)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line and whose help shows defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def option(
        self, name: str, validator: Validator[object], default: object, metavar: str, help: str, *, repeat: bool = False
    ) -> None:
        """An option with a value. ``repeat``: it may stand several times, its values are a list."""
        self.add_argument(
            name,
            type=_as_type(validator),
            default=default,
            metavar=metavar,
            help=help,
            action="append" if repeat else "store",
        )

    def choice(self, name: str, names: Sequence[str], default: str, help: str) -> None:
        """An option whose value is one of ``names``."""
        self.add_argument(name, choices=names, default=default, help=help)

    def flag(self, name: str, help: str) -> None:
        self.add_argument(name, action="store_true", help=help)


def _as_type(validator: Validator[object]) -> Validator[object]:
    """The validator in the form that argparse wants: it then adds the option's name to the message."""

    def convert(text: str) -> object:
        try:
            return validator(text)
        except BadInput as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


class _Formatter(argparse.HelpFormatter):
    """Adds the default of every option that has one and does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        silent = action.default in (None, "", False, argparse.SUPPRESS) or action.default == []
        if text is None or silent or "default:" in text:
            return text
        shown = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
        return f"{text} (default: {shown})".replace("%", "%%")
