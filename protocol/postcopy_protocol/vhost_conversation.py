"""The front-end's half of a vhost-user conversation with post-copy, sans-I/O.

Every method gives a ``Question``: bytes and descriptors to send, and what will come back. The caller sends it, reads
one frame if it is ``answered``, and passes it to ``heard``, which checks it and returns its value. A method called out
of order raises ValueError (our fault), a wrong answer VhostUserError (the back-end's).

::

    method              standard                           rust-vmm
    -----------------   --------------------------------   ---------------------------
    advise              agreed -> advised                  agreed -> advised
    listen              advised -> listening               table sent -> mapped
    set_mem_table       listening, mapped -> table sent    advised -> table sent
    acknowledge_table   table sent -> mapped               -
    end                 listening, mapped -> ended         listening, mapped -> ended

* ``advise``: the answer brings the userfaultfd.
* Standard ``listen`` comes before any region: libvhost-user and DPDK refuse it afterwards.
* Standard ``set_mem_table`` never has NEED_REPLY, because its answer is the table. Only the extra acknowledgement makes
  the back-end register its memory.
* In rust-vmm's order (``table_first``) the table is acknowledged like any message, and LISTEN registers the memory. The
  back-end does not report where its memory is.
* CONFIGURE_MEM_SLOTS is never agreed on: libvhost-user aborts at the last message of that variant.

A message without an answer of its own is sent with NEED_REPLY, so an answer means done. A back-end without REPLY_ACK is
refused, because its answers could not be assigned to LISTEN. A back-end that fails usually just closes the socket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from .vhost_user import (
    FEATURE_INDIRECT,
    FEATURE_PROTOCOL,
    FEATURE_VERSION_1,
    MOST_CONFIG,
    U64,
    USER_SPACE,
    VRING_ADDRESSES,
    VRING_NO_DESCRIPTOR,
    VRING_STATE,
    Frame,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VhostUserError,
    check_layout,
    feature_names,
    lay_out,
    pack_config,
    pack_frame,
    pack_table,
    unpack_config,
    unpack_table,
)

__all__ = ["FrontEnd", "Question", "Rules", "Stage", "check_layout", "lay_out"]

REQUESTED: Final = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.PAGEFAULT | ProtocolFeature.CONFIG
"""Protocol features that we use if they are offered. Not BACKEND_REQ, which we do not serve."""

NO_PAGEFAULT: Final = (
    "the back-end does not offer post-copy (protocol feature PAGEFAULT, bit 8; it offers {offered}). Usually its "
    "process may not make a userfaultfd: run it as root or with CAP_SYS_PTRACE, or set sysctl "
    "vm.unprivileged_userfaultfd=1; a seccomp filter (containers, sandbox options) may forbid userfaultfd(2). DPDK "
    "wants postcopy-support=1. Or it has no post-copy at all, as virtiofsd"
)


class Stage(Enum):
    """How far the conversation has come."""

    NEW = "new"
    AGREED = "agreed"
    ADVISED = "advised"
    LISTENING = "listening"
    TABLE_SENT = "table sent"
    MAPPED = "mapped"
    ENDED = "ended"


Rules = Mapping[str, tuple[tuple[Stage, ...], Stage]]
_END: Final = ((Stage.LISTENING, Stage.MAPPED), Stage.ENDED)
STANDARD: Final[Rules] = {
    "advise": ((Stage.AGREED,), Stage.ADVISED),
    "listen": ((Stage.ADVISED,), Stage.LISTENING),
    "set_mem_table": ((Stage.LISTENING, Stage.MAPPED), Stage.TABLE_SENT),
    "acknowledge_table": ((Stage.TABLE_SENT,), Stage.MAPPED),
    "end": _END,
}
RUST_VMM: Final[Rules] = {
    "advise": ((Stage.AGREED,), Stage.ADVISED),
    "listen": ((Stage.TABLE_SENT,), Stage.MAPPED),
    "set_mem_table": ((Stage.ADVISED,), Stage.TABLE_SENT),
    "end": _END,
}
"""The table above, by method: stages in which it may be called, and the stage after it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A message to send. ``take`` checks the answer's frame and returns its value; None: nothing comes back."""

    request: Request
    data: bytes
    fds: tuple[int, ...] = ()
    take: Callable[[Frame], Any] | None = None
    size: int | None = None
    """Bytes of the answer's payload; None: any."""
    descriptors: int = 0
    """Number of descriptors that come with the answer."""

    @property
    def answered(self) -> bool:
        """Whether a frame comes back."""
        return self.take is not None


class FrontEnd:
    """The conversation with one back-end. ``table_first``: it follows rust-vmm's order."""

    def __init__(self, *, table_first: bool = False) -> None:
        self.table_first = table_first
        self._rules = RUST_VMM if table_first else STANDARD
        self.stage = Stage.NEW
        self.offered = 0
        self.features = 0
        self.protocol_offered = ProtocolFeature(0)
        self.protocol = ProtocolFeature(0)
        self.queues = 1
        self.echoed: bool | None = None
        """Whether the table came back with our own addresses (libvhost-user) instead of the back-end's."""
        self.table: tuple[MemoryRegion, ...] = ()
        self._asked: set[Request] = set()

    def get_features(self) -> Question:
        def take(frame: Frame) -> int:
            self.offered = _u64(frame)
            if not self.offered & FEATURE_PROTOCOL:
                raise VhostUserError("protocol-features", "the back-end has no protocol features, hence no post-copy")
            self._asked.add(Request.GET_FEATURES)
            return self.offered

        return self._ask(Request.GET_FEATURES, take, size=8)

    def get_protocol_features(self) -> Question:
        self._after(Request.GET_FEATURES)

        def take(frame: Frame) -> ProtocolFeature:
            self.protocol_offered = ProtocolFeature(_u64(frame))
            if not self.protocol_offered & ProtocolFeature.PAGEFAULT:
                raise VhostUserError("pagefault", NO_PAGEFAULT.format(offered=feature_names(self.protocol_offered)))
            if not self.protocol_offered & ProtocolFeature.REPLY_ACK:
                raise VhostUserError("reply-ack", "the back-end has no REPLY_ACK: it cannot confirm messages")
            self._asked.add(Request.GET_PROTOCOL_FEATURES)
            return self.protocol_offered

        return self._ask(Request.GET_PROTOCOL_FEATURES, take, size=8)

    def set_protocol_features(self, requested: ProtocolFeature = REQUESTED) -> Question:
        self._after(Request.GET_PROTOCOL_FEATURES)
        if requested & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            raise ValueError("CONFIGURE_MEM_SLOTS and post-copy do not go together")
        requested |= ProtocolFeature.PAGEFAULT | ProtocolFeature.REPLY_ACK
        self.protocol = self.protocol_offered & requested
        self._asked.add(Request.SET_PROTOCOL_FEATURES)
        # This message agrees on REPLY_ACK, so it cannot ask for a reply itself.
        return Question(Request.SET_PROTOCOL_FEATURES, pack_frame(16, U64.pack(self.protocol)))

    def set_owner(self) -> Question:
        self._after(Request.SET_PROTOCOL_FEATURES)
        self.stage = Stage.AGREED
        return self._tell(Request.SET_OWNER)

    def get_queue_num(self) -> Question:
        self._after(Request.SET_PROTOCOL_FEATURES)
        if not self.protocol & ProtocolFeature.MQ:
            raise ValueError("the back-end has not agreed to MQ")

        def take(frame: Frame) -> int:
            self.queues = _u64(frame)
            if not 1 <= self.queues <= 1 << 16:
                raise VhostUserError("queue-num", f"the back-end claims {self.queues} queues")
            return self.queues

        return self._ask(Request.GET_QUEUE_NUM, take, size=8)

    def get_config(self, offset: int, size: int) -> Question:
        self._after(Request.SET_PROTOCOL_FEATURES)
        if not self.protocol & ProtocolFeature.CONFIG:
            raise ValueError("the back-end has not agreed to CONFIG")
        if not 0 < size <= MOST_CONFIG - offset:
            raise ValueError(f"no configuration space has bytes {offset} to {offset + size}")
        return self._ask(
            Request.GET_CONFIG, lambda frame: unpack_config(frame.payload, size), pack_config(offset, size)
        )

    def set_features(self, requested: int = FEATURE_VERSION_1 | FEATURE_INDIRECT) -> Question:
        """``requested``: virtio feature bits. Those not offered are left out, those that post-copy needs are added."""
        self._at(Stage.AGREED, Stage.ADVISED, Stage.LISTENING)
        self.features = self.offered & (requested | FEATURE_PROTOCOL | FEATURE_VERSION_1)
        return self._tell(Request.SET_FEATURES, U64.pack(self.features))

    def advise(self) -> Question:
        """The answer's value is the back-end's userfaultfd."""
        after = self._after_step("advise")

        def take(frame: Frame) -> int:
            self.stage = after
            return frame.fds[0]

        return self._ask(Request.POSTCOPY_ADVISE, take, size=0, descriptors=1)

    def listen(self) -> Question:
        self.stage = self._after_step("listen")
        return self._tell(Request.POSTCOPY_LISTEN)

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> Question:
        """The answer's value: the address of each region in the back-end; None if it only returns ours."""
        after = self._after_step("set_mem_table")
        check_layout(regions)
        if len(fds) != len(regions):
            raise ValueError("every region has one descriptor")
        self.table = tuple(regions)
        data = pack_table(regions)
        if self.table_first:
            self.stage = after
            return self._tell(Request.SET_MEM_TABLE, data, tuple(fds))
        self.stage = Stage.LISTENING

        def take(frame: Frame) -> tuple[int, ...] | None:
            addresses = self._check_table(unpack_table(frame.payload))
            self.stage = after
            return addresses

        return Question(Request.SET_MEM_TABLE, pack_frame(5, data), tuple(fds), take, len(data))

    def _check_table(self, answered: tuple[MemoryRegion, ...]) -> tuple[int, ...] | None:
        asked = {region.guest: region for region in self.table}
        if len(answered) != len(asked) or {region.guest for region in answered} != set(asked):
            raise VhostUserError("table-reply", "the memory table came back with other regions than were sent")
        for region in answered:
            sent = asked[region.guest]
            if (region.size, region.offset) != (sent.size, sent.offset):
                raise VhostUserError("table-reply", f"the region at {region.guest:#x} came back with another size")
        echoes = [region.user == asked[region.guest].user for region in answered]
        if any(echoes) and not all(echoes):
            raise VhostUserError("addresses", "some addresses in the returned memory table are real, some are ours")
        self.echoed = all(echoes)
        if self.echoed:
            return None
        found = {region.guest: region.user for region in answered}
        for address in found.values():
            if not 0 < address < USER_SPACE or address % 4096:
                raise VhostUserError("addresses", f"the back-end reports memory at {address:#x}, which is no process's")
        return tuple(found[region.guest] for region in self.table)

    def acknowledge_table(self) -> Question:
        """Confirm the returned table. Nothing comes back; the next answer shows that it was accepted."""
        self.stage = self._after_step("acknowledge_table")
        return Question(Request.SET_MEM_TABLE, pack_frame(5, U64.pack(0)))

    def barrier(self) -> Question:
        """A question whose answer proves that everything before it was done."""

        def take(frame: Frame) -> None:
            if _u64(frame) != self.offered:
                raise VhostUserError("features-change", "the answer to GET_FEATURES has changed on the same connection")

        return self._ask(Request.GET_FEATURES, take, size=8)

    def end(self) -> Question:
        """End post-copy. libvhost-user and DPDK always answer it, others because of NEED_REPLY."""
        self.stage = self._after_step("end")
        return self._tell(Request.POSTCOPY_END)

    def set_vring_num(self, index: int, size: int) -> Question:
        if size < 1 or size > 32768 or size & (size - 1):
            raise ValueError(f"a ring of {size} descriptors: it must be a power of two, at most 32768")
        return self._ring(Request.SET_VRING_NUM, VRING_STATE.pack(self._index(index), size))

    def set_vring_base(self, index: int, base: int) -> Question:
        return self._ring(Request.SET_VRING_BASE, VRING_STATE.pack(self._index(index), base))

    def set_vring_addr(self, index: int, descriptors: int, used: int, available: int) -> Question:
        """User addresses. The back-end reads used.idx on its message thread, so it may fault before it answers."""
        payload = VRING_ADDRESSES.pack(self._index(index), 0, descriptors, used, available, 0)
        return self._ring(Request.SET_VRING_ADDR, payload)

    def set_vring_kick(self, index: int, fd: int) -> Question:
        return self._ring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int) -> Question:
        return self._ring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int) -> Question:
        return self._ring_fd(Request.SET_VRING_ERR, index, fd)

    def set_vring_enable(self, index: int, enabled: bool) -> Question:
        return self._ring(Request.SET_VRING_ENABLE, VRING_STATE.pack(self._index(index), int(enabled)))

    def get_vring_base(self, index: int) -> Question:
        """Stop the ring; the answer's value is its position."""
        self._at(Stage.MAPPED, Stage.ENDED)

        def take(frame: Frame) -> int:
            number, base = VRING_STATE.unpack(frame.payload)
            if number != index:
                raise VhostUserError("vring-base", f"the base of ring {number} came, not that of {index}")
            return int(base)

        return self._ask(Request.GET_VRING_BASE, take, VRING_STATE.pack(self._index(index), 0), size=8)

    def heard(self, question: Question, frame: Frame) -> Any:
        """Check the answer to ``question`` and return its value. Raises VhostUserError; then the caller closes all
        descriptors of the frame."""
        name = question.request.name
        if question.take is None:
            raise ValueError(f"{name} has no answer")
        if frame.request != question.request or not frame.is_reply:
            what = "answer" if frame.is_reply else "message"
            raise VhostUserError("order", f"{name} was sent; what came is {what} {frame.request}")
        if len(frame.fds) != question.descriptors:
            raise VhostUserError(
                "descriptors",
                f"the answer to {name} came with {len(frame.fds)} descriptors, not {question.descriptors}",
            )
        if question.size is not None and len(frame.payload) != question.size:
            raise VhostUserError("size", f"the answer to {name} has {len(frame.payload)} bytes, not {question.size}")
        return question.take(frame)

    def _tell(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Question:
        """A message without an answer of its own."""
        return Question(request, pack_frame(request, payload, need_reply=True), fds, _acknowledged, U64.size)

    def _ask(
        self,
        request: Request,
        take: Callable[[Frame], Any],
        payload: bytes = b"",
        *,
        size: int | None = None,
        descriptors: int = 0,
    ) -> Question:
        return Question(request, pack_frame(request, payload), (), take, size, descriptors)

    def _ring(self, request: Request, payload: bytes, fds: tuple[int, ...] = ()) -> Question:
        self._at(Stage.MAPPED, Stage.ENDED)
        return self._tell(request, payload, fds)

    def _ring_fd(self, request: Request, index: int, fd: int) -> Question:
        word = self._index(index) | (VRING_NO_DESCRIPTOR if fd < 0 else 0)
        return self._ring(request, U64.pack(word), () if fd < 0 else (fd,))

    def _index(self, index: int) -> int:
        if not 0 <= index < min(256, self.queues):
            raise ValueError(f"ring {index}: the back-end has {self.queues}")
        return index

    def _at(self, *stages: Stage) -> None:
        if self.stage not in stages:
            raise ValueError(f"out of order: the conversation is {self.stage.value}")

    def _after_step(self, method: str) -> Stage:
        """The stage after a method of the table. Raises ValueError if it may not be called now."""
        allowed, after = self._rules.get(method, ((), Stage.ENDED))
        self._at(*allowed)
        return after

    def _after(self, request: Request) -> None:
        if request not in self._asked:
            raise ValueError(f"{request.name} comes first")


def _u64(frame: Frame) -> int:
    if len(frame.payload) != U64.size:
        raise VhostUserError("size", f"the answer to {frame.request} has {len(frame.payload)} bytes, not 8")
    value: int = U64.unpack(frame.payload)[0]
    return value


def _acknowledged(frame: Frame) -> None:
    status = _u64(frame)
    if status:
        name = next((known.name for known in Request if known == frame.request), f"request {frame.request}")
        raise VhostUserError("acknowledge", f"the back-end refuses {name} (status {status})")
