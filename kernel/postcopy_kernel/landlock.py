"""Landlock: a thread, and all that it starts from then on, gives up what it does not need. Nobody gives it back.

The rule set here allows nothing: no path is opened, made, renamed or removed, no TCP port bound or connected to
(Linux 6.7), no signal sent and no abstract Unix socket spoken to outside the own domain (6.12). What is open already
stays usable, and connect(2) to a Unix socket that has a path is not Landlock's business up to ABI 7.

Every kernel has its ABI version; what it does not know is left out of the rule set, or it would refuse the whole.
Landlock is per thread: call ``restrict`` before there are others.
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
"""(ABI, rights that came with it): thirteen to begin with, then REFER, TRUNCATE, IOCTL_DEV."""
_NETWORK: Final = ((4, 0b11),)  # BIND_TCP, CONNECT_TCP
_SCOPES: Final = ((6, 0b11),)  # ABSTRACT_UNIX_SOCKET, SIGNAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none, or was started without it."""
    found = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))
    return max(0, int(found))


def attributes(version: int) -> tuple[int, ...]:
    """The rule set for a kernel of this ABI as the u64 fields of its structure: it grew from one to three."""
    fields = [sum(bits for since, bits in kinds if since <= version) for kinds in (_FILES, _NETWORK, _SCOPES)]
    while fields and not fields[-1]:
        fields.pop()
    return tuple(fields)


def restrict() -> int:
    """Give up everything that this kernel's Landlock can take; returns its ABI version (0: there is none, nothing has
    changed). Sets no_new_privs, without which only root may. Raises OSError, E2BIG after sixteen layers."""
    version = abi()
    if not version:
        return 0
    words = attributes(version)
    structure = (ctypes.c_uint64 * len(words))(*words)
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
