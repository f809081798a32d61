"""Files that others write to: make their stores visible, or take a copy that only we hold.

A store through a shared mapping sets a file's times only at the first store into a clean page. So the pages are written
back once, after which the next store is seen. Files in memory (tmpfs, hugetlbfs) are never written back: a store
through a mapping leaves no trace there, so their pages are compared with digests."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from .filedigest import PageDigests
from .filestamp import Stamp
from .filewatch import lease
from .memory import data_runs, reopen

_libc = ctypes.CDLL(None, use_errno=True)

_IN_MEMORY: Final = frozenset((0x01021994, 0x858458F6, 0x958458F6))  # f_type: tmpfs, ramfs, hugetlbfs
_STATFS_BYTES: Final = 256  # more than struct statfs of any architecture; it begins with f_type, a long
_FICLONE: Final = 0x40049409
_PIECE: Final = 64 << 20


def in_memory(fd: int) -> bool:
    """Whether the file is in memory, so that stores through a mapping of it are never seen."""
    facts = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, facts):
        return False
    return ctypes.c_long.from_buffer(facts).value & 0xFFFFFFFF in _IN_MEMORY


def watched_stamp(fd: int) -> Stamp:
    """The stamp of a file that others may have mapped for writing; their next store changes it."""
    with suppress(OSError):  # a file system that has nothing to write back
        os.fdatasync(fd)  # first, because a network file system sets the times of earlier stores now
    stamp = Stamp.of(fd)
    with suppress(OSError):
        os.fdatasync(fd)  # pages that were stored to between the two
    return stamp


@dataclass(frozen=True, slots=True)
class ServedFile:
    """An open file and its stamp. ``leased``: a lease is held; ``digests``: for a file in memory; ``original``: stamp
    of the file that was copied."""

    fd: int
    stamp: Stamp
    leased: bool
    digests: PageDigests | None = None
    original: Stamp | None = None


def settle(fd: int, path: str, *, copy: bool) -> ServedFile:
    """Prepare the regular file ``fd`` so that a change of it is seen: by a lease if possible, else by its stamp, for a
    file in memory by digests. ``copy``: take a copy that no other program has. Takes ``fd`` over. Raises OSError."""
    original = None
    try:
        if copy:
            source, original = fd, watched_stamp(fd)
            fd = private_copy(fd, path)
            os.close(source)
        if lease(fd):
            return ServedFile(fd, Stamp.of(fd), leased=True, original=original)
        stamp = watched_stamp(fd)
        digests = PageDigests.of(fd, stamp.size) if in_memory(fd) else None
        return ServedFile(fd, stamp, leased=False, digests=digests, original=original)
    except BaseException:
        os.close(fd)
        raise


def private_copy(fd: int, path: str) -> int:
    """A copy without a name, open read-only: a clone (reflink) beside the file if its file system can, else the bytes,
    beside it or in the directory for temporary files; in memory for a file in memory. Raises OSError: EBUSY when the
    file is changed meanwhile."""
    before = watched_stamp(fd)
    writer = _nameless(fd, os.path.dirname(os.path.abspath(path)))
    try:
        try:
            fcntl.ioctl(writer, _FICLONE, fd)
        except OSError:
            _copy_bytes(fd, writer, before.size)
        if reason := before.change(fd):
            raise OSError(errno.EBUSY, f"while it was copied, {reason}")
        return reopen(writer, writable=False)  # a lease needs that nothing has it open for writing
    finally:
        os.close(writer)


def _nameless(fd: int, directory: str) -> int:
    if in_memory(fd):
        return os.memfd_create("postcopy-copy", os.MFD_CLOEXEC)
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags, 0o600)
    except OSError:  # read-only, or a file system that cannot
        return os.open(tempfile.gettempdir(), flags, 0o600)


def _copy_bytes(source: int, target: int, size: int) -> None:
    """Copy the data; holes stay holes. The kernel copies, and shares the blocks where the file system can."""
    os.ftruncate(target, size)
    for start, end in data_runs(source, 0, size):
        while start < end:
            done = _copy_piece(source, target, start, min(end - start, _PIECE))
            if not done:
                raise OSError(errno.EBUSY, "it was truncated while it was copied")
            start += done


def _copy_piece(source: int, target: int, start: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, start, start)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    os.lseek(target, start, os.SEEK_SET)
    return os.sendfile(target, source, start, length)
