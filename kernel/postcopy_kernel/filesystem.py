"""syncfs(2): everything that was written to one file system is on its disk."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def sync_file_system(path: str) -> None:
    """Wait until the file system of ``path`` has written what is in memory. Raises OSError, also for writes that failed
    before (Linux 5.8)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)
