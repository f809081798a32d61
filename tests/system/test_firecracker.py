"""Simulated Firecrackers on a block: every version's handshake, removed pages, and everyone's death."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from examples import kvm_clones
from postcopy_kernel.memory import PAGE_2M
from tests.conftest import SourceFile
from tests.kernel.huge_pool import reserved
from tests.system.remote import Source
from tests.system.service import Service, end_by_pidfd, environment, until
from tests.system.test_rescue import kill_all

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

PAGE = 4096
PAGES = 512
PROGRAM = str(Path(__file__).with_name("fake_machine.py"))
PATIENCE = 60.0


class Program:
    """A program that prints lines, and obeys those that it reads."""

    def __init__(self, *words: str, **more: str) -> None:
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**more),
            bufsize=0,  # ``line`` waits by select, which does not see what Python has buffered
        )
        self.lines: list[str] = []

    def line(self, within: float = PATIENCE) -> str:
        stdout = self.process.stdout
        assert stdout is not None
        ready = select.select([stdout], [], [], within)[0]
        assert ready, f"no line within {within:g} s after {self.lines}"
        line = stdout.readline().decode().rstrip()
        errors = self.process.stderr.read().decode() if self.process.stderr and not line else ""
        assert line, f"it has ended after {self.lines}: {errors}"
        self.lines.append(line)
        return line

    def until_line(self, text: str) -> str:
        while text not in (line := self.line()):
            pass
        return line

    def begin(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        self.process.stdin.flush()

    def do(self, order: str) -> Any:
        self.begin(order)
        return json.loads(self.line())

    def end(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return self.process.wait(PATIENCE)


@contextmanager
def handler(service: Service, path: Path, *more: str, block: str = "ram0") -> Iterator[Program]:
    words = ("--listen", str(path), "--block", block, "--runtime-dir", str(service.directory), *more)
    program = Program(sys.executable, "-m", "postcopy", "attach", "firecracker", *words)
    try:
        program.until_line("listening")
        yield program
    finally:
        assert program.process.poll() == -signal.SIGKILL or program.end(signal.SIGINT) in (0, 130)


@contextmanager
def machine(
    path: Path, file: Path, regions: tuple[int, ...] = (PAGES,), words: tuple[str, ...] = (), **profile: Any
) -> Iterator[Program]:
    body = json.dumps({"regions": regions, **profile})
    program = Program(sys.executable, PROGRAM, str(path), str(file), body, *words)
    try:
        assert json.loads(program.line()) == "ready"
        yield program
    finally:
        program.end()


def kill_workers(service: Service) -> None:
    for client in service.status()["clients"]:
        with suppress(OSError, AssertionError, TypeError):  # its successor has not come yet
            end_by_pidfd(client["worker_pid"], signal.SIGKILL, "postcopy")


@pytest.fixture
def image(source_file: SourceFile) -> Path:
    return source_file(PAGES * PAGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fc.sock"


PROFILES = {
    "1.1": {"version": "1.1", "close": True},
    "1.7": {"version": "1.7", "close": True, "regions": (384, 128)},
    "1.12": {"version": "1.12", "regions": (300, 200, 12)},
    "2.0": {"version": "2.0", "pieces": 2},
    "fork": {"keep": False},
}


def test_every_version_gets_every_byte(runtime_dir: Path, image: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={image}") as service, handler(service, path) as face:
        for profile in PROFILES.values():
            with machine(path, image, **profile) as guest:  # type: ignore[arg-type]
                face.until_line("attached")
                assert guest.do("touch 2 1") == 0
            face.until_line("has ended")
        until(lambda: not service.status()["clients"], "the machines have left")
        assert service.status()["totals"]["placed"] == PAGES  # once for all of them


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_what_was_given_back_stays_zeros(runtime_dir: Path, image: Path, path: Path, remote: bool) -> None:
    with Source(f"ram0={image}") as source:
        block = source.block() if remote else f"ram0={image}"
        with (
            Service(runtime_dir, block, background_rate="0") as service,
            handler(service, path) as face,
            machine(path, image, (256, 256)) as guest,
        ):
            face.until_line("attached")
            assert guest.do("write 7") and guest.do("touch1 7")
            assert guest.do("balloon 0 40") and guest.do("balloon 250 12")  # never touched, but for one
            assert guest.do("touch 2 1") == 0
            assert guest.do("balloon 100 50")  # touched
            kill_workers(service)
            assert guest.do("touch 2 2") == 0
            client = service.status()["clients"][0]
            assert (client["kind"], client["blocks"][0]["mode"]) == ("vm", "own")
            assert client["name"].startswith("firecracker-")


def test_memory_is_given_back_while_the_worker_is_stopped(runtime_dir: Path, image: Path, path: Path) -> None:
    """The machine waits in the kernel until its event is read, and that is no fault."""
    with (
        Service(runtime_dir, f"ram0={image}") as service,
        handler(service, path) as face,
        machine(path, image) as guest,
    ):
        face.until_line("attached")
        assert guest.do("touch 2 1") == 0
        end_by_pidfd(service.status()["clients"][0]["worker_pid"], signal.SIGSTOP, "postcopy")
        assert guest.do("balloon 100 50")
        assert guest.do("touch 2 2") == 0
        assert [event["kind"] for event in service.status()["events"]].count("watchdog") == 1


def test_workers_and_supervisor_are_killed(runtime_dir: Path, image: Path, path: Path) -> None:
    with Source(f"ram0={image}") as source:
        service = Service(runtime_dir, source.block(), background_rate="0", fault_around="4K")
        with service, handler(service, path) as face, machine(path, image) as guest, machine(path, image) as other:
            face.until_line("attached")
            face.until_line("attached")
            assert guest.do("balloon 0 16")
            guest.begin("touch 3 1")
            other.begin("touch 3 9")
            for _ in range(3):
                kill_workers(service)
            service.kill()
            service.recover(background_rate="0", fault_around="4K")
            assert json.loads(guest.line()) == 0
            assert json.loads(other.line()) == 0
            assert guest.do("balloon 30 5") and guest.do("touch 1 4") == 0


def test_the_face_may_end(runtime_dir: Path, image: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={image}") as service, handler(service, path) as face:
        with machine(path, image) as guest:
            face.until_line("attached")
            face.end(signal.SIGKILL)
            assert guest.do("touch 2 1") == 0
        until(lambda: not service.status()["clients"], "the machine's end is seen without its face")
        with handler(service, path) as next_face, machine(path, image) as guest:  # a stale socket does no harm
            next_face.until_line("attached")
            assert guest.do("touch 1 1") == 0


@pytest.mark.parametrize("face_dies", [False, True], ids=["face-lives", "face-dies"])
def test_everything_dies_and_none_comes(runtime_dir: Path, image: Path, path: Path, face_dies: bool) -> None:
    """Its face has started a watcher for the machine, which outlives the face and applies the policy."""
    policy: dict[str, Any] = {"on_orphan": "poison", "orphan_timeout": 0.5, "fault_around": "4K"}
    with Service(runtime_dir, f"ram0={image}", **policy) as service, handler(service, path) as face:
        with machine(path, image) as guest:
            face.until_line("attached")
            assert guest.do("touch1 5")
            if face_dies:
                face.end(signal.SIGKILL)
            kill_all(service)
            assert guest.do("touch1 5")
            guest.begin("touch1 300")
            assert guest.process.wait(PATIENCE) == -signal.SIGBUS
        service.recover()
        assert service.status()["clients"] == []


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_everything_dies_and_machines_are_rescued(runtime_dir: Path, image: Path, path: Path, kind: str) -> None:
    """The userfaultfd is found in the machine, what it has given back in its face."""
    with Source(f"ram0={image}") as source:
        block = source.block() if kind == "remote" else f"ram0={image}"
        with (
            Service(runtime_dir, block, background_rate="0", fault_around="4K") as service,
            handler(service, path) as face,
            machine(path, image, (256, 256)) as guest,
            machine(path, image) as other,
        ):
            face.until_line("attached")
            face.until_line("attached")
            assert guest.do("balloon 0 40") and guest.do("write 7") and guest.do("touch1 60")
            for seed in (1, 2):
                kill_all(service)
                other.begin(f"touch 2 {seed}")
                guest.begin(f"touch1 {100 + seed}")
                service.recover()
                assert json.loads(guest.line()) and json.loads(other.line()) == 0
                assert guest.do("balloon 300 9")
            assert guest.do("touch 2 3") == 0
            client = service.status()["clients"][0]
            assert (client["kind"], client["blocks"][0]["mode"]) == ("vm", "own")


def test_a_machine_whose_face_died_too_is_not_rescued(runtime_dir: Path, image: Path, path: Path) -> None:
    with (
        Service(runtime_dir, f"ram0={image}") as service,
        handler(service, path) as face,
        machine(path, image) as guest,
    ):
        face.until_line("attached")
        assert guest.do("touch1 5")
        face.end(signal.SIGKILL)
        kill_all(service)
        service.recover()
        assert "which pages it has given back is lost" in service.last_log()
        assert service.status()["clients"] == []


@pytest.mark.parametrize("when_lost", ["poison", "wait", "kill"])
def test_lost_pages(runtime_dir: Path, image: Path, path: Path, when_lost: str) -> None:
    """SIGBUS, or the machine waits for an operator, or it is killed. The others go on."""
    with (
        Service(runtime_dir, f"ram0={image}") as service,
        handler(service, path, "--when-lost", when_lost) as face,
        machine(path, image) as guest,
        machine(path, image) as other,
    ):
        face.until_line("attached")
        face.until_line("attached")
        assert guest.do("touch1 5")
        os.truncate(image, PAGE)
        guest.begin("touch1 300")
        until(lambda: service.events("source-changed") or service.events("lost"), "it is reported")
        if when_lost == "wait":
            kill_workers(service)
            assert other.process.poll() is None and guest.process.stdout is not None
            assert not select.select([guest.process.stdout], [], [], 0.5)[0] and guest.process.poll() is None
        else:
            number = {"poison": signal.SIGBUS, "kill": signal.SIGKILL}[when_lost]
            assert guest.process.wait(PATIENCE) == -number
        assert other.process.poll() is None


@pytest.mark.hugetlb
def test_guests_with_huge_pages(runtime_dir: Path, source_file: SourceFile, path: Path) -> None:
    """Two pages of the block, and a copy of them; what is given back is zeros, also after its worker's death."""
    file = source_file(2 * PAGE_2M)
    with (
        reserved(4),
        Service(runtime_dir, f"ram0={file}", page_size="2M") as service,
        handler(service, path) as face,
    ):
        with machine(path, file, (1, 1), page_size=PAGE_2M) as guest:
            face.until_line("attached")
            assert guest.do("touch 2 1") == 0
            assert guest.do("balloon 1 1") and guest.do("touch1 1")
            assert guest.do("balloon 1 1")
            kill_workers(service)
            assert guest.do("touch 1 2") == 0
        with machine(path, file, (512, 512)):
            assert "those of the block 2097152" in face.until_line("refused")


def test_sockets_and_names(runtime_dir: Path, image: Path, tmp_path: Path) -> None:
    """One socket for each machine; names from the sockets, or from command lines."""
    first, second = tmp_path / "red.sock", tmp_path / "blue.sock"
    with Service(runtime_dir, f"ram0={image}") as service:
        for name_from, names in (("socket", {"red", "blue"}), ("cmdline", {"one", "two"})):
            more = ("--listen", str(second), "--name-from", name_from)
            with (
                handler(service, first, *more) as face,
                machine(first, image, words=("--id", "one")) as guest,
                machine(second, image, words=("--id=two",)) as other,
            ):
                face.until_line("attached")
                face.until_line("attached")
                assert guest.do("touch1 1") and other.do("touch1 2")
                assert {client["name"] for client in service.status()["clients"]} == names
            until(lambda: not service.status()["clients"], "the machines have left")


def say(path: Path, data: bytes, fds: list[int]) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.connect(str(path))
    socket.send_fds(channel, [data], fds)
    return channel


def test_what_no_machine_may_say(runtime_dir: Path, image: Path, path: Path) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    region = {"base_host_virt_addr": 1 << 40, "size": PAGES * PAGE, "offset": 0, "page_size": PAGE}
    wrong: list[tuple[Any, str]] = [
        ([region], "no userfaultfd"),
        ([{**region, "page_size": 4096 * 1024}], "page size"),
        ([{**region, "size": -1}], "size"),
        ([], "1 to 64 regions"),
        (["x"], "object"),
    ]
    try:
        with Service(runtime_dir, f"ram0={image}") as service, handler(service, path) as face:
            for body, reason in wrong:
                with say(path, json.dumps(body).encode(), [null]):
                    assert reason in face.until_line("refused")
            with say(path, b"{}", [null, null]):
                assert "begin with [" in face.until_line("refused")
            with say(path, json.dumps([region]).encode(), []):
                assert "no userfaultfd" in face.until_line("refused")
            with say(path, b"[" * (1 << 20), []) as channel:
                channel.sendall(b"[" * PAGE)
                assert "does not end" in face.until_line("refused")
            say(path, b"[", []).close()
            assert "ends after 1 bytes" in face.until_line("refused")
            silent = say(path, b"[", [])
            for regions, reason in (((511,), "another snapshot"), ((513,), "another snapshot")):
                with machine(path, image, regions):
                    assert reason in face.until_line("refused")
            with machine(path, image) as guest:
                face.until_line("attached")
                assert guest.do("touch 1 1") == 0
            silent.close()
    finally:
        os.close(null)


def test_a_wrong_block_or_socket_is_one_line(runtime_dir: Path, image: Path, tmp_path: Path) -> None:
    with Service(runtime_dir, f"ram0={image}") as service:
        for words, reason, status in (
            (("--block", "other", "--listen", str(tmp_path / "s")), "no block other here", 2),
            (("--block", "ram0", "--listen", str(image)), "it is there and no socket", 1),
            (("--block", "ram0", "--listen", str(tmp_path / "none" / "s")), "cannot listen", 1),
        ):
            command = [sys.executable, "-m", "postcopy", "attach", "firecracker", *words]
            command += ["--runtime-dir", str(service.directory)]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == status and reason in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_guests_of_kvm_while_workers_die(runtime_dir: Path, path: Path, tmp_path: Path) -> None:
    image = tmp_path / "guest.mem"
    expected = kvm_clones.make_image(image, PAGES * PAGE)
    with (
        Service(runtime_dir, f"ram0={image}", fault_around="4K") as service,
        handler(service, path),
        machine(path, image) as one,
        machine(path, image) as other,
    ):
        until(lambda: len(service.status()["clients"]) == 2, "both are there")
        one.begin("kvm")
        other.begin("kvm")
        for _ in range(3):
            kill_workers(service)
        assert [json.loads(guest.line()) for guest in (one, other)] == [expected, expected]


class Api(threading.Thread):
    """Firecracker's API socket, which answers one PUT /snapshot/load: ``load`` does it and returns status and body."""

    def __init__(self, path: Path, load: Callable[[dict[str, Any]], tuple[int, bytes]]) -> None:
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.load = load

    def run(self) -> None:
        connection, _ = self.listener.accept()
        self.listener.close()
        with connection:
            data = b""
            while b"}}" not in data.replace(b" ", b"") and b"resume_vm" not in data:
                data += connection.recv(4096)
            head, _, body = data.partition(b"\r\n\r\n")
            assert head.startswith(b"PUT /snapshot/load HTTP/1.1\r\n")
            status, answer = self.load(json.loads(body))
            connection.sendall(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(answer), answer))


@pytest.mark.parametrize("own", [True, False], ids=["a file", "a block"])
def test_restore(runtime_dir: Path, image: Path, tmp_path: Path, own: bool) -> None:
    with ExitStack() as stack:
        guests: list[Program] = []

        def load(body: dict[str, Any]) -> tuple[int, bytes]:
            assert body["snapshot_path"] == str(image) and body["resume_vm"] is True
            guests.append(stack.enter_context(machine(Path(body["mem_backend"]["backend_path"]), image)))
            assert guests[0].do("touch1 3")  # before the answer
            return 204, b""

        Api(tmp_path / "api", load).start()
        words = ["--snapshot", str(image), "--api", str(tmp_path / "api"), "--runtime-dir", str(runtime_dir)]
        if not own:
            stack.enter_context(Service(runtime_dir, f"ram0={image}"))
        memory = str(image) if own else "ram0"
        face = Program(sys.executable, "-m", "postcopy", "restore", "firecracker", "--memory", memory, *words)
        try:
            face.until_line("is loaded")
            assert guests[0].do("touch 2 1") == 0
            guests[0].end()
            face.until_line("has ended")
            assert face.process.wait(PATIENCE) == 0
        finally:
            face.end()


def test_restore_that_fails_is_one_line(image: Path, tmp_path: Path) -> None:
    Api(tmp_path / "api", lambda body: (400, b'{"fault_message": "no\\nsuch snapshot"}')).start()
    for api, memory, reason, status in (
        ("api", image, "no such snapshot", 1),
        ("none", image, "No such file or directory", 1),
        ("api", tmp_path / "absent", "there is no such file", 2),
    ):
        command = [sys.executable, "-m", "postcopy", "restore", "firecracker", "--snapshot", str(image)]
        command += ["--memory", str(memory), "--api", str(tmp_path / api)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == status and reason in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_death_of_a_machine_frees_it(runtime_dir: Path, image: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={image}") as service, handler(service, path) as face:
        with machine(path, image) as guest:
            face.until_line("attached")
            pid = service.status()["clients"][0]["pid"]
            assert pid == guest.process.pid
            end_by_pidfd(service.status()["clients"][0]["worker_pid"], signal.SIGSTOP, "postcopy")
            guest.begin("touch1 9")
        until(lambda: not service.status()["clients"], "its client has left")
