"""A memory touch in C, for load tests: its time includes no Python, and the GIL is not held.

The C compiler of this machine compiles it on demand into a temporary file.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable

SOURCE = r"""
#include <stdint.h>
#include <time.h>

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t touch(uint64_t address, int value)
{
	volatile uint8_t *byte = (volatile uint8_t *)(uintptr_t)address;
	uint64_t before = now();
	if (value < 0)
		(void)*byte;
	else
		*byte = (uint8_t)value;
	return now() - before;
}
"""
COMPILE_WITHIN = 60.0


def compiler() -> str | None:
    """Path of a C compiler, if there is one."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def compile_touch(target: str) -> None:
    """Compile the touch into ``target``. Raises OSError if there is no compiler or it fails."""
    found = compiler()
    if found is None:
        raise FileNotFoundError(2, "no C compiler (cc)")
    command = [found, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", target]
    done = subprocess.run(command, input=SOURCE, capture_output=True, text=True, timeout=COMPILE_WITHIN)
    if done.returncode:
        raise OSError(5, f"{found} failed: {' '.join(done.stderr.split())[:200]}")


def load_touch(library: str) -> Callable[[int, int], int]:
    """Load ``touch(address, value)``: it reads the byte (``value`` -1) or writes ``value`` (0 to 255), and returns the
    nanoseconds that it took. Raises OSError."""
    touch = ctypes.CDLL(library).touch
    touch.argtypes, touch.restype = (ctypes.c_uint64, ctypes.c_int), ctypes.c_uint64
    called: Callable[[int, int], int] = touch
    return called


class CompiledTouch:
    """A compiled touch in the file ``library``, for any number of processes, until ``close``. Raises OSError."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="postcopy-touch-")
        self.library = os.path.join(self._place.name, "touch.so")
        try:
            compile_touch(self.library)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._place.cleanup()
