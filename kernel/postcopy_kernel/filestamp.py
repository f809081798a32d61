"""What shows that an open file was changed: its size and times, and the facts that excuse a new time of change.

The time of change (ctime) cannot be set, so it also shows a write whose modification time was put back (``touch -r``,
``rsync --times``). But chmod, chown, link, unlink and rename set it too. So a new time of change counts as a write only
if none of mode, owner, number of links and path is new. write(2) and a first store into a page of a shared mapping set
the times before they change a byte, so bytes that were read before an unchanged stamp are the old ones.

What leaves no trace: stores through a shared mapping of a file in memory (tmpfs, hugetlbfs; see ``filecopy``), changes
on the other side of a network file system until its attributes are read again, and on kernels before 6.13 a second
change within the same tick (at most 10 ms). The kernel keeps STATX_CHANGE_COOKIE from programs."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Final

_FORM: Final = struct.Struct("<QqqIIIQ16s")
_PATH: Final = 16  # bytes


class Stamp:
    """Size and times of a file in nanoseconds, as they were when ``of`` looked."""

    __slots__ = ("_ctime_ns", "_facts", "mtime_ns", "size")

    def __init__(self, size: int, mtime_ns: int, ctime_ns: int, facts: tuple[int, int, int, int, bytes]) -> None:
        self.size, self.mtime_ns, self._ctime_ns, self._facts = size, mtime_ns, ctime_ns, facts

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """The stamp of an open file."""
        now = os.fstat(fd)
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns, _facts(now, fd, bytes(_PATH)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Stamp:
        """The stamp that another process has packed. Raises ValueError."""
        try:
            size, mtime_ns, ctime_ns, *facts = _FORM.unpack(data)
        except struct.error as error:
            raise ValueError(f"not a stamp of a file: {error}") from error
        return cls(size, mtime_ns, ctime_ns, tuple(facts))

    def __bytes__(self) -> bytes:
        return _FORM.pack(self.size, self.mtime_ns, self._ctime_ns, *self._facts)

    def change(self, fd: int) -> str:
        """What was done to the file since then, or an empty text. Costs one fstat(2). Raises OSError (ESTALE)."""
        now = os.fstat(fd)
        if now.st_size != self.size:
            return f"the file has {now.st_size} bytes, it had {self.size}"
        if now.st_mtime_ns != self.mtime_ns:
            return "the file was written to since it is served"
        if now.st_ctime_ns != self._ctime_ns:
            facts = _facts(now, fd, self._facts[4])
            if facts == self._facts:
                return "the file was changed since it is served, and its modification time put back"
            self._ctime_ns, self._facts = now.st_ctime_ns, facts
        return ""


def _facts(now: os.stat_result, fd: int, path: bytes) -> tuple[int, int, int, int, bytes]:
    """Mode, owner, links and a digest of the path; ``path`` where it cannot be read."""
    try:
        path = hashlib.blake2b(os.readlink(b"/proc/self/fd/%d" % fd), digest_size=_PATH).digest()
    except OSError:
        pass
    return now.st_mode, now.st_uid, now.st_gid, now.st_nlink, path
