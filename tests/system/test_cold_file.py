"""A file that is not in the page cache: a fault reads what it needs, and no more of the device's read-ahead."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import pytest

from postcopy_kernel.memory import Mapping
from tests.system.service import Service

MB = 1 << 20
PAGE = 4096
TOUCHES = 64


def cold(path: Path) -> int:
    """Drop a file from the page cache; returns how many of its pages are still there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(path)


def cached(path: Path) -> int:
    """Pages of a file that are in the page cache, as mincore(2) tells its owner."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    states = (ctypes.c_ubyte * (size // PAGE))()
    with path.open("rb") as file, Mapping.of(file.fileno(), size, writable=False) as mapping:
        if libc.mincore(ctypes.c_void_p(mapping.address), ctypes.c_size_t(size), states):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(state & 1 for state in states)


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    path = tmp_path / "cold"
    path.write_bytes(random.Random(3).randbytes(64 * MB))
    if cold(path):
        pytest.skip("this file system keeps everything cached")
    return path


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_random_touches_read_their_pages_only(runtime_dir: Path, cold_file: Path, mode: str) -> None:
    pages = random.Random(4).sample(range(64 * MB // PAGE), TOUCHES)
    with Service(runtime_dir, f"ram0={cold_file}") as service:
        client = service.client("ram0", mode)
        before = cached(cold_file)
        client.do(f"[b.buf[page * {PAGE}] for page in {pages}] and None")
        assert cached(cold_file) - before < 4 * TOUCHES
        assert client.do(f"check(b, {str(cold_file)!r})") == -1


def test_a_sequential_read_is_read_ahead_in_windows(runtime_dir: Path, cold_file: Path) -> None:
    with Service(runtime_dir, f"ram0={cold_file}") as service:
        client = service.client("ram0", "private")
        half = 32 * MB
        client.do(f"[b.buf[at] for at in range(0, {half}, {PAGE})] and None")
        assert half // PAGE <= cached(cold_file) < (half + 4 * MB) // PAGE
