"""What a worker may do and hold, who may attach, and what an unprivileged client gets."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from postcopy_protocol.messages import ControlRefused
from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, PuppetError, Service, called, descriptors, until, word

NOBODY = 65534


def told(pid: int) -> dict[str, str]:
    """/proc/PID/status as words."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def as_nobody(service: Service, mode: str = "private") -> Puppet:
    client = service.client(None)
    client.do(f"become({NOBODY})")
    client.attach("ram0", mode)
    return client


def test_a_worker_has_no_rights(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    (tmp_path / "pages.py").write_text("def make(offset, length): return b'h' * length\n")
    blocks = (f"ram0={source_file(64 * PAGE)}", "ram1=handler:pages:make?size=1M")
    with Service(runtime_dir, *blocks, cwd=tmp_path) as service:
        client = service.client()
        client.attach("ram1", "private", "c")
        client.do("words(b, [1]); words(c, [1])")
        assert not isinstance(service.export(tmp_path / "out"), ControlRefused)
        worker = service.worker(client)
        zero = until(lambda: [pid for pid in service.people() if called(pid) == "postcopy-w0"], "worker zero")[0]
        for pid in (worker, zero):
            status = told(pid)
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[kind], 16) == 0, kind
            assert status["NoNewPrivs"] == "1"
        assert told(worker)["Name"] == f"postcopy-w{service.record(client)['id']}"
        assert told(service.pid)["Name"].startswith("postcopy")


def test_a_worker_holds_its_own_clients_descriptors_only(runtime_dir: Path, source_file: SourceFile) -> None:
    paths = [source_file(64 * PAGE, number, f"{number}.bin") for number in range(4)]
    with Service(runtime_dir, *(f"ram{number}={path}" for number, path in enumerate(paths))) as service:
        clients = [service.client(f"ram{number}") for number in range(4)]
        for number, client in enumerate(clients):
            client.do("words(b, [1])")
            held = descriptors(service.worker(client))
            assert len(held) < 32
            own = {f"postcopy-ram{number}", str(paths[number])}
            for other in {f"postcopy-ram{n}" for n in range(4)} | {str(path) for path in paths}:
                found = any(other in target.replace(f"{other}-map", "") for target in held)
                assert found == (other in own), (number, other, held)
            assert sum("userfaultfd]" in target for target in held) == 2, "its client's, and that of its own mapping"
            assert not any("door" in target for target in held)


def test_the_directory_and_its_sockets(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(PAGE)}"):
        modes = {name: stat.S_IMODE((runtime_dir / name).stat().st_mode) for name in (".", "door", "private")}
        assert modes == {".": 0o711, "door": 0o666, "private": 0o700}


def with_ptrace_only(barred: Path) -> Callable[[], None]:
    """Before a program starts: no right but CAP_SYS_PTRACE, and a device that only other rights would open."""
    newns, private, bind, drop, ptrace = 0x20000, 1 << 14 | 1 << 18, 1 << 12, 24, 19
    libc = ctypes.CDLL(None)

    def enter() -> None:
        libc.unshare(newns)
        libc.mount(None, b"/", None, private, None)
        assert libc.mount(os.fsencode(barred), b"/dev/userfaultfd", None, bind, None) == 0
        for capability in range(64):
            if capability != ptrace:
                libc.prctl(drop, capability, 0, 0, 0)

    return enter


def test_a_supervisor_with_ptrace_only(runtime_dir: Path, tmp_path: Path) -> None:
    """It serves clients that have a right of their own, and says at its start that the others cannot attach."""
    barred = tmp_path / "barred"
    barred.touch(mode=0)
    barred.chmod(0)
    with Service(runtime_dir, "z=zero:1M", preexec=with_ptrace_only(barred), allow_uid=str(NOBODY)) as service:
        assert "each client needs a right of its own" in service.log()
        assert int(told(service.pid)["CapEff"], 16) == 1 << 19
        client, other = service.client("z"), service.client(None)
        assert client.do("b.buf[5]") == 0
        assert int(told(service.worker(client))["CapPrm"], 16) == 0
        service.kill_worker(client)
        assert client.do("b.buf[9000]") == 0, "its successor needs the right too"
        other.do(f"become({NOBODY})")
        with pytest.raises(PuppetError, match="no open /dev/userfaultfd to pass on") as caught:
            other.attach("z")
        assert caught.value.kind == "UserfaultfdUnavailable"


# --- other users ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_client_without_rights_of_an_allowed_user(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(512 * PAGE)
    path.parent.chmod(0o755)
    for parent in path.parents:
        parent.chmod(parent.stat().st_mode | 0o011) if str(parent).startswith("/tmp/pytest") else None
    shared = [NOBODY] if mode == "shared" else []
    with Service(runtime_dir, f"ram0={path}", allow_uid=[NOBODY], shared_uid=shared) as service:
        client, root = as_nobody(service, mode), service.client("ram0", mode)
        assert service.record(client)["uid"] == NOBODY
        pages = list(range(0, 512, 3))
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages]
        assert root.do(f"check(b, {str(path)!r}, 'random')") == -1
        client.do("everything = hash(bytes(b.buf))")
        for page in (3, 4, 500):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        client.kill()
        until(lambda: not service.record(client), "it is forgotten", 5)


def test_its_worker_is_killed_while_it_faults(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(512 * PAGE)}", allow_uid=[NOBODY], fault_around="4K") as service:
        client = as_nobody(service)
        for page in range(0, 400, 100):
            service.kill_worker(client, signal.SIGKILL)
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]


def test_a_user_who_is_not_allowed(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(PAGE)}", allow_uid=[NOBODY - 1]) as service:
        with pytest.raises(PuppetError) as refused:
            as_nobody(service)
        assert refused.value.kind == "AttachDenied"
        assert str(NOBODY) in refused.value.text and "--allow-uid" in refused.value.text
        assert service.status()["clients"] == []


@pytest.mark.parametrize(
    ("gid", "groups", "allowed"),
    [
        (5001, "()", True),
        (NOBODY, "(1, 5001, 7)", True),
        (5002, "(1, 5003)", False),
        (5002, "tuple(range(7000, 7200))", False),
    ],
)
def test_a_group_that_is_allowed(
    runtime_dir: Path, source_file: SourceFile, gid: int, groups: str, allowed: bool
) -> None:
    """The peer's own group, or one beside it, as the kernel noted them when it connected."""
    with Service(runtime_dir, f"ram0={source_file(PAGE)}", allow_gid=[5001, 7500]) as service:
        client = service.client(None)
        client.do(f"become({NOBODY}, {gid}, {groups})")
        if allowed:
            client.attach("ram0")
            assert client.do("words(b, [0])") == [word(0)]
            return
        with pytest.raises(PuppetError) as refused:
            client.attach("ram0")
        assert refused.value.kind == "AttachDenied" and str(NOBODY) in refused.value.text


def test_an_unprivileged_client_cannot_write_a_private_block(runtime_dir: Path, source_file: SourceFile) -> None:
    """Not through its read-only descriptor opened anew, nor through the router or the lock."""
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", allow_uid=[NOBODY]) as service:
        client = service.client(None)
        client.do(f"become({NOBODY})")
        client.do(
            "from postcopy.session import Session\nfrom postcopy.deadline import Deadline\n"
            "s = Session(directory, Deadline(10)); o = s.open('ram0', 'private', Deadline(10))"
        )
        for fd in ("o.memory", "o.received"):
            with pytest.raises(PuppetError) as refused:
                client.do(f"os.open(f'/proc/self/fd/{{{fd}}}', os.O_RDWR)")
            assert refused.value.kind == "PermissionError"
            with pytest.raises(PuppetError):
                client.do(f"os.pwrite({fd}, b'x', 0)")
            with pytest.raises(PuppetError):
                client.do(f"os.ftruncate({fd}, 0)")
        for name in ("private/router", "private/lock"):
            with pytest.raises(PuppetError) as refused:
                client.do(f"os.stat(directory + '/{name}')")
            assert refused.value.kind == "PermissionError"


# --- limits -----------------------------------------------------------------------------------------------------------


def limited(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@pytest.mark.parametrize(("limit", "blocks"), [(200, 0), (345, 40), (355, 40)])
def test_an_attach_that_would_not_fit_is_refused(
    runtime_dir: Path, source_file: SourceFile, limit: int, blocks: int
) -> None:
    path = source_file(64 * PAGE)
    others = [f"z{number}=zero:4K" for number in range(blocks)]
    with Service(runtime_dir, f"ram0={path}", *others, preexec=partial(limited, limit)) as service:
        clients: list[Puppet] = []
        with pytest.raises(PuppetError) as refused:
            for _ in range(40):
                clients.append(service.client(None))
                clients[-1].attach()
        assert refused.value.kind == "AttachDenied" and "ulimit -n" in refused.value.text
        assert len(clients) > 2, "a few fit"
        for page, client in enumerate(clients[:-1]):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        service.kill_worker(clients[0])
        assert clients[0].do("words(b, [60])") == [word(60 * PAGE)]
        clients[0].kill()
        until(lambda: not service.record(clients[0]), "one has left", 20)
        clients[-1].attach()
        assert clients[-1].do(f"check(b, {str(path)!r})") == -1


def test_the_soft_limit_is_raised(runtime_dir: Path, source_file: SourceFile) -> None:
    def soft() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    with Service(runtime_dir, f"ram0={source_file(PAGE)}", preexec=soft) as service:
        for pid in (service.pid, *service.people()):
            limits = Path(f"/proc/{pid}/limits").read_text()
            line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
            assert line.split()[3] == line.split()[4]
        assert os.getpid() and service.client().do("words(b, [0])") == [0]
