"""Clients at the attach socket that send bad bytes, lie, or send nothing: refused, and no other client notices."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from postcopy_kernel.descriptors import close_all
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import open_userfaultfd
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import (
    Attached,
    Goodbye,
    Hello,
    Mapped,
    Message,
    OfferBackEnd,
    OfferUserfaultfd,
    OpenBlock,
    Refused,
    StatusAnswer,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)
from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, descriptors, until, word
from tests.wire.caller import PATIENCE, Caller

PAGES = 64
HONEST = [3, 17, 40]


class Watched:
    """A service with an honest client, which works before and after; its descriptors are counted."""

    def __init__(self, service: Service, path: Path) -> None:
        self.service, self.path = service, path
        self.honest: Puppet = service.client("ram0", "shared")
        self.page = 0
        self.works()
        self.before = sorted(descriptors(service.pid))

    def works(self) -> None:
        """The honest client touches two pages, right after each other; it may not have to wait long."""
        began = time.monotonic()
        pages = [self.page, self.page + 1]
        self.page += 2
        assert self.honest.do(f"words(b, {pages})", 5) == [word(page * PAGE) for page in pages]
        assert time.monotonic() - began < 4

    def alone(self, within: float = 10.0) -> None:
        """Only the honest client is left, and nothing of the others."""
        until(lambda: len(self.service.status()["clients"]) == 1, "everybody else is forgotten", within)
        until(lambda: not self._more(), "no descriptor is left of them", within)
        self.works()

    def _more(self) -> list[str]:
        return sorted((Counter(descriptors(self.service.pid)) - Counter(self.before)).elements())


@pytest.fixture
def watched(runtime_dir: Path, source_file: SourceFile) -> Iterator[Watched]:
    path, other = source_file(PAGES * PAGE), source_file(PAGES * PAGE, 5, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        yield Watched(service, path)
        # The last word: a new client reads everything right.
        assert service.client("ram0", "private").do(f"check(b, {str(path)!r})") == -1


# --- words ------------------------------------------------------------------------------------------------------------

NONSENSE = {
    "a zero": b"\0",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "half a hello": encode(Hello("half", "native"))[:-3],
    "a hello and more": encode(Hello("more", "native")) + b"\0",
    "another kind": encode(Hello("x", "emperor")),
    "another program's message": encode(StatusAnswer(b"{}")),
    "too long": encode(Hello("x", "native")) + bytes(9000),
    "deep": b"\x91" * 4000,
    "a bomb": b"\xdd\xff\xff\xff\xff" + b"\x01" * 60,
    "a map": b"\x83\x01\x02\x03\x04\x05\x06",
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_bad_bytes_are_refused_and_the_connection_ends(watched: Watched, data: bytes) -> None:
    with Caller(watched.service.directory) as caller:
        caller.raw(data)
        assert caller.refusal() == "bad-message"
        assert caller.ended()
    watched.alone()


def test_a_message_of_a_later_version(watched: Watched) -> None:
    with Caller(watched.service.directory) as caller:
        caller.raw(b"\x93\x63\x01\xa1x")  # version 99
        answer = caller.get(Refused)
        assert answer.code == "bad-version" and "99" in answer.reason and "1" in answer.reason
        assert caller.ended()
    watched.alone()


def test_ten_thousand_random_messages(watched: Watched) -> None:
    """Mutations of client messages, with and without descriptors, by unknown peers and by an attached client."""
    chance = random.Random(11)
    talk: list[Message] = [Hello("x", "native"), OpenBlock("ram0", "shared"), OpenBlock("ram9", "private")]
    talk += [Mapped(1, 1 << 40, PAGE, 0), Unmap(1, 1 << 40), OfferUserfaultfd(), Goodbye()]
    words = [encode(message) for message in talk]

    def mutated() -> bytes:
        data = bytearray(chance.choice(words))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data) if chance.random() < 0.8 else chance.randbytes(chance.randrange(1, 200))

    caller, out = Caller(watched.service.directory), 0
    for said in range(10_000):
        if said % 500 == 0:  # in turn an unknown peer, whose connection is ended again and again, and an attached one
            caller.close()
            caller = Caller(watched.service.directory)
            watched.service.status()
        try:
            if said % 1000 == 500:
                caller.hello()
                caller.offer()
            caller.raw(mutated(), [caller.socket.fileno()] * chance.choice((0, 0, 0, 0, 1, 2)))
            drain(caller)
        except (BrokenPipeError, ConnectionResetError):
            out += 1
            caller.close()
            caller = Caller(watched.service.directory)
    caller.close()
    assert out > 10, "connections of unknown peers are ended"
    watched.alone()


def drain(caller: Caller) -> None:
    """Take what has come, and its descriptors."""
    caller.socket.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            data, fds, _, _ = socket.recv_fds(caller.socket, 65536, 16, socket.MSG_DONTWAIT)
            caller.fds += fds
            if not data:
                raise ConnectionResetError
    caller.socket.settimeout(PATIENCE)


def test_messages_out_of_order(watched: Watched) -> None:
    with Caller(watched.service.directory) as caller:
        caller.say(OpenBlock("ram0", "private"))
        assert caller.refusal() == "bad-message" and caller.ended()
    with Caller(watched.service.directory) as caller:
        caller.hello()
        caller.offer()
        for message, code in (
            (Hello("again", "native"), "bad-message"),
            (Mapped(1, 1 << 40, PAGE, 0), "no-such-block"),
            (Unmap(1, 1 << 40), "bad-range"),
            (OpenBlock("ram9", "private"), "no-such-block"),
            (OpenBlock("ram0", "public"), "bad-message"),
            (OpenBlock("../ram0", "shared"), "no-such-block"),
        ):
            caller.say(message)
            assert caller.refusal() == code, message
        opened, memory = caller.open()
        with caller.map(opened, memory) as mapping:
            caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
            assert caller.get(Attached).address == mapping.address, "who stays is served in the end"
            caller.say(Unmap(opened.block, mapping.address))
            assert caller.get(Unmapped).address == mapping.address
        caller.say(Goodbye())
        assert caller.ended()
    watched.alone()


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_descriptors_that_are_no_userfaultfd(watched: Watched) -> None:
    used = open_userfaultfd()
    used.handshake()
    with tempfile.TemporaryFile() as file, used, socket.socket() as other, open_userfaultfd() as fresh:
        event = os.eventfd(0)
        bad = [[], [file.fileno()], [other.fileno()], [event], [used.fd], [fresh.fd] * 2, [fresh.fd] * 8]
        for fds in [*bad, [fresh.fd] * 40]:
            with Caller(watched.service.directory) as caller:
                caller.hello()
                caller.say(OfferUserfaultfd(), fds)
                assert caller.refusal() in ("bad-descriptor", "bad-message"), fds
                assert caller.ended()
        with Caller(watched.service.directory) as caller:
            caller.say(Hello("gift", "native"), [fresh.fd])
            assert caller.refusal() == "bad-descriptor" and caller.ended()
        os.close(event)
    watched.alone()


def test_a_userfaultfd_of_another_process(watched: Watched) -> None:
    """Of one that has ended: nothing can be registered. Of one that lives: its own memory is all that can suffer."""
    mine, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        socket.send_fds(theirs, [b"x"], [open_userfaultfd().fd])
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(mine, 1, 1)
    os.waitpid(pid, 0)
    mine.close()
    theirs.close()
    with Caller(watched.service.directory) as caller:
        caller.hello()
        caller.say(OfferUserfaultfd(), fds)
        caller.get(UserfaultfdAccepted)
        opened, memory = caller.open()
        with caller.map(opened, memory) as mapping:
            caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
            assert caller.refusal() == "bad-range"
    os.close(fds[0])
    watched.alone()


def test_back_ends_that_are_none(watched: Watched) -> None:
    """OfferBackEnd wants a userfaultfd past its handshake and a pidfd of a living process, from a front-end."""
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    dead, mine, event = os.pidfd_open(gone), os.pidfd_open(os.getpid()), os.eventfd(0)
    os.waitpid(gone, 0)
    with open_userfaultfd() as shaken, open_userfaultfd() as fresh:
        shaken.handshake()
        for fds in (
            [],
            [shaken.fd],
            [shaken.fd, event],
            [shaken.fd, dead],
            [fresh.fd, mine],
            [event, mine],
            [mine] * 3,
        ):
            with Caller(watched.service.directory) as caller:
                caller.say(Hello("front", "vhost-user"))
                caller.get(Welcome)
                caller.say(OfferBackEnd(), fds)
                assert caller.refusal() == "bad-descriptor", fds
                assert caller.ended()
        with Caller(watched.service.directory) as caller:
            caller.hello()
            caller.say(OfferBackEnd(), [shaken.fd, mine])
            assert caller.refusal() == "bad-message" and caller.ended()
        with Caller(watched.service.directory) as caller:  # a good one, whose ranges were never registered
            caller.say(Hello("front", "vhost-user"))
            caller.get(Welcome)
            caller.say(OfferBackEnd(), [shaken.fd, mine])
            caller.get(UserfaultfdAccepted)
            opened, _ = caller.open()
            caller.say(Mapped(opened.block, 1 << 40, opened.pages * opened.page_size, 0))
            caller.get(Attached)
    close_all((dead, mine, event))
    watched.alone()


# --- addresses --------------------------------------------------------------------------------------------------------


def test_lies_about_addresses(watched: Watched) -> None:
    with Caller(watched.service.directory) as caller:
        caller.hello()
        caller.offer()
        opened, memory = caller.open()
        length = PAGES * PAGE
        with caller.map(opened, memory) as mapping, Mapping.anonymous(PAGE) as small:
            start = mapping.address
            for told, offset, size in (
                (0, 0, length),
                (PAGE, 0, length),
                (start + 1, 0, length),
                (start, 1, length),
                (start, 0, length - 1),
                (start, 0, 0),
                (start, PAGE, length),
                (start, 1 << 62, PAGE),
                (1 << 63, 0, length),
                ((1 << 64) - PAGE, 0, length),
                (start, 0, (1 << 64) - PAGE),
                (small.address, 0, length),
                (1 << 46, 0, length),
            ):
                caller.say(Mapped(opened.block, told, size, offset))
                assert caller.refusal() in ("bad-range", "bad-message"), (told, offset, size)
            caller.say(Mapped(opened.block, start, 2 * PAGE, 0))
            caller.get(Attached)
            caller.say(Mapped(opened.block, start + PAGE, 2 * PAGE, PAGE))
            assert caller.refusal() == "bad-range", "it overlaps"
            caller.say(Mapped(7, start + 4 * PAGE, PAGE, 0))
            assert caller.refusal() == "no-such-block"
            caller.say(Unmap(opened.block, start + PAGE))
            assert caller.refusal() == "bad-range"
            caller.say(Goodbye())
            assert caller.ended()
    watched.alone()


LIAR = """
from tests.wire.caller import PATIENCE, Caller
from postcopy_protocol.messages import Attached, Mapped
from postcopy_kernel.descriptors import close_all
from postcopy_kernel.memory import Mapping
caller = Caller(directory)
caller.hello(); caller.offer()
opened, fd = caller.open("ram0", "shared")
"""


@pytest.mark.parametrize("lie", ["its own memory", "another block"])
def test_memory_that_is_not_what_it_is_said_to_be(watched: Watched, lie: str) -> None:
    """What a liar's touches place is marked received and is not in the block: others still read right bytes."""
    liar = watched.service.client(None)
    liar.do(LIAR)
    size, pages = PAGES * PAGE, [2, 5, 30, 63]
    if lie == "its own memory":
        liar.do(f"m = Mapping.anonymous({size})")
    else:
        liar.do(f"o, other = caller.open('ram1', 'private'); m = Mapping.of(other, {size}, shared=False)")
    liar.do(f"caller.say(Mapped(opened.block, m.address, {size}, 0)); caller.get(Attached)")
    values = liar.do(f"[int.from_bytes(ctypes.string_at(m.address + n * PAGE, 8), 'little') for n in {pages}]")
    assert values == [word(page * PAGE) for page in pages]
    for client in (watched.honest, watched.service.client("ram0", "private")):
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages]
    assert watched.service.client("ram1").do(f"words(b, {pages})") == [word(page * PAGE, 5) for page in pages]


def test_a_writer_that_lies_about_the_place_is_reported(runtime_dir: Path, source_file: SourceFile) -> None:
    """It may write the block anyhow; but the pages that it gets placed wrongly are found, the others come right."""
    with Service(runtime_dir, f"ram0={source_file(PAGES * PAGE)}", polluting=True, fault_around="4K") as service:
        honest, liar = service.client(), service.client(None)
        liar.do(LIAR)
        liar.do(f"m = Mapping.of(fd, {8 * PAGE})")
        liar.do(f"caller.say(Mapped(opened.block, m.address, {8 * PAGE}, {32 * PAGE})); caller.get(Attached)")
        liar.do("[ctypes.string_at(m.address + n * PAGE, 8).hex() for n in (2, 5)]")
        assert honest.do("words(b, [32, 34, 37])") == [word(page * PAGE) for page in (32, 34, 37)]
        assert service.status(audit=True)["blocks"][0]["polluted"] == [[2 * PAGE, PAGE], [5 * PAGE, PAGE]]
