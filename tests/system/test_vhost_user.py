"""Real back-ends on memory whose pages are missing: data, faults, and everybody's death."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from postcopy import attach
from postcopy.commands.attach import parse_region
from postcopy.errors import BackEndGone, BackEndTimeout, BadInput, NoSuchBlock, VhostUserError
from postcopy.vhost_user import BackEnd, GuestMemory, blk
from postcopy.vhost_user.virtqueue import Ring, RingEvents, start_ring
from tests.kernel.huge_pool import reserved
from tests.system.back_ends import disk_bytes, dpdk, running, storage_daemon, storage_daemons
from tests.system.remote import Source
from tests.system.service import Service, alive, end_by_pidfd, environment, until
from tests.system.test_rescue import kill_all

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

PAGE = 4096
PAGES = 64
RING, AVAILABLE, USED = 0, PAGE, 2 * PAGE
FIRST = 3  # the first page behind the ring
STRIDE = 3  # pages of one request: header and status, two of data


def guest_image(path: Path, requests: list[tuple[int, int]], guest: int = 0) -> None:
    """Guest memory with a ring on which ``requests`` (kind, sector) are available already, each of two pages."""
    image = bytearray(PAGES * PAGE)
    ring = Ring(memoryview(image), 32, RING, AVAILABLE, USED)
    for n, (kind, sector) in enumerate(requests):
        at = (FIRST + STRIDE * n) * PAGE
        image[at : at + 16] = blk.header(kind, sector)
        image[at + 100] = blk.PENDING
        image[at + PAGE : at + 3 * PAGE] = bytes([n + 1]) * (2 * PAGE)
        pieces = blk.request(kind, guest + at, [(guest + at + PAGE, 2 * PAGE)], guest + at + 100)
        ring.submit(pieces, 3 * n)
    path.write_bytes(image)


def pages_of(requests: int) -> list[int]:
    return list(range(FIRST + STRIDE * requests))


@contextmanager
def guest(directory: Path, tmp_path: Path, requests: list[tuple[int, int]], **options: Any) -> Iterator[Service]:
    """A service whose block ``guest`` is such an image; a fault brings one page."""
    guest_image(tmp_path / "guest.img", requests)
    with Service(directory, f"guest={tmp_path / 'guest.img'}", fault_around="4K", **options) as service:
        yield service


class Driver:
    """The rings of one back-end, driven from this process through a mapping of the block that touches only what the
    back-end has brought in. ``attach`` would do; this one proves that nobody else faulted."""

    def __init__(self, back_end: BackEnd, block: str = "guest", index: int = 0) -> None:
        shared = back_end.blocks[block]
        self.back_end, self.index, self.shared = back_end, index, shared
        self.memory = mmap.mmap(shared.memory, shared.length)
        self.view = memoryview(self.memory)
        self.ring = Ring(self.view, 32, RING, AVAILABLE, USED)
        self.bells = RingEvents()

    def start(self, offered: int) -> None:
        start_ring(self.back_end, self.index, self.ring, self.bells, self.shared.name)
        self.ring.next_available = offered
        self.bells.notify()

    def received(self) -> list[int]:
        return [page for page, mark in enumerate(self.shared.marks()) if mark == 2]

    def finish(self, within: float = 30.0) -> None:
        """Wait until all that is available is used. The used page may be read once it is there."""
        until(lambda: 2 in self.received(), "the used ring is there", within)
        until(lambda: (self.ring.completed(), self.ring.in_flight == 0)[1], "all requests are used", within)

    def data(self, n: int) -> bytes:
        at = (FIRST + STRIDE * n) * PAGE
        return bytes(self.view[at + PAGE : at + 3 * PAGE])

    def status(self, n: int) -> int:
        return self.view[(FIRST + STRIDE * n) * PAGE + 100]

    def close(self) -> None:
        self.view.release()
        self.memory.close()
        self.bells.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def sectors(first: int) -> bytes:
    return disk_bytes(first + 16)[first * 512 :]


def record(service: Service, name: str) -> dict[str, Any]:
    return next((client for client in service.status()["clients"] if client["name"] == name), {})


def test_a_read_into_missing_pages(runtime_dir: Path, tmp_path: Path) -> None:
    requests = [(blk.READ, 0), (blk.READ, 64), (blk.READ, 1000)]
    with guest(runtime_dir, tmp_path, requests) as service, storage_daemon(tmp_path) as program:
        with BackEnd(program.socket, ["guest"], runtime_dir) as back_end:
            assert back_end.pid == program.pid
            assert back_end.quirks == ["addresses-echoed"]
            assert blk.capacity(back_end.ask(back_end.talk.get_config(0, 8))) == 2048
            with Driver(back_end) as driver:
                assert driver.received() == []
                driver.start(len(requests))
                driver.finish()
                for n, (_, sector) in enumerate(requests):
                    assert driver.status(n) == 0
                    assert driver.data(n) == sectors(sector)
                # Marked and counted a moment after the back-end runs again.
                until(lambda: driver.received() == pages_of(3), "its pages are marked, and no others")
                until(lambda: record(service, "blk.sock")["faults"] == 12, "its faults are counted")
                shown = record(service, "blk.sock")
                assert (shown["kind"], shown["pid"]) == ("vhost-user", program.pid)
                assert back_end.ask(back_end.talk.get_vring_base(0)) == 3
        until(lambda: not record(service, "blk.sock"), "the back-end's client has gone")
        # It has let go and can come back; what is there need not come again.
        with BackEnd(program.socket, ["guest"], runtime_dir) as back_end, Driver(back_end) as driver:
            assert driver.received() == pages_of(3)


def test_a_write_out_of_missing_pages(runtime_dir: Path, tmp_path: Path) -> None:
    with guest(runtime_dir, tmp_path, [(blk.WRITE, 32)]), storage_daemon(tmp_path) as program:
        with BackEnd(program.socket, ["guest"], runtime_dir) as back_end, Driver(back_end) as driver:
            driver.start(1)
            driver.finish()
            assert driver.status(0) == 0
        until(lambda: program.disk.read_bytes()[32 * 512 :][: 2 * PAGE] == b"\1" * (2 * PAGE), "the write arrived")


def test_its_worker_is_killed(runtime_dir: Path, tmp_path: Path) -> None:
    """While the back-end sleeps in a fault on its message thread: a successor makes it answer SET_VRING_ADDR."""
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 4) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        worker = until(lambda: record(service, "blk.sock")["worker_pid"], "it has a worker")
        end_by_pidfd(worker, signal.SIGSTOP, "postcopy-w")
        where = [back_end.user_address("guest", part) for part in (RING, USED, AVAILABLE)]
        question = back_end.talk.set_vring_addr(0, *where)
        back_end.channel.send(question)
        with pytest.raises(BackEndTimeout):
            back_end.channel.receive("SET_VRING_ADDR", timeout=0.3)
        assert driver.received() == []
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        back_end.talk.heard(question, back_end.channel.receive("SET_VRING_ADDR"))
        until(lambda: driver.received() == [USED // PAGE], "the page it waited for is marked")
        driver.start(4)
        driver.finish()
        assert [driver.data(n) for n in range(4)] == [sectors(8)] * 4
        until(lambda: record(service, "blk.sock")["restarts"] == 1, "a successor was counted")


def test_a_back_end_dies_and_comes_back(runtime_dir: Path, tmp_path: Path) -> None:
    with guest(runtime_dir, tmp_path, [(blk.READ, 8)]) as service:
        with storage_daemon(tmp_path) as program:
            back_end = BackEnd(program.socket, ["guest"], runtime_dir)
            program.kill()
            until(lambda: not record(service, "blk.sock"), "the dead back-end's client has gone")
            assert back_end.gone
            with pytest.raises(BackEndGone, match="closed the connection"):
                back_end.ask(back_end.talk.barrier())
            back_end.close()
        with (
            storage_daemon(tmp_path) as program,
            BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
            Driver(back_end) as driver,
        ):
            driver.start(1)
            driver.finish()
            assert driver.data(0) == sectors(8)


def test_post_copy_ends(runtime_dir: Path, tmp_path: Path) -> None:
    """Once all pages are there the back-end runs without us, and not one fault follows."""
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 2) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        driver.start(2)
        driver.finish()
        assert not back_end.complete
        with attach("guest", runtime_dir, mode="shared") as block:
            block.ensure()
        until(lambda: back_end.complete, "the block is released")
        faults = record(service, "blk.sock")["faults"]
        back_end.end()
        at = 40 * PAGE
        driver.view[at : at + 16] = blk.header(blk.READ, 100)
        driver.ring.submit(blk.request(blk.READ, at, [(at + PAGE, 2 * PAGE)], at + 100), 0)
        driver.bells.notify()
        driver.finish()
        assert bytes(driver.view[at + PAGE : at + 3 * PAGE]) == sectors(100)
        assert record(service, "blk.sock")["faults"] == faults


def test_two_back_ends_and_four_native_clients(runtime_dir: Path, tmp_path: Path) -> None:
    """All on the same block: each page is placed once, whoever touches it first."""
    with ExitStack() as stack:
        service = stack.enter_context(guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 3))
        programs = [stack.enter_context(storage_daemon(tmp_path, name=f"blk{n}")) for n in range(2)]
        ends = [stack.enter_context(BackEnd(program.socket, ["guest"], runtime_dir)) for program in programs]
        clients = [service.client("guest", mode) for mode in ("private", "shared") * 2]
        first = stack.enter_context(Driver(ends[0]))
        for client in clients:
            client.begin(f"hash(bytes(b.buf[{40 * PAGE}:]))")
        first.start(3)
        first.finish()
        for client in clients:
            client.answer()
            assert client.do(f"b.buf[{FIRST * PAGE + PAGE}]") == 8
        second = stack.enter_context(Driver(ends[1]))
        second.ring.next_used = 3
        start_ring(ends[1], 0, second.ring, second.bells)
        at = 50 * PAGE  # there since the clients read it: our own mapping is not registered
        second.view[at : at + 16] = blk.header(blk.READ, 200)
        second.ring.next_available = 3
        second.ring.submit(blk.request(blk.READ, at, [(at + PAGE, 2 * PAGE)], at + 100), 12)
        second.bells.notify()
        second.finish()
        assert bytes(second.view[at + PAGE : at + 3 * PAGE]) == sectors(200)
        kinds = sorted(client["kind"] for client in service.status()["clients"])
        assert kinds == ["native"] * 4 + ["vhost-user"] * 2


def test_regions_anywhere(runtime_dir: Path, tmp_path: Path) -> None:
    """Three regions out of two blocks, with holes between them, in no order; the ring in one, the data in another."""
    guest_image(tmp_path / "guest.img", [(blk.READ, 8)], guest=1 << 32)
    (tmp_path / "more.img").write_bytes(bytes(range(256)) * 16 * 40)
    blocks = [f"{name}={tmp_path / name}.img" for name in ("guest", "more")]
    with Service(runtime_dir, *blocks, fault_around="4K") as service, storage_daemon(tmp_path) as program:
        memory = [
            GuestMemory("more", 8 * PAGE, 16 * PAGE, 0),
            GuestMemory("guest", 0, None, 1 << 32),
            GuestMemory("more", 24 * PAGE, 16 * PAGE, 1 << 20),
        ]
        with BackEnd(program.socket, memory, runtime_dir) as back_end, Driver(back_end) as driver:
            assert back_end.guest_address("more", 25 * PAGE) == (1 << 20) + PAGE
            driver.start(1)
            driver.finish()
            assert driver.data(0) == sectors(8)
            until(lambda: record(service, "blk.sock")["faults"] == 6, "its faults are counted")
            assert service.block("more")["received"] == 0
            with pytest.raises(ValueError, match="no region"):
                back_end.guest_address("more", 0)


def test_a_front_end_that_is_killed(runtime_dir: Path, tmp_path: Path) -> None:
    """Its back-end is served until it has let go of its memory, and then it is nobody's client."""
    with guest(runtime_dir, tmp_path, [(blk.READ, 8)]) as service, storage_daemon(tmp_path) as program:
        puppet = service.client(None)
        puppet.do("__import__('postcopy.vhost_user')")
        puppet.do(
            f"e = __import__('postcopy').vhost_user.BackEnd({str(program.socket)!r}, ['guest'], {str(runtime_dir)!r})"
        )
        assert record(service, "blk.sock")["pid"] == program.pid
        puppet.kill()
        puppet.status()
        until(lambda: not record(service, "blk.sock"), "its client is forgotten")
        with BackEnd(program.socket, ["guest"], runtime_dir) as back_end, Driver(back_end) as driver:
            driver.start(1)
            driver.finish()
            assert driver.data(0) == sectors(8)


def test_nobody_there(runtime_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BackEndGone, match="no such socket"):
        BackEnd(tmp_path / "nobody", ["guest"], runtime_dir)


# --- the command line -------------------------------------------------------------------------------------------------


@contextmanager
def attached(runtime_dir: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "postcopy", "attach", "vhost-user", *words, "--runtime-dir", str(runtime_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str], wanted: str) -> str:
    """The first line with these words. Ends the program when they do not come, so that its reader does not wait."""
    assert process.stdout is not None and process.stderr is not None
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if wanted in line:
                return line
    finally:
        timer.cancel()
    raise AssertionError(f"no line has {wanted!r}: {process.stderr.read()}")


def test_the_command_attaches_ends_and_comes_back(runtime_dir: Path, tmp_path: Path) -> None:
    with guest(runtime_dir, tmp_path, []) as service, storage_daemon(tmp_path) as program:
        words = [str(program.socket), "--block", "guest:64K+128K@0x100000", "--block", "guest:0+64K", "--reconnect"]
        with attached(runtime_dir, *words) as process:
            assert f"pid {program.pid}" in line_of(process, "attached")
            assert "128K of guest from 65536 at 0x100000" in line_of(process, "128K")
            assert "libvhost-user" in line_of(process, "quirk")
            assert record(service, "blk.sock")["state"] == "running"
            program.kill()
            line_of(process, "waiting for it")
            with storage_daemon(tmp_path) as program:
                assert f"pid {program.pid}" in line_of(process, "attached")
                with attach("guest", runtime_dir) as block:
                    block.ensure()
                line_of(process, "post-copy has ended")
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 130
                until(lambda: not record(service, "blk.sock"), "it has left")


def test_what_is_refused(runtime_dir: Path, tmp_path: Path) -> None:
    """In one line, and the same back-end can be attached afterwards."""
    cases: list[tuple[list[str | GuestMemory], dict[str, Any], type[Exception], str]] = [
        (["nothing"], {}, NoSuchBlock, "no block nothing"),
        ([GuestMemory("guest", guest=5)], {}, ValueError, "whole pages"),
        (["guest", GuestMemory("guest", guest=0)], {}, ValueError, "overlap"),
        ([GuestMemory("guest", 0, 1 << 30)], {}, ValueError, "ends at"),
        (["guest"], {"pid": 4194304}, BackEndGone, "no process"),
        (["guest"], {"pid": os.getpid()}, VhostUserError, "is not mapped in the back-end"),
        (["guest"], {"order": "any"}, ValueError, "none of standard, rust-vmm"),
    ]
    with guest(runtime_dir, tmp_path, []) as service, storage_daemon(tmp_path) as program:
        for memory, more, kind, text in cases:
            with pytest.raises(kind, match=text):
                BackEnd(program.socket, memory, runtime_dir, **more)
            until(lambda: not service.status()["clients"], "nobody is left")
        with BackEnd(program.socket, ["guest"], runtime_dir):
            assert record(service, "blk.sock")
        words = [str(program.socket), "--block", "guest", "--block", "guest@0"]
        with attached(runtime_dir, *words) as process:
            assert process.wait(30) == 2
            assert process.stderr is not None
            said = process.stderr.read()
            assert "overlap" in said and said.count("\n") == 1, said


def test_regions_on_the_command_line() -> None:
    assert parse_region("ram0") == GuestMemory("ram0")
    assert parse_region("ram0@0x100000000") == GuestMemory("ram0", guest=1 << 32)
    assert parse_region("ram0:1M+64K@2G") == GuestMemory("ram0", 1 << 20, 1 << 16, 2 << 30)
    for wrong in ("", "ram0:0", "ram0:0+", "ram0@", "ram0@0xg", "ram0:x+1", "../x", "ram0@1@2"):
        with pytest.raises(BadInput):
            parse_region(wrong)


def test_a_back_end_without_post_copy(runtime_dir: Path, tmp_path: Path) -> None:
    """virtiofsd does not offer it; the refusal says why that usually is."""
    path = tmp_path / "fs.sock"
    command = ["/usr/lib/qemu/virtiofsd", f"--socket-path={path}", "-o", f"source={tmp_path}", "-o", "sandbox=chroot"]
    with (
        guest(runtime_dir, tmp_path, []),
        running(command, path, tmp_path) as program,
        attached(runtime_dir, str(program.socket), "--block", "guest") as process,
    ):
        assert process.wait(30) == 1
        assert process.stderr is not None
        said = process.stderr.read()
        assert "does not offer post-copy" in said and "CAP_SYS_PTRACE" in said and "seccomp" in said


# --- the probe --------------------------------------------------------------------------------------------------------


def probed(*words: str, status: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "postcopy", "probe", "vhost-user", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(), check=False)
    assert done.returncode == status, done.stderr + done.stdout
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def states(document: dict[str, Any]) -> dict[str, str]:
    return {rule["rule"]: rule["state"] for rule in document["rules"]}


def test_a_probe_of_a_good_back_end(tmp_path: Path) -> None:
    """Its handler is killed and stopped on the way; the pages that came are exactly the predicted ones."""
    with storage_daemon(tmp_path, sectors=8192, queues=2) as program:
        words = ["--disk", str(program.disk), "--requests", "300", "--writes", "--kill-workers", "3", "--delays", "2"]
        document = probed(str(program.socket), *words)
    found = states(document)
    assert document["verdict"] == "passed" and document["quirks"] == ["addresses-echoed"]
    assert found.pop("addresses") == "quirk"
    assert set(found.values()) == {"held"}, found
    assert document["trouble"]["kills"] == 3 and document["trouble"]["delays"] == 2
    assert document["faults"]["pages"] == document["faults"]["predicted_pages"]
    assert document["requests"]["done"] == 300 and document["back_end"]["queues"] == 2


@pytest.mark.slow
def test_ten_thousand_requests_and_twenty_dead_workers(tmp_path: Path) -> None:
    with storage_daemon(tmp_path, sectors=65536, queues=4) as program:
        words = ["--disk", str(program.disk), "--requests", "10000", "--writes", "--kill-workers", "20"]
        document = probed(str(program.socket), *words)
    assert document["verdict"] == "passed" and document["quirks"] == ["addresses-echoed"]
    assert document["trouble"]["kills"] == 20 and document["requests"]["done"] == 10000
    assert "broken" not in states(document).values()


def test_a_probe_sees_wrong_data(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as program:
        other = tmp_path / "other.img"
        other.write_bytes(b"\0" + program.disk.read_bytes()[1:])
        words = ["--requests", "40", "--depth", "4", "--rate", "500"]
        assert states(probed(str(program.socket), "--disk", str(program.disk), *words))["reads"] == "held"
        other.write_bytes(bytes(program.disk.stat().st_size))
        document = probed(str(program.socket), "--disk", str(other), *words, status=1)
    assert document["verdict"] == "failed"
    assert states(document)["reads"] == "broken" and states(document)["writes"] == "not applicable"


def test_a_probe_has_its_trouble_by_the_clock_too(tmp_path: Path) -> None:
    """Of requests that would last much longer, as many as its time allows; all kills and delays fall into that."""
    with storage_daemon(tmp_path) as program:
        words = ["--requests", "6000", "--rate", "300", "--duration", "2", "--kill-workers", "3", "--delays", "2"]
        document = probed(str(program.socket), *words)
    assert document["trouble"]["kills"] == 3 and document["trouble"]["delays"] == 2
    assert 5 < document["requests"]["done"] < 1000


def test_a_probe_refuses_another_disk(tmp_path: Path) -> None:
    """Before it tests anything: what differs would be the back-end's fault."""
    (tmp_path / "short.img").write_bytes(bytes(4096))
    with storage_daemon(tmp_path) as program:
        for disk, status, text in (("short.img", 2, "but the device has"), ("nothing.img", 1, "No such file")):
            command = [sys.executable, "-m", "postcopy", "probe", "vhost-user", str(program.socket)]
            command += ["--disk", str(tmp_path / disk), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(), check=False)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
            assert text in done.stderr


def test_a_probe_of_what_has_no_post_copy(tmp_path: Path) -> None:
    path = tmp_path / "fs.sock"
    command = ["/usr/lib/qemu/virtiofsd", f"--socket-path={path}", "-o", f"source={tmp_path}", "-o", "sandbox=chroot"]
    with running(command, path, tmp_path):
        document = probed(str(path), "--device", "none", status=1)
    assert states(document)["pagefault"] == "broken" and states(document)["protocol-features"] == "held"
    assert set(states(document).values()) == {"held", "broken", "not applicable"}


# --- DPDK -------------------------------------------------------------------------------------------------------------


def test_a_probe_of_testpmd(tmp_path: Path) -> None:
    with dpdk(tmp_path, "--no-mlockall") as program:
        document = probed(str(program.socket), "--device", "none")
    assert document["verdict"] == "passed" and document["quirks"] == ["open-before-registered"]
    found = states(document)
    assert found["addresses"] == found["registered"] == found["end"] == found["comes-back"] == "held", found


def test_testpmd_locks_its_memory(runtime_dir: Path, tmp_path: Path) -> None:
    """As it does unless told not to: refused before it hears of the memory, which would be zeros at once."""
    with guest(runtime_dir, tmp_path, []) as service, dpdk(tmp_path) as program:
        with pytest.raises(VhostUserError, match=r"mlockall.*--no-mlockall") as caught:
            BackEnd(program.socket, ["guest"], runtime_dir)
        assert caught.value.rule == "locked-memory"
        assert service.block("guest")["received"] == 0


def test_testpmd_faults_on_its_rings(runtime_dir: Path, tmp_path: Path) -> None:
    """Two rings of missing pages, in a region in the middle of a block: it reads them on its message thread and its
    polling thread, and its own addresses are true."""
    with (
        guest(runtime_dir, tmp_path, []) as service,
        dpdk(tmp_path, "--no-mlockall", "--auto-start") as program,
        BackEnd(program.socket, [GuestMemory("guest", 8 * PAGE, 32 * PAGE)], runtime_dir) as back_end,
        Driver(back_end) as driver,
        RingEvents() as bells,
    ):
        assert "addresses-echoed" not in back_end.quirks
        for index, bell in enumerate((driver.bells, bells)):
            first = (8 + 4 * index) * PAGE
            start_ring(back_end, index, Ring(driver.view, 64, first, first + PAGE, first + 2 * PAGE), bell)
        rings = {8 + 4 * index + part for index in range(2) for part in range(3)}
        used = {10, 14}
        until(lambda: used <= set(driver.received()), f"its rings have come: {driver.received()}")
        assert set(driver.received()) <= rings
        assert record(service, "pmd.sock")["pid"] == program.pid


# --- several, and a supervisor that dies ------------------------------------------------------------------------------


def test_the_supervisor_dies_and_another_comes(runtime_dir: Path, tmp_path: Path) -> None:
    """Its worker serves on; the front-end finds the successor, and hears from it that everything has come."""
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 3) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        service.kill()
        driver.start(3)
        driver.finish()
        assert driver.data(2) == sectors(8)
        assert back_end.side.ending is None and not back_end.complete
        service.recover()
        assert record(service, "blk.sock")["pid"] == program.pid
        with attach("guest", runtime_dir) as block:
            block.ensure()
        until(lambda: back_end.complete, "the front-end has heard that the block is whole")
        back_end.end()
        back_end.close()
        until(lambda: not record(service, "blk.sock"), "it has left the successor")


def test_everything_dies_and_the_back_end_is_rescued(runtime_dir: Path, tmp_path: Path) -> None:
    """Its memory and its userfaultfd are found in the back-end, and the front-end resumes."""
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 3) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        kill_all(service)
        starting = threading.Thread(target=driver.start, args=(3,))
        starting.start()  # its rings are missing: the back-end answers after the rescue
        service.recover()
        starting.join(30)
        driver.finish()
        assert driver.data(2) == sectors(8)
        assert record(service, "blk.sock")["pid"] == program.pid
        with attach("guest", runtime_dir) as block:
            block.ensure()
        until(lambda: back_end.complete, "the front-end has heard that the block is whole")
        back_end.end()
        back_end.close()
        until(lambda: not record(service, "blk.sock"), "it has left the successor")


def test_everything_dies_and_none_comes(runtime_dir: Path, tmp_path: Path) -> None:
    """The front-end has started a watcher for the back-end, which gets SIGBUS instead of waiting for ever."""
    policy: dict[str, Any] = {"on_orphan": "poison", "orphan_timeout": 0.5}
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)] * 3, **policy) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        kill_all(service)
        with pytest.raises((BackEndGone, OSError)):
            driver.start(3)
            driver.finish(5)
        until(lambda: not alive(program.pid), "its rings are SIGBUS")
        service.recover()
        assert service.status()["clients"] == []


def test_sixteen_at_once(runtime_dir: Path, tmp_path: Path) -> None:
    """Sixteen devices of one process, each with a userfaultfd of its own and a ring of its own in the same block."""
    count, stride = 16, 8 * PAGE
    image = bytearray(count * stride)
    for n in range(count):
        base = n * stride
        ring = Ring(memoryview(image), 8, base, base + PAGE, base + 2 * PAGE)
        image[base + 3 * PAGE : base + 3 * PAGE + 16] = blk.header(blk.READ, n * 16)
        ring.submit(blk.request(blk.READ, base + 3 * PAGE, [(base + 4 * PAGE, PAGE)], base + 3 * PAGE + 100), 0)
    (tmp_path / "guest.img").write_bytes(image)
    with ExitStack() as stack:
        service = stack.enter_context(Service(runtime_dir, f"guest={tmp_path / 'guest.img'}", fault_around="4K"))
        sockets = stack.enter_context(storage_daemons(tmp_path, count))
        ends = [stack.enter_context(BackEnd(path, ["guest"], runtime_dir)) for path in sockets]
        drivers = [stack.enter_context(Driver(end)) for end in ends]
        for n, driver in enumerate(drivers):
            driver.ring = Ring(driver.view, 8, n * stride, n * stride + PAGE, n * stride + 2 * PAGE)
            driver.start(1)
        for n, driver in enumerate(drivers):
            until(lambda driver=driver, n=n: 8 * n + 2 in driver.received(), "its used ring has come")  # type: ignore[misc]
            until(lambda driver=driver: driver.ring.completed(), "its request is used")  # type: ignore[misc]
            at = n * stride + 4 * PAGE
            assert bytes(driver.view[at : at + PAGE]) == sectors(n * 16)[:PAGE]

        def devices() -> list[dict[str, Any]]:
            return [client for client in service.status()["clients"] if client["kind"] == "vhost-user"]

        until(lambda: [client["faults"] for client in devices()] == [5] * count, "their faults are counted")
        clients = devices()
        assert len({client["worker_pid"] for client in clients}) == count and len({c["pid"] for c in clients}) == 1


def test_the_example_of_the_documentation(runtime_dir: Path, tmp_path: Path) -> None:
    """It reads a sector, through a page that only the back-end touches."""
    text = (Path(__file__).parents[2] / "docs" / "vhost-user.md").read_text()
    (tmp_path / "example.py").write_text(text.split("```python\n")[1].split("```")[0])
    with guest(runtime_dir, tmp_path, []) as service, storage_daemon(tmp_path) as program:
        command = [sys.executable, str(tmp_path / "example.py"), str(program.socket), str(runtime_dir), "77"]
        done = subprocess.run(command, capture_output=True, timeout=60, env=environment(), check=False)
        assert (done.returncode, done.stdout) == (0, sectors(77)[:512]), done.stderr
        assert b"2048 sectors" in done.stderr
        service.await_received(5, "guest")


# --- other blocks -----------------------------------------------------------------------------------------------------


def test_a_remote_block(runtime_dir: Path, tmp_path: Path) -> None:
    """Pages over a return path; the source is killed while the back-end waits, and comes back."""
    guest_image(tmp_path / "guest.img", [(blk.READ, 8)] * 3)
    with (
        Source(f"guest={tmp_path / 'guest.img'}") as source,
        Service(runtime_dir, source.block("guest"), background_rate="0", source_timeout=1) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        source.end()
        where = [back_end.user_address("guest", part) for part in (RING, USED, AVAILABLE)]
        question = back_end.talk.set_vring_addr(0, *where)
        back_end.channel.send(question)
        until(lambda: service.status()["state"] == "paused", "the loss is noticed")
        source.start()
        back_end.talk.heard(question, back_end.channel.receive("SET_VRING_ADDR"))
        driver.start(3)
        driver.finish()
        assert [driver.data(n) for n in range(3)] == [sectors(8)] * 3


@pytest.mark.hugetlb
def test_huge_pages(runtime_dir: Path, tmp_path: Path) -> None:
    """Ring, request and data lie in three huge pages."""
    huge = 2 << 20
    image = bytearray(3 * huge)
    ring = Ring(memoryview(image), 8, 0, PAGE, 2 * PAGE)
    image[huge : huge + 16] = blk.header(blk.READ, 8)
    ring.submit(blk.request(blk.READ, huge, [(2 * huge, 2 * PAGE)], huge + 100), 0)
    (tmp_path / "guest.img").write_bytes(image)
    with (
        reserved(4),
        Service(runtime_dir, f"guest={tmp_path / 'guest.img'}", page_size="2M") as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
        Driver(back_end) as driver,
    ):
        driver.ring = Ring(driver.view, 8, 0, PAGE, 2 * PAGE)
        driver.start(1)
        until(lambda: 0 in driver.received(), "the ring's page has come")
        until(lambda: driver.ring.completed(), "the request is used")
        assert bytes(driver.view[2 * huge : 2 * huge + 2 * PAGE]) == sectors(8)
        until(lambda: record(service, "blk.sock")["faults"] == 3, "its faults are counted")


def test_the_orderly_end_of_the_supervisor(runtime_dir: Path, tmp_path: Path) -> None:
    """What is missing then is SIGBUS in the back-end, through its own userfaultfd; never zeros."""
    with (
        guest(runtime_dir, tmp_path, [(blk.READ, 8)]) as service,
        storage_daemon(tmp_path) as program,
        BackEnd(program.socket, ["guest"], runtime_dir) as back_end,
    ):
        service.stop()
        assert service.wait() == 0
        until(lambda: back_end.side.ending is not None, "the front-end has heard it")
        where = [back_end.user_address("guest", part) for part in (RING, USED, AVAILABLE)]
        with pytest.raises(BackEndGone):
            back_end.ask(back_end.talk.set_vring_addr(0, *where))
        assert program.process.wait(20) == -signal.SIGBUS


def test_a_back_end_that_may_not_make_a_userfaultfd(runtime_dir: Path, tmp_path: Path) -> None:
    """Run by nobody, qemu-storage-daemon does not offer post-copy; the refusal says what may be the matter."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0" or os.geteuid() != 0:
        pytest.fail("this test wants to be root where nobody may not make a userfaultfd")
    with tempfile.TemporaryDirectory(prefix="pcb-", dir="/tmp") as place, guest(runtime_dir, tmp_path, []) as service:
        os.chown(place, 65534, 65534)
        with storage_daemon(Path(place), user=65534) as program:
            with pytest.raises(VhostUserError, match="CAP_SYS_PTRACE") as caught:
                BackEnd(program.socket, ["guest"], runtime_dir)
            assert caught.value.rule == "pagefault"
        until(lambda: not service.status()["clients"], "nobody is left")


def test_the_command_outlives_the_supervisor(runtime_dir: Path, tmp_path: Path) -> None:
    with (
        guest(runtime_dir, tmp_path, []) as service,
        storage_daemon(tmp_path) as program,
        attached(runtime_dir, str(program.socket), "--block", "guest") as process,
    ):
        line_of(process, "attached")
        service.kill()
        line_of(process, "the supervisor has died")
        service.recover()
        line_of(process, "taken over")
        with attach("guest", runtime_dir) as block:
            block.ensure()
        line_of(process, "post-copy has ended")
        program.kill()
        assert process.wait(20) == 1
        until(lambda: not record(service, "blk.sock"), "it is forgotten")
