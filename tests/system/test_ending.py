"""The orderly end: nobody reads zeros, what is there stays, what waits is told, nothing is left."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Authenticator, PuppetError, Service, alive, end_by_pidfd, until, word

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
    with Service(runtime_dir, f"ram0={source_file(PAGE)}") as service:
        people = service.people()
        service.process.send_signal(number)
        assert service.wait() == 0
        assert not any(alive(pid) for pid in people)
        assert not (runtime_dir / "door").exists() and not (runtime_dir / "private").exists()


def test_asked_over_control(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        client = service.client()
        service.audit()
        service.stop()
        assert service.wait() == 0
        assert "Traceback" not in service.log()
        with pytest.raises(PuppetError) as told:
            client.do("b.ensure()")
        assert told.value.kind == "PageLost"


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_holes_become_sigbus_and_pages_stay(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(512 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, toucher, other = (service.client("ram0", mode) for _ in range(3))
        present = [0, 1, 100, 511]
        values = [word(page * PAGE) for page in present]
        assert client.do(f"words(b, {present})") == values
        if mode == "private":
            client.do(f"write(b, {7 * PAGE}, 'abcd')")
        service.audit()
        service.end()
        assert service.people() == []
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
    with Service(runtime_dir, "ram0=handler:pages:slow?size=1M", cwd=module, fault_around="4K") as service:
        toucher, ensurer = service.client("ram0", mode), service.client("ram0", mode)
        toucher.begin("words(b, [100])")
        ensurer.begin(f"b.ensure({101 * PAGE}, 1, 60)")
        for client in (toucher, ensurer):
            until(lambda client=client: service.record(client)["faults"], "it waits")  # type: ignore[misc]
        began = time.monotonic()
        service.audit()
        service.end()
        assert toucher.status() == -signal.SIGBUS
        with pytest.raises(PuppetError) as told:
            ensurer.answer()
        assert told.value.kind == "PageLost"
        assert time.monotonic() - began < 10


def test_while_clients_fault_without_pause(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    """Every touch during the end is either the right bytes or SIGBUS."""
    path, gate = source_file(64 << 20, 3), Authenticator(tmp_path, 2)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            # First pages of its own, of the part behind the gate: of the other the faster ones might leave it none.
            own = range(10000 + 60 * seed, 10060 + 60 * seed)
            client.begin(f"words(b, {own}) and {gate.order(path, 4096, seed)}")
        for client in clients:
            until(lambda client=client: service.record(client)["faults"] > 50, "it faults")  # type: ignore[misc]
        assert service.block()["received"] < (64 << 20) // PAGE
        service.audit()
        service.end()
        gate.open()  # who was through with its part already
        assert [client.status() for client in clients] == [-signal.SIGBUS] * 4, "a wrong byte answers, and exits later"


def test_with_a_worker_that_does_not_leave(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        client = service.client()
        service.audit()
        pid = service.kill_worker(client, signal.SIGSTOP)
        service.end()
        assert not alive(pid) and service.people() == []


def test_with_a_dead_custodian(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        client = service.client()
        worker = service.worker(client)
        custodian = next(pid for pid in service.people() if pid != worker)
        service.audit()
        end_by_pidfd(custodian, signal.SIGKILL, "postcopy-cust")
        service.end()
        assert service.people() == []
        with pytest.raises(PuppetError) as told:
            client.do("b.ensure()")
        assert told.value.kind == "PageLost"


def test_clients_learn_of_the_end_and_of_a_new_beginning(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        client.do("words(b, [1])")
        service.audit()
        service.end()
        with pytest.raises(PuppetError) as told:
            client.attach("ram0", "private", "c")
        assert told.value.kind == "NoSupervisor"
        with Service(runtime_dir, f"ram0={source_file(64 * PAGE, 4)}") as second:
            assert second.status()["clients"] == []
            client.attach("ram0", "private", "c")
            assert client.do("words(c, [1])") == [word(PAGE, 4)]
            assert client.do("words(b, [1])") == [word(PAGE)], "the old block is what it was"
            client.close()


def test_someone_who_connects_during_the_end_is_not_left_hanging(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with visitor:
            visitor.settimeout(10)
            visitor.connect(str(runtime_dir / "door"))
            until(lambda: len(service.status()["clients"]) == 1, "the visitor is in")
            service.end()
            while visitor.recv(4096):  # Ending, if anything; then the end of the connection
                pass
