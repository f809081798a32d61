"""One client per process and runtime directory: several blocks share one connection, one userfaultfd, one worker.

Two locks, always taken in this order. ``Client._turns`` is held through a whole exchange with the supervisor, for
seconds if that is slow. ``_registry`` guards the list of attached blocks and is held briefly. A fork takes only the
registry, so it never waits for an exchange. A block is in the list exactly while it may be touched.

Both locks let their own thread in again, because a finalizer or a signal handler may attach or close at any
instruction: see ``turns``. At the end of the interpreter the supervisor gets no message, and sees the process
end."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from operator import index

from postcopy_kernel.memory import DOFORK, DONTFORK, NOHUGEPAGE, Mapping, huge_pages
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.runtime_paths import client_name, runtime_directory

from . import populate, sigbus
from .attach_socket import OpenedBlock
from .block import Block
from .deadline import Deadline
from .errors import AttachTimeout, BadInput, PostcopyError
from .interrupts import held
from .session import Session
from .turns import Turns

log = logging.getLogger("postcopy")

TIMEOUT = 30.0
"""Seconds for one exchange with the supervisor, by default."""

CAUSE_WITHIN = 5.0
"""Seconds to ask why a page is lost."""

_clients: dict[str, Client] = {}
_registry = threading.RLock()


def attach(
    block: str,
    runtime_dir: str | os.PathLike[str] | None = None,
    mode: str = "private",
    timeout: float | None = TIMEOUT,
    *,
    trust_uid: int | Iterable[int] = (),
    name: str | None = None,
) -> Block:
    """Attach the RAM block ``block`` of the supervisor in ``runtime_dir``.

    ``name`` is what operators see of this process in status, metrics and events: at most 64 printable characters; by
    default ``$POSTCOPY_CLIENT_NAME``, else the program's. It counts when the process attaches its first block.

    A supervisor can read and change the memory of its clients. It must run as this process's user, as root, or as a
    user in ``trust_uid`` or ``$POSTCOPY_TRUST_UID``; another's is AttachDenied.

    Raises NoSupervisor, NoSuchBlock, AttachDenied, AttachTimeout (after ``timeout`` seconds; None: no limit),
    UserfaultfdUnavailable, and other PostcopyErrors; OSError when the kernel has no memory or descriptor left.

    Example::

        with postcopy.attach("ram0", "/run/postcopy", mode="shared") as block:
            array = numpy.frombuffer(block.buf, numpy.float32)
    """
    if mode not in ("private", "shared"):
        raise BadInput(f"mode {mode!r} is neither 'private' nor 'shared'")
    if not isinstance(block, str):
        raise TypeError(f"the name of a block is a str, not {type(block).__name__}")
    directory, trust, deadline = directory_of(runtime_dir), users_of(trust_uid), Deadline(timeout)
    shown = client_name(name, os.environ)
    with _registry:
        client = _clients.setdefault(directory, Client(directory))
        client.name = shown or client.name
        client.trust |= trust
    return client.attach(block, mode, deadline)


def directory_of(runtime_dir: str | os.PathLike[str] | None) -> str:
    """The absolute runtime directory: the given one, or the default."""
    explicit = None if runtime_dir is None else os.fsdecode(runtime_dir)
    return os.path.abspath(runtime_directory(explicit, os.environ))


def users_of(trust_uid: int | Iterable[int]) -> frozenset[int]:
    """The users that are trusted. Raises TypeError for what is no number."""
    several = isinstance(trust_uid, Iterable) and not isinstance(trust_uid, str)
    return frozenset(map(index, trust_uid if several else (trust_uid,)))  # type: ignore[arg-type]


def _attach_again(name: str, directory: str, mode: str, trust: frozenset[int]) -> Block:
    """What a pickled block becomes."""
    return attach(name, directory, mode, trust_uid=trust)


class Client:
    """This process as a client of the supervisor in ``directory``. Thread-safe."""

    def __init__(self, directory: str, trust: frozenset[int] = frozenset()) -> None:
        """``trust``: users whose supervisor is trusted."""
        self.directory, self.trust = directory, trust
        self.name = ""
        self.blocks: list[Block] = []
        self._turns = Turns(directory)
        self._session: Session | None = None

    def attach(self, name: str, mode: str, deadline: Deadline) -> Block:
        """See ``postcopy.attach``."""
        block = None
        try:
            with self._turns.take(deadline) as nested, held():
                session = Session(self.directory, deadline, name=self.name) if nested else self._current(deadline)
                try:
                    block = self._open(session, name, mode, deadline)
                finally:
                    self._end_if_unused(session)
            return block
        except BaseException:
            if block is not None:
                block.close()
            raise

    def detach(self, block: Block) -> None:
        """Unmap ``block``, also when the supervisor cannot be informed of it. At the end of the interpreter the kernel
        does it: helper threads stand still then, and no module can be imported."""
        if sys.is_finalizing():
            return
        with _registry:  # from now on a forked child does not inherit it
            self.blocks.remove(block)
        block.withdraw()
        deadline = Deadline(TIMEOUT)
        try:
            with self._turns.take(deadline) as nested:
                if nested:
                    self._turns.later(lambda: self._unmap(block, Deadline(TIMEOUT)))
                else:
                    self._unmap(block, deadline)
        except AttachTimeout as error:
            log.warning("block %s is closed, but the supervisor was not informed: %s", block.name, error)
            block.mapping.close()

    def ending_of(self, block: Block) -> str | None:
        """Why the supervisor of ``block`` ended, if it gave a reason."""
        with self._turns.take_now() as ours:
            if ours:
                block.session.connection.take_notices()
        return block.session.connection.ending

    def cause_of(self, block: Block, offset: int) -> str:
        """Why a page of ``block`` is lost, in the words of its source; empty when the supervisor does not know."""
        deadline = Deadline(CAUSE_WITHIN)
        try:
            with self._turns.take(deadline) as nested:
                if nested or not self._reachable(block.session, deadline):
                    return ""
                return block.session.connection.ask_loss(0, block.number, offset, deadline).reason
        except (PostcopyError, OSError) as error:
            log.debug("block %s: the cause of a lost page is not known: %s", block.name, error)
            return ""

    def reduce(self, block: Block) -> tuple[object, ...]:
        """A pickle of ``block``: unpickling attaches."""
        return _attach_again, (block.name, self.directory, block.mode, self.trust)

    def _current(self, deadline: Deadline) -> Session:
        """The session for a new region. A session that is no longer usable keeps the regions that it has."""
        if self._session is None or not self._reachable(self._session, deadline):
            self._session = Session(self.directory, deadline, self.trust, self.name)
            sigbus.introduce(self.directory, self._session.connection.client)
        return self._session

    def _reachable(self, session: Session, deadline: Deadline) -> bool:
        """Whether the session's supervisor, or one that has taken over, answers requests."""
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
            mapping = _map(opened)
            try:
                session.watch(opened, mapping.address, deadline)
            except BaseException:
                mapping.close()
                raise
            block = Block(self, session, opened, mapping)
        finally:
            opened.close()
        try:
            session.announce(block.number, block.mapping.address, block.mapping.length, deadline)
        except BaseException:
            # Unless it refused, the supervisor may still register the range: the addresses must never be used again.
            block.discard(keep_addresses=not session.connection.usable)
            raise
        try:
            block.mapping.allow()
        except OSError:
            self._unmap(block, deadline)
            raise
        with _registry:
            self.blocks.append(block)
        return block

    def _unmap(self, block: Block, deadline: Deadline) -> None:
        session = block.session
        session.queue_unmap(block.number, block.mapping.address)
        if self._reachable(session, deadline):
            try:
                session.send_unmaps(deadline)
            except PostcopyError as error:
                log.debug("block %s: %s", block.name, error)
        block.mapping.close()
        session.regions -= 1
        self._end_if_unused(session)

    def _end_if_unused(self, session: Session) -> None:
        """End a session that has no regions."""
        if session.regions == 0:
            session.end()
            if self._session is session:
                self._session = None

    def before_fork(self) -> None:
        """Let the child inherit the attached blocks. Take the supervisor's notices, unless a request is under way."""
        for block in self.blocks:
            self.ending_of(block)
            _advise_fork(block, DOFORK)

    def after_fork(self) -> None:
        """In the parent: a fork in C code must inherit nothing, because its faults would be answered with zeros."""
        for block in self.blocks:
            _advise_fork(block, DONTFORK)

    def revive(self) -> None:
        """In the child: become a separate client and attach the inherited mappings where they are.

        A new mapping would lose private writes. A block that cannot be attached is made inaccessible, also when this
        method is interrupted."""
        self._turns = Turns(self.directory)
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
                if block.number not in block.session.connection.released:
                    block.forbid(reason)

    def _adopt(self, block: Block, deadline: Deadline) -> str:
        """Attach an inherited block. Returns the reason of a failure, or an empty text."""
        try:
            session = self._current(deadline)
            opened = session.open(block.name, block.mode, deadline)
            try:
                if opened.identity() != block.identity:
                    return f"block {block.name} has been replaced by another block of that name"
                session.watch(opened, block.mapping.address, deadline)
                session.announce(opened.number, block.mapping.address, block.mapping.length, deadline)
                block.adopt(session, opened)
            finally:
                opened.close()
                self._end_if_unused(session)
            block.mapping.advise(DONTFORK)
        except (PostcopyError, OSError) as error:
            return str(error)
        return ""


def _map(opened: OpenedBlock) -> Mapping:
    """Map a block without touching it: nothing can, before it is registered and ``allow`` is called. Forks do not
    inherit it, from before the first possible fault."""
    if opened.mode == "private" and opened.page_size != PAGE_4K:
        mapping = _map_huge_private(opened)
    else:
        mapping = Mapping.of(opened.memory, opened.length, shared=opened.mode == "shared", inaccessible=True)
    try:
        mapping.advise(DONTFORK)
        if opened.page_size == PAGE_4K:
            with suppress(OSError):  # a kernel without transparent huge pages
                mapping.advise(NOHUGEPAGE)
    except BaseException:
        mapping.close()
        raise
    return mapping


def _map_huge_private(opened: OpenedBlock) -> Mapping:
    """A private mapping of huge pages. Its copies are reserved in the pool: a write that finds the pool empty is
    SIGBUS. Where they do not fit, the memory is read-only."""
    try:
        return Mapping.of(opened.memory, opened.length, shared=False, reserve=True, inaccessible=True)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    log.warning(
        "block %s is read-only here: private writes need %d more huge pages of 2M, %d are free; "
        "set sysctl vm.nr_hugepages to more, or attach it with mode 'shared'",
        *(opened.name, opened.pages, huge_pages().available),
    )
    return Mapping.of(opened.memory, opened.length, shared=False, writable=False, inaccessible=True)


def _advise_fork(block: Block, advice: int) -> None:
    try:
        block.mapping.advise(advice)
    except OSError as error:  # the child has no memory there: a touch is SIGSEGV, not silent zeros
        log.error("block %s: %s", block.name, error)


def _before_fork() -> None:
    _registry.acquire()
    for client in _clients.values():
        client.before_fork()


def _after_fork_in_parent() -> None:
    try:
        for client in _clients.values():
            client.after_fork()
    finally:
        _registry.release()


def _after_fork_in_child() -> None:
    global _registry
    _registry = threading.RLock()
    populate.forget_threads()
    for client in _clients.values():
        client.revive()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
