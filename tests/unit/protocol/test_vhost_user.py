"""vhost-user without a socket: frames, tables, and the front-end's conversation with good and with bad back-ends."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol import vhost_conversation
from postcopy_protocol.vhost_conversation import FrontEnd, Question, Stage
from postcopy_protocol.vhost_user import (
    FEATURE_PROTOCOL,
    FEATURE_VERSION_1,
    HEADER,
    MOST_DESCRIPTORS,
    MOST_PAYLOAD,
    USER_SPACE,
    Frame,
    FrameReader,
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

PAGE = 4096
OFFERED = FEATURE_PROTOCOL | FEATURE_VERSION_1 | 1 << 28
QSD_PROTOCOL = 0x8F2B  # what qemu-storage-daemon 7.2 offers
REGION = MemoryRegion(0, 16 * PAGE, USER_SPACE, 0)


def reply(request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Frame:
    return Frame(request, 5, payload, fds)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def answer(question: Question) -> Frame:
    """What a back-end answers that does everything right (and tells true addresses)."""
    request = question.request
    payload = {
        Request.GET_FEATURES: u64(OFFERED),
        Request.GET_PROTOCOL_FEATURES: u64(QSD_PROTOCOL),
        Request.GET_QUEUE_NUM: u64(4),
        Request.POSTCOPY_ADVISE: b"",
        Request.GET_VRING_BASE: question.data[12:16] + struct.pack("=I", 7),
        Request.GET_CONFIG: question.data[12:],
    }.get(request, u64(0))
    if request is Request.SET_MEM_TABLE:
        moved = [
            MemoryRegion(at.guest, at.size, 0x7F0000000000 + at.guest, at.offset)
            for at in unpack_table(question.data[12:])
        ]
        payload = pack_table(moved)
    return reply(request, payload, (99,) if request is Request.POSTCOPY_ADVISE else ())


HANDSHAKE: list[Callable[[FrontEnd], Question]] = [
    lambda talk: talk.get_features(),
    lambda talk: talk.get_protocol_features(),
    lambda talk: talk.set_protocol_features(),
    lambda talk: talk.set_owner(),
    lambda talk: talk.get_queue_num(),
    lambda talk: talk.set_features(),
    lambda talk: talk.advise(),
    lambda talk: talk.listen(),
    lambda talk: talk.set_mem_table([REGION], [3]),
    lambda talk: talk.acknowledge_table(),
    lambda talk: talk.barrier(),
    lambda talk: talk.set_vring_num(0, 8),
    lambda talk: talk.set_vring_base(0, 0),
    lambda talk: talk.set_vring_addr(0, USER_SPACE, USER_SPACE + 8192, USER_SPACE + PAGE),
    lambda talk: talk.set_vring_call(0, 5),
    lambda talk: talk.set_vring_err(0, -1),
    lambda talk: talk.set_vring_kick(0, 6),
    lambda talk: talk.set_vring_enable(0, True),
    lambda talk: talk.get_config(0, 60),
    lambda talk: talk.end(),
    lambda talk: talk.get_vring_base(0),
]
NAMES = [
    "GET_FEATURES GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES SET_OWNER GET_QUEUE_NUM SET_FEATURES POSTCOPY_ADVISE",
    "POSTCOPY_LISTEN SET_MEM_TABLE SET_MEM_TABLE GET_FEATURES SET_VRING_NUM SET_VRING_BASE SET_VRING_ADDR",
    "SET_VRING_CALL SET_VRING_ERR SET_VRING_KICK SET_VRING_ENABLE GET_CONFIG POSTCOPY_END GET_VRING_BASE",
]


def after(steps: int) -> FrontEnd:
    talk = FrontEnd()
    for step in HANDSHAKE[:steps]:
        question = step(talk)
        if question.answered:
            talk.heard(question, answer(question))
    return talk


def test_the_whole_conversation() -> None:
    talk, said = FrontEnd(), []
    for step in HANDSHAKE:
        question = step(talk)
        said.append(question)
        if question.answered:
            talk.heard(question, answer(question))
    assert [question.request.name for question in said] == " ".join(NAMES).split()
    needs = {question.request.name for question in said if HEADER.unpack_from(question.data)[1] & 8}
    # Never on what has an answer of its own: SET_MEM_TABLE's would be taken for the table.
    assert not needs & {"SET_MEM_TABLE", "GET_FEATURES", "GET_CONFIG", "POSTCOPY_ADVISE", "GET_VRING_BASE"}
    assert {"SET_OWNER", "POSTCOPY_LISTEN", "POSTCOPY_END", "SET_VRING_ADDR"} <= needs
    assert talk.stage is Stage.ENDED and talk.echoed is False and talk.queues == 4


def test_memory_slots_are_never_agreed_on() -> None:
    talk = after(2)
    assert talk.protocol_offered & ProtocolFeature.CONFIGURE_MEM_SLOTS
    talk.set_protocol_features()
    assert talk.protocol == ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | 0x100 | ProtocolFeature.CONFIG
    with pytest.raises(ValueError, match="do not go together"):
        after(2).set_protocol_features(ProtocolFeature.CONFIGURE_MEM_SLOTS)


def test_the_bytes_of_the_memory_table() -> None:
    question = after(8).set_mem_table([MemoryRegion(1 << 20, PAGE, USER_SPACE, 2 * PAGE)], [3])
    assert question.data == struct.pack("=III", 5, 1, 40) + struct.pack(
        "=IIQQQQ", 1, 0, 1 << 20, 4096, USER_SPACE, 8192
    )
    assert question.fds == (3,)
    assert after(9).acknowledge_table().data == struct.pack("=IIIQ", 5, 1, 8, 0)


@pytest.mark.parametrize("steps", range(len(HANDSHAKE)))
def test_out_of_order_is_our_fault(steps: int) -> None:
    """From every point of the conversation, what belongs elsewhere cannot even be said."""
    stage = after(steps).stage
    allowed: dict[str, set[Stage]] = {
        "advise": {Stage.AGREED},
        "listen": {Stage.ADVISED},
        "acknowledge_table": {Stage.TABLE_SENT},
        "end": {Stage.LISTENING, Stage.MAPPED},
    }
    for name, stages in allowed.items():
        talk = after(steps)
        with contextlib.nullcontext() if stage in stages else pytest.raises(ValueError, match="out of order"):
            getattr(talk, name)()


def test_addresses_that_only_come_back() -> None:
    talk = after(8)
    question = talk.set_mem_table([REGION], [3])
    assert talk.heard(question, reply(5, question.data[12:])) is None
    assert talk.echoed is True


def test_the_order_of_rust_vmm() -> None:
    talk = FrontEnd(table_first=True)
    steps = [*HANDSHAKE[:7], HANDSHAKE[8], HANDSHAKE[7], *HANDSHAKE[10:]]
    for step in steps:
        question = step(talk)
        if question.request is Request.SET_MEM_TABLE:
            assert HEADER.unpack_from(question.data)[1] & 8, "it is acknowledged as any message"
            talk.heard(question, reply(5, u64(0)))
            with pytest.raises(ValueError, match="out of order"):
                talk.acknowledge_table()
        elif question.answered:
            talk.heard(question, answer(question))
    assert talk.stage is Stage.ENDED and talk.echoed is None


def table(*regions: MemoryRegion) -> bytes:
    return pack_table(regions)


TRUE = MemoryRegion(0, 16 * PAGE, 0x7F0000000000, 0)


@pytest.mark.parametrize(
    ("steps", "frame", "rule"),
    [
        (0, reply(1, u64(0)), "protocol-features"),
        (0, reply(2, u64(OFFERED)), "order"),
        (0, Frame(1, 1, u64(OFFERED)), "order"),
        (0, reply(1, b"1234"), "size"),
        (0, reply(1, u64(OFFERED), (7,)), "descriptors"),
        (1, reply(15, u64(QSD_PROTOCOL & ~0x100)), "pagefault"),
        (1, reply(15, u64(QSD_PROTOCOL & ~8)), "reply-ack"),
        (3, reply(3, u64(1)), "acknowledge"),
        (4, reply(17, u64(0)), "queue-num"),
        (4, reply(17, u64(1 << 40)), "queue-num"),
        (6, reply(28), "descriptors"),
        (6, reply(28, b"", (7, 8)), "descriptors"),
        (6, reply(28, u64(0), (7,)), "size"),
        (7, reply(29, u64(2**64 - 1)), "acknowledge"),
        (8, reply(5, u64(0)), "size"),
        (8, reply(5, table(MemoryRegion(PAGE, 16 * PAGE, 1 << 46, 0))), "table-reply"),
        (8, reply(5, table(MemoryRegion(0, PAGE, 1 << 46, 0))), "table-reply"),
        (8, reply(5, table(MemoryRegion(0, 16 * PAGE, 1 << 46, PAGE))), "table-reply"),
        (8, reply(5, struct.pack("=II", 9, 0) + bytes(32)), "table-reply"),
        (8, reply(5, table(MemoryRegion(0, 16 * PAGE, 0, 0))), "addresses"),
        (8, reply(5, table(MemoryRegion(0, 16 * PAGE, 0x7F0000000001, 0))), "addresses"),
        (8, reply(5, table(MemoryRegion(0, 16 * PAGE, USER_SPACE + (9 << 48), 0))), "addresses"),
        (8, reply(5, table(TRUE), (9,)), "descriptors"),
        (10, reply(1, u64(0)), "features-change"),
        (18, reply(24, b""), "config"),
        (18, reply(24, pack_config(0, 59)), "config"),
        (20, reply(11, struct.pack("=II", 3, 0)), "vring-base"),
    ],
)
def test_a_wrong_answer_has_the_name_of_its_rule(steps: int, frame: Frame, rule: str) -> None:
    talk = after(steps)
    question = HANDSHAKE[steps](talk)
    with pytest.raises(VhostUserError) as caught:
        talk.heard(question, frame)
    assert caught.value.rule == rule, caught.value


def test_some_addresses_true_some_not() -> None:
    talk = after(8)
    regions = lay_out([(0, PAGE, None), (PAGE, PAGE, None)])
    question = talk.set_mem_table(regions, [3, 3])
    mixed = [regions[0], MemoryRegion(regions[1].guest, PAGE, 1 << 46, PAGE)]
    with pytest.raises(VhostUserError, match="some are ours"):
        talk.heard(question, reply(5, pack_table(mixed)))


def test_regions_are_matched_by_guest_address() -> None:
    talk = after(8)
    regions = lay_out([(0, PAGE, None), (PAGE, PAGE, None)])
    question = talk.set_mem_table(regions, [3, 3])
    moved = [MemoryRegion(at.guest, at.size, (1 << 46) + at.guest, at.offset) for at in reversed(regions)]
    assert talk.heard(question, reply(5, pack_table(moved))) == (1 << 46, (1 << 46) + PAGE)


@given(st.integers(0, len(HANDSHAKE) - 1), st.integers(0, 64), st.integers(0, 15), st.binary(max_size=80), st.data())
def test_any_answer_is_taken_or_refused(
    steps: int, request: int, flags: int, payload: bytes, data: st.DataObject
) -> None:
    talk = after(steps)
    question = HANDSHAKE[steps](talk)
    if not question.answered:
        return
    request = data.draw(st.sampled_from([request, int(question.request)]))
    payload = data.draw(st.sampled_from([payload, payload[:8].ljust(8, b"\0"), answer(question).payload]))
    fds = tuple(range(data.draw(st.integers(0, 3))))
    with contextlib.suppress(VhostUserError):
        talk.heard(question, Frame(request, flags, payload, fds))


# --- frames -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 64), st.binary(max_size=300), st.integers(0, 3)), max_size=6), st.data())
def test_frames_come_out_as_they_went_in(sent: list[tuple[int, bytes, int]], data: st.DataObject) -> None:
    """However the stream is cut, and with the descriptors at each frame's first byte."""
    reader, got = FrameReader(), []
    for number, (request, payload, fds) in enumerate(sent):
        stream, carried = pack_frame(request, payload), tuple(range(number * 10, number * 10 + fds))
        while stream:
            cut = data.draw(st.integers(1, min(reader.wanted, len(stream))))
            frame = reader.feed(stream[:cut], carried)
            stream, carried = stream[cut:], ()
            if frame is not None:
                got.append((frame.request, frame.payload, frame.fds))
        assert not reader.inside
    assert got == [(r, p, tuple(range(n * 10, n * 10 + f))) for n, (r, p, f) in enumerate(sent)]


@given(st.binary(min_size=12, max_size=12), st.integers(0, 12))
def test_any_header_is_taken_or_refused(header: bytes, fds: int) -> None:
    reader = FrameReader()
    try:
        frame = reader.feed(header, range(fds))
    except VhostUserError as error:
        assert error.rule == "framing"
        assert reader.dropped() == tuple(range(fds))
        return
    _, flags, size = HEADER.unpack(header)
    assert flags & 3 == 1 and size <= MOST_PAYLOAD and fds <= MOST_DESCRIPTORS
    assert (frame is None) == (size > 0)


@given(st.binary(max_size=400))
def test_any_table_is_taken_or_refused(payload: bytes) -> None:
    with contextlib.suppress(VhostUserError):
        assert len(pack_table(unpack_table(payload))) == len(payload)


def test_configuration_space() -> None:
    assert unpack_config(pack_config(0, 4, b"abcd"), 4) == b"abcd"
    with pytest.raises(ValueError, match="configuration"):
        after(3).get_config(250, 8)


# --- guest memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [MemoryRegion(n << 30, PAGE, USER_SPACE + (n << 40), 0) for n in range(9)],
        [MemoryRegion(0, 2 * PAGE, USER_SPACE, 0), MemoryRegion(PAGE, PAGE, USER_SPACE + (1 << 40), 0)],
        [MemoryRegion(0, 2 * PAGE, USER_SPACE, 0), MemoryRegion(1 << 30, PAGE, USER_SPACE + PAGE, 0)],
        [MemoryRegion(0, 0, USER_SPACE, 0)],
        [MemoryRegion(5, PAGE, USER_SPACE, 0)],
        [MemoryRegion(2**64 - PAGE, 2 * PAGE, USER_SPACE, 0)],
    ],
)
def test_layouts_that_a_back_end_must_not_see(regions: list[MemoryRegion]) -> None:
    with pytest.raises(ValueError, match="region"):
        check_layout(regions)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_chosen_layouts_are_legal(wanted: list[tuple[int, int]]) -> None:
    regions = lay_out([(offset * PAGE, size * PAGE, None) for offset, size in wanted])
    check_layout(regions)
    assert [(at.offset, at.size) for at in regions] == [(o * PAGE, s * PAGE) for o, s in wanted]
    assert all(at.user >= USER_SPACE for at in regions)


def test_feature_names() -> None:
    assert feature_names(0) == "none"
    assert feature_names(0x8 | 1 << 40) == "REPLY_ACK, bit 40"


def test_the_table_in_the_text_is_the_table_that_the_conversation_walks() -> None:
    def shown(rules: vhost_conversation.Rules, method: str) -> str:
        if method not in rules:
            return "-"
        allowed, after = rules[method]
        return f"{', '.join(stage.value for stage in allowed)} -> {after.value}"

    table = (vhost_conversation.__doc__ or "").split("   ---------------------------\n")[1].split("\n\n")[0]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert [row[0] for row in rows] == list(vhost_conversation.STANDARD)
    for method, *orders in rows:
        assert orders == [shown(rules, method) for rules in (vhost_conversation.STANDARD, vhost_conversation.RUST_VMM)]
