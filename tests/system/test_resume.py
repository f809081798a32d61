"""Clients beyond the death of a supervisor: whoever takes over is told what they attach and detach, as the dead one
would have been."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, PuppetError, Service, until, word

PAGES = 512


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(PAGES * PAGE)


def test_what_is_closed_after_a_recovery_is_given_back(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        service.kill()
        service.recover()
        for client in clients:
            assert service.record(client)
            client.do("b.close()")
        until(lambda: not service.status()["clients"], "both have said goodbye")


def test_more_is_attached_by_the_same_client(runtime_dir: Path, path: Path, source_file: SourceFile) -> None:
    other = source_file(PAGES * PAGE, 7, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        client = service.client("ram0", "shared")
        number = service.record(client)["id"]
        for page in (5, 6):
            service.kill()
            with pytest.raises(PuppetError) as told:
                client.attach("ram1", "private", "c")
            assert told.value.kind == "NoSupervisor"
            service.recover()
            client.attach("ram1", "private", "c")
            assert client.do(f"words(c, [{page}])") == [word(page * PAGE, 7)]
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
            record = service.record(client)
            assert record["id"] == number and len(record["blocks"]) == 2
            assert len(service.status()["clients"]) == 1
            client.do("c.close()")
            until(lambda: len(service.record(client)["blocks"]) == 1, "one is left")
        client.do("b.close()")
        until(lambda: not service.status()["clients"], "it has said goodbye")


def test_what_was_closed_while_nobody_listened(runtime_dir: Path, path: Path, source_file: SourceFile) -> None:
    """Its addresses may be those of what the same client attaches next."""
    other = source_file(PAGES * PAGE, 7, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        client = service.client("ram0", "shared")
        client.attach("ram1", "private", "c")
        client.do("where = address(c)")
        service.kill()
        client.do("c.close()")
        service.recover()
        client.attach("ram1", "private", "d")
        assert client.do("address(d) == where"), "the kernel gives the same addresses again"
        assert client.do("words(d, [1])") == [word(PAGE, 7)]
        assert len(service.record(client)["blocks"]) == 2


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_other_memory_at_the_addresses_of_what_was_closed(runtime_dir: Path, path: Path, mode: str) -> None:
    """The next supervisor believes for a while that a block is still there: it must leave alone what is."""
    length = PAGES * PAGE
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        client.do("where = address(b)")
        service.kill()
        client.do("b.close()")
        client.do("libc.mmap.restype = ctypes.c_void_p")
        flags = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000"  # MAP_FIXED_NOREPLACE
        order = f"libc.mmap(ctypes.c_void_p(where), ctypes.c_size_t({length}), 3, {flags}, -1, ctypes.c_long(0))"
        assert client.do(f"{order} == where")
        service.recover()
        looked = time.monotonic() + 2.5  # it looks after clients that it does not hear once a second
        until(lambda: time.monotonic() > looked, "it has looked")
        assert client.do(f"ctypes.string_at(where, {length}).strip(bytes(1)).hex()") == ""


def test_a_fork_does_not_resume_its_parents_session(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0")
        number = service.record(client)["id"]
        service.kill()
        assert client.do("child('words(b, [8])')") == "ended -11", "nobody to be a client of"
        service.recover()
        assert client.do("child('words(b, [8])')") == [word(8 * PAGE)]
        assert client.do("child('b.close()')") is None
        assert client.do("words(b, [9])") == [word(9 * PAGE)]
        until(lambda: [record["id"] for record in service.status()["clients"]] == [number], "the children have left")
        client.do("b.close()")
        until(lambda: not service.status()["clients"], "it has said goodbye")


def test_one_that_does_not_know_us_gets_a_new_client(runtime_dir: Path, path: Path) -> None:
    """After ``--abandon``: what was attached stays with its worker, what comes is served anew."""
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0", "shared")
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.kill()
        service.start(abandon=True)
        service.await_ready()
        client.attach("ram0", "private", "c")
        assert len(service.status()["clients"]) == 1 and len(service.record(client)["blocks"]) == 1
        assert client.do("words(c, [2])") == [word(2 * PAGE)]
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        client.do("b.close()")
        client.do("c.close()")
        until(lambda: not service.status()["clients"], "it has said goodbye")
        client.close()


def test_after_an_orderly_end_there_is_nothing_to_resume(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0")
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0
        service.start()
        service.await_ready()
        client.attach("ram0", "private", "c")
        assert client.do("words(c, [2])") == [word(2 * PAGE)]
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert len(service.record(client)["blocks"]) == 1
        client.do("b.close()")
