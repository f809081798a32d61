"""What a next supervisor refuses, in one line and with nothing lost; who else stands before a custodian's door."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel import descriptors
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import TakeOver
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Option, Service, alive, refused, until, word

PAGES = 512
SIZE = PAGES * PAGE
KEPT = "nothing is changed"


@pytest.fixture
def orphaned(runtime_dir: Path, source_file: SourceFile) -> Iterator[Service]:
    """A service whose supervisor is dead, with one client; its own command line must be able to recover it."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        worker = service.worker(client)
        service.kill()
        yield service
        service.recover()
        assert client.do("words(b, [1, 2])") == [word(PAGE), word(2 * PAGE)]
        assert service.worker(client) == worker and service.block()["received"] >= 2


def fails(service: Service, *blocks: str, **options: Option) -> str:
    """The one line of a supervisor that cannot stand."""
    status, text = refused(service.directory, *(blocks or service.blocks), options=options)
    lines = [line for line in text.splitlines() if "custodian" not in line or "postcopy serve:" in line]
    assert status == 1 and len(lines) == 1 and lines[0].startswith("postcopy serve: "), text
    return lines[0]


def test_clients_are_not_forgotten_by_mistake(orphaned: Service) -> None:
    line = fails(orphaned)
    assert "1 clients" in line and "--recover" in line and "--abandon" in line


def test_another_file(orphaned: Service, source_file: SourceFile) -> None:
    other = source_file(SIZE, 1, "other")
    assert KEPT in fails(orphaned, f"ram0={other}", recover=True)


def test_a_file_that_was_replaced(orphaned: Service) -> None:
    path = Path(orphaned.blocks[0].partition("=")[2])
    path.rename(path.with_suffix(".old"))
    assert "cannot be opened" in fails(orphaned, recover=True)
    path.write_bytes(path.with_suffix(".old").read_bytes())
    assert "another file" in fails(orphaned, recover=True)
    path.with_suffix(".old").rename(path)


@pytest.mark.parametrize("blocks", [["ram1=zero:1M"], ["ram0=zero:2M"], ["ram0=ipc:///tmp/nobody/ram0"]])
def test_another_command_line(orphaned: Service, blocks: list[str]) -> None:
    assert KEPT in fails(orphaned, *blocks, recover=True)


def test_another_page_size(orphaned: Service) -> None:
    assert "pages of 4" in fails(orphaned, recover=True, page_size="2M")


def test_a_new_block_that_cannot_be(orphaned: Service) -> None:
    assert "nowhere" in fails(orphaned, *orphaned.blocks, "ram1=/nowhere/at/all", recover=True)


def test_a_new_block_beside_the_old_one(orphaned: Service) -> None:
    orphaned.blocks = (*orphaned.blocks, "ram1=zero:1M")
    orphaned.recover()
    assert orphaned.client("ram1").do("words(b, [7])") == [0]
    assert {block["name"] for block in orphaned.status()["blocks"]} == {"ram0", "ram1"}
    orphaned.kill()


def test_a_new_block_whose_source_is_away(orphaned: Service) -> None:
    """Who waits for it replaces no worker meanwhile: it is not waited for, and the custodian goes on as before."""
    blocks = (*orphaned.blocks, "far=ipc:///tmp/nobody/far")
    status, text = refused(orphaned.directory, *blocks, options={"recover": True})
    assert status == 1 and "ipc:///tmp/nobody does not answer" in text and KEPT in text.splitlines()[-1], text


def test_unknown_processes_at_the_takeover_socket(orphaned: Service) -> None:
    """Nonsense and other versions are shown out; a supervisor that vanishes in between costs nothing."""
    path = str(orphaned.directory / "private/custodian")
    for words in (b"nonsense", encode(TakeOver(1))[:-1], b"\x93\x63\x53\x01", encode(TakeOver(os.getpid()))):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.connect(path)
            visitor.settimeout(10)
            visitor.send(words)
            heard = descriptors.receive_message(visitor, wait=True)
            descriptors.close_all(heard.fds)


def test_a_custodian_of_another_version(runtime_dir: Path, source_file: SourceFile) -> None:
    """Whoever answers with another version's words, or with none, is not touched."""
    (runtime_dir / "private").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(runtime_dir / "private/custodian"))
        listener.listen(8)
        service_line = f"ram0={source_file(SIZE)}"
        for answer in (b"\x92\x63\x5a", b""):
            pid = os.fork()
            if pid == 0:
                with listener.accept()[0] as visitor:
                    visitor.recv(1000)
                    if answer:
                        visitor.send(answer)
                os._exit(0)
            status, text = refused(runtime_dir, service_line, options={"recover": True})
            os.waitpid(pid, 0)
            assert status == 1 and "version" in text and KEPT in text and "--abandon" in text, text
            assert text.count("\n") == 0
        pid = os.fork()
        if pid == 0:
            listener.accept()[0].close()
            os._exit(0)
        with Service(runtime_dir, service_line, abandon=True) as service:
            os.waitpid(pid, 0)
            assert service.client().do("words(b, [7])") == [word(7 * PAGE)]


def test_abandoned(runtime_dir: Path, source_file: SourceFile) -> None:
    """The old client goes on with its worker, the new service has nothing to do with it, and neither hears the
    other."""
    path = source_file(SIZE)
    options: dict[str, Any] = {"fault_around": "4K", "background_rate": "0", "orphan_timeout": "0.2"}
    with (
        Source(f"far={path}") as source,
        Service(runtime_dir, f"ram0={path}", source.block("far"), **options) as service,
    ):
        old, waits = service.client(), service.client("far")
        people = service.people()
        service.kill()
        waits.begin("words(b, [5])")
        service.start(abandon=True)
        service.await_ready()
        assert service.status()["clients"] == [] and service.status()["recovered"] == 0
        new, far = service.client(), service.client("far")
        assert old.do("words(b, [1])") == new.do("words(b, [1])") == [word(PAGE)]
        assert far.do("words(b, [5])") == [word(5 * PAGE)] and not waits.answered(0.3)
        ids = {record["id"] for record in service.status()["clients"]}
        assert ids == {3, 4}, "no number is used twice"
        for client in (old, waits):
            client.kill()
        until(lambda: not any(alive(pid) for pid in people), "with its clients the old custodian ends too")
