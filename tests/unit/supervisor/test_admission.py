"""Who may attach, how much one user may ask for, and how refusals are reported."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

import pytest

from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import Mapped, OpenBlock, Refused
from postcopy_supervisor.admission import (
    EVERY_BLOCK,
    LONGEST_WAIT,
    MOST_CONNECTS,
    MOST_USERS,
    MOST_WORK,
    OTHERS,
    WORK_PER_SECOND,
    WORKER_WORK,
    Admission,
    AllowList,
    Peer,
    may_write,
)
from postcopy_supervisor.bans import MOST_REFUSED
from postcopy_supervisor.settings import parse

UID, GID = os.geteuid(), os.getegid()
GUEST = 65533
OPEN, MAPPED = OpenBlock("ram0", "private"), Mapped(1, 4096, 4096, 0)


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """Its peer is this process."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left


def stranger(**rights: object) -> AllowList:
    """For a supervisor of another user than ours."""
    return AllowList(UID + 1, **rights)  # type: ignore[arg-type]


def admitted(allow: AllowList, connection: socket.socket) -> Peer:
    peer = Admission(allow).admit(connection, 0.0)
    assert isinstance(peer, Peer), peer
    return peer


def refused(admission: Admission, connection: socket.socket) -> tuple[str, str]:
    """Code and reason."""
    data = admission.admit(connection, 0.0)
    assert isinstance(data, bytes), data
    refusal = decode(data, expect=(Refused,))
    assert admission.reports(100.0)[0][:2] == (UID, refusal.reason)
    return refusal.code, refusal.reason


def test_the_own_user_may_do_everything(connection: socket.socket) -> None:
    peer = admitted(AllowList(UID), connection)
    assert (peer.uid, peer.pid) == (UID, os.getpid())
    assert may_write(peer.writable, "any")


def test_others_are_denied_with_the_remedy(connection: socket.socket) -> None:
    allow = stranger(uids=frozenset({UID + 2}), gids=frozenset({GID + 54321}))
    code, reason = refused(Admission(allow), connection)
    assert code == "denied" and f"--allow-uid {UID}" in reason


@pytest.mark.parametrize(
    ("rights", "blocks"),
    [
        ({"uids": {UID}}, set()),
        ({"gids": {GID}}, set()),
        ({"shared_uids": {("ram0", UID)}}, {"ram0"}),
        ({"shared_gids": {("ram1", GID)}, "shared_uids": {("ram0", UID), ("ram2", UID + 7)}}, {"ram0", "ram1"}),
        ({"shared_gids": {(EVERY_BLOCK, GID)}}, {"ram0", "ram1", "ram2"}),
    ],
)
def test_what_a_user_on_a_list_may_write(
    connection: socket.socket, rights: dict[str, set[object]], blocks: set[str]
) -> None:
    peer = admitted(stranger(**{name: frozenset(value) for name, value in rights.items()}), connection)
    assert {name for name in ("ram0", "ram1", "ram2") if may_write(peer.writable, name)} == blocks


def test_a_user_without_a_number_is_denied_whatever_the_lists_say(connection: socket.socket) -> None:
    for allow, remedy in (
        (AllowList(UID, frozenset({UID}), unmapped=(UID, -1)), "--allow-unmapped"),
        (stranger(gids=frozenset({GID}), unmapped=(-1, GID)), "may not attach"),
    ):
        code, reason = refused(Admission(allow), connection)
        assert code == "denied" and remedy in reason


def test_a_user_that_connects_too_often_is_refused_for_a_while(connection: socket.socket) -> None:
    admission = Admission(stranger(uids=frozenset({UID})))
    for _ in range(MOST_CONNECTS):
        admission.admit(connection, 0.0)
    code, reason = refused(admission, connection)
    assert code == "limit" and "more often" in reason
    assert isinstance(admission.admit(connection, 1.0), Peer)


def test_a_user_who_connects_and_leaves_is_kept_out() -> None:
    """Before the backlog is full: it holds 4096."""
    admission = Admission(AllowList(0, frozenset({GUEST})))
    for _ in range(MOST_REFUSED):
        assert not admission.bans.take(0.0)
        admission.has_left(GUEST, 0.0)
        admission.has_left(0, 0.0)
    assert admission.bans.take(0.0) == [GUEST]
    [(uid, reason, count)] = admission.reports(1.0)
    assert (uid, count) == (GUEST, 1) and "leaves without end" in reason


def test_the_own_user_has_no_limits(connection: socket.socket) -> None:
    admission = Admission(AllowList(UID))
    for _ in range(MOST_CONNECTS + 1):
        admission.admit(connection, 0.0)
    for _ in range(MOST_WORK):
        admission.count(UID, MAPPED)
        assert admission.hold(UID, 0.0) == 0


def test_work_is_held_and_then_read_one_connection_after_the_other() -> None:
    admission, read = Admission(AllowList(0)), 0
    while not admission.hold(7, 0.0):
        admission.count(7, MAPPED)
        read += 1
    assert read == MOST_WORK // WORKER_WORK
    assert admission.hold(8, 0.0) == 0, "another user is not concerned"
    turns = [admission.hold(7, 0.0) for _ in range(3)]
    assert turns == sorted(set(turns))
    later = turns[-1] + 1.0
    assert admission.hold(7, later) == 0
    for _ in range(int(WORK_PER_SECOND * 1.2)):
        admission.count(7, OPEN)
    assert admission.hold(7, later) > later


def test_many_users_share_what_is_remembered() -> None:
    admission = Admission(AllowList(0))
    for uid in range(1, 3 * MOST_USERS):
        admission.hold(uid, 0.0)
        admission.count(uid, OPEN)
        admission.refused(uid, "denied", "no")
    assert len(admission._work) <= MOST_USERS + 1 and len(admission._refusals) <= MOST_USERS + 1
    assert (OTHERS, "no", 2 * MOST_USERS - 1) in admission.reports(0.0)


def test_refusals_are_reported_ever_more_rarely_and_all_counted() -> None:
    admission, now, reported, times = Admission(AllowList(0)), 0.0, 0, []
    while now < 1000:
        admission.refused(7, "denied", "no")
        for _, _, count in admission.reports(now):
            reported += count
            times.append(now)
        now += 0.25
    assert times[:4] == [0.0, 1.0, 3.0, 7.0] and max(b - a for a, b in itertools.pairwise(times)) == 64.0
    reported += sum(count for _, _, count in admission.reports(now + LONGEST_WAIT))
    assert reported == 4000 == admission.refusals["denied"]
    admission.reports(now + 3 * LONGEST_WAIT)
    admission.refused(7, "denied", "no")
    assert admission.reports(now + 3 * LONGEST_WAIT), "after a quiet time it is reported at once again"


def test_the_options() -> None:
    settings = parse(["a=zero:1M", "--shared-uid", "7", "--shared-uid", "a=8", "--shared-gid", "a=9"])
    assert settings.shared_uids == {("", 7), ("a", 8)} and settings.shared_gids == {("a", 9)}
    with pytest.raises(BadInput, match="no block b"):
        parse(["a=zero:1M", "--shared-gid", "b=9"])
    for wrong in ("x", "a=", "a=x", "-1"):
        with pytest.raises(SystemExit):
            parse(["a=zero:1M", f"--shared-uid={wrong}"])
