"""Page sources on the simulated kernel: a file that can be cut or rewritten, and a handler function that fails.

``FilePages`` asks the real system what a file is like, so its double is written here, with the same law; the handler's
is the real one on memory that only the simulated kernel can read.
"""

from __future__ import annotations

from postcopy_kernel.memory import Mapping
from postcopy_protocol.errors import PageLost
from postcopy_protocol.messages import BlockGrant
from postcopy_workers.page_sources import HandlerPages, SourceChanged
from tests.simulated.kernel import File, Kernel

SOURCE_AT = 0x7000_0000_0000


class SourceFile:
    """A file as it is now; ``original`` is how it was when it was served."""

    def __init__(self, kernel: Kernel, size: int, page_size: int) -> None:
        pages = -(-size // page_size)
        self.original = b"".join(bytes((0x81 + page % 0x7D,)) * page_size for page in range(pages))[:size]
        self.data = self.original
        self.page_size = page_size
        self.changed = False
        self.unreadable: set[int] = set()
        self.file = File(size)
        self.descriptor = kernel.open(self.file)
        kernel.readable(SOURCE_AT, pages * page_size, self.copied)

    def copied(self, offset: int, length: int) -> bytes | None:
        """What COPY finds in the mapping: zeros behind the end of the file up to its last page's end, then EFAULT."""
        if offset // self.page_size in self.unreadable or offset >= self.file.size:
            return None
        return self.data[offset : offset + length].ljust(length, b"\0")

    def cut(self, size: int) -> None:
        self.data = self.data[:size]
        self.file.size = len(self.data)
        self.changed = True

    def rewrite(self) -> None:
        self.data = bytes(255 - byte for byte in self.data)
        self.changed = True

    def page(self, page: int) -> bytes:
        """The page as it must be in the block."""
        return self.original[page * self.page_size : (page + 1) * self.page_size].ljust(self.page_size, b"\0")


class SimulatedFilePages:
    """``FilePages`` over a SourceFile."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self.size = len(source.original)
        self.linear = SOURCE_AT
        self.descriptor = source.descriptor
        self.forgotten = 0

    def locate(self, offset: int, length: int) -> int:
        return SOURCE_AT + offset

    def check(self) -> None:
        if self._source.changed:
            raise SourceChanged("the file is not what it was")

    def content(self, offset: int, length: int) -> bytes:
        wanted = max(0, min(length, self.size - offset))
        data = self._source.data[offset : offset + wanted]
        if len(data) != wanted:
            raise SourceChanged("the file is shorter than it was")
        return data.ljust(length, b"\0")

    def forget(self) -> None:
        self.forgotten += 1


class Function:
    """A user's handler function over a SourceFile's bytes: it loses ``lost`` pages and fails at ``failing`` ones."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self.lost: set[int] = set()
        self.failing: set[int] = set()
        self.calls = 0

    def __call__(self, offset: int, length: int) -> bytes:
        self.calls += 1
        size = self._source.page_size
        pages = set(range(offset // size, -(-(offset + length) // size)))
        if pages & self.failing:
            raise RuntimeError("the handler has a bad day")
        if pages & self.lost:
            raise PageLost("the handler has no such page")
        return self._source.original[offset : offset + length]


class SimulatedHandlerPages(HandlerPages):
    """The real thing; its staging is a bytearray that the simulated kernel reads at an address of its own."""

    def __init__(self, grant: BlockGrant, function: Function, stretch: int, kernel: Kernel, address: int) -> None:
        self.size = grant.size
        self._function = function
        staging = bytearray(stretch)
        self._staging = Mapping(address, stretch)  # a name for the address; nothing is mapped there
        self._view = memoryview(staging)
        kernel.readable(address, stretch, lambda offset, length: bytes(staging[offset : offset + length]))
