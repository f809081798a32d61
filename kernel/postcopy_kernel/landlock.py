"""Landlock: a thread gives up rights for itself and its children, irrevocably.

The rule set allows nothing: no path is opened, made, renamed or removed; no TCP port is bound or connected to (Linux
6.7); no signal and no message to an abstract Unix socket leaves the own domain (6.12). Open files stay usable.
connect(2) to a Unix socket with a path is not restricted up to ABI 7.

A kernel refuses rights that its ABI version does not know, so those are left out. Landlock is per thread: call
``restrict`` before there are other threads.

Example::

    if not restrict():
        print("this kernel has no Landlock")
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from .process import set_no_new_privs

# The same numbers on every architecture.
_CREATE_RULESET: Final = 444
_RESTRICT_SELF: Final = 446
_ASK_VERSION: Final = 1

_FILES: Final = ((1, 0x1FFF), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
"""(ABI, rights that it introduced): thirteen, then REFER, TRUNCATE, IOCTL_DEV."""
_NETWORK: Final = ((4, 0b11),)  # BIND_TCP, CONNECT_TCP
_SCOPES: Final = ((6, 0b11),)  # ABSTRACT_UNIX_SOCKET, SIGNAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def abi() -> int:
    """The kernel's Landlock ABI version; 0 if it has none or was started without it."""
    found = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))
    return max(0, int(found))


def attributes(version: int) -> tuple[int, ...]:
    """The rule set for this ABI version: one to three u64 fields of the kernel's structure."""
    fields = [sum(bits for since, bits in kinds if since <= version) for kinds in (_FILES, _NETWORK, _SCOPES)]
    while fields and not fields[-1]:
        fields.pop()
    return tuple(fields)


def restrict() -> int:
    """Give up all rights that this kernel's Landlock knows. Returns its ABI version (0: no Landlock, nothing changed).

    Sets no_new_privs, which Landlock requires without CAP_SYS_ADMIN. Raises OSError, E2BIG after sixteen layers."""
    version = abi()
    if not version:
        return 0
    fields = attributes(version)
    structure = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = _call(_CREATE_RULESET, structure, ctypes.c_size_t(ctypes.sizeof(structure)), ctypes.c_uint32(0))
    try:
        set_no_new_privs()
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
