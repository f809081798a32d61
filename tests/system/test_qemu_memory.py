"""A running QEMU as page source: kinds of memory and of connections, and the rounds before post-copy."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import postcopy
from tests.kernel.huge_pool import reserved
from tests.system.qemu import MIB, PAGE, PAUSE, SLOWLY, Qemu, Vm, await_line, memory, options, qemu_source, sweep
from tests.system.service import Service, until

pytestmark = pytest.mark.usefixtures("require_userfaultfd")
OTHER = 8 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_blocks_over_tcp_after_rounds_of_pre_copy(qemu: Qemu, place: Path) -> None:
    """The operator types. Most of what came in the rounds is old: QEMU discards it. Half of one block is zeros."""
    other = os.urandom(OTHER // 2) + bytes(OTHER // 2)
    (place / "other").write_bytes(other)
    more = ["-m", f"{MIB}M,slots=1,maxmem=256M", "-device", "pc-dimm,memdev=b,id=d"]
    more += ["-object", f"memory-backend-file,id=b,size={OTHER},mem-path={place}/other,share=off"]
    uri = f"tcp:127.0.0.1:{free_port()}"
    with Vm(qemu, place / "vm", *more) as vm, qemu_source(place, "--migration", uri, *PAUSE):
        await_line(place, '"migrate-start-postcopy"')
        wanted = ["postcopy-ram", "postcopy-preempt"]
        vm.execute("migrate-set-capabilities", capabilities=[{"capability": one, "state": True} for one in wanted])
        vm.execute("migrate-set-parameters", max_bandwidth=16 << 20, max_postcopy_bandwidth=0)
        vm.execute("migrate", uri=uri)
        until(lambda: vm.execute("query-migrate").get("ram", {}).get("dirty-sync-count", 0) >= 2, "some rounds", 60)
        vm.execute("migrate-start-postcopy")
        await_line(place, "the VM stands still")
        truth = vm.save()
        with Service(place / "r", f"ram0=ipc://{place}/s/m", f"other=ipc://{place}/s/b"):
            assert memory(place) == truth
            assert memory(place, "other") == other
        if vm.qemu.version < (10, 2):
            await_line(place, 'type into the VM\'s monitor: {"execute": "cont"}')
            until(lambda: vm.status == "postmigrate", "the migration has ended", 30)
            vm.execute("cont")
        until(lambda: vm.status == "running", "the VM runs", 30)
        assert vm.lives()


def test_a_migration_that_ends_in_pre_copy(qemu: Qemu, place: Path) -> None:
    """The operator never began post-copy: QEMU stops the VM and sends the rest. It is an image, and the VM runs on."""
    with Vm(qemu, place / "vm") as vm, qemu_source(place, "--migration", f"unix:{place}/mig", *PAUSE):
        await_line(place, '"migrate-start-postcopy"')
        vm.execute("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        vm.execute("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
        vm.execute("migrate", uri=f"unix:{place}/mig")
        await_line(place, "are here")
        with Service(place / "r", f"ram0=ipc://{place}/s/m"):
            assert len(sweep(memory(place))) <= 2
        until(lambda: vm.execute("query-migrate")["status"] in ("failed", "completed"), "it has ended", 30)
        if vm.status == "postmigrate":
            vm.execute("cont")
        assert vm.lives()


def test_huge_pages(qemu: Qemu, place: Path) -> None:
    """QEMU sends and takes requests for whole huge pages; an old one is interrupted in the middle, and goes on."""
    backend = f"memory-backend-memfd,id=m,size={MIB}M,hugetlb=on,hugetlbsize=2M"
    with reserved(MIB // 2), Vm(qemu, place / "vm", memory=backend) as vm:
        with qemu_source(place, *options(vm, place, *SLOWLY)):
            await_line(place, "the VM stands still")
            truth = vm.save()
            with Service(place / "r", f"ram0=ipc://{place}/s/m"):
                with postcopy.attach("ram0", runtime_dir=place / "r") as block:
                    places = [vm.size - PAGE, (5 << 20) + 3 * PAGE]
                    assert [bytes(block.buf[at : at + PAGE]) for at in places] == [truth[at:][:PAGE] for at in places]
                if vm.qemu.version < (10, 2):
                    vm.execute("migrate-pause")
                    await_line(place, "the migration goes on")
                vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
                assert memory(place) == truth
            await_line(place, "the VM is running")
        assert vm.lives()


def test_what_a_supervisor_shows_of_it(newest: Qemu, place: Path) -> None:
    """Phase, rate, what is left and the state of the VM: in status, and in metrics."""
    with Vm(newest, place / "vm") as vm, qemu_source(place, *options(vm, place, *SLOWLY)):
        await_line(place, "the VM stands still")
        with Service(place / "r", f"ram0=ipc://{place}/s/m") as house:
            found = until(lambda: house.status()["sources"][0]["progress"], "it is informed", 30)
            assert (found["phase"], found["origin"]) == ("post-copy", "VM stopped")
            assert 0 < found["left"] <= (MIB + 4) << 20 and found["received"] > 0
            until(lambda: house.status()["sources"][0]["progress"]["bytes_per_s"] > 0, "a rate", 30)
            vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)

            def ended() -> bool:
                found = house.status()["sources"][0]["progress"]
                return (found["phase"], found["origin"], found["left"]) == ("complete", "VM running", 0)

            until(ended, "all of it is there, and the VM runs", 60)
        await_line(place, "the VM is running")
