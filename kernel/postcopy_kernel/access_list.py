"""Users whom the kernel keeps from a file or a socket: entries of its POSIX access control list (acl(5))."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

_NAME = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_OWNER, _USER, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_ALL = 6  # read and write
MOST_USERS = 64  # ext4 has room for some hundreds


def refuse_users(path: str, users: Iterable[int]) -> None:
    """All but these users, at most MOST_USERS, may open the file or connect to the socket (mode 0666). Raises OSError:
    ENOTSUP on a file system without such lists.

    Example: ``refuse_users("/run/it/door", [1001])`` makes connect fail with EACCES for user 1001."""
    refused = sorted(users)
    if not refused:
        os.removexattr(path, _NAME)
        return
    entries = [(_OWNER, _ALL, _NO_ID), *((_USER, 0, user) for user in refused)]
    entries += [(_GROUP, _ALL, _NO_ID), (_MASK, _ALL, _NO_ID), (_OTHER, _ALL, _NO_ID)]
    os.setxattr(path, _NAME, _VERSION + b"".join(_ENTRY.pack(*entry) for entry in entries))
