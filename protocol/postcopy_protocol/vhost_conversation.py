"""The front-end's part of a vhost-user conversation with post-copy, sans-I/O.

Every method gives a ``Question``: bytes and descriptors to send, and what will come back. The driver sends it, reads
one frame if ``answer`` says so, and hands it to ``heard``, which judges it and gives its value. Order and answers are
laws here: a method called out of order raises ValueError (our fault), a wrong answer raises VhostUserError (theirs).

::

    new -> agreed       features, owner           SET_PROTOCOL_FEATURES never with CONFIGURE_MEM_SLOTS: libvhost-user
                                                  dies of the last message of that variant
    agreed -> advised   POSTCOPY_ADVISE           the answer brings the userfaultfd
    advised -> listening POSTCOPY_LISTEN          before any region: libvhost-user and DPDK refuse it afterwards
    listening -> told   SET_MEM_TABLE             never with NEED_REPLY: its answer is the table itself
    told -> mapped      the extra acknowledgement only now does the back-end register its memory and open it
    mapped -> ended     POSTCOPY_END              a new table before it begins again at ``listening``

rust-vmm's order is another (``table_first``): the table comes before LISTEN, is acknowledged as any message, and LISTEN
registers it. Nothing says where the memory is; there is no extra acknowledgement.

Whatever has no answer of its own is sent with NEED_REPLY, so an answer means done; a back-end without REPLY_ACK is
refused, because nobody could tell which of its answers belongs to LISTEN. One that fails mostly just closes the socket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Final

from .vhost_user import (
    FEATURE_INDIRECT,
    FEATURE_PROTOCOL,
    FEATURE_VERSION_1,
    MOST_CONFIG,
    MOST_REGIONS,
    U64,
    VRING_ADDRESSES,
    VRING_NO_DESCRIPTOR,
    VRING_STATE,
    Frame,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VhostUserError,
    feature_names,
    pack_config,
    pack_frame,
    pack_table,
    unpack_config,
    unpack_table,
)

WISHED: Final = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.PAGEFAULT | ProtocolFeature.CONFIG
"""What we take of what a back-end offers. Not BACKEND_REQ, which we do not serve; never CONFIGURE_MEM_SLOTS."""

USER_SPACE: Final = 0x00F0_0000_0000_0000
"""Where the user addresses that we declare begin: no process can have memory there, so an address that only comes back
as it was sent can be told from a true one."""

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
    TOLD = "told"
    MAPPED = "mapped"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Question:
    """What to send. ``take`` judges the answer's frame; None: nothing comes back."""

    request: Request
    data: bytes
    fds: tuple[int, ...] = ()
    take: Callable[[Frame], Any] | None = None
    size: int | None = None
    """Bytes of the answer's payload; None: any."""
    descriptors: int = 0
    """How many come with the answer."""

    @property
    def answered(self) -> bool:
        return self.take is not None


class FrontEnd:
    """What has been agreed with one back-end so far. ``table_first``: it follows rust-vmm's order."""

    def __init__(self, *, table_first: bool = False) -> None:
        self.table_first = table_first
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

    # --- features -----------------------------------------------------------------------------------------------------

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
                raise VhostUserError("reply-ack", "the back-end has no REPLY_ACK: who has heard what cannot be known")
            self._asked.add(Request.GET_PROTOCOL_FEATURES)
            return self.protocol_offered

        return self._ask(Request.GET_PROTOCOL_FEATURES, take, size=8)

    def set_protocol_features(self, wished: ProtocolFeature = WISHED) -> Question:
        self._after(Request.GET_PROTOCOL_FEATURES)
        if wished & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            raise ValueError("CONFIGURE_MEM_SLOTS and post-copy do not go together")
        wished |= ProtocolFeature.PAGEFAULT | ProtocolFeature.REPLY_ACK
        self.protocol = self.protocol_offered & wished
        self._asked.add(Request.SET_PROTOCOL_FEATURES)
        # REPLY_ACK is agreed on by this very message: nothing can be asked of it yet.
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

    def set_features(self, wished: int = FEATURE_VERSION_1 | FEATURE_INDIRECT) -> Question:
        """``wished``: virtio feature bits; what is not offered is left out, what post-copy needs is put in."""
        self._at(Stage.AGREED, Stage.ADVISED, Stage.LISTENING)
        self.features = self.offered & (wished | FEATURE_PROTOCOL | FEATURE_VERSION_1)
        return self._tell(Request.SET_FEATURES, U64.pack(self.features))

    # --- post-copy ----------------------------------------------------------------------------------------------------

    def advise(self) -> Question:
        self._at(Stage.AGREED)

        def take(frame: Frame) -> int:
            self.stage = Stage.ADVISED
            return frame.fds[0]

        return self._ask(Request.POSTCOPY_ADVISE, take, size=0, descriptors=1)

    def listen(self) -> Question:
        self._at(Stage.TOLD if self.table_first else Stage.ADVISED)
        self.stage = Stage.MAPPED if self.table_first else Stage.LISTENING
        return self._tell(Request.POSTCOPY_LISTEN)

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> Question:
        """The answer's value: where the back-end says that it has each region, None if it only echoes ours."""
        self._at(*((Stage.ADVISED,) if self.table_first else (Stage.LISTENING, Stage.MAPPED)))
        check_layout(regions)
        if len(fds) != len(regions):
            raise ValueError("every region has one descriptor")
        self.table = tuple(regions)
        data = pack_table(regions)
        if self.table_first:
            self.stage = Stage.TOLD
            return self._tell(Request.SET_MEM_TABLE, data, tuple(fds))
        self.stage = Stage.LISTENING

        def take(frame: Frame) -> tuple[int, ...] | None:
            addresses = self._judge_table(unpack_table(frame.payload))
            self.stage = Stage.TOLD
            return addresses

        return Question(Request.SET_MEM_TABLE, pack_frame(5, data), tuple(fds), take, len(data))

    def _judge_table(self, answered: tuple[MemoryRegion, ...]) -> tuple[int, ...] | None:
        asked = {region.guest: region for region in self.table}
        if len(answered) != len(asked) or {region.guest for region in answered} != set(asked):
            raise VhostUserError("table-reply", "the memory table came back with other regions than were sent")
        for region in answered:
            sent = asked[region.guest]
            if (region.size, region.offset) != (sent.size, sent.offset):
                raise VhostUserError("table-reply", f"the region at {region.guest:#x} came back with another size")
        echoes = [region.user == asked[region.guest].user for region in answered]
        if any(echoes) and not all(echoes):
            raise VhostUserError("addresses", "some addresses of the memory table are true, some only our own")
        self.echoed = all(echoes)
        if self.echoed:
            return None
        found = {region.guest: region.user for region in answered}
        for address in found.values():
            if not 0 < address < USER_SPACE or address % 4096:
                raise VhostUserError("addresses", f"the back-end claims memory at {address:#x}, where none can be")
        return tuple(found[region.guest] for region in self.table)

    def acknowledge_table(self) -> Question:
        """Our answer to the answer; nothing comes back, and that it was taken only the next answer shows."""
        if self.table_first:
            raise ValueError("in rust-vmm's order nothing is acknowledged")
        self._at(Stage.TOLD)
        self.stage = Stage.MAPPED
        return Question(Request.SET_MEM_TABLE, pack_frame(5, U64.pack(0)))

    def barrier(self) -> Question:
        """An answer proves that everything before it was done."""

        def take(frame: Frame) -> None:
            if _u64(frame) != self.offered:
                raise VhostUserError("features-change", "GET_FEATURES answers differently in the same connection")

        return self._ask(Request.GET_FEATURES, take, size=8)

    def end(self) -> Question:
        """One answer in every back-end: its own in libvhost-user and DPDK, to NEED_REPLY in others."""
        self._at(Stage.LISTENING, Stage.MAPPED)
        self.stage = Stage.ENDED
        return self._tell(Request.POSTCOPY_END)

    # --- rings --------------------------------------------------------------------------------------------------------

    def set_vring_num(self, index: int, size: int) -> Question:
        if size < 1 or size > 32768 or size & (size - 1):
            raise ValueError(f"a ring of {size} descriptors: a power of two is wanted, at most 32768")
        return self._ring(Request.SET_VRING_NUM, VRING_STATE.pack(self._index(index), size))

    def set_vring_base(self, index: int, base: int) -> Question:
        return self._ring(Request.SET_VRING_BASE, VRING_STATE.pack(self._index(index), base))

    def set_vring_addr(self, index: int, descriptors: int, used: int, available: int) -> Question:
        """User addresses. The back-end reads used.idx here, on its message thread: it may fault before it answers."""
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
        """Stops the ring; the value is where it stood."""
        self._at(Stage.MAPPED, Stage.ENDED)

        def take(frame: Frame) -> int:
            number, base = VRING_STATE.unpack(frame.payload)
            if number != index:
                raise VhostUserError("vring-base", f"asked for the base of ring {index}, told that of ring {number}")
            return int(base)

        return self._ask(Request.GET_VRING_BASE, take, VRING_STATE.pack(self._index(index), 0), size=8)

    # --- what came back -----------------------------------------------------------------------------------------------

    def heard(self, question: Question, frame: Frame) -> Any:
        """Judge the answer to ``question`` and give its value. Raises VhostUserError; descriptors of the frame are then
        the caller's to close, all of them."""
        name = question.request.name
        if question.take is None:
            raise ValueError(f"{name} has no answer")
        if frame.request != question.request or not frame.is_reply:
            what = "answer" if frame.is_reply else "message"
            raise VhostUserError("order", f"{name} was asked; what came is {what} {frame.request}")
        if len(frame.fds) != question.descriptors:
            raise VhostUserError(
                "descriptors",
                f"the answer to {name} came with {len(frame.fds)} descriptors, not {question.descriptors}",
            )
        if question.size is not None and len(frame.payload) != question.size:
            raise VhostUserError("size", f"the answer to {name} has {len(frame.payload)} bytes, not {question.size}")
        return question.take(frame)

    # --- inside -------------------------------------------------------------------------------------------------------

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

    def _after(self, request: Request) -> None:
        if request not in self._asked:
            raise ValueError(f"{request.name} comes first")


def check_layout(regions: Sequence[MemoryRegion]) -> None:
    """Raises ValueError for guest memory that a back-end must not be told: overlaps make some of them abort."""
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"guest memory has 1 to {MOST_REGIONS} regions, not {len(regions)}")
    for region in regions:
        if region.size <= 0 or any(part % 4096 for part in (region.guest, region.size, region.user, region.offset)):
            raise ValueError(f"the region at {region.guest:#x} is not made of whole pages")
    for name in ("guest", "user"):
        ends = sorted((getattr(region, name), getattr(region, name) + region.size) for region in regions)
        if any(before[1] > after[0] for before, after in pairwise(ends)):
            raise ValueError(f"two regions overlap in {name} addresses")
        if ends[-1][1] >= 1 << 64:
            raise ValueError(f"a region ends beyond the last {name} address")


def lay_out(wanted: Sequence[tuple[int, int, int | None]]) -> tuple[MemoryRegion, ...]:
    """Regions of (offset, size, guest address or None: behind what stands before it). User addresses are chosen far
    apart, where no process can have memory."""
    regions: list[MemoryRegion] = []
    free = 0
    for number, (offset, size, guest) in enumerate(wanted):
        start = free if guest is None else guest
        regions.append(MemoryRegion(start, size, USER_SPACE + (number << 48), offset))
        free = max(free, start + size)
    check_layout(regions)
    return tuple(regions)


def _u64(frame: Frame) -> int:
    if len(frame.payload) != U64.size:
        raise VhostUserError("size", f"the answer to {frame.request} has {len(frame.payload)} bytes, not 8")
    value: int = U64.unpack(frame.payload)[0]
    return value


def _acknowledged(frame: Frame) -> None:
    status = _u64(frame)
    if status:
        try:
            name = Request(frame.request).name
        except ValueError:
            name = f"request {frame.request}"
        raise VhostUserError("acknowledge", f"the back-end refuses {name} (status {status})")
