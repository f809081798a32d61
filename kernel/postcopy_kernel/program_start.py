"""What a program needs of those who start it: standard descriptors that are open and can show any name, and a umask.

A program that is started with 0, 1 or 2 closed gets its next files and sockets under these numbers, and messages for
people go into them. Python has no stream for a closed one: ``print(file=sys.stderr)`` then writes to stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def prepare() -> None:
    """Open what is closed of 0, 1 and 2 on /dev/null, let stdout and stderr escape what they cannot encode, and let the
    owner use the files and sockets that we make (under umask 0777 not even they could)."""
    os.umask(os.umask(0o077) & 0o077)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(_nothing(), True)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Our output cannot be written: what is in the buffer must not cause a second error at the end of the program."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(_nothing(), sys.stdout.fileno())


def _nothing() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:  # a root directory without /dev
        return os.memfd_create("null")
