"""A vhost-user back-end as a client of the supervisor: handshake, memory, end.

The order guarantees that no fault is lost. The supervisor has the userfaultfd before the back-end knows any memory. A
worker reads it before the acknowledgement that lets the back-end register and touch memory. ``BackEnd`` is returned
only after its memory is proven to be registered. So every fault is resolved, also one on the back-end's message thread.
The end runs in reverse: the supervisor resolves faults until the back-end has unmapped its memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

from postcopy_kernel import address_space, process
from postcopy_kernel.userfaultfd import is_userfaultfd
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.vhost_conversation import Question, lay_out
from postcopy_protocol.vhost_user import FEATURE_INDIRECT, MemoryRegion, Request, VhostUserError

from ..errors import BackEndGone, BackEndTimeout, PostcopyError
from .attach_side import BackEndSession, SharedBlock
from .channel import Channel, close_frame
from .conversation import Conversation
from .memory_map import Placed, check_claims, find_mappings, placed_as_claimed

ORDERS = ("standard", "rust-vmm")
UNMAP_WITHIN = 10.0
"""Seconds for a back-end to unmap its memory after its connection was closed."""
TABLE_ANSWER_WITHIN = 10.0
"""Seconds without an answer to the memory table. After that a second question finds out whether one will come."""


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """A piece of guest memory: ``size`` bytes (None: the rest) of ``block`` from ``offset``, at guest address ``guest``
    (None: after the previous piece)."""

    block: str
    offset: int = 0
    size: int | None = None
    guest: int | None = None


class BackEnd:
    """An attached back-end.

    ``memory`` holds names of blocks or ``GuestMemory``; ``features`` are the virtio feature bits that the caller
    accepts; ``pid`` is the back-end's process if another process made the socket; ``order`` is the order of messages,
    ``standard`` (libvhost-user, DPDK) or ``rust-vmm``.

    Raises BackEndGone, BackEndTimeout, VhostUserError (a broken rule or a missing feature), and what ``attach`` raises.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str],
        memory: Sequence[str | GuestMemory],
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        features: int = FEATURE_INDIRECT,
        pid: int | None = None,
        name: str = "",
        timeout: float = 30.0,
        order: str = "standard",
    ) -> None:
        explicit = None if runtime_dir is None else os.fspath(runtime_dir)
        self.directory = os.path.abspath(runtime_directory(explicit, os.environ))
        self.path = os.fspath(socket)
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is none of {', '.join(ORDERS)}")
        self.quirks: list[str] = []
        self.blocks: dict[str, SharedBlock] = {}
        self.regions: tuple[tuple[int, MemoryRegion], ...] = ()
        self.placed: tuple[Placed, ...] = ()
        self._unexpected: dict[str, int] = {}
        self._stack = ExitStack()
        self._closed = False
        try:
            self.channel = self._stack.enter_context(closing(Channel(self.path, timeout)))
            self._conversation = Conversation(self.channel, table_first=order == "rust-vmm")
            self.talk = self._conversation.talk
            self._negotiate(features)
            self._find_process(pid)
            self._offer(name or os.path.basename(self.path), timeout)
            self._share([GuestMemory(one) if isinstance(one, str) else one for one in memory])
        except BaseException:
            self._abandon()
            raise

    def ask(self, question: Question) -> Any:
        """Send a question of ``talk`` and return the value of its answer. Raises BackEndGone, BackEndTimeout,
        VhostUserError."""
        return self._conversation.ask(question)

    def _negotiate(self, features: int) -> None:
        self.ask(self.talk.get_features())
        self._conversation.negotiate_protocol()
        self.ask(self.talk.set_features(features))

    def _find_process(self, pid: int | None) -> None:
        if pid is None:
            self.pidfd = self.channel.pidfd()
        else:
            try:
                self.pidfd = process.pidfd_open(pid)
            except OSError as error:
                raise BackEndGone(f"there is no process {pid}: {error.strerror}") from None
        self._stack.callback(os.close, self.pidfd)
        try:
            self.pid = address_space.pid_of(self.pidfd)
        except ValueError as error:
            raise VhostUserError(
                "process", f"the process of the back-end at {self.path} is unknown: {error}; name it with --pid"
            ) from None

    def _offer(self, name: str, timeout: float) -> None:
        """Ask for the userfaultfd (ADVISE) and hand it to the supervisor, which keeps it if this process dies."""
        try:
            fd = self.ask(self.talk.advise())
        except BackEndGone as error:
            raise BackEndGone(f"{error} (a back-end that cannot make a userfaultfd does that)") from None
        try:
            if not is_userfaultfd(fd):
                raise VhostUserError(
                    "userfaultfd", "the descriptor in the answer to POSTCOPY_ADVISE is not a userfaultfd"
                )
            self.side = self._hand_over(name, fd, timeout)
        finally:
            os.close(fd)
        self._stack.callback(self.side.close)

    def _hand_over(self, name: str, userfaultfd: int, timeout: float) -> BackEndSession:
        """Give the userfaultfd to the supervisor, whose worker resolves the faults."""
        return BackEndSession(self.directory, name, userfaultfd, self.pidfd, timeout)

    def _share(self, memory: Sequence[GuestMemory]) -> None:
        for piece in memory:
            if piece.block not in self.blocks:
                self.blocks[piece.block] = self.side.open(piece.block)
                self._stack.callback(self.blocks[piece.block].close)
        self._lay_out(memory)
        self._refuse_locked_memory()
        if not self.talk.table_first:
            self.ask(self.talk.listen())
        before = self._look()
        self._unexpected = {name: block.unexpected_pages() for name, block in self.blocks.items()}
        claimed = self._send_table(memory)
        self._refuse_unexpected_pages("when it mapped the memory")
        self.placed = self._locate(before, claimed)
        for at in self.placed:
            self.side.announce(at.block, at.address, at.length, at.offset)
        self.ask(self.talk.listen() if self.talk.table_first else self.talk.acknowledge_table())
        self.ask(self.talk.barrier())
        self._prove()
        self._refuse_unexpected_pages("before it registered the memory")

    def _lay_out(self, memory: Sequence[GuestMemory]) -> None:
        wanted: list[tuple[int, int, int | None]] = []
        for piece in memory:
            length = self.blocks[piece.block].length
            size = length - piece.offset if piece.size is None else piece.size
            if piece.offset + size > length:
                raise ValueError(f"block {piece.block} ends at {length}, before the region does")
            wanted.append((piece.offset, size, piece.guest))
        numbers = [self.blocks[piece.block].number for piece in memory]
        self.regions = tuple(zip(numbers, lay_out(wanted), strict=True))

    def _look(self) -> list[address_space.MappedRange] | None:
        """The back-end's mappings; None without the permission to read them."""
        try:
            return address_space.mapped_ranges(self.pid)
        except PermissionError:
            return None
        except OSError as error:
            raise BackEndGone(f"process {self.pid} is gone ({error.strerror})") from None

    def _refuse_locked_memory(self) -> None:
        """Check before the back-end maps the memory: afterwards the zero pages are already in the block."""
        with suppress(OSError):
            if address_space.locks_its_memory(self.pid):
                raise VhostUserError(
                    "locked-memory",
                    f"process {self.pid} locks all its memory (mlockall): the kernel would fill every missing page "
                    "with zeros when it is mapped; start it without that (DPDK's testpmd: --no-mlockall)",
                )

    def _refuse_unexpected_pages(self, when: str) -> None:
        for block in self.blocks.values():
            count = block.unexpected_pages() - self._unexpected.get(block.name, 0)
            if count > 0:
                raise VhostUserError(
                    "populated",
                    f"{count} pages of block {block.name} are present that the service did not place: the back-end "
                    f"touched or populated them {when} (mlockall?); the block is polluted (see: postcopy status "
                    "--audit)",
                )

    def _send_table(self, memory: Sequence[GuestMemory]) -> tuple[int, ...] | None:
        fds = [self.blocks[piece.block].memory for piece in memory]
        question = self.talk.set_mem_table([region for _, region in self.regions], fds)
        if self.talk.table_first:
            self.ask(question)
            return None
        self.channel.send(question)
        try:
            frame = self.channel.receive("SET_MEM_TABLE", min(TABLE_ANSWER_WITHIN, self.channel.timeout))
        except BackEndTimeout:
            self._refuse_other_order()
            raise
        claimed: tuple[int, ...] | None = self._conversation.check(question, frame)
        return claimed

    def _refuse_other_order(self) -> None:
        """Find out why the table was not answered. Answers arrive in order, so an answer to this question means that
        none follows for the table. A table that arrives now is too late: libvhost-user has taken our question for the
        acknowledgement."""
        frame = self.channel.ask(self.talk.barrier())
        close_frame(frame)
        if frame is not None and frame.request == Request.SET_MEM_TABLE:
            raise BackEndTimeout(f"the back-end at {self.path} answered SET_MEM_TABLE too late; try again")
        raise VhostUserError(
            "rust-vmm-order",
            "the back-end does not answer SET_MEM_TABLE while it listens: it follows rust-vmm's order (the table "
            "first, LISTEN registers it); say so: --order rust-vmm",
        )

    def _locate(
        self, before: list[address_space.MappedRange] | None, claimed: tuple[int, ...] | None
    ) -> tuple[Placed, ...]:
        after = self._look()
        if self.talk.echoed:
            self.quirks.append("addresses-echoed")
        if before is None or after is None:
            if claimed is None:
                raise VhostUserError(
                    "addresses",
                    "the back-end does not report where its memory is (libvhost-user sends our own addresses back), "
                    f"and its maps cannot be read: run this as root or as the user of process {self.pid}, "
                    "in its pid namespace",
                )
            return placed_as_claimed(self.regions, claimed)
        files = {block.file: (block.number, block.length) for block in self.blocks.values()}
        found = find_mappings(before, after, files, self.regions)
        if any(at.file in files and at.accessible and at not in before for at in after):
            self.quirks.append("open-before-registered")
        if claimed is not None:
            check_claims(found, self.regions, claimed)
        return found

    def _prove(self) -> None:
        """Check in smaps that every region is registered. Where smaps cannot be read, that is noted as a quirk."""
        try:
            registered = [(at.start, at.end) for at in address_space.flagged_ranges(self.pid) if "um" in at.flags]
        except OSError:
            self.quirks.append("registration-unproven")
            return
        for at in self.placed:
            if at.block in self.side.released:
                continue
            needed = [region for block, region in self.regions if block == at.block]
            for region in needed:
                start = max(at.offset, region.offset)
                end = min(at.offset + at.length, region.offset + region.size)
                first = at.address + start - at.offset
                if start < end and not address_space.covered(registered, first, first + end - start):
                    raise VhostUserError(
                        "registered",
                        f"the back-end has not registered its memory at {first:#x}: missing pages would be zeros",
                    )

    def guest_address(self, block: str, offset: int = 0) -> int:
        """Guest address of a byte of a block, as used in descriptors. Raises ValueError outside all regions."""
        region = self._region(block, offset)
        return region.guest + offset - region.offset

    def user_address(self, block: str, offset: int = 0) -> int:
        """The address of a byte of a block in SET_VRING_ADDR. Raises ValueError outside all regions."""
        region = self._region(block, offset)
        return region.user + offset - region.offset

    def _region(self, block: str, offset: int) -> MemoryRegion:
        number = self.blocks[block].number
        for owner, region in self.regions:
            if owner == number and region.offset <= offset < region.offset + region.size:
                return region
        raise ValueError(f"byte {offset} of block {block} is in no region of the guest's memory")

    @property
    def complete(self) -> bool:
        """Whether the supervisor has reported every page of all blocks as present."""
        return {block.number for block in self.blocks.values()} <= self.side.released

    def end(self) -> None:
        """Send POSTCOPY_END. Raises PostcopyError while pages are missing."""
        if not self.complete:
            raise PostcopyError("post-copy cannot end: pages are missing")
        self.ask(self.talk.end())

    @property
    def gone(self) -> bool:
        """Whether the back-end has hung up, or ended."""
        return process.pidfd_exited(self.pidfd) or self.channel.hung_up

    def close(self) -> None:
        """Close the connection, wait until the back-end has unmapped the memory, say Goodbye to the supervisor.

        A back-end that still maps the memory after ten seconds stays a client: its faults are resolved to its end."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        if self.wait_until_unmapped():
            self.side.leave()
        self._stack.close()

    def wait_until_unmapped(self, within: float = UNMAP_WITHIN) -> bool:
        """Wait until the back-end has unmapped, or unregistered, all of its memory, or has ended. False: it has not
        done so in ``within`` seconds, or its maps cannot be read."""
        limit = time.monotonic() + within
        ranges = [(at.address, at.length) for at in self.placed]
        while not process.pidfd_exited(self.pidfd):
            try:
                if not address_space.any_registered(self.pid, ranges):
                    return True
            except PermissionError:
                return False
            except OSError:
                return True
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
        return True

    def _abandon(self) -> None:
        self._closed = True
        self._stack.close()

    def __enter__(self) -> BackEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
