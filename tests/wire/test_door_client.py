"""The client at a door that lies: garbage, wrong descriptors, the end of the connection at every step.

Whatever comes, ``attach`` raises one clear PostcopyError, soon, and keeps no descriptor and no memory. No page
is touched here, so the liar can be a thread of the test.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest

import postcopy
from postcopy.client import Client
from postcopy.deadline import Deadline
from postcopy_kernel.descriptors import close_all, count_descriptors, receive_message, send_message
from postcopy_kernel.memory import create_memfd
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import (
    VERSION,
    Attached,
    BlockOpened,
    Ending,
    Message,
    OrphanPolicy,
    Refused,
    Released,
    UserfaultfdAccepted,
    Welcome,
)
from tests.kernel.touching import Child

pytestmark = [pytest.mark.usefixtures("require_userfaultfd"), pytest.mark.leaves_files("the liar does not tidy up")]

PAGE = 4096
PAGES = 3
OPENED = BlockOpened(7, "ram0", PAGES * PAGE - 5, PAGE, PAGES)

Make = Callable[[], list[int]]
Reply = tuple[bytes, Make]
"""What is sent, and the descriptors beside it."""


def nothing() -> list[int]:
    return []


def block_and_map() -> list[int]:
    return [create_memfd("block", PAGES * PAGE), create_memfd("map", PAGE)]


HONEST: list[Reply] = [
    (encode(Welcome(1)), nothing),
    (encode(UserfaultfdAccepted()), nothing),
    (encode(OPENED), block_and_map),
    (encode(OrphanPolicy(0, False)), nothing),
    (encode(Attached(7, 0)), nothing),  # whatever the address: no honest supervisor says 0
]
STEPS = ("Hello", "OfferUserfaultfd", "OpenBlock", "AskOrphanPolicy", "Mapped")
NEEDED = [step for step, name in enumerate(STEPS) if name != "AskOrphanPolicy"]


class Liar:
    """Listens at ``directory/door`` and answers one connection's messages with ``replies``; None: hangs up."""

    def __init__(self, directory: Path, replies: Sequence[Reply | None]) -> None:
        self._replies = replies
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._listener.bind(str(directory / "door"))
        self._listener.listen(1)
        self._listener.settimeout(10)
        self._thread = threading.Thread(target=self._lie)

    def _lie(self) -> None:
        sock, _ = self._listener.accept()
        with sock, suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            sock.settimeout(10)
            for reply in self._replies:
                close_all(receive_message(sock, wait=True).fds)
                if reply is None:
                    return
                data, make = reply
                fds = make()
                try:
                    send_message(sock, data, fds)
                finally:
                    close_all(fds)
            while (last := receive_message(sock, wait=True)).data:  # until the client goes
                close_all(last.fds)

    def __enter__(self) -> Liar:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        self._stack.close()
        assert not self._thread.is_alive()


@pytest.fixture
def deceive(runtime_dir: Path) -> Iterator[Callable[[Sequence[Reply | None]], postcopy.PostcopyError]]:
    """``deceive(replies)`` attaches to a liar and returns what attach raised."""

    def attach(replies: Sequence[Reply | None]) -> postcopy.PostcopyError:
        before = count_descriptors()
        with Liar(runtime_dir, replies), pytest.raises(postcopy.PostcopyError) as caught:
            postcopy.attach("ram0", runtime_dir, timeout=5.0)
        assert count_descriptors() == before
        assert "memfd:block" not in Path("/proc/self/maps").read_text("utf-8")
        assert not isinstance(caught.value, postcopy.AttachTimeout)
        assert "\n" not in str(caught.value)
        assert str(caught.value)
        return caught.value

    yield attach


def pipes(count: int) -> Make:
    def make() -> list[int]:
        ends = [end for _ in range(count) for end in os.pipe()]
        close_all(ends[count:])
        return ends[:count]

    return make


def small_map() -> list[int]:
    return [create_memfd("block", PAGES * PAGE), os.memfd_create("map")]


def small_block() -> list[int]:
    return [create_memfd("block", (PAGES - 1) * PAGE), create_memfd("map", PAGE)]


def closed_files() -> list[int]:
    return [os.open("/dev/null", os.O_RDWR), os.open("/proc/self/status", os.O_RDONLY)]


ANYWHERE: dict[str, Reply | None] = {
    "the end": None,
    "one byte": (b"\x00", nothing),
    "noise": (bytes(range(256)) * 40, nothing),
    "a bomb": (b"\xdd\xff\xff\xff\xff" * 100, nothing),
    "no list": (msgpack.packb({"version": VERSION}), nothing),
    "the future": (msgpack.packb([VERSION + 1, 20, 1]), nothing),
    "another message": (encode(Message.__subclasses__()[0]("x", "native")), nothing),
    "too long": (b"x" * 70000, nothing),
    "too many descriptors": (encode(Released(1)), pipes(70)),
    "descriptors beside a word unasked": (encode(Released(1)), pipes(1)),
    "descriptors beside a refusal": (encode(Refused("failed", "no")), pipes(2)),
    "descriptors beside noise": (b"\xc1", pipes(3)),
}


@pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
@pytest.mark.parametrize("lie", ANYWHERE)
def test_lies_at_every_step(
    deceive: Callable[[Sequence[Reply | None]], postcopy.PostcopyError], step: int, lie: str
) -> None:
    deceive([*HONEST[:step], ANYWHERE[lie]])


LIES: dict[str, tuple[int, Reply]] = {
    "a pipe for a device": (0, (encode(Welcome(1)), pipes(1))),
    "a null device": (0, (encode(Welcome(1)), lambda: [os.open("/dev/null", os.O_RDWR)])),
    "two devices": (0, (encode(Welcome(1)), pipes(2))),
    "a descriptor to thank": (1, (encode(UserfaultfdAccepted()), pipes(1))),
    "no memory": (2, (encode(OPENED), nothing)),
    "memory without a map": (2, (encode(OPENED), pipes(1))),
    "three descriptors": (2, (encode(OPENED), pipes(3))),
    "pipes for memory": (2, (encode(OPENED), pipes(2))),
    "devices for memory": (2, (encode(OPENED), closed_files)),
    "a short block": (2, (encode(OPENED), small_block)),
    "a short map": (2, (encode(OPENED), small_map)),
    "another name": (2, (encode(replace(OPENED, name="ram1")), block_and_map)),
    "no bytes": (2, (encode(replace(OPENED, size=0, pages=0)), block_and_map)),
    "too many pages": (2, (encode(replace(OPENED, pages=PAGES + 1)), block_and_map)),
    "too few pages": (2, (encode(replace(OPENED, pages=PAGES - 1)), block_and_map)),
    "odd pages": (2, (encode(replace(OPENED, page_size=1000, pages=13)), block_and_map)),
    "a page of nothing": (2, (encode(replace(OPENED, page_size=0)), block_and_map)),
    "a universe": (2, (encode(replace(OPENED, size=2**63, pages=2**51)), block_and_map)),
    "two lifelines": (3, (encode(OrphanPolicy(1000, True)), pipes(2))),
    "another range": (4, (encode(Attached(7, PAGE)), nothing)),
    "another block": (4, (encode(Attached(8, 0)), nothing)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_what_is_sent(deceive: Callable[[Sequence[Reply | None]], postcopy.PostcopyError], lie: str) -> None:
    step, reply = LIES[lie]
    deceive([*HONEST[:step], reply])


REFUSALS = {
    "no-such-block": postcopy.NoSuchBlock,
    "denied": postcopy.AttachDenied,
    "limit": postcopy.AttachDenied,
    "bad-version": postcopy.BadMessage,
    "failed": postcopy.PostcopyError,
    "something new": postcopy.PostcopyError,
}


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("step", NEEDED, ids=[STEPS[step] for step in NEEDED])
def test_a_refusal_has_its_exception_and_its_reason(
    deceive: Callable[[Sequence[Reply | None]], postcopy.PostcopyError], code: str, step: int
) -> None:
    error = deceive([*HONEST[:step], (encode(Refused(code, "because of rain")), nothing)])
    assert isinstance(error, REFUSALS[code])
    assert "because of rain" in str(error)


@pytest.mark.parametrize("asked", [False, True], ids=["before the question", "while the question waits unread"])
def test_a_refusal_that_waits_for_no_question_is_heard(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(runtime_dir / "door"))
        listener.listen(1)

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock:
                assert not asked or select.select([sock], [], [], 10)[0]
                send_message(sock, encode(Refused("denied", "not you")))

        thread = threading.Thread(target=refuse)
        thread.start()

        def send_late(*words: Any, **more: Any) -> None:
            thread.join(10)
            send_message(*words, **more)

        if not asked:
            monkeypatch.setattr("postcopy.attach_socket.send_message", send_late)
        with pytest.raises(postcopy.AttachDenied, match="not you"):
            postcopy.attach("ram0", runtime_dir, timeout=5.0)
        thread.join(10)


def test_the_future_is_called_by_its_name(
    deceive: Callable[[Sequence[Reply | None]], postcopy.PostcopyError],
) -> None:
    assert str(VERSION + 1) in str(deceive([ANYWHERE["the future"]]))


def test_an_ending_in_the_middle_is_not_taken_for_the_answer(
    deceive: Callable[[Sequence[Reply | None]], postcopy.PostcopyError],
) -> None:
    error = deceive([HONEST[0], (encode(Ending("night")), nothing)])
    assert isinstance(error, postcopy.NoSupervisor)
    assert "night" in str(error)


def test_a_stale_socket_is_no_supervisor(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(runtime_dir / "door"))
    with pytest.raises(postcopy.NoSupervisor, match="has ended"):
        postcopy.attach("ram0", runtime_dir)


def another_users(directory: Path, uid: int) -> Callable[[socket.socket], None]:
    """Listens as this user; sends home how many descriptors came after Welcome."""

    def listen(home: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            os.setresuid(uid, uid, uid)
            listener.bind(str(directory / "door"))
            listener.listen()
            while True:
                home.send(b"listening")
                sock, _ = listener.accept()
                with sock:
                    receive_message(sock, wait=True)
                    send_message(sock, encode(Welcome(1)))
                    home.send(b"%d" % len(receive_message(sock, wait=True).fds))

    return listen


def test_another_users_supervisor_gets_no_userfaultfd(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right over this process's memory. Unless that user is trusted."""
    os.chown(runtime_dir, 4711, 4711)
    with Child(another_users(runtime_dir, 4711)) as child:
        child.socket.recv(100)
        before = count_descriptors()
        with pytest.raises(postcopy.AttachDenied, match=r"user 4711's.*trust_uid=4711"):
            postcopy.attach("ram0", runtime_dir, timeout=20.0)
        assert count_descriptors() == before
        assert child.socket.recv(100) == b"0"
        for argument, variable in (((4711,), ""), ((), "1,4711")):
            child.socket.recv(100)
            monkeypatch.setenv("POSTCOPY_TRUST_UID", variable)
            with pytest.raises(postcopy.NoSupervisor):  # it hangs up
                Client(str(runtime_dir), frozenset(argument)).attach("ram0", "private", Deadline(20.0))
            assert child.socket.recv(100) == b"1"


def test_a_full_backlog_is_a_timeout(runtime_dir: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(runtime_dir / "door"))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        waiting.connect(str(runtime_dir / "door"))
        with pytest.raises(postcopy.AttachTimeout):
            postcopy.attach("ram0", runtime_dir, timeout=0.2)


def test_a_door_that_is_no_socket_is_no_supervisor(runtime_dir: Path) -> None:
    (runtime_dir / "door").touch()
    with pytest.raises(postcopy.NoSupervisor):
        postcopy.attach("ram0", runtime_dir)
