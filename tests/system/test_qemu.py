"""A running QEMU as page source: real QEMUs of two ages, real supervisors and clients."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import postcopy
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.qemu_stream import StreamParser
from tests.system.qemu import PAGE, PAUSE, SLOWLY, Qemu, Vm, await_line, memory, options, qemu_source, refused, sweep
from tests.system.qemu_between import EARLY, Between
from tests.system.service import PuppetError, Service, environment, until
from tests.unit.protocol.qemu_streams import Kept


@pytest.mark.leaves_files("the source is killed")
def test_captured_live_by_eight_clients_then_again_by_a_source_that_is_killed(vm: Vm, place: Path) -> None:
    """The guest writes its memory without pause. The truth is what it has when QEMU begins: it stands still then."""
    truth: list[bytes] = []

    def stand_still() -> None:
        vm.execute("stop")
        truth.append(vm.save())

    with Between(vm, place, "migrate", stand_still, most=EARLY) as between, qemu_source(place, *between.options):
        assert between.held.wait(60), "some pages have come"
        vm.execute("cont")  # an old QEMU has done that itself
        between.go_on()
        await_line(place, "ready")
        with Service(place / "r", f"ram0=ipc://{place}/s/m", f"bios=ipc://{place}/s/pc.bios") as house:
            clients = [house.client() for _ in range(8)]
            for client in clients:
                client.begin("__import__('hashlib').sha256(b.buf).hexdigest()")
            expected = hashlib.sha256(truth[0]).hexdigest()
            assert [client.answer(60) for client in clients] == [expected] * 8
        assert vm.lives()
    assert vm.status == "running"
    assert not [one for one in vm.execute("query-migrate-capabilities") if one["state"]]
    (place / "source.log").unlink()
    captured_by_a_source_that_is_killed(vm, place)


def captured_by_a_source_that_is_killed(vm: Vm, place: Path) -> None:
    """From 10.2 on the VM runs on at once; an older one is paused, and the next source recovers and continues it."""
    with qemu_source(place, *options(vm, place, *SLOWLY), status=None) as source:
        await_line(place, "the VM stands still")
        truth = vm.save()
        with Service(place / "r", f"ram0=ipc://{place}/s/m") as house:
            client = house.client()
            assert client.do(f"bytes(b.buf[-{PAGE}:]).hex()", 60) == truth[-PAGE:].hex()
            source.kill()
            source.wait(10)
    if vm.qemu.version < (10, 2):
        until(lambda: vm.execute("query-migrate")["status"] == "postcopy-paused", "it is paused", 30)
        (place / "source.log").unlink()
        with qemu_source(place, *options(vm, place, *PAUSE)):
            await_line(place, "ready")
            with Service(place / "r", f"ram0=ipc://{place}/s/m"):
                assert memory(place) == truth
            await_line(place, "the VM is running")
        assert not [one for one in vm.execute("query-migrate-capabilities") if one["state"]]
    until(lambda: vm.status == "running", "it runs on", 30)
    assert vm.lives()


def test_a_second_live_image_is_another(vm: Vm, place: Path) -> None:
    seen = []
    for _ in range(2):
        with qemu_source(place, *options(vm, place)):
            await_line(place, "are here")
            with Service(place / "r", f"ram0=ipc://{place}/s/m"):
                seen.append(sweep(memory(place))[0])
        (place / "source.log").unlink()
        assert vm.lives()
    assert seen[0] < seen[1]


def test_a_paused_vm(vm: Vm, place: Path) -> None:
    """An old QEMU would resume it: refused. A new one: the image is what the VM has."""
    vm.execute("stop")
    truth = vm.save()
    if vm.qemu.version < (9, 0):
        with qemu_source(place, *options(vm, place), status=1) as source:
            assert source.wait(30) == 1
        assert "would resume it" in await_line(place, "postcopy source: ")
    else:
        with qemu_source(place, *options(vm, place)):
            await_line(place, "ready")
            with Service(place / "r", f"ram0=ipc://{place}/s/m"):
                assert memory(place) == truth
    assert vm.status == "paused" and vm.save() == truth


def test_pause_gives_the_vm_back(vm: Vm, place: Path) -> None:
    with qemu_source(place, *options(vm, place, *PAUSE)):
        await_line(place, "ready")
        with Service(place / "r", f"ram0=ipc://{place}/s/m"):
            rounds = sweep(memory(place))
        assert len(rounds) <= 2 and rounds[-1] in (rounds[0], rounds[0] - 1)
        await_line(place, "the VM is running")
        assert vm.lives()
    assert not [one for one in vm.execute("query-migrate-capabilities") if one["state"]]


def test_pause_requests_what_clients_touch(vm: Vm, place: Path) -> None:
    """The memory comes at 1 MiB a second. Pages at its end are there long before the scan."""
    with qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        truth = vm.save()
        with Service(place / "r", f"ram0=ipc://{place}/s/m") as house:
            client = house.client()
            places = [vm.size - (at + 1) * 37 * PAGE for at in range(8)]
            seen = client.do(f"[bytes(b.buf[at:at+4096]).hex() for at in {places}]", 60)
            assert [bytes.fromhex(one) for one in seen] == [truth[at : at + PAGE] for at in places]
            found = vm.execute("query-migrate")
            assert found["status"].startswith("postcopy") and found["ram"]["postcopy-requests"] > 0
            assert vm.status == "finish-migrate"
            vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
            assert memory(place) == truth
        await_line(place, "the VM is running")
        assert vm.lives()


def test_an_interrupted_post_copy_goes_on(vm: Vm, place: Path) -> None:
    """An old QEMU connects again and sends what is missing; a new one is never in that phase."""
    if vm.qemu.version >= (10, 2):
        return
    with qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        truth = vm.save()
        with Service(place / "r", f"ram0=ipc://{place}/s/m") as house:
            client = house.client()
            here = client.do(f"b.buf[{vm.size - PAGE}]", 60)
            vm.execute("migrate-pause")
            client.begin(f"bytes(b.buf[{vm.size - 9 * PAGE}:{vm.size - 8 * PAGE}]).hex()")
            await_line(place, "the migration goes on")
            vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
            assert bytes.fromhex(client.answer(60)) == truth[vm.size - 9 * PAGE :][:PAGE]
            assert here == truth[vm.size - PAGE] and memory(place) == truth
        await_line(place, "the VM is running")
    assert vm.lives()


def test_a_qemu_that_dies(vm: Vm, place: Path) -> None:
    """What has come is served; what has not is lost, never zeros."""
    with qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        vm.process.kill()
        await_line(place, "pages are lost")
        with Service(place / "r", f"ram0=ipc://{place}/s/m") as house:
            client = house.client()
            with pytest.raises(PuppetError) as raised:
                client.do(f"b.ensure({vm.size - PAGE}, {PAGE})", 30)
            assert raised.value.kind == "PageLost"


def test_without_a_monitor_it_says_what_to_type(vm: Vm, place: Path) -> None:
    with qemu_source(place, "--migration", f"unix:{place}/mig"):
        said = await_line(place, '"migrate"')
        assert '"background-snapshot"' in said
        wanted = [{"capability": "background-snapshot", "state": True}]
        vm.execute("migrate-set-capabilities", capabilities=wanted)
        vm.execute("migrate", uri=f"unix:{place}/mig")
        await_line(place, "are here")
    until(lambda: vm.execute("query-migrate")["status"] == "completed", "it is complete")
    assert vm.lives()


def test_a_real_stream_in_all_slices(vm: Vm, place: Path) -> None:
    """A recorded one: the same in slices of any size, and cut anywhere it is refused."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place}/mig")
        listener.listen(1)
        wanted = [{"capability": "background-snapshot", "state": True}]
        vm.execute("migrate-set-capabilities", capabilities=wanted)
        vm.execute("migrate", uri=f"unix:{place}/mig")
        connection, _ = listener.accept()
        with connection:
            stream = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    (place / "mig").unlink()
    seen = []
    for size in (len(stream), 4097, 100_003):
        kept = Kept()
        parser, waiting = StreamParser(kept), b""
        for at in range(0, len(stream), size):
            waiting += stream[at : at + size]
            waiting = waiting[parser.parse(waiting)[0] :]
        parser.finish()
        assert kept.came == len(kept.pages) == sum(block.size for block in kept.blocks) // PAGE
        seen.append(kept.pages)
    assert seen[0] == seen[1] == seen[2]
    main = [block.name for block in kept.blocks].index("m")
    assert len(sweep(b"".join(seen[0][main, at] for at in range(0, vm.size, PAGE)))) <= 2
    cut = StreamParser(Kept())
    cut.parse(stream[: len(stream) // 2])
    with pytest.raises(BadMessage, match="in the middle"):
        cut.finish()


def test_a_mapped_ram_file(newest: Qemu, place: Path) -> None:
    path = place / "image"
    with Vm(newest, place / "vm") as vm:
        vm.execute("stop")
        truth = vm.save()
        wanted = [{"capability": "mapped-ram", "state": True}]
        vm.execute("migrate-set-capabilities", capabilities=wanted)
        vm.execute("migrate", uri=f"file:{path}")
        until(lambda: vm.execute("query-migrate")["status"] == "completed", "the file is written", 60)
    with Service(place / "r", f"VM=qemu-ram:{path}", f"alone=qemu-ram:{path}?block=m") as house:
        names = {block["name"] for block in house.status()["blocks"]}
        assert {"VM.m", "VM.pc.bios", "alone"} <= names
        for name in ("VM.m", "alone"):
            with postcopy.attach(name, runtime_dir=place / "r") as block:
                assert bytes(block.buf) == truth
        house.kill()
        house.recover()
        with postcopy.attach("VM.m", runtime_dir=place / "r") as block:
            assert bytes(block.buf) == truth
    os.truncate(path, path.stat().st_size // 2)
    ended = serve(place, f"VM=qemu-ram:{path}")
    assert ended.returncode == 2 and "the file has" in ended.stderr and len(ended.stderr.splitlines()) == 1


def serve(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "postcopy_supervisor", *words, "--runtime-dir", str(place / "r")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


def test_bad_input(place: Path) -> None:
    unix = f"unix:{place}/mig"
    assert "no QEMU answers" in refused(place, "--migration", unix, "--qmp", f"{place}/none")
    assert "write unix:PATH or tcp:HOST:PORT" in refused(place, "--migration", "exec:cat")
    assert "an absolute path" in refused(place, "--migration", "unix:mig")
    assert "cannot listen" in refused(place, "--migration", "tcp:203.0.113.1:4444")


def test_a_vm_that_has_not_started(qemu: Qemu, place: Path) -> None:
    with Vm(qemu, place / "fresh", "-S", guest=False) as fresh:
        assert "state prelaunch" in refused(place, *options(fresh, place))
        assert fresh.status == "prelaunch"
