"""A running QEMU as page source: what ends it, and when. The VM lives on, and nothing is zeros that is not zeros."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
from pathlib import Path

import pytest

from tests.system.qemu import (
    PAGE,
    PAUSE,
    SLOWLY,
    Qemu,
    Vm,
    await_line,
    memory,
    options,
    qemu_source,
    refused,
    sweep,
)
from tests.system.qemu_between import EARLY, Between
from tests.system.service import PuppetError, Service, until
from tests.unit.protocol import qemu_streams as streams

INTERRUPTED = 130
LIVE = ("--mode", "live")


def given_back(vm: Vm) -> None:
    """It runs, and its migration settings are as they were."""
    until(lambda: vm.status == "running", "the VM runs", 30)
    assert vm.lives()
    assert not [one for one in vm.execute("query-migrate-capabilities") if one["state"]]


def some_are_lost(directory: Path) -> None:
    """A client that needs all pages is informed, and reads no zeros."""
    with Service(directory / "r", f"ram0=ipc://{directory}/s/m") as house:
        with pytest.raises(PuppetError) as raised:
            house.client().do("b.ensure()", 60)
        assert raised.value.kind == "PageLost"


# --- Ctrl-C in each phase ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "command"),
    [
        (LIVE, "migrate-set-capabilities"),
        (LIVE, "migrate"),
        (PAUSE, "migrate-set-capabilities"),
        (PAUSE, "migrate"),
        (PAUSE, "migrate-start-postcopy"),
    ],
)
def test_ctrl_c_while_it_begins(vm: Vm, place: Path, mode: tuple[str, ...], command: str) -> None:
    found = threading.Event()

    def interrupt() -> None:
        assert found.wait(30)
        source.send_signal(signal.SIGINT)

    with (
        Between(vm, place, command, interrupt) as between,
        qemu_source(place, *between.options, *mode, status=None) as source,
    ):
        found.set()
        assert source.wait(90) in (0, INTERRUPTED)
    given_back(vm)


def test_ctrl_c_in_the_middle_of_a_live_image(vm: Vm, place: Path) -> None:
    with Between(vm, place, most=EARLY) as between, qemu_source(place, *between.options) as source:
        assert between.held.wait(60)
        await_line(place, "ready")
        source.send_signal(signal.SIGINT)
        between.go_on()  # an old QEMU must be read to the end
        assert source.wait(90) == 0
    given_back(vm)


def test_ctrl_c_before_the_vm_stands_still(vm: Vm, place: Path) -> None:
    """The operator has not begun post-copy: all that has come will come again."""
    with qemu_source(place, "--migration", f"unix:{place}/mig", *PAUSE) as source:
        await_line(place, '"migrate-start-postcopy"')
        vm.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        vm.execute("migrate-set-parameters", max_bandwidth=1 << 20)
        vm.execute("migrate", uri=f"unix:{place}/mig")
        await_line(place, "ready")
        source.send_signal(signal.SIGINT)
        assert source.wait(90) == 0
    until(lambda: vm.execute("query-migrate")["status"] == "failed", "QEMU notices", 30)
    assert vm.status == "running" and vm.lives()


def test_ctrl_c_while_the_vm_stands_still(vm: Vm, place: Path) -> None:
    """The rest is taken at full speed, where QEMU needs that."""
    with qemu_source(place, *options(vm, place, *PAUSE, "--rate", "64K")) as source:
        await_line(place, "the VM stands still")
        source.send_signal(signal.SIGINT)
        assert source.wait(90) == 0
    given_back(vm)


def test_ctrl_c_while_a_post_copy_is_interrupted(vm: Vm, place: Path) -> None:
    """Before 10.2: it goes on until all is there, or the VM would stay paused."""
    if vm.qemu.version >= (10, 2):
        return  # never in that phase: a cut gives the VM back
    with qemu_source(place, *options(vm, place, *SLOWLY)) as source:
        await_line(place, "the VM stands still")
        vm.execute("migrate-pause")
        await_line(place, "until its migration goes on")
        source.send_signal(signal.SIGINT)
        assert source.wait(90) == 0
    given_back(vm)


# --- QEMU dies in each phase ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [LIVE, PAUSE])
def test_a_qemu_that_dies_at_the_start(newest: Qemu, place: Path, mode: tuple[str, ...]) -> None:
    with Vm(newest, place / "vm") as vm, Between(vm, place, "migrate", vm.process.kill) as between:
        said = refused(place, *between.options, *mode)
    assert said.startswith("postcopy source: the QEMU at") and "is gone" in said


def test_a_qemu_that_dies_in_the_middle_of_a_live_image(vm: Vm, place: Path) -> None:
    with Between(vm, place, most=EARLY) as between, qemu_source(place, *between.options):
        assert between.held.wait(60)
        await_line(place, "ready")
        vm.process.kill()
        between.close()
        said = await_line(place, "they are lost")
        assert "the live image ended with" in said
        some_are_lost(place)


def test_a_qemu_that_dies_before_it_stands_still(vm: Vm, place: Path) -> None:
    with Between(vm, place, "migrate-start-postcopy", vm.process.kill) as between:
        with qemu_source(place, *between.options, *PAUSE, status=None) as source:
            until(lambda: source.poll() is not None or "are lost" in (place / "source.log").read_text(), "it ends", 60)
        assert "is gone" in await_line(place, "gone")


# --- streams that are not right, and QEMU's own reasons ---------------------------------------------------------------


def arm() -> bytes:
    return streams.header("virt", streams.subsection("configuration/target-page-bits", struct.pack(">I", 16)))


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" * 9, "no migration stream of QEMU"),
        (b"QEVM\0\0\0\3\x07\0\0\0\x02pc\x99" + bytes(99), "type 0x99"),
        (b"", "closed the connection"),
        (streams.snapshot()[:60], "closed the connection"),
        (arm() + bytes(20), "virt has pages of 65536 bytes; only 4096 are understood"),
        (streams.header() + streams.start(streams.BLOCKS, called="vfio") + bytes(99), "section vfio"),
    ],
)
def test_something_else_comes_to_the_socket(place: Path, sent: bytes, why: str) -> None:
    with qemu_source(place, "--migration", f"unix:{place}/mig", status=1) as source:
        await_line(place, "type into")
        send(place, sent)
        assert source.wait(60) == 1
    assert why in await_line(place, "postcopy source: ").splitlines()[-1]


def send(place: Path, *pieces: bytes) -> None:
    """Each piece but the first when the source serves."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError):
        connection.connect(f"{place}/mig")
        connection.sendall(pieces[0])
        for piece in pieces[1:]:
            await_line(place, "ready")
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(60)
        connection.recv(1)


@pytest.mark.parametrize("wrong", ["cut", "corrupt"])
def test_a_stream_that_goes_wrong(place: Path, wrong: str) -> None:
    """What came before is served; the rest is lost, never zeros."""
    whole = streams.snapshot()
    half = whole[: len(whole) // 2]
    name, last = "pc.ram", 15 * PAGE
    with qemu_source(place, "--migration", f"unix:{place}/mig"):
        await_line(place, "type into")
        send(place, half, b"\xff" * 9999 if wrong == "corrupt" else b"")
        said = await_line(place, "they are lost")
        assert ("the stream cannot be read" if wrong == "corrupt" else "closed the connection") in said
        with Service(place / "r", f"ram0=ipc://{place}/s/{name}") as house:
            client = house.client()
            assert client.do("bytes(b.buf[:4096]).hex()", 60) == (streams.content(0, 0) or b"").hex()
            with pytest.raises(PuppetError) as raised:
                client.do(f"b.ensure({last}, {PAGE})", 60)
            assert raised.value.kind == "PageLost"


def test_a_device_that_cannot_be_migrated(qemu: Qemu, place: Path) -> None:
    device = "-object memory-backend-ram,id=s,size=1M,share=on -device ivshmem-plain,memdev=s,master=off"
    with Vm(qemu, place / "vm", *device.split()) as vm:
        for mode in (LIVE, PAUSE):
            said = refused(place, *options(vm, place, *mode))
            assert "QEMU refuses migrate: " in said and "ivshmem" in said
            given_back(vm)


def test_another_migration_of_the_vm_is_left_alone(vm: Vm, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{place}/other")
        other.listen(1)
        vm.execute("migrate-set-parameters", max_bandwidth=1 << 16)
        vm.execute("migrate", uri=f"unix:{place}/other")
        connection, _ = other.accept()
        with connection:
            until(lambda: vm.execute("query-migrate")["status"] == "active", "it is under way", 30)
            for mode in (LIVE, PAUSE):
                assert "another migration of this VM is under way" in refused(place, *options(vm, place, *mode))
            assert vm.execute("query-migrate")["status"] == "active"
    given_back(vm)


def test_a_second_migration_to_one_socket(vm: Vm, place: Path) -> None:
    """Refused, whenever it comes; the first one is complete."""
    with qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        for _ in range(2):
            send(place, streams.header() + bytes(99))
        await_line(place, "is refused")
        vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        with Service(place / "r", f"ram0=ipc://{place}/s/m"):
            assert len(sweep(memory(place))) <= 2
        await_line(place, "the VM is running")
    given_back(vm)


def test_where_a_second_source_would_listen(vm: Vm, place: Path) -> None:
    with qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        other = ("--listen", f"ipc://{place}/s2", "--migration", f"unix:{place}/mig")
        assert "another program listens at unix:" in refused(place, *other)
        assert "another program listens at ipc:" in refused(place, "--migration", f"unix:{place}/mig2")
        vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        await_line(place, "the VM is running")
