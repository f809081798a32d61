"""A file on a disk that cannot be read in one stretch: a file system of one file, served by a process of its own over
/dev/fuse, which answers EIO there. Needs the right to mount."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType

LIBC = ctypes.CDLL(None, use_errno=True)
DETACH = 2
IN = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
OUT = struct.Struct("<IiQ")
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, BATCH_FORGET, OPENDIR = (
    1,
    2,
    3,
    14,
    15,
    17,
    18,
    25,
    26,
    42,
    27,
)
DIRECTORY, FILE, NAME = 1, 2, "disk.bin"
FOREVER = 3600


class BrokenDisk:
    """``with BrokenDisk(...) as path``: a file with this content; reads that touch ``broken`` are EIO."""

    def __init__(self, directory: Path, content: bytes, broken: range) -> None:
        self._mounted = directory / "mounted"
        self._content = directory / "content"
        self._content.write_bytes(content)
        self._broken = broken

    def __enter__(self) -> Path:
        self._mounted.mkdir()
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if LIBC.mount(b"broken", os.fsencode(self._mounted), b"fuse", 0, options.encode()):
            os.close(device)
            raise OSError(ctypes.get_errno(), "cannot mount")
        told = [str(device), str(self._content), str(self._broken.start), str(self._broken.stop)]
        self._server = subprocess.Popen([sys.executable, __file__, *told], pass_fds=[device])
        os.close(device)
        return self._mounted / NAME

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        LIBC.umount2(os.fsencode(self._mounted), DETACH)
        self._server.send_signal(signal.SIGKILL)
        self._server.wait(10)


def attributes(node: int, size: int) -> bytes:
    mode = 0o40755 if node == DIRECTORY else 0o100644
    length = 0 if node == DIRECTORY else size
    return struct.pack(
        "<QQQQQQIIIIIIIIII", node, length, -(-length // 512), 1, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )


def answer(opcode: int, node: int, body: bytes, content: bytes, broken: range) -> bytes | int | None:
    """What the kernel gets: bytes, an errno, or nothing."""
    if opcode == INIT:
        return struct.pack("<IIIIHHIIHHIIHH6I", 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 16, 0, 0, 0, 0, 0, *[0] * 6)[:64]
    if opcode in (FORGET, BATCH_FORGET):
        return None
    if opcode == LOOKUP:
        if body.rstrip(b"\0") != NAME.encode():
            return errno.ENOENT
        return struct.pack("<QQQQII", FILE, 0, FOREVER, FOREVER, 0, 0) + attributes(FILE, len(content))
    if opcode == GETATTR:
        return struct.pack("<QII", FOREVER, 0, 0) + attributes(node, len(content))
    if opcode in (OPEN, OPENDIR):
        return struct.pack("<QII", 1, 0, 0)
    if opcode == READ:
        _, offset, length = struct.unpack_from("<QQI", body)
        if offset < broken.stop and broken.start < offset + length:
            return errno.EIO
        return content[offset : offset + length]
    if opcode in (RELEASE, FLUSH):
        return b""
    return errno.ENOSYS


def serve(device: int, content: bytes, broken: range) -> None:
    """Until the file system is gone (ENODEV)."""
    while True:
        request = os.read(device, 1 << 20)
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        said = answer(opcode, node, request[IN.size :], content, broken)
        if said is None:
            continue
        body, failed = (b"", -said) if isinstance(said, int) else (said, 0)
        os.write(device, OUT.pack(OUT.size + len(body), failed, unique) + body)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), range(int(sys.argv[3]), int(sys.argv[4])))
