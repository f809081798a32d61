"""One client per process and runtime directory: several blocks share one connection, one userfaultfd, one worker.

Two locks, never the other way round: ``Client._talking`` is held through a whole conversation, for seconds if the
supervisor is slow; ``_ledger`` guards the list of attached blocks and is held for a moment only. A fork takes the
ledger alone, so it never waits for a conversation, and finds a list that is true: a block stands in it exactly while
it may be touched.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from postcopy_kernel.memory import DOFORK, DONTFORK, NOHUGEPAGE, Mapping
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.runtime_paths import runtime_directory

from . import filling
from .block import Block
from .deadline import Deadline
from .errors import AttachTimeout, BadInput, PostcopyError
from .session import Opened, Session

log = logging.getLogger("postcopy")

TIMEOUT = 30.0
"""Seconds that a conversation may take unless somebody says otherwise."""

_clients: dict[str, Client] = {}
_ledger = threading.RLock()


def attach(
    name: str, runtime_dir: str | os.PathLike[str] | None = None, mode: str = "private", timeout: float | None = TIMEOUT
) -> Block:
    """Attach the RAM block ``name`` of the supervisor in ``runtime_dir``.

    Raises NoSupervisor, NoSuchBlock, AttachDenied, AttachTimeout (after ``timeout`` seconds; None: no limit),
    UserfaultfdUnavailable, and other PostcopyErrors; OSError when the kernel has no room.
    """
    if mode not in ("private", "shared"):
        raise BadInput(f"mode {mode!r} is neither 'private' nor 'shared'")
    explicit = None if runtime_dir is None else os.fspath(runtime_dir)
    directory = os.path.abspath(runtime_directory(explicit, os.environ))
    with _ledger:
        client = _clients.setdefault(directory, Client(directory))
    return client.attach(name, mode, Deadline(timeout))


class Client:
    """What this process is to the supervisor in ``directory``. Thread-safe."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.blocks: list[Block] = []
        self._talking = threading.Lock()
        self._session: Session | None = None

    def attach(self, name: str, mode: str, deadline: Deadline) -> Block:
        """See ``postcopy.attach``."""
        with self._turn(deadline):
            session = self._current(deadline)
            try:
                return self._open(session, name, mode, deadline)
            finally:
                self._leave(session)

    def detach(self, block: Block) -> None:
        """Unmap ``block``. The supervisor is told when it can be; when it cannot, the memory goes all the same."""
        with _ledger:  # from now on no fork inherits it
            self.blocks.remove(block)
        block.withdraw()
        try:
            with self._turn(Deadline(TIMEOUT)):
                self._take_leave(block, Deadline(TIMEOUT))
        except AttachTimeout as error:
            log.warning("block %s closed without a word: %s", block.name, error)
            block.mapping.close()

    def ending_of(self, block: Block) -> str | None:
        """Why the supervisor of ``block`` ended, if it said so."""
        if self._talking.acquire(blocking=False):
            try:
                block.session.door.listen()
            finally:
                self._talking.release()
        return block.session.door.ending

    # --- conversations ------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        lock = self._talking
        if not lock.acquire(timeout=deadline.lock_timeout()):
            raise AttachTimeout(f"another thread is still talking to the supervisor in {self.directory}")
        try:
            yield
        finally:
            lock.release()

    def _current(self, deadline: Deadline) -> Session:
        """The session for a new region. One that is of no use any more stays behind with its regions."""
        if self._session is None or not self._at_hand(self._session, deadline):
            self._session = Session(self.directory, deadline)
        return self._session

    def _at_hand(self, session: Session, deadline: Deadline) -> bool:
        """Can more be asked through this session, if need be of a supervisor that has taken over?"""
        if session.usable:
            return True
        try:
            return session.resume(deadline)
        except (PostcopyError, OSError) as error:
            log.debug("the session in %s is not resumed: %s", self.directory, error)
            return False

    def _open(self, session: Session, name: str, mode: str, deadline: Deadline) -> Block:
        opened = session.open(name, mode, deadline)
        try:
            block = Block(self, session, opened, _map(opened))
        finally:
            opened.close()
        try:
            session.announce(block.number, block.mapping.address, block.mapping.length, deadline)
        except BaseException:
            # Unless it was refused, the supervisor may register the range yet: nobody else must ever get the addresses.
            block.discard(keep_addresses=not session.door.usable)
            raise
        with _ledger:
            self.blocks.append(block)
        return block

    def _take_leave(self, block: Block, deadline: Deadline) -> None:
        session = block.session
        session.owe(block.number, block.mapping.address)
        if self._at_hand(session, deadline):
            try:
                session.settle(deadline)
            except PostcopyError as error:
                log.debug("block %s: %s", block.name, error)
        block.mapping.close()
        session.regions -= 1
        self._leave(session)

    def _leave(self, session: Session) -> None:
        """End a session that has no regions (left)."""
        if session.regions == 0:
            session.end()
            if self._session is session:
                self._session = None

    # --- forks --------------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Let the child inherit what is attached; learn what the supervisor has said, if nobody is talking."""
        for block in self.blocks:
            self.ending_of(block)
            _advise_fork(block, DOFORK)

    def after_fork(self) -> None:
        """In the parent: a fork that is not Python's must not inherit anything (it would fault into zeros)."""
        for block in self.blocks:
            _advise_fork(block, DONTFORK)

    def revive(self) -> None:
        """In the child: become a client of its own and attach the inherited mappings where they are.

        Never anew: private writes would be lost. What cannot be attached is made inaccessible, whatever happens here.
        """
        self._talking = threading.Lock()
        parents = {id(session): session for session in (self._session, *(block.session for block in self.blocks))}
        self._session, inherited = None, list(self.blocks)
        deadline, reason = Deadline(TIMEOUT), "interrupted"
        try:
            for session in filter(None, parents.values()):
                session.abandon()
            for block in self.blocks:
                block.reset_locks()
                reason = self._adopt(block, deadline)
                if not reason:
                    inherited.remove(block)
        finally:
            for block in inherited:
                if block.number not in block.session.door.released:
                    block.forbid(reason)

    def _adopt(self, block: Block, deadline: Deadline) -> str:
        """Attach an inherited block; the reason why not, else nothing."""
        try:
            session = self._current(deadline)
            opened = session.open(block.name, block.mode, deadline)
            try:
                if opened.identity() != block.identity:
                    return f"block {block.name} is another one by now"
                session.announce(opened.number, block.mapping.address, block.mapping.length, deadline)
                block.adopt(session, opened)
            finally:
                opened.close()
                self._leave(session)
            block.mapping.advise(DONTFORK)
        except (PostcopyError, OSError) as error:
            return str(error)
        return ""


def _map(opened: Opened) -> Mapping:
    """Map a block without touching it. Out of reach of forks from the first, before anybody can fault on it."""
    mapping = Mapping.of(opened.memory, opened.length, shared=opened.mode == "shared")
    try:
        mapping.advise(DONTFORK)
        if opened.page_size == PAGE_4K:
            with suppress(OSError):  # a kernel without huge pages of this kind
                mapping.advise(NOHUGEPAGE)
    except BaseException:
        mapping.close()
        raise
    return mapping


def _advise_fork(block: Block, advice: int) -> None:
    try:
        block.mapping.advise(advice)
    except OSError as error:  # the child gets no memory there: SIGSEGV, which is loud enough
        log.error("block %s: %s", block.name, error)


def _before_fork() -> None:
    _ledger.acquire()
    for client in _clients.values():
        client.before_fork()


def _after_fork_in_parent() -> None:
    try:
        for client in _clients.values():
            client.after_fork()
    finally:
        _ledger.release()


def _after_fork_in_child() -> None:
    global _ledger
    _ledger = threading.RLock()
    filling.forget_threads()
    for client in _clients.values():
        client.revive()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
