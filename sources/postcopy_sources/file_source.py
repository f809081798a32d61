"""A file as a page source. It is believed as long as it is what it was when it was opened, and not a moment longer."""

from __future__ import annotations

import os
import stat

from postcopy_protocol.errors import BadInput, PageLost
from postcopy_protocol.geometry import PAGE_4K

_PIECES = 512  # bytes that st_blocks counts by


class FileSource:
    """A regular file or a block device. Raises BadInput for what is neither, or empty; OSError when it does not open.

    Who cuts or writes the file while it is served loses its pages: nobody can tell which of them are still those of the
    others. Looked at after every read, by size and time of change; ``read`` then raises PageLost for good.
    """

    page_size = PAGE_4K

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._fd)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise BadInput(f"{path} is no file")
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if not self.size:
                raise BadInput(f"{path} is empty: a block has at least one byte")
        except BaseException:
            os.close(self._fd)
            raise
        self._was = (status.st_size, status.st_mtime_ns)
        self._sparse = stat.S_ISREG(status.st_mode) and status.st_blocks * _PIECES < self.size

    def read(self, offset: int, length: int) -> bytes | None:
        """See PageSource. Waits for the disk."""
        if self._sparse and self._is_hole(offset, length):
            data = None
        else:
            data = os.pread(self._fd, length, offset)
        self._judge(data, length)
        return data

    def read_now(self, offset: int, length: int) -> bytearray | None:
        """As ``read``, without waiting: BlockingIOError when not all of it is in the page cache (Linux 4.14)."""
        if self._sparse and self._is_hole(offset, length):
            self._judge(None, length)
            return None
        data = bytearray(length)
        self._read_at_once(data, offset)
        self._judge(data, length)
        return data

    def read_into(self, offset: int, view: memoryview) -> bool:
        """As ``read_now``, into ``view``; False: all of it is zeros, and ``view`` is as it was."""
        length = len(view)
        hole = self._sparse and self._is_hole(offset, length)
        if not hole:
            self._read_at_once(view, offset)
        self._judge(None, length)
        return not hole

    def _read_at_once(self, data: bytearray | memoryview, offset: int) -> None:
        """Fill it. Raises BlockingIOError."""
        try:
            done = os.preadv(self._fd, (data,), offset, os.RWF_NOWAIT)
        except OSError:  # not there yet; or EOPNOTSUPP: where there are no such reads, none is certain to be quick
            raise BlockingIOError from None
        if done < len(data):
            raise BlockingIOError

    def close(self) -> None:
        os.close(self._fd)

    def _is_hole(self, offset: int, length: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError:  # ENXIO: no data behind offset
            return True

    def _judge(self, data: bytes | bytearray | None, length: int) -> None:
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._was or (data is not None and len(data) != length):
            raise PageLost(f"{self.path} was cut or written since it is served: start the source anew")
