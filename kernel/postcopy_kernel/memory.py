"""RAM blocks for the kernel: memfds, mappings, advice, and which pages are present.

Two traps explain this module:

* If a mapping that is **not** registered with a userfaultfd touches a missing page, the kernel makes a page of zeros,
  for every client. So nothing here touches memory: views are returned unread, presence is asked of the file
  (SEEK_DATA), prefetching uses MADV_POPULATE_READ.
* A fault inside a Python bytecode holds the GIL. :func:`advise` calls through ctypes, which releases it.

Example::

    block = create_memfd("ram0", 4096)
    with Mapping.of(block, 4096) as mapping:
        assert not is_present(block, 0)
        mapping.advise(POPULATE_READ)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final

PAGE_4K: Final = 4096
PAGE_2M: Final = 2 << 20

# madvise(2); the same numbers on x86_64 and arm64.
RANDOM: Final = 1
DONTNEED: Final = 4
REMOVE: Final = 9
DONTFORK: Final = 10
DOFORK: Final = 11
NOHUGEPAGE: Final = 15
DONTDUMP: Final = 16
POPULATE_READ: Final = 22  # Linux 5.14
POPULATE_WRITE: Final = 23  # Linux 5.14

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000  # no constant in Python 3.11
_MAP_FIXED_NOREPLACE: Final = 0x100000  # Linux 4.17
_MAP_HUGE_2M: Final = 0x40000 | 21 << 26  # MAP_HUGETLB, and the logarithm of the size
_PUNCH: Final = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_PROT_NONE: Final = 0
_FIXED_SIZE: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_FAILED: Final = ctypes.c_void_p(-1).value
_HUGE: Final = "/sys/kernel/mm/hugepages/hugepages-{}kB/{}_hugepages"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def create_memfd(name: str, size: int, page_size: int = PAGE_4K) -> int:
    """Make a memfd of ``size`` bytes (a multiple of ``page_size``: 4096, or 2 MiB for huge pages), all holes.

    Its size is sealed. Writing is not: F_SEAL_WRITE is refused for mapped files, and F_SEAL_FUTURE_WRITE would forbid
    later shared mappings. Its mode is 0600: a new memfd has 0777, and another uid could reopen a read-only descriptor
    for writing through /proc. Raises ValueError for sizes, OSError of memfd_create.
    """
    if page_size not in (PAGE_4K, PAGE_2M):
        raise ValueError(f"page size {page_size} is neither {PAGE_4K} nor {PAGE_2M}")
    if size <= 0 or size % page_size:
        raise ValueError(f"size {size} is not a positive multiple of {page_size}")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if page_size == PAGE_2M:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create(name, flags)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole: its pages are given back, and it reads as zeros. Raises OSError."""
    if _libc.fallocate(fd, _PUNCH, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def reopen(fd: int, *, writable: bool) -> int:
    """A new open file description of the same file (close on exec), for example a read-only one of a memfd."""
    return os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)


def open_memfd_of(pid: int, descriptor: int, name: str, size: int) -> int:
    """Open another process's memfd for reading and writing (close on exec).

    It is checked before it is really opened (O_PATH first), because opening a device or a fifo has effects. Raises
    OSError if it cannot be opened. Raises ValueError unless it is a memfd of that name and size, of our own user (any
    for root), and sealed against shrinking and growing: touching truncated memory would be SIGBUS.
    """
    place = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
    try:
        status, found = os.fstat(place), os.readlink(f"/proc/self/fd/{place}")
        if found != f"/memfd:{name} (deleted)" or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"descriptor {descriptor} of process {pid} is {found}, not the memfd {name}")
        if os.geteuid() not in (0, status.st_uid):
            raise ValueError(f"the memfd {name} of process {pid} belongs to user {status.st_uid}")
        opened = reopen(place, writable=True)
    finally:
        os.close(place)
    try:
        seals = fcntl.fcntl(opened, fcntl.F_GET_SEALS)
        if seals & _FIXED_SIZE != _FIXED_SIZE or os.fstat(opened).st_size != size:
            raise ValueError(f"the memfd {name} of process {pid} is not sealed at {size} bytes")
    except BaseException:
        os.close(opened)
        raise
    return opened


def advise(address: int, length: int, advice: int) -> int:
    """madvise(2) without the GIL. Returns 0 or the errno; EHWPOISON (133): POPULATE_READ met a poisoned page.

    Signals do not interrupt a populate: it returns when every page is present.
    """
    if _libc.madvise(address, length, advice) == 0:
        return 0
    return ctypes.get_errno()


def address_of(buffer: memoryview) -> int:
    """Address of the first byte of a contiguous buffer (may be read-only), as a source of UFFDIO_COPY. The caller keeps
    the buffer alive while the address is used."""
    if not buffer.readonly:  # four times as fast, and used for every remote page
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    view = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(view), 0)
    address = view.buf
    _release_buffer(ctypes.byref(view))
    return address or 0


def exchange(address: int, data: bytes) -> bytes:
    """Write ``data`` to mapped and present memory at ``address``; returns what was there."""
    before = ctypes.string_at(address, len(data))
    ctypes.memmove(address, data, len(data))
    return before


class _PyBuffer(ctypes.Structure):
    """Py_buffer of CPython's stable ABI (3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def _map(address: int | None, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address, length, protection, flags, fd, offset)
    if result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {length} bytes: {os.strerror(code)}")
    assert isinstance(result, int)
    return result


class Mapping:
    """``length`` bytes of mapped memory at ``address``, never touched by this class.

    ``mmap.mmap`` has no NORESERVE and no fixed address, and holds the GIL in madvise.
    """

    def __init__(self, address: int, length: int, *, writable: bool = True) -> None:
        self.address = address
        self.length = length
        self.writable = writable
        self._exporters: list[weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = []

    @classmethod
    def of(
        cls,
        fd: int,
        length: int,
        *,
        offset: int = 0,
        shared: bool = True,
        writable: bool = True,
        reserve: bool = False,
        fixed_address: int | None = None,
        inaccessible: bool = False,
    ) -> Mapping:
        """Map ``length`` bytes of ``fd`` from ``offset``.

        Without ``reserve`` no memory is reserved (MAP_NORESERVE): otherwise 100 GiB of private mapping are ENOMEM under
        the usual overcommit, and a private hugetlb mapping takes its whole length out of the pool. ``fixed_address``
        must be free (EEXIST otherwise, Linux 4.17). ``inaccessible``: until ``allow``. Raises OSError.
        """
        flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | (0 if reserve else _MAP_NORESERVE)
        if fixed_address is not None:
            flags |= _MAP_FIXED_NOREPLACE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if inaccessible:
            protection = _PROT_NONE
        return cls(_map(fixed_address, length, protection, flags, fd, offset), length, writable=writable)

    @classmethod
    def anonymous(cls, length: int, page_size: int = PAGE_4K) -> Mapping:
        """Map ``length`` bytes of private anonymous memory, not reserved. Raises OSError."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        if page_size == PAGE_2M:
            flags |= _MAP_HUGE_2M
        return cls(_map(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), length)

    def view(self, length: int | None = None, *, writable: bool | None = None) -> memoryview:
        """The first ``length`` bytes (default: all) as a flat memoryview of bytes, writable only if the mapping is.

        Making it touches nothing. Indexing it does, with the GIL held.
        """
        size = self.length if length is None else length
        if not 0 <= size <= self.length or self.address == 0:
            raise ValueError(f"no {size} bytes in a mapping of {self.length if self.address else 0}")
        exporter = (ctypes.c_ubyte * size).from_address(self.address)
        self._exporters = [known for known in self._exporters if known() is not None]
        self._exporters.append(weakref.ref(exporter))
        view = memoryview(exporter).cast("B")
        return view if (self.writable if writable is None else writable) else view.toreadonly()

    @property
    def exported(self) -> bool:
        """Whether a view, or an object made from one (a slice, an array), still exists."""
        return any(known() is not None for known in self._exporters)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise(2) on the range, without the GIL (see :func:`advise`). Raises OSError."""
        code = advise(self.address + offset, self.length - offset if length is None else length, advice)
        if code:
            raise OSError(code, f"madvise {advice}: {os.strerror(code)}")

    def allow(self) -> None:
        """Give access to a mapping that was made ``inaccessible`` and has been registered with a userfaultfd since.

        In a process that locks its memory (mlockall with MCL_FUTURE) the kernel populates a mapping while it is made,
        so before it can be registered: holes become zero pages for everybody. It cannot populate an inaccessible one.
        mprotect on registered memory populates nothing (run on Linux 6.18, shared and private, locked or not). Raises
        OSError.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        if _libc.mprotect(self.address, self.length, protection) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"mprotect of {self.length} bytes: {os.strerror(code)}")

    def forbid(self) -> None:
        """Replace the memory by an inaccessible range: touching it is SIGSEGV, and no other mapping gets the addresses.
        A userfaultfd registration of the range ends."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _map(self.address, self.length, _PROT_NONE, flags, -1, 0)

    def close(self) -> None:
        """Unmap. While views exist, the range is only forbidden, so that they never show other memory."""
        if self.address == 0:
            return
        if self.exported:
            self.forbid()
        elif _libc.munmap(self.address, self.length) != 0:
            raise OSError(ctypes.get_errno(), "munmap failed")
        self.address = 0

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Where data (or a hole) begins at or after ``offset``, at most ``end``. The file position is not used, because
    other holders of the description move it too."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data up to the end of the file
            return end
        raise


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs ``(start, end)`` of pages of ``fd`` that are present. Shmem only: hugetlb reports holes as data."""
    while start < end:
        first = _seek(fd, start, os.SEEK_DATA, end)
        if first >= end:
            return
        start = _seek(fd, first, os.SEEK_HOLE, end)
        yield first, start


def hole_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs ``(start, end)`` of pages of ``fd`` that are absent. Shmem only, as :func:`data_runs`."""
    for first, last in data_runs(fd, start, end):
        if first > start:
            yield start, first
        start = last
    if start < end:
        yield start, end


def is_present(fd: int, offset: int) -> bool:
    """Whether the page at ``offset`` is present (about 1 us). Shmem only: for hugetlb it is always True. There use
    UFFDIO_CONTINUE on an own registered mapping (UNREADABLE means absent)."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


@dataclass(frozen=True, slots=True)
class HugePages:
    """A pool of huge pages, in pages. ``reserved`` ones are free but belong to mappings."""

    total: int
    free: int
    reserved: int

    @property
    def available(self) -> int:
        """Pages that a new mapping can have."""
        return self.free - self.reserved


def huge_pages(page_size: int = PAGE_2M) -> HugePages:
    """The pool of huge pages of ``page_size`` bytes; all 0 if the kernel has no such pages."""

    def count(kind: str) -> int:
        try:
            with open(_HUGE.format(page_size >> 10, kind), "rb") as figure:
                return int(figure.read())
        except FileNotFoundError:
            return 0

    return HugePages(count("nr"), count("free"), count("resv"))
