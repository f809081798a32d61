"""Messages with descriptors, the peer's identity, and that no error path keeps a descriptor open."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_kernel.descriptors import (
    MOST_DESCRIPTORS,
    Credentials,
    Received,
    TruncatedMessage,
    close_all,
    close_drained,
    close_others,
    count_descriptors,
    create_eventfd,
    has_ended,
    peer_credentials,
    peer_pidfd,
    raise_descriptor_limit,
    receive_message,
    send_message,
    signal_eventfd,
    socket_owners,
)
from postcopy_kernel.process import pidfd_exited
from tests.kernel.touching import PATIENCE, Child, readable, use_up_descriptors

Pair = tuple[socket.socket, socket.socket]


def open_descriptors() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def event() -> Iterator[int]:
    fd = create_eventfd()
    yield fd
    os.close(fd)


def test_a_descriptor_travels_and_is_closed_on_exec(pair: Pair, event: int) -> None:
    send_message(pair[0], b"take this", [event])
    received = receive_message(pair[1])
    assert received.data == b"take this"
    (fd,) = received.fds
    try:
        assert fd != event
        assert not os.get_inheritable(fd)
        signal_eventfd(event)
        assert readable(fd, 0)
    finally:
        os.close(fd)


def test_messages_keep_their_borders(pair: Pair) -> None:
    for word in (b"one", b"two"):
        send_message(pair[0], word)
    assert [receive_message(pair[1]), receive_message(pair[1])] == [Received(b"one", ()), Received(b"two", ())]


def test_nothing_there_and_nothing_left(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        receive_message(pair[1])
    pair[0].close()
    assert receive_message(pair[1]) == Received(b"", ())


def test_a_peer_that_left_with_words_unread_is_the_end_too(pair: Pair) -> None:
    send_message(pair[1], b"never read")
    pair[0].close()
    assert receive_message(pair[1]) == Received(b"", ())


def test_waiting_is_asked_for(pair: Pair) -> None:
    pair[1].settimeout(PATIENCE)
    with Child(lambda _: send_message(pair[0], b"late")) as child:
        assert receive_message(pair[1], wait=True).data == b"late"
        assert child.exit_code() == 0


def test_sending_never_waits(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            send_message(pair[0], b"x" * 1000)
    pair[1].close()
    with pytest.raises(ConnectionResetError):  # it left words unread
        send_message(pair[0], b"x")
    with pytest.raises(BrokenPipeError):
        send_message(pair[0], b"x")


def test_the_last_words_of_a_peer_that_was_killed() -> None:
    """It had not read everything: the kernel tells the reset before the words that it had sent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            send_message(ours, b"never read")
            send_message(theirs, b"one")
            send_message(theirs, b"two", [0])
        assert receive_message(ours).data == b"one"
        last = receive_message(ours)
        assert last.data == b"two" and len(last.fds) == 1
        close_all(last.fds)
        assert receive_message(ours) == Received(b"", ())


def test_a_peer_that_is_gone_is_no_sigpipe() -> None:
    def body(_: socket.socket) -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; a program that embeds us may not
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)  # SEQPACKET raises none (Linux 6.18)
        right.close()
        with left, pytest.raises(BrokenPipeError):
            send_message(left, b"x")

    with Child(body) as child:
        assert child.exit_code() == 0


def test_a_message_that_is_too_long_loses_its_descriptors(pair: Pair, event: int) -> None:
    before = count_descriptors()
    send_message(pair[0], b"x" * 11, [event])
    with pytest.raises(TruncatedMessage):
        receive_message(pair[1], 10)
    assert count_descriptors() == before


@pytest.mark.parametrize(("sent", "taken"), [(2, 1), (3, 1), (5, 4), (1, 0), (MOST_DESCRIPTORS, 64)])
def test_too_many_descriptors_are_all_closed(pair: Pair, event: int, sent: int, taken: int) -> None:
    before = count_descriptors()
    send_message(pair[0], b"take these", [event] * sent)
    with pytest.raises(TruncatedMessage):
        receive_message(pair[1], max_fds=taken)
    assert count_descriptors() == before


def test_as_many_as_asked_for_come(pair: Pair, event: int) -> None:
    for count in (1, 2, 64, MOST_DESCRIPTORS):
        send_message(pair[0], b"take these", [event] * count)
        received = receive_message(pair[1], max_fds=count)
        assert len(received.fds) == count
        close_all(received.fds)
    with pytest.raises(OSError) as caught:
        send_message(pair[0], b"too many", [event] * (MOST_DESCRIPTORS + 1))
    assert caught.value.errno == errno.EINVAL


def test_no_room_for_descriptors_is_a_truncated_message(pair: Pair, event: int) -> None:
    def body(_: socket.socket) -> None:
        send_message(pair[0], b"take these", [event] * 8)
        use_up_descriptors()
        os.close(event)  # room for one of eight, which has to go as well
        with pytest.raises(TruncatedMessage):
            receive_message(pair[1])
        assert os.dup(0) == event

    with Child(body) as child:
        assert child.exit_code() == 0


def test_an_empty_message_is_the_end_and_keeps_nothing(pair: Pair, event: int) -> None:
    before = count_descriptors()
    send_message(pair[0], b"", [event])
    assert receive_message(pair[1]) == Received(b"", ())
    assert count_descriptors() == before


def test_who_is_there(pair: Pair) -> None:
    assert peer_credentials(pair[0]) == Credentials(os.getpid(), os.getuid(), os.getgid())


def test_the_greatest_uid_is_not_negative() -> None:
    def body(_: socket.socket) -> None:
        uid = 2**32 - 2
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with left, right:
            assert peer_credentials(left) == Credentials(os.getpid(), uid, uid)

    with Child(body) as child:
        assert child.exit_code() == 0


def test_the_peers_pidfd_outlives_it(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(runtime_dir / "door"))
        listener.listen()
        listener.settimeout(PATIENCE)

        def body(sock: socket.socket) -> None:
            listener.close()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mine:
                mine.connect(str(runtime_dir / "door"))
                sock.recv(100)

        with Child(body) as child:
            connection, _ = listener.accept()
            with connection:
                assert peer_credentials(connection).pid == child.pid
                pidfd = peer_pidfd(connection)
                assert not os.get_inheritable(pidfd)
                assert not pidfd_exited(pidfd)
                child.kill()
                assert pidfd_exited(pidfd)
                os.close(pidfd)
    (runtime_dir / "door").unlink()


def test_without_so_peerpidfd_the_pid_is_opened(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postcopy_kernel.descriptors._SO_PEERPIDFD", 9999)  # as Linux before 6.5 answers
    pidfd = peer_pidfd(pair[0])
    assert not pidfd_exited(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize(("age", "refused"), [(0.0, False), (1e6, True)])
def test_a_pid_that_another_process_has_by_now_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, age: float, refused: bool
) -> None:
    """The connection is older than the process that has its pid."""
    monkeypatch.setattr("postcopy_kernel.descriptors._SO_PEERPIDFD", 9999)
    before = count_descriptors()
    try:
        os.close(peer_pidfd(pair[0], time.monotonic() - age))
        assert not refused
    except ProcessLookupError:
        assert refused
    assert count_descriptors() == before


def test_a_descriptor_that_was_not_received_is_not_closed(pair: Pair, event: int) -> None:
    """Its close may wait."""
    left, right = pair
    send_message(right, b"unread")
    send_message(right, b"unread", [event])
    assert not close_drained(left) and left.fileno() >= 0
    with pytest.raises(BrokenPipeError):
        send_message(right, b"more")


@pytest.mark.parametrize("messages", [[b""], [b"", b"x"], [b"x", b"", b"x"]])
def test_an_empty_message_is_not_the_end(pair: Pair, event: int, messages: list[bytes]) -> None:
    """A descriptor may be in it, or behind it."""
    left, right = pair
    assert not has_ended(left)
    for data in messages[:-1]:
        send_message(right, data)
    send_message(right, messages[-1], [event])
    assert not has_ended(left) and not close_drained(left)
    right.close()


def test_the_end_is_seen(pair: Pair) -> None:
    left, right = pair
    send_message(right, b"x")
    right.close()
    assert not has_ended(left)
    receive_message(left)
    assert has_ended(left)


def test_the_last_message_is_read_whatever_the_peer_has_sent(pair: Pair) -> None:
    """A plain close with unread messages makes ECONNRESET of it."""
    left, right = pair
    before = count_descriptors()
    for _ in range(5):
        send_message(right, b"unread")
    send_message(left, b"the last words")
    assert close_drained(left)
    with pytest.raises(BrokenPipeError):
        send_message(right, b"more")
    right.settimeout(PATIENCE)
    assert right.recv(100) == b"the last words"
    assert right.recv(100) == b""
    assert count_descriptors() == before - 1


def test_whose_a_socket_is(runtime_dir: Path) -> None:
    path = str(runtime_dir / "door")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, Child(lambda sock: sock.recv(1)):
        listener.bind(path)
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            assert socket_owners(sock, path) == {os.geteuid()}
            os.chown(path, 4711, 4711)
            assert socket_owners(sock, path) == {os.geteuid(), 4711}
    Path(path).unlink()


def test_an_eventfd_is_signalled_once_and_for_all(event: int) -> None:
    assert not readable(event, 0)
    os.eventfd_write(event, 2**64 - 2)
    signal_eventfd(event)  # full: readable all the same
    assert readable(event, 0)


def test_closing_all_passes_over_what_is_closed() -> None:
    one, two = create_eventfd(), create_eventfd()
    os.close(one)
    close_all([one, two, 10**6])
    for fd in (one, two):
        with pytest.raises(OSError):
            os.fstat(fd)


@pytest.mark.parametrize("kernel_has_close_range", [True, False])
def test_a_child_closes_what_is_not_its_own(
    event: int, kernel_has_close_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_has_close_range:
        monkeypatch.setattr("postcopy_kernel.descriptors._CLOSE_RANGE", 9999)  # ENOSYS

    def body(sock: socket.socket) -> None:
        far = os.dup2(event, 200)
        os.dup2(event, 100)
        os.dup2(event, 600)
        close_others({sock.fileno(), far, 1, 500})
        assert open_descriptors() >= {0, 1, 2, sock.fileno(), far}
        assert count_descriptors() == 5
        sock.send(b"still connected")

    with Child(body) as child:
        assert child.socket.recv(100) == b"still connected"
        assert child.exit_code() == 0


@pytest.mark.parametrize("fast", [True, False], ids=["stat", "before Linux 6.2"])
def test_counting_descriptors(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        real = os.stat
        monkeypatch.setattr(os, "stat", lambda path: real("/dev/null") if path == "/proc/self/fd" else real(path))
    before = count_descriptors()
    more = [create_eventfd() for _ in range(7)]
    assert count_descriptors() == before + 7
    close_all(more)
    assert count_descriptors() == before


def test_the_soft_limit_becomes_the_hard_one() -> None:
    def body(sock: socket.socket) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    with Child(body) as child:
        assert child.exit_code() == 0
