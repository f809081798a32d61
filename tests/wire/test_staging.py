"""Staging memory on the wire: the source program and a scripted supervisor, the supervisor and a source that lies."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopy_kernel.memory import create_memfd, open_memfd_of
from postcopy_protocol.codec import encode
from postcopy_protocol.return_path import (
    NONCE,
    SLOT_FREE,
    SLOT_FULL,
    STAGING_HEADER,
    STAGING_NAME,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    SourceRefused,
    Staged,
    Staging,
    UseStaging,
    check_staging,
    unpack_ranges,
)
from tests.conftest import SourceFile
from tests.system.service import Service, until, word
from tests.wire.evil import EvilSource
from tests.wire.own_sources import Large, page_of
from tests.wire.scripted import PAGE, ScriptedSupervisor, SourceProgram

OWN = str(Path(__file__).with_name("own_sources.py"))
MIB = 1 << 20
LENGTH = 12 * MIB - 77
FEATURES = ("zero", "push", "staging")


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(LENGTH)


@pytest.fixture
def endpoint(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/source"


@pytest.fixture
def supervisor(path: Path, endpoint: str) -> Iterator[ScriptedSupervisor]:
    with (
        SourceProgram(f"ram0={path}", "--listen", endpoint),
        ScriptedSupervisor(endpoint) as supervisor,
    ):
        yield supervisor


@pytest.fixture
def own(endpoint: str) -> Iterator[ScriptedSupervisor]:
    with SourceProgram(endpoint, "-", program=(OWN,)), ScriptedSupervisor(endpoint) as supervisor:
        yield supervisor


class Opened:
    """A staging memory, as a supervisor has it."""

    def __init__(self, supervisor: ScriptedSupervisor, advised: Advised) -> None:
        self.supervisor = supervisor
        self.staged: list[int] = []
        supervisor.say(Listen(advised.stream, 0))
        self.offer = supervisor.expect(Staging)
        length = check_staging(self.offer)
        descriptor = open_memfd_of(self.offer.pid, self.offer.descriptor, STAGING_NAME, length)
        self.memory = mmap.mmap(descriptor, length)
        os.close(descriptor)
        assert self.memory[:NONCE] == self.offer.nonce and not any(self.slots())

    def slots(self) -> bytes:
        return self.memory[NONCE : NONCE + self.offer.slots]

    def use(self) -> None:
        self.supervisor.say(UseStaging(self.offer.number))

    def take(self, *, free: bool = True) -> tuple[Staged, bytes]:
        """The next Staged, and the bytes of its slot."""
        staged = self.supervisor.expect(Staged)
        assert staged.number == self.offer.number and self.slots()[staged.slot] == SLOT_FULL
        start = STAGING_HEADER + staged.slot * self.offer.slot_bytes
        found = self.memory[start : start + staged.length]
        if free:  # not before its bytes are ours
            self.memory[NONCE + staged.slot] = SLOT_FREE
        return staged, found

    def answers(self, advised: Advised, count: int) -> dict[int, bytes]:
        """What comes next, in slots (whose number is noted) or as Pages, by offset."""
        found: dict[int, bytes] = {}
        for _ in range(count):
            heard = self.supervisor.hear()
            assert heard is not None
            if isinstance(heard[0], Staged):
                start = STAGING_HEADER + heard[0].slot * self.offer.slot_bytes
                found[heard[0].offset] = self.memory[start : start + heard[0].length]
                self.staged.append(heard[0].offset)
                self.memory[NONCE + heard[0].slot] = SLOT_FREE
            else:
                assert isinstance(heard[0], Pages) and heard[0].stream == advised.stream
                ((offset, length),) = unpack_ranges(heard[0].ranges)
                found[offset] = heard[1][0] if heard[1] else bytes(length)
        return found


def advise(supervisor: ScriptedSupervisor, block: str = "ram0") -> Advised:
    advised = supervisor.advise(block, features=FEATURES)
    assert advised.features == FEATURES
    return advised


# --- the source -------------------------------------------------------------------------------------------------------


def test_every_byte_of_a_file_through_slots(supervisor: ScriptedSupervisor, path: Path) -> None:
    data = path.read_bytes().ljust(12 * MIB, b"\0")
    advised = advise(supervisor)
    staging = Opened(supervisor, advised)
    staging.use()
    for offset in range(0, 12 * MIB, 4 * MIB):
        request = supervisor.ask(advised, (offset, 4 * MIB), urgent=False)
        for place in range(offset, offset + 4 * MIB, MIB):
            staged, found = staging.take()
            assert (staged.stream, staged.request, staged.offset) == (advised.stream, request, place)
            assert found == data[place : place + MIB], "the rest of the last page is zero"
    assert not any(staging.slots())


def test_a_slot_that_is_not_freed_is_not_filled(supervisor: ScriptedSupervisor, path: Path) -> None:
    """Then pages come through the socket; a slot that is set free is used again."""
    data = path.read_bytes().ljust(12 * MIB, b"\0")
    advised = advise(supervisor)
    staging = Opened(supervisor, advised)
    staging.use()
    for offset in (0, 4 * MIB):
        supervisor.ask(advised, (offset, 4 * MIB), urgent=False)
    kept = [staging.take(free=False) for _ in range(staging.offer.slots)]
    assert {staged.slot for staged, _ in kept} == set(range(8))
    supervisor.ask(advised, (8 * MIB, MIB), urgent=False)
    assert b"".join(supervisor.pages(advised)[1].values()) == data[8 * MIB : 9 * MIB]  # type: ignore[arg-type]
    staging.memory[NONCE + 5] = SLOT_FREE
    supervisor.ask(advised, (9 * MIB, MIB), urgent=False)
    staged, found = staging.take()
    assert staged.slot == 5 and found == data[9 * MIB : 10 * MIB]
    for staged, found in kept:
        start = STAGING_HEADER + staged.slot * MIB
        if staged.slot != 5:
            assert staging.memory[start : start + MIB] == found == data[staged.offset : staged.offset + MIB]


def test_nothing_is_staged_before_it_is_opened_or_while_a_client_waits(supervisor: ScriptedSupervisor) -> None:
    advised = advise(supervisor)
    staging = Opened(supervisor, advised)
    supervisor.say(UseStaging(staging.offer.number + 1))
    supervisor.fetch(advised, (0, MIB), urgent=False)
    staging.use()
    supervisor.fetch(advised, (0, MIB))  # a client waits for it
    supervisor.fetch(advised, (0, 8 * PAGE), urgent=False)  # too small to be worth it

    def behind_an_urgent_one() -> int:
        """Bytes of the first piece of what is asked for together with an urgent page."""
        supervisor.ask(advised, (0, PAGE))
        supervisor.ask(advised, (0, MIB), urgent=False)
        supervisor.pages(advised)
        pieces: list[int] = []
        while sum(pieces) < MIB:
            pieces.append(staging.take()[0].length)
        return pieces[0]

    # Small for 50 ms only, and the program may have to wait for a processor for longer.
    until(lambda: behind_an_urgent_one() == 256 << 10, "a moment after an urgent request pieces are small")


def test_no_offer_without_the_feature(supervisor: ScriptedSupervisor) -> None:
    advised = supervisor.listen("ram0")
    supervisor.fetch(advised, (0, MIB), urgent=False)
    supervisor.say(Ping(1))
    assert supervisor.expect(Pong) == Pong(1)


def test_over_tcp_there_is_none(path: Path) -> None:
    words = (f"ram0={path}", "--listen", "tcp://127.0.0.1:0", "--plain-tcp")
    with SourceProgram(*words) as program, ScriptedSupervisor(program.endpoint) as supervisor:
        advised = supervisor.advise("ram0", features=FEATURES)
        assert advised.features == ("zero", "push")
        supervisor.say(Listen(advised.stream, 0))
        supervisor.fetch(advised, (0, MIB), urgent=False)


def test_after_another_advise_it_is_another_memory(supervisor: ScriptedSupervisor, path: Path) -> None:
    data = path.read_bytes()
    first = Opened(supervisor, advise(supervisor))
    first.use()
    advised = advise(supervisor)
    second = Opened(supervisor, advised)
    assert second.offer.number != first.offer.number and second.offer.nonce != first.offer.nonce
    first.use()  # says the number of the old one: ignored
    supervisor.fetch(advised, (0, MIB), urgent=False)
    second.use()
    supervisor.ask(advised, (MIB, MIB), urgent=False)
    assert second.take()[1] == data[MIB : 2 * MIB] and not any(first.slots())


def test_complete_gives_it_up(supervisor: ScriptedSupervisor) -> None:
    advised = advise(supervisor)
    staging = Opened(supervisor, advised)
    place = Path(f"/proc/{staging.offer.pid}/fd/{staging.offer.descriptor}")
    assert STAGING_NAME in str(place.readlink())
    supervisor.say(Complete(advised.stream))
    until(lambda: not place.is_symlink() or STAGING_NAME not in str(place.readlink()), "it is closed")


def test_a_file_that_is_written_to_is_lost_page_by_page(supervisor: ScriptedSupervisor, path: Path) -> None:
    advised = advise(supervisor)
    staging = Opened(supervisor, advised)
    staging.use()
    with path.open("r+b") as file:
        file.write(b"changed")
    supervisor.ask(advised, (0, 4 * PAGE), (MIB, MIB), urgent=False)
    for _ in range(2):
        assert all("was cut or written" in str(reason) for reason in supervisor.pages(advised)[1].values())
    assert not any(staging.slots())


def test_zeros_are_not_sent(endpoint: str, source_file: SourceFile) -> None:
    """Neither holes nor zeros that were written."""
    path = source_file(4 * MIB)
    with path.open("r+b") as file:
        file.truncate(MIB)
        file.truncate(2 * MIB)
        file.seek(2 * MIB)
        file.write(bytes(MIB) + b"\0" * PAGE + b"end")
    with SourceProgram(f"ram0={path}", "--listen", endpoint), ScriptedSupervisor(endpoint) as supervisor:
        advised = advise(supervisor)
        staging = Opened(supervisor, advised)
        staging.use()
        supervisor.ask(advised, (0, MIB), (2 * MIB, MIB), (MIB, MIB), urgent=False)
        assert staging.take()[0].offset == 0
        for place in (2 * MIB, MIB):
            message, _ = supervisor.pages(advised)
            assert (message.kinds, unpack_ranges(message.ranges)) == (b"\1", [(place, MIB)])
        supervisor.ask(advised, (3 * MIB, 2 * PAGE), urgent=False)
        assert len(supervisor.pages(advised)[1]) == 2


@pytest.mark.parametrize("block", ["large", "into", "into-raises", "into-blocks", "into-zeros"])
def test_sources_of_ones_own(own: ScriptedSupervisor, block: str) -> None:
    """What was read in another way is copied into a slot; what ``read_into`` does wrong is read again."""
    advised = advise(own, block)
    staging = Opened(own, advised)
    staging.use()
    pages = -(-Large.size // PAGE) * PAGE
    own.ask(advised, (0, pages), urgent=False)
    found = staging.answers(advised, 2)
    wanted = page_of(0, Large.size).ljust(pages, b"\0")
    assert found[MIB] == wanted[MIB:], "too small for a slot"
    assert found[0] == (bytes(MIB) if block == "into-zeros" else wanted[:MIB])
    assert staging.staged == ([] if block == "into-zeros" else [0])


def test_pages_of_two_mebibytes(own: ScriptedSupervisor) -> None:
    advised = own.advise("huge", 2 << 20, FEATURES)
    staging = Opened(own, advised)
    staging.use()
    own.ask(advised, (0, 4 * MIB), urgent=False)
    assert [staging.take()[1] == b"h" * (2 * MIB) for _ in range(2)] == [True, True]


# --- the supervisor ---------------------------------------------------------------------------------------------------

SLOTS = 4
SLOT = 64 << 10
NUMBER = 7000
NONCE_TOLD = b"0123456789abcdef"


class Liar:
    """A source that offers memory of this process. ``memory`` is the honest one."""

    def __init__(self, evil: EvilSource, service: Service) -> None:
        self.evil, self.service = evil, service
        self._noise = 64
        self.descriptor = create_memfd(STAGING_NAME, STAGING_HEADER + SLOTS * SLOT)
        self.memory = mmap.mmap(self.descriptor, STAGING_HEADER + SLOTS * SLOT)
        self.memory[:NONCE] = NONCE_TOLD

    def offer(
        self,
        descriptor: int = -1,
        *,
        number: int = NUMBER,
        pid: int = 0,
        nonce: bytes = NONCE_TOLD,
        slots: int = SLOTS,
        slot_bytes: int = SLOT,
    ) -> None:
        descriptor = self.descriptor if descriptor < 0 else descriptor
        self.evil.push([encode(Staging(number, pid or os.getpid(), descriptor, nonce, slots, slot_bytes))])

    def used(self) -> list[int]:
        return [message.number for message in self.evil.heard if isinstance(message, UseStaging)]

    def fill(self, slot: int, data: bytes) -> None:
        start = STAGING_HEADER + slot * SLOT
        self.memory[start : start + len(data)] = data
        self.memory[NONCE + slot] = SLOT_FULL

    def slots(self) -> bytes:
        return self.memory[NONCE : NONCE + SLOTS]

    def staged(self, slot: int, offset: int, length: int = SLOT, request: int = 0, **wrong: int) -> None:
        given = {"stream": self.evil.stream, "number": NUMBER} | wrong
        self.evil.push([encode(Staged(request=request, offset=offset, length=length, slot=slot, **given))])

    def heard(self) -> None:
        """What was pushed has been heard by the supervisor."""
        until(lambda: not self.evil._push, "all is said")
        nonsense = len(self.service.events("source-nonsense"))
        self.evil.push(*[[b"\xc1"]] * self._noise)
        self._noise *= 2  # told when its number has doubled
        until(lambda: len(self.service.events("source-nonsense")) > nonsense, "it is heard")

    def close(self) -> None:
        self.memory.close()
        os.close(self.descriptor)


@contextmanager
def lying(runtime_dir: Path, path: Path) -> Iterator[Liar]:
    with EvilSource(path) as evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", background_rate="0") as service:
        until(evil.listened, "it listens")
        liar = Liar(evil, service)
        try:
            yield liar
        finally:
            liar.close()


def a_file(directory: Path) -> int:
    path = directory / f"memfd:{STAGING_NAME} (deleted)"
    path.write_bytes(b"0123456789abcdef" + bytes(STAGING_HEADER + SLOTS * SLOT - NONCE))
    descriptor = os.open(path, os.O_RDWR)
    path.unlink()
    return descriptor


def a_fifo(directory: Path) -> int:
    os.mkfifo(directory / "fifo")
    descriptor = os.open(directory / "fifo", os.O_RDWR | os.O_NONBLOCK)
    (directory / "fifo").unlink()
    return descriptor


def a_memfd(name: str = STAGING_NAME, length: int = STAGING_HEADER + SLOTS * SLOT, sealed: bool = True) -> int:
    if sealed:
        descriptor = create_memfd(name, length)
    else:
        descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, length)
    os.pwrite(descriptor, b"0123456789abcdef", 0)
    return descriptor


STRANGE: dict[str, Callable[[Path], int]] = {
    "a file": a_file,
    "a fifo": a_fifo,
    "a socket": lambda _: socket.socket().detach(),
    "a memfd of another name": lambda _: a_memfd("postcopy-ram0"),
    "a memfd that can shrink": lambda _: a_memfd(sealed=False),
    "a memfd that is too short": lambda _: a_memfd(length=STAGING_HEADER),
    "a memfd that is too long": lambda _: a_memfd(length=STAGING_HEADER + (SLOTS + 1) * SLOT),
}


def test_what_is_no_staging_memory_is_not_used(runtime_dir: Path, path: Path) -> None:
    """Nothing is lost by it: pages come through the socket, and an honest memory is taken after all of it."""
    with lying(runtime_dir, path) as liar:
        strange = [make(runtime_dir) for make in STRANGE.values()]
        for descriptor in strange:
            liar.offer(descriptor)
        liar.offer(pid=1 << 40)
        liar.offer(pid=1)
        liar.offer(descriptor=1 << 40)
        liar.offer(nonce=b"fedcba9876543210")
        liar.offer(nonce=b"short")
        for slots in (0, 65, 1 << 60):
            liar.offer(slots=slots)
        for length in (0, 77, 1 << 60):
            liar.offer(slot_bytes=length)
        liar.offer(number=NUMBER + 1)
        until(lambda: liar.used() == [NUMBER + 1], "only the last one is used")
        assert liar.service.client().do("words(b, [3])") == [word(3 * PAGE)]
        assert "Traceback" not in liar.service.log() and not liar.service.events("bug")
        for descriptor in strange:
            os.close(descriptor)


def test_lies_about_slots_place_nothing_and_free_no_others(runtime_dir: Path, path: Path) -> None:
    wrong, data = b"\xee" * SLOT, path.read_bytes()
    with lying(runtime_dir, path) as liar:
        liar.fill(0, wrong)
        liar.staged(0, 0)  # before there is any
        liar.heard()
        liar.offer()
        until(lambda: liar.used() == [NUMBER], "it is used")
        liar.staged(0, 0, number=NUMBER - 1)  # late, about an old one
        liar.staged(SLOTS, 0)
        liar.staged(1 << 63, 0)
        liar.staged(1, 0)  # is not full
        liar.heard()
        assert liar.slots() == bytes([SLOT_FULL, 0, 0, 0]) and liar.service.block()["received"] == 0
        for slot, offset, length in ((1, 8, PAGE), (2, 0, SLOT + PAGE), (3, 1 << 40, PAGE)):
            liar.fill(slot, wrong)
            liar.staged(slot, offset, length)
        liar.staged(0, 0, stream=99)  # of a block that was not asked for
        until(lambda: not any(liar.slots()), "what is dropped is set free")
        assert liar.service.block()["received"] == 0
        liar.fill(2, data[:SLOT])
        liar.staged(2, 0)  # pushed, the right bytes
        liar.staged(2, SLOT)  # and once more, of a slot that is ours by now
        liar.service.await_received(SLOT // PAGE)
        liar.heard()
        assert liar.service.block()["received"] == SLOT // PAGE and not any(liar.slots())
        liar.fill(1, wrong)
        liar.staged(1, 0)  # other bytes for what has come
        until(lambda: not any(liar.slots()), "it is set free")
        assert liar.service.client().do(f"check(b, {str(path)!r})") == -1
        assert liar.service.events("source-nonsense") and not liar.service.events("bug")


def test_a_staging_memory_takes_the_place_of_the_one_before(runtime_dir: Path, path: Path) -> None:
    data = path.read_bytes()
    with lying(runtime_dir, path) as liar:
        liar.offer()
        until(liar.used, "it is used")
        liar.offer(a := a_memfd(), number=NUMBER + 1)
        until(lambda: len(liar.used()) == 2, "so is the next")
        liar.fill(0, data[:SLOT])
        liar.staged(0, 0)
        liar.heard()
        assert liar.slots()[0] == SLOT_FULL and liar.service.block()["received"] == 0
        liar.offer(nonce=b"fedcba9876543210", number=NUMBER + 2)
        os.pwrite(a, bytes([SLOT_FULL]), NONCE)
        liar.staged(0, 0, number=NUMBER + 1)
        liar.heard()
        assert liar.service.block()["received"] == 0, "an offer that fails ends the one before, too"
        assert os.pread(a, 1, NONCE) == bytes([SLOT_FULL])
        os.close(a)


def test_a_source_that_goes_takes_its_memory_with_it(runtime_dir: Path, path: Path) -> None:
    with lying(runtime_dir, path) as liar:
        liar.offer()
        until(liar.used, "it is used")

        def mapped() -> bool:
            return STAGING_NAME in Path(f"/proc/{liar.service.status()['pid']}/maps").read_text()

        assert mapped()
        liar.evil.push([encode(SourceRefused("out-of-phase", "", "who are you?"))])
        until(lambda: not mapped(), "nothing of it is left")
        assert liar.service.client().do("words(b, [3])") == [word(3 * PAGE)]
