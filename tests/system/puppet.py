"""A client process under a test's control: ``python puppet.py RUNTIME_DIR``.

It runs what it is told, one JSON line at a time, and answers each with one line: ``{"is": value}`` or
``{"error": class name, "text": ...}``. The helpers below are in its namespace, ``directory`` too.
Whatever a test lets it touch may stop this process or end it; the test process itself never touches a block.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import postcopy
from postcopy_kernel import memory

directory = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
PAGE = 4096


def attach(name: str = "ram0", mode: str = "private", timeout: float = 20.0) -> postcopy.Block:
    return postcopy.attach(name, directory, mode, timeout)


def address(block: postcopy.Block, offset: int = 0) -> int:
    return int(block.mapping.address) + offset


def read(block: postcopy.Block, offset: int, length: int) -> str:
    """Hexadecimal digits of the bytes."""
    return bytes(block.buf[offset : offset + length]).hex()


def write(block: postcopy.Block, offset: int, data: str) -> None:
    block.buf[offset : offset + len(data) // 2] = bytes.fromhex(data)


def behind(block: postcopy.Block) -> str:
    """What the last page holds behind the block's exact size."""
    end = -(-block.size // block.page_size) * block.page_size
    return ctypes.string_at(address(block) + block.size, end - block.size).strip(b"\0").hex()


def order_of(size: int, step: int, order: str, seed: int) -> list[int]:
    starts = list(range(0, size, step))
    if order == "random":
        random.Random(seed).shuffle(starts)
    return starts


def check(
    block: postcopy.Block,
    path: str,
    order: str = "forward",
    step: int = 65536,
    seed: int = 0,
    begin: int = 0,
    end: int | None = None,
) -> int:
    """Compare every byte from ``begin`` to ``end`` (the block's) with the file; the first step that differs, or -1."""
    stop = block.size if end is None else end
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as wanted:
        if len(wanted) != block.size:
            return 0
        here, there = address(block), ctypes.addressof(ctypes.c_char.from_buffer(wanted))
        for start in (begin + place for place in order_of(stop - begin, step, order, seed)):
            length = min(step, stop - start)
            if libc.memcmp(ctypes.c_void_p(here + start), ctypes.c_void_p(there + start), ctypes.c_size_t(length)):
                return start
    return -1


def check_in_parts(block: postcopy.Block, path: str, gate: str, parts: int, step: int = 4096, seed: int = 0) -> int:
    """The same in random order, part after part of the block; each but the first begins when ``gate`` is so many bytes
    long as parts lie before it: what lies in it is missing until the test wants it to come."""
    for part in range(parts):
        while Path(gate).stat().st_size < part:
            time.sleep(0.002)
        begin, end = (block.size * border // parts // step * step for border in (part, part + 1))
        found = check(block, path, "random", step, seed, begin, block.size if part == parts - 1 else end)
        if found != -1:
            return found
    return -1


def words(block: postcopy.Block, pages: list[int]) -> list[int]:
    """The first 64-bit word of each of these pages."""
    return [int.from_bytes(block.buf[page * PAGE : page * PAGE + 8], "little") for page in pages]


def syscall_read(block: postcopy.Block, offset: int, length: int = 8) -> str:
    """Read by a system call: a poisoned page is EFAULT there, not the end of the process."""
    reader, writer = os.pipe()
    try:
        os.write(writer, block.buf[offset : offset + length])
        return os.read(reader, length).hex()
    finally:
        os.close(reader)
        os.close(writer)


def become(uid: int, gid: int = -1, groups: tuple[int, ...] = ()) -> None:
    """Give up all rights; everything that is imported later must be here already, because files may be out of reach."""
    import postcopy.attach_socket
    import postcopy.block
    import postcopy.client
    import postcopy.errors
    import postcopy.populate
    import postcopy.session  # noqa: F401

    own = uid if gid < 0 else gid
    os.setgroups(groups)
    os.setresgid(own, own, own)
    os.setresuid(uid, uid, uid)


def child(expression: str) -> Any:
    """The expression's value in a child made by os.fork; "ended N" when it gave none."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(eval(expression, globals())).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(said) if said else f"ended {os.waitstatus_to_exitcode(status)}"


def obey(line: str) -> dict[str, Any]:
    try:
        try:
            code = compile(line, "order", "eval")
        except SyntaxError:
            exec(compile(line, "order", "exec"), globals())
            return {"is": None}
        value = eval(code, globals())
        return {"is": value if isinstance(value, (int, float, str, list, dict)) else None}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)


NAMESPACE = (memory, threading, time)

if __name__ == "__main__":
    main()
