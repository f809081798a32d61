"""The descriptor store of the service manager (systemd: FileDescriptorStoreMax=, sd_pid_notify_with_fds(3)).

What the custodian keeps is stored there too. When every process of the service has died, the manager hands it to the
next supervisor (LISTEN_FDS, LISTEN_FDNAMES; sd_listen_fds(3)), which then needs no right to look into its clients.
Notes are no descriptors: they are in the ``records``. A name is ``KEY.POSITION``, with a dash in place of the slash."""

from __future__ import annotations

import array
import collections
import logging
import os
import re
import socket
import time
from collections.abc import Collection, MutableMapping, Sequence

from postcopy_kernel import descriptors

from .plan import LIFELINE

log = logging.getLogger("postcopy")

FIRST = 3  # SD_LISTEN_FDS_START
MOST_WAITING = 4096
MOST_OF_A_KEY = 5
LAST_WORDS_SECONDS = 1.0
"""At the end, for a manager that reads slowly. A datagram socket holds ten messages."""
NAME = re.compile(r"([a-z]+(?:-[0-9]+)?)\.([0-9]+)")


def taken(environ: MutableMapping[str, str]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The descriptors that the manager has handed over, by key, in order of position, without keys of which some are
    missing; and all keys. The variables are removed, so that no child takes the descriptors for its own."""
    words = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    environ.pop("LISTEN_PIDFDID", None)
    if words[0] != str(os.getpid()) or not words[1].isdecimal():
        return {}, set()
    found: dict[str, dict[int, int]] = {}
    names = words[2].split(":")
    for number in range(int(words[1])):
        fd = FIRST + number
        os.set_inheritable(fd, False)
        known = NAME.fullmatch(names[number]) if number < len(names) else None
        places = found.setdefault(known[1].replace("-", "/"), {}) if known else {}
        if known is None or int(known[2]) in places:
            log.warning("descriptor %d of the service manager is not ours: it is closed", fd)
            os.close(fd)
            continue
        places[int(known[2])] = fd
    whole = {key: tuple(places[at] for at in sorted(places)) for key, places in found.items()}
    for key, places in found.items():
        if sorted(places) != list(range(len(places))):
            descriptors.close_all(whole.pop(key))
    return whole, set(found)


class DescriptorStore:
    """Stores duplicates at the manager, and removes them. Never waits: what its socket does not take is sent later."""

    def __init__(self, address: str, limit: int, stored: Collection[str]) -> None:
        """``address``: $NOTIFY_SOCKET; ``limit``: how many descriptors it stores; ``stored``: keys that it had."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._limit, self._before = limit, set(stored)
        self._stored: dict[str, tuple[int, ...]] = {}
        self._waiting: collections.deque[tuple[str, int]] = collections.deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._full = False

    @classmethod
    def wanted(cls, environ: MutableMapping[str, str], stored: Collection[str]) -> DescriptorStore | None:
        """The store, if the manager offers one: it sets $FDSTORE (systemd 254 and later; before, the unit does)."""
        address, limit = environ.get("NOTIFY_SOCKET", ""), environ.get("FDSTORE", "")
        if not address or not limit.isdecimal() or int(limit) == 0:
            return None
        return cls(address, int(limit), stored)

    def keep(self, key: str, meta: bytes, fds: Sequence[int]) -> None:
        """Store the descriptors of a key, unless they are stored."""
        if self._stored.get(key) == tuple(fds) or key == LIFELINE:  # the manager would keep that alive for ever
            return
        self._remove(key, len(self._stored.get(key, ())))
        if sum(map(len, self._stored.values())) + len(fds) > self._limit:
            if not self._full:
                log.warning(
                    "the descriptor store is full (%d, FileDescriptorStoreMax): %s is not in it", self._limit, key
                )
            self._full = True
            return
        self._stored[key] = tuple(fds)
        for place, fd in enumerate(fds):
            # FDPOLL=0: otherwise the manager drops what polls as an error, as a userfaultfd does.
            self._send(f"FDSTORE=1\nFDNAME={_name(key)}.{place}\nFDPOLL=0", fd)

    def drop(self, key: str) -> None:
        """Remove the descriptors of a key."""
        self._remove(key, len(self._stored.pop(key, ())))

    def _remove(self, key: str, count: int) -> None:
        if key in self._before:
            self._before.discard(key)
            count = max(count, MOST_OF_A_KEY)
        for place in range(count):
            self._send(f"FDSTOREREMOVE=1\nFDNAME={_name(key)}.{place}")

    def retain(self, keys: Collection[str]) -> None:
        """Remove what an earlier supervisor has stored under other keys."""
        for key in self._before - set(keys):
            self._remove(key, 0)

    def clear(self) -> None:
        """Remove everything: the service ends in order."""
        for key in list(self._stored):
            self.drop(key)
        self.retain(())
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self._waiting and time.monotonic() < deadline:
            time.sleep(0.002)
            self.flush()

    def _send(self, text: str, fd: int = -1) -> None:
        self._waiting.append((text, fd))
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the manager takes it."""
        while self._waiting:
            text, fd = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
            try:
                self._socket.sendmsg([text.encode()], rights, 0, self._address)
            except BlockingIOError:
                return
            except OSError as error:  # EBADF: it was closed since; anything else: there is no manager
                log.debug("the service manager does not store a descriptor: %s", error)
            self._waiting.popleft()


def _name(key: str) -> str:
    return key.replace("/", "-")
