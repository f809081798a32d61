"""The orderly end: nobody reads zeros, what is there stays, what waits is told, nothing is left."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.house.house import PAGE, Gate, House, PuppetError, alive, end_by_pidfd, until, word

MODULE = """
import time
def slow(offset, length):
    if offset < 64 * 4096:
        return b"s" * length
    time.sleep(3600)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """The directory that the supervisor is started in: it holds the module ``pages``."""
    (tmp_path / "pages.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_no_client(runtime_dir: Path, source_file: SourceFile, number: int) -> None:
    with House(runtime_dir, f"ram0={source_file(PAGE)}") as house:
        people = house.people()
        house.process.send_signal(number)
        assert house.wait() == 0
        assert not any(alive(pid) for pid in people)
        assert not (runtime_dir / "door").exists() and not (runtime_dir / "private").exists()


def test_asked_over_control(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(64 * PAGE)}") as house:
        client = house.client()
        house.audit()
        house.stop()
        assert house.wait() == 0
        assert "Traceback" not in house.log()
        with pytest.raises(PuppetError) as told:
            client.do("b.ensure()")
        assert told.value.kind == "PageLost"


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_holes_become_sigbus_and_pages_stay(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(512 * PAGE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        client, toucher, other = (house.client("ram0", mode) for _ in range(3))
        present = [0, 1, 100, 511]
        values = [word(page * PAGE) for page in present]
        assert client.do(f"words(b, {present})") == values
        if mode == "private":
            client.do(f"write(b, {7 * PAGE}, 'abcd')")
        house.audit()
        house.end()
        assert house.people() == []
        assert client.do(f"words(b, {present})") == values
        assert other.do(f"words(b, {present})") == values, "pages that this client had not touched yet"
        if mode == "private":
            assert client.do(f"read(b, {7 * PAGE}, 2)") == "abcd"
        for page in (2, 99, 101, 510):
            with pytest.raises(PuppetError) as told:
                client.do(f"b.ensure({page * PAGE}, 1, 10)")
            assert told.value.kind == "PageLost" and "ended" in told.value.text
        with pytest.raises(PuppetError) as told:
            client.do(f"syscall_read(b, {300 * PAGE})")
        assert "Bad address" in told.value.text
        for one in (toucher, other):
            one.begin("words(b, [200])")
            assert one.status() == -signal.SIGBUS
        # Nobody can register a child's memory any more, and a fork does not inherit poison: no zeros, but the end.
        assert client.do(f"child('words(b, {present})')") == "ended -11"
        client.do("b.close()")


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_client_that_waits_is_woken_by_sigbus(runtime_dir: Path, module: Path, mode: str) -> None:
    with House(runtime_dir, "ram0=handler:pages:slow?size=1M", cwd=module, fault_around="4K") as house:
        toucher, ensurer = house.client("ram0", mode), house.client("ram0", mode)
        toucher.begin("words(b, [100])")
        ensurer.begin(f"b.ensure({101 * PAGE}, 1, 60)")
        for client in (toucher, ensurer):
            until(lambda client=client: house.record(client)["faults"], "it waits")  # type: ignore[misc]
        began = time.monotonic()
        house.audit()
        house.end()
        assert toucher.status() == -signal.SIGBUS
        with pytest.raises(PuppetError) as told:
            ensurer.answer()
        assert told.value.kind == "PageLost"
        assert time.monotonic() - began < 10


def test_while_clients_fault_without_pause(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    """Every touch during the end is either the right bytes or SIGBUS."""
    path, gate = source_file(64 << 20, 3), Gate(tmp_path, 2)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            # First pages of its own, of the part behind the gate: of the other the faster ones might leave it none.
            own = range(10000 + 60 * seed, 10060 + 60 * seed)
            client.begin(f"words(b, {own}) and {gate.order(path, 4096, seed)}")
        for client in clients:
            until(lambda client=client: house.record(client)["faults"] > 50, "it faults")  # type: ignore[misc]
        assert house.block()["received"] < (64 << 20) // PAGE
        house.audit()
        house.end()
        gate.open()  # who was through with its part already
        assert [client.status() for client in clients] == [-signal.SIGBUS] * 4, "a wrong byte answers, and exits later"


def test_with_a_worker_that_does_not_leave(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(64 * PAGE)}") as house:
        client = house.client()
        house.audit()
        pid = house.kill_worker(client, signal.SIGSTOP)
        house.end()
        assert not alive(pid) and house.people() == []


def test_with_a_dead_custodian(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(64 * PAGE)}") as house:
        client = house.client()
        worker = house.worker(client)
        custodian = next(pid for pid in house.people() if pid != worker)
        house.audit()
        end_by_pidfd(custodian, signal.SIGKILL, "postcopy-cust")
        house.end()
        assert house.people() == []
        with pytest.raises(PuppetError) as told:
            client.do("b.ensure()")
        assert told.value.kind == "PageLost"


def test_clients_learn_of_the_end_and_of_a_new_beginning(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with House(runtime_dir, f"ram0={path}") as house:
        client = house.client()
        client.do("words(b, [1])")
        house.audit()
        house.end()
        with pytest.raises(PuppetError) as told:
            client.attach("ram0", "private", "c")
        assert told.value.kind == "NoSupervisor"
        with House(runtime_dir, f"ram0={source_file(64 * PAGE, 4)}") as second:
            assert second.status()["clients"] == []
            client.attach("ram0", "private", "c")
            assert client.do("words(c, [1])") == [word(PAGE, 4)]
            assert client.do("words(b, [1])") == [word(PAGE)], "the old block is what it was"
            client.close()


def test_someone_who_connects_during_the_end_is_not_left_hanging(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(64 * PAGE)}") as house:
        visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with visitor:
            visitor.settimeout(10)
            visitor.connect(str(runtime_dir / "door"))
            until(lambda: len(house.status()["clients"]) == 1, "the visitor is in")
            house.end()
            while visitor.recv(4096):  # Ending, if anything; then the end of the connection
                pass
