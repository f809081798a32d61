"""A vhost-user back-end as a client of the supervisor: the handshake, its memory, its end.

The order is the argument. The userfaultfd goes to the supervisor before the back-end hears of any memory; a worker
listens before the acknowledgement that lets the back-end register and touch; its memory is proven registered before
anybody is told that it is attached. So there is no moment at which it could fault unheard, on its message thread too.
The end is the same backwards: the supervisor goes on until the back-end has let go of its memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from postcopy_kernel import address_space, process
from postcopy_kernel.userfaultfd import is_userfaultfd
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.vhost_conversation import FrontEnd, Question, lay_out
from postcopy_protocol.vhost_user import FEATURE_INDIRECT, MemoryRegion, ProtocolFeature, Request, VhostUserError

from ..errors import BackEndGone, BackEndTimeout, PostcopyError
from .attach_side import DoorSide, SharedBlock
from .channel import Channel, close_frame
from .memory_map import Placed, believe, compare, find_mappings

ORDERS = ("standard", "rust-vmm")
LET_GO_WITHIN = 10.0
"""Seconds that a back-end gets to unmap when its connection has been closed."""
RUST_VMM_PATIENCE = 10.0
"""Seconds without an answer to the memory table, after which we ask whether there will be one."""


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """A piece of guest memory: ``size`` bytes (None: the rest) of ``block`` from ``offset``, at guest address ``guest``
    (None: behind the piece before it)."""

    block: str
    offset: int = 0
    size: int | None = None
    guest: int | None = None


class BackEnd:
    """An attached back-end. ``memory`` are names of blocks or ``GuestMemory``; ``features`` virtio feature bits that
    the caller takes; ``pid`` the back-end's process where it is not the one that made the socket; ``order`` is that of
    the messages, ``standard`` (libvhost-user, DPDK) or ``rust-vmm``.

    Raises BackEndGone, BackEndTimeout, VhostUserError (what it did, or cannot do), and what ``attach`` raises.
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
        self.talk = FrontEnd(table_first=order == "rust-vmm")
        self.quirks: list[str] = []
        self.blocks: dict[str, SharedBlock] = {}
        self.regions: tuple[tuple[int, MemoryRegion], ...] = ()
        self.placed: tuple[Placed, ...] = ()
        self._strange: dict[str, int] = {}
        self._stack = ExitStack()
        self._closed = False
        try:
            self.channel = self._stack.enter_context(closing(Channel(self.path, timeout)))
            self._agree(features)
            self._find_process(pid)
            self._offer(name or os.path.basename(self.path), timeout)
            self._share([GuestMemory(one) if isinstance(one, str) else one for one in memory])
        except BaseException:
            self._abandon()
            raise

    # --- the handshake ------------------------------------------------------------------------------------------------

    def ask(self, question: Question) -> Any:
        """Send a question of the conversation and give the value of its answer. Raises BackEndGone, BackEndTimeout,
        VhostUserError."""
        frame = self.channel.ask(question)
        if frame is None:
            return None
        try:
            return self.talk.heard(question, frame)
        except BaseException:
            close_frame(frame)
            raise

    def _agree(self, features: int) -> None:
        talk = self.talk
        self.ask(talk.get_features())
        self.ask(talk.get_protocol_features())
        self.ask(talk.set_protocol_features())
        self.ask(talk.set_owner())
        if talk.protocol & ProtocolFeature.MQ:
            self.ask(talk.get_queue_num())
        self.ask(talk.set_features(features))

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
            raise VhostUserError("process", f"whose back-end is {self.path}? {error} (--pid names it)") from None

    def _offer(self, name: str, timeout: float) -> None:
        """ADVISE, and its userfaultfd straight to the supervisor: from here on somebody outlives us with it."""
        try:
            fd = self.ask(self.talk.advise())
        except BackEndGone as error:
            raise BackEndGone(f"{error} (a back-end that cannot make a userfaultfd does that)") from None
        try:
            if not is_userfaultfd(fd):
                raise VhostUserError("userfaultfd", "what came with the answer to POSTCOPY_ADVISE is no userfaultfd")
            self.side = self._hand_over(name, fd, timeout)
        finally:
            os.close(fd)
        self._stack.callback(self.side.close)

    def _hand_over(self, name: str, userfaultfd: int, timeout: float) -> DoorSide:
        """Who resolves the faults: the supervisor."""
        return DoorSide(self.directory, name, userfaultfd, self.pidfd, timeout)

    # --- memory -------------------------------------------------------------------------------------------------------

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
        self._strange = {name: block.strange_pages() for name, block in self.blocks.items()}
        said = self._send_table(memory)
        self._refuse_strange_pages("when it mapped the memory")
        self.placed = self._locate(before, said)
        for at in self.placed:
            self.side.announce(at.block, at.address, at.length, at.offset)
        self.ask(self.talk.listen() if self.talk.table_first else self.talk.acknowledge_table())
        self.ask(self.talk.barrier())
        self._prove()
        self._refuse_strange_pages("before it registered the memory")

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
        """The back-end's mappings; None where we may not see them."""
        try:
            return address_space.mapped_ranges(self.pid)
        except PermissionError:
            return None
        except OSError as error:
            raise BackEndGone(f"process {self.pid} is gone ({error.strerror})") from None

    def _refuse_locked_memory(self) -> None:
        """Before it hears of the memory: afterwards it is too late, the zeros are in the block."""
        with suppress(OSError):
            if address_space.locks_its_memory(self.pid):
                raise VhostUserError(
                    "locked-memory",
                    f"process {self.pid} locks all its memory (mlockall): the kernel would fill every missing page "
                    "with zeros the moment it is mapped; start it without that (DPDK's testpmd: --no-mlockall)",
                )

    def _refuse_strange_pages(self, when: str) -> None:
        for block in self.blocks.values():
            count = block.strange_pages() - self._strange.get(block.name, 0)
            if count > 0:
                raise VhostUserError(
                    "populated",
                    f"{count} pages of block {block.name} are there that nobody placed: the back-end touched or "
                    f"populated them {when} (mlockall?); the block is not what it was (see: postcopy status --audit)",
                )

    def _send_table(self, memory: Sequence[GuestMemory]) -> tuple[int, ...] | None:
        fds = [self.blocks[piece.block].memory for piece in memory]
        question = self.talk.set_mem_table([region for _, region in self.regions], fds)
        if self.talk.table_first:
            self.ask(question)
            return None
        self.channel.send(question)
        try:
            frame = self.channel.receive("SET_MEM_TABLE", min(RUST_VMM_PATIENCE, self.channel.timeout))
        except BackEndTimeout:
            self._refuse_other_order()
            raise
        try:
            said: tuple[int, ...] | None = self.talk.heard(question, frame)
        except BaseException:
            close_frame(frame)
            raise
        return said

    def _refuse_other_order(self) -> None:
        """Messages are answered in order: who answers this one has no answer for the table. A table that comes now has
        come too late: libvhost-user has taken our question for the acknowledgement."""
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
        self, before: list[address_space.MappedRange] | None, said: tuple[int, ...] | None
    ) -> tuple[Placed, ...]:
        after = self._look()
        if self.talk.echoed:
            self.quirks.append("addresses-echoed")
        if before is None or after is None:
            if said is None:
                raise VhostUserError(
                    "addresses",
                    "the back-end does not say where its memory is (libvhost-user only sends our own addresses back), "
                    f"and its maps cannot be read: run this as root or as the user of process {self.pid}, "
                    "in its pid namespace",
                )
            return believe(self.regions, said)
        files = {block.file: (block.number, block.length) for block in self.blocks.values()}
        found = find_mappings(before, after, files, self.regions)
        if any(at.file in files and at.accessible and at not in before for at in after):
            self.quirks.append("open-before-registered")
        if said is not None:
            compare(found, self.regions, said)
        return found

    def _prove(self) -> None:
        """Every region is registered, by the kernel's word; where it cannot be asked, that is a quirk to be told."""
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
        """Guest address of a byte of a block: what stands in descriptors. Raises ValueError where none shows it."""
        region = self._region(block, offset)
        return region.guest + offset - region.offset

    def user_address(self, block: str, offset: int = 0) -> int:
        """The address of a byte of a block in SET_VRING_ADDR. Raises ValueError where no region shows it."""
        region = self._region(block, offset)
        return region.user + offset - region.offset

    def _region(self, block: str, offset: int) -> MemoryRegion:
        number = self.blocks[block].number
        for owner, region in self.regions:
            if owner == number and region.offset <= offset < region.offset + region.size:
                return region
        raise ValueError(f"no region of the guest's memory shows byte {offset} of block {block}")

    # --- post-copy's end ----------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Is every page of all its blocks present, by the supervisor's word?"""
        return {block.number for block in self.blocks.values()} <= self.side.released

    def end(self) -> None:
        """POSTCOPY_END: nothing is missing any more. Raises PostcopyError while something is."""
        if not self.complete:
            raise PostcopyError("post-copy cannot end: pages are missing")
        self.ask(self.talk.end())

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Has the back-end hung up, or ended?"""
        return process.pidfd_exited(self.pidfd) or self.channel.hung_up

    def close(self) -> None:
        """Close the connection, wait until the back-end has let go of the memory, take leave of the supervisor.

        A back-end that does not let go within ten seconds is left to the supervisor, which serves it to its end."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        if self.wait_until_let_go():
            self.side.leave()
        self._stack.close()

    def wait_until_let_go(self, within: float = LET_GO_WITHIN) -> bool:
        """Wait until the back-end has unmapped, or unregistered, all of its memory, or has ended; False: it has not
        within so many seconds, or its maps cannot be read."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
