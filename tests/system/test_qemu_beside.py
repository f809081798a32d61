"""The whole picture of post-copy: a VM's memory arrives from a real QEMU while a real vhost-user back-end works on it,
beside ordinary clients, and its worker is killed again and again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from postcopy.vhost_user import BackEnd, GuestMemory, blk
from postcopy.vhost_user.virtqueue import Ring, RingEvents, start_ring
from tests.system.back_ends import disk_bytes, storage_daemon
from tests.system.qemu import MIB, PAGE, PAUSE, Qemu, Vm, await_line, memory, options, qemu_source
from tests.system.service import Service, called, end_by_pidfd, until

KILLS = 20
EACH = 2  # requests between two kills
REQUESTS = KILLS * EACH
AT = 16 << 20  # where the guest's driver has its ring; the guest itself writes below it
HEADER, DATA, STATUS = 0, PAGE, 3 * PAGE  # the pages of a request: none of them lies beside another one's
STRIDE = 8 * PAGE
SECTORS = 2 * PAGE // 512


def pages_of(number: int) -> int:
    return AT + 8 * PAGE + number * STRIDE


def driver_memory() -> bytes:
    """What a guest's driver has prepared: reads and writes in turn, the first of them available."""
    image = bytearray(MIB << 20)
    ring = ring_in(memoryview(image))
    for number in range(REQUESTS):
        at, kind = pages_of(number), blk.WRITE if number % 2 else blk.READ
        image[at : at + 16] = blk.header(kind, number * SECTORS)
        image[at + DATA : at + STATUS] = bytes([number + 1]) * (2 * PAGE)
        image[at + STATUS] = blk.PENDING
        if number < EACH:
            offer(ring, number)
    return bytes(image)


def ring_in(memory: memoryview) -> Ring:
    return Ring(memory, 128, AT, AT + PAGE, AT + 2 * PAGE)


def offer(ring: Ring, number: int) -> None:
    at, kind = pages_of(number), blk.WRITE if number % 2 else blk.READ
    ring.submit(blk.request(kind, at + HEADER, [(at + DATA, 2 * PAGE)], at + STATUS), 3 * number)


@pytest.mark.usefixtures("require_userfaultfd")
def test_a_back_end_works_while_the_memory_arrives(qemu: Qemu, place: Path, tmp_path: Path) -> None:
    (place / "ram").write_bytes(driver_memory())
    backend = f"memory-backend-file,size={MIB}M,id=m,mem-path={place}/ram,share=off"
    with (
        Vm(qemu, place / "vm", memory=backend, written=AT) as vm,
        qemu_source(place, *options(vm, place, *PAUSE, "--rate", "256K")),
    ):
        await_line(place, "the VM stands still")
        truth = vm.save()
        with Service(place / "r", f"ram0=ipc://{place}/s/m", restart_interval=0.1, fault_around="4K") as house:
            client = house.client()
            client.begin(f"[bytes(b.buf[at:at+4]).hex() for at in range(1 << 20, {AT}, 64 << 12)]")
            with storage_daemon(tmp_path) as program:
                with BackEnd(program.socket, [GuestMemory("ram0", 0, None, 0)], place / "r") as back_end:
                    work(house, back_end)
                disk = program.disk.read_bytes()
            status = vm.execute("query-migrate")["status"]
            seen = client.answer(60)
            assert seen == [truth[at : at + 4].hex() for at in range(1 << 20, AT, 64 << 12)]
            assert status.startswith("postcopy"), "the transfer went on all the time"
            vm.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
            assert memory(place)[: 16 << 20] == truth[:AT]
        await_line(place, "the VM is running")
        assert vm.lives()
    expected = bytearray(disk_bytes(2048))
    for number in range(1, REQUESTS, 2):
        expected[number * 2 * PAGE : (number + 1) * 2 * PAGE] = bytes([number + 1]) * (2 * PAGE)
    assert disk == expected


def work(house: Service, back_end: BackEnd) -> None:
    """All requests, EACH at a time. The worker is killed while the back-end is about to fault."""
    shared, disk = back_end.blocks["ram0"], disk_bytes(2048)
    killed: set[int] = set()

    def worker() -> int:
        found = [one["worker_pid"] for one in house.status()["clients"] if one["kind"] == "vhost-user"]
        # A fork of the custodian has its parent's name at first.
        return next((pid for pid in found if pid and pid not in killed and called(pid).startswith("postcopy-w")), 0)

    with mmap.mmap(shared.memory, shared.length) as mapped, RingEvents() as bells, memoryview(mapped) as view:
        ring = ring_in(view)
        for round in range(KILLS):
            pid = until(worker, "its worker is there", 60)
            if round:
                for number in range(round * EACH, (round + 1) * EACH):
                    offer(ring, number)
            else:
                start_ring(back_end, 0, ring, bells, "ram0")
                ring.next_available = EACH
            bells.notify()
            end_by_pidfd(pid, 9, "postcopy-w")
            killed.add(pid)
            until(lambda: os.pread(shared.memory, 4, AT + 2 * PAGE) != bytes(4), "the used ring has come", 60)
            until(lambda: (ring.completed(), ring.in_flight == 0)[1], "all requests are used", 60)
        for number in range(REQUESTS):
            at = pages_of(number)
            assert view[at + STATUS] == 0
            wanted = bytes([number + 1]) * (2 * PAGE) if number % 2 else disk[number * 2 * PAGE :][: 2 * PAGE]
            assert view[at + DATA : at + STATUS] == wanted
    assert len(killed) == KILLS
