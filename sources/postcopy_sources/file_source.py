"""A file as a page source. Its pages are served only while the file is unchanged since it was opened."""

from __future__ import annotations

import os
import stat

from postcopy_kernel.filecopy import settle
from postcopy_kernel.filedigest import PageDigests
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.filewatch import give_up_lease
from postcopy_protocol.errors import BadInput, PageLost
from postcopy_protocol.geometry import PAGE_4K

_PIECES = 512  # unit of st_blocks, in bytes


class FileSource:
    """A regular file or a block device. Raises BadInput for what is neither, or empty; OSError when it does not open.
    When the file is cut or written while it is served, its pages are lost: new and old pages look alike. Its
    stamp is checked after every read; after a change ``read`` always raises PageLost. ``copy``: serve a copy."""

    page_size = PAGE_4K

    def __init__(self, name: str, path: str, *, copy: bool = False) -> None:
        self.name = name
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._fd)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise BadInput(f"{path} is no file or block device")
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if not self.size:
                raise BadInput(f"{path} is empty: a block has at least one byte")
        except BaseException:
            os.close(self._fd)
            raise
        self._digests: PageDigests | None = None
        if stat.S_ISREG(status.st_mode):
            self._settle(copy)
        else:
            self._stamp = Stamp.of(self._fd)
        self._sparse = stat.S_ISREG(status.st_mode) and status.st_blocks * _PIECES < self.size

    def _settle(self, copy: bool) -> None:
        served = settle(self._fd, self.path, copy=copy)
        if served.leased:
            give_up_lease(served.fd)  # it shows that no program can write now; later writes are seen by the stamp
        self._fd, self._stamp, self.size, self._digests = served.fd, served.stamp, served.stamp.size, served.digests

    def read(self, offset: int, length: int) -> bytes | None:
        """See PageSource. Waits for the disk."""
        if self._sparse and self._is_hole(offset, length):
            data = None
        else:
            data = os.pread(self._fd, length, offset)
        self._check_unchanged(data, offset, length)
        return data

    def read_now(self, offset: int, length: int) -> bytearray | None:
        """As ``read``, without waiting. Raises BlockingIOError unless all of it is in the page cache (Linux 4.14)."""
        if self._sparse and self._is_hole(offset, length):
            self._check_unchanged(None, offset, length)
            return None
        data = bytearray(length)
        self._read_at_once(data, offset)
        self._check_unchanged(data, offset, length)
        return data

    def read_into(self, offset: int, view: memoryview) -> bool:
        """As ``read_now``, into ``view``. False: all of it is zeros, and ``view`` is unchanged."""
        length = len(view)
        hole = self._sparse and self._is_hole(offset, length)
        if not hole:
            self._read_at_once(view, offset)
        self._check_unchanged(None if hole else view, offset, length)
        return not hole

    def _read_at_once(self, data: bytearray | memoryview, offset: int) -> None:
        """Fill it. Raises BlockingIOError."""
        try:
            done = os.preadv(self._fd, (data,), offset, os.RWF_NOWAIT)
        except OSError:  # not cached; or EOPNOTSUPP: without such reads, no read is certain to be quick
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

    def _check_unchanged(self, data: bytes | bytearray | memoryview | None, offset: int, length: int) -> None:
        reason = self._stamp.change(self._fd)
        if self._digests is not None and self._digests.differs(memoryview(data or bytes(length)), offset):
            reason = "the file was written to through a mapping since it is served"
        if reason or (data is not None and len(data) != length):
            why = f" ({reason})" if reason else ""
            raise PageLost(f"{self.path} was cut or written while it is served{why}: start the source again")
