"""Watchers of clients: what they learn about orphans, and their end when their clients are rescued.

A client starts its watcher itself, or a program that speaks for it does (``postcopy.orphan_watcher``), and its end of
the conversation is descriptor 3 of that process. It is found by its command line and user: the client's word is not
needed, and a lie harms only that user's clients."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from postcopy_kernel import descriptors, other_process, process
from postcopy_kernel.address_space import owner_of
from postcopy_protocol.messages import OrphanPolicy

log = logging.getLogger("postcopy")

PROGRAM = b"orphan_watcher.py"
INBOX = 3
ORDER = struct.Struct("=cQ")
POISONED = struct.Struct("=QQ")
FOREVER = (1 << 64) - 1
MOST_BYTES = 1 << 17
ANSWER_SECONDS = 2.0  # for all watchers together; one that does not answer is killed

Poisoned = list[tuple[int, int]]  # block, offset


def new_lifeline() -> int:
    """The writing end of a new pipe; reading ends are made by ``Orphans``."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


class Orphans:
    """The policy for clients whose service has died altogether. ``timeout``: seconds until missing pages are poisoned;
    None: they wait."""

    def __init__(self, timeout: float | None, lifeline: int) -> None:
        self._timeout, self._lifeline = timeout, lifeline

    @contextlib.contextmanager
    def policy(self) -> Iterator[tuple[OrphanPolicy, tuple[int, ...]]]:
        """The answer to AskOrphanPolicy, and its descriptor, which is open meanwhile."""
        if self._timeout is None:
            yield OrphanPolicy(0, False), ()
            return
        reader = self._reader()
        try:
            yield OrphanPolicy(int(self._timeout * 1000), True), (reader,)
        finally:
            os.close(reader)

    def _reader(self) -> int:
        return os.open(f"/proc/self/fd/{self._lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def relieve(self, clients: Mapping[int, tuple[int, int]]) -> list[tuple[int, Poisoned]]:
        """Make the watchers of these clients (number: pid and user) stop, and give them the policy and the lifeline of
        this service. Returns what each has poisoned. Afterwards none of them reads a userfaultfd."""
        if not clients:
            return []
        watchers = list(_watchers_of(clients))
        reader = self._reader()
        timeout = FOREVER if self._timeout is None else int(self._timeout * 1000)
        for watcher in watchers:
            watcher.tell(ORDER.pack(b"T", timeout), reader)
        os.close(reader)
        deadline = time.monotonic() + ANSWER_SECONDS
        answers = [(watcher.client, watcher.answer(deadline)) for watcher in watchers]
        for watcher in watchers:
            watcher.close()
        # A process may be several clients. Of what its watchers say, adopt notes for each what that one has attached.
        return [(same, pages) for number, pages in answers for same in clients if clients[same] == clients[number]]


class _Watcher:
    """A watcher that was found. Owns both descriptors."""

    def __init__(self, client: int, pidfd: int, inbox: socket.socket) -> None:
        self.client, self._pidfd, self._inbox = client, pidfd, inbox

    def tell(self, data: bytes, fd: int) -> None:
        with contextlib.suppress(OSError):
            descriptors.send_message(self._inbox, data, (fd,))

    def answer(self, deadline: float) -> Poisoned:
        """What it has poisoned. It is killed when it does not answer."""
        try:
            poll = select.poll()
            poll.register(self._inbox, select.POLLIN)
            while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                data = descriptors.receive_message(self._inbox, MOST_BYTES).data
                if data[:1] == b"P" and len(data) % POISONED.size == 1:
                    return list(POISONED.iter_unpack(data[1:]))
        except OSError as error:
            log.debug("the watcher of client %d: %s", self.client, error)
        _kill(self.client, self._pidfd)
        return []

    def close(self) -> None:
        self._inbox.close()
        os.close(self._pidfd)


def _watchers_of(clients: Mapping[int, tuple[int, int]]) -> Iterator[_Watcher]:
    """The watchers of these clients, which run as their users. Their parents may have ended."""
    numbers = {client: number for number, client in clients.items()}  # by pid and user
    users = {uid for _, uid in clients.values()}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # it has just ended
            if not name.isdecimal() or (uid := owner_of(int(name))) not in users:
                continue
            watched = _watched(int(name))
            if (number := numbers.get((watched, uid))) is not None:
                found = _watcher(number, int(name), watched, uid)
                if found is not None:
                    yield found


def _watched(pid: int) -> int:
    """The client of a watcher with this pid; 0: it is another program."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    place = next((at for at, word in enumerate(words[:5]) if os.path.basename(word) == PROGRAM), len(words))
    return int(words[place + 1]) if len(words) > place + 1 and words[place + 1].isdigit() else 0


def _watcher(number: int, pid: int, client: int, uid: int) -> _Watcher | None:
    """The watcher with this pid; None if it is another program. One that cannot be reached is killed."""
    pidfd = other_process.open_process(pid, other_process.start_time(pid))
    try:
        if owner_of(pid) == uid and _watched(pid) == client:
            inbox = _inbox(pidfd)
            if inbox is not None:
                return _Watcher(number, os.dup(pidfd), inbox)
            _kill(number, pidfd)
    finally:
        os.close(pidfd)
    return None


def _inbox(pidfd: int) -> socket.socket | None:
    """The watcher's end for us. None: we have no right to fetch it, or it is not what it should be."""
    try:
        fetched = other_process.fetch_descriptor(pidfd, INBOX)
    except OSError:
        return None
    try:
        inbox = socket.socket(fileno=fetched)
    except OSError:  # it is no socket
        os.close(fetched)
        return None
    if (inbox.family, inbox.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        return inbox
    inbox.close()
    return None


def _kill(number: int, pidfd: int) -> None:
    """End a watcher that would go on reading the userfaultfd."""
    try:
        process.pidfd_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        text = "the watcher of client %d cannot be ended (no permission): it may poison pages that could be placed"
        return log.error(text, number)
    process.pidfd_exited(pidfd, ANSWER_SECONDS)
    log.warning("the watcher of client %d does not answer: it is killed", number)
