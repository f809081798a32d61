"""Something runs out: processes, descriptors, memory, a disk. The client concerned waits or is told, the others go on,
and when there is enough again all is well."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.broken_disk import BrokenDisk
from tests.system.remote import Source
from tests.system.service import PAGE, PuppetError, Service, called, until, word

CGROUPS = Path("/sys/fs/cgroup")


def cgroup(controller: str) -> Iterator[Path]:
    """A cgroup of our own in version 1's hierarchy of this controller."""
    if not (CGROUPS / controller / "cgroup.procs").exists():
        pytest.skip(f"no hierarchy of version 1 for {controller}")
    made = CGROUPS / controller / f"postcopy-test-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        until(lambda: not (made / "cgroup.procs").read_text(), "the cgroup is empty")
        made.rmdir()


@pytest.fixture
def pids() -> Iterator[Path]:
    yield from cgroup("pids")


@pytest.fixture
def memory() -> Iterator[Path]:
    yield from cgroup("memory")


def custodian(service: Service) -> int:
    return next(pid for pid in service.people() if called(pid) == "postcopy-cust")


def test_no_more_processes(runtime_dir: Path, source_file: SourceFile, pids: Path) -> None:
    """A custodian that cannot fork: who attaches waits, nobody is quarantined, and a dead worker's client waits too."""
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        first, second = service.client(), service.client()
        (pids / "cgroup.procs").write_text(str(custodian(service)))
        (pids / "pids.max").write_text("1")
        service.kill_worker(first)
        until(lambda: "could not be forked" in service.log(), "a fork has failed")
        first.begin("words(b, [3])")
        newcomer = service.client(None)
        newcomer.begin("b = attach('ram0', 'private')")
        until(lambda: service.log().count("could not be forked") > 12, "it is tried again and again")
        assert second.do("words(b, [5])") == [word(5 * PAGE)]
        assert service.events("quarantine") == [] and not first.answered() and not newcomer.answered()
        (pids / "pids.max").write_text("max")
        assert first.answer() == [word(3 * PAGE)]
        newcomer.answer()
        assert newcomer.do("words(b, [7])") == [word(7 * PAGE)]


@pytest.mark.parametrize("spare", [0, 1, 6, 24])
def test_no_more_descriptors_in_a_running_supervisor(runtime_dir: Path, source_file: SourceFile, spare: int) -> None:
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        first = service.client()
        before = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        used = len(list(Path(f"/proc/{service.pid}/fd").iterdir()))
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (used + spare, before[1]))
        client = service.client(None)
        with pytest.raises(PuppetError) as refused:
            client.do("attach('ram0', 'private', 2)")
        assert refused.value.kind in ("AttachDenied", "AttachTimeout"), refused.value
        assert first.do("words(b, [1])") == [word(PAGE)]
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, before)
        service.kill_worker(first)
        assert first.do("words(b, [2])") == [word(2 * PAGE)]
        late = service.client()
        assert late.do("words(b, [9])") == [word(9 * PAGE)]


def test_no_more_memory_for_workers(runtime_dir: Path, source_file: SourceFile, memory: Path) -> None:
    """What a private client's worker places is charged to the worker. At the limit its client waits. A shared client's
    pages are charged to that client, but its worker is in the same cgroup, and may wait there for a page table of its
    own: it goes on or waits, and nothing is lost, poisoned or given up. Who needs no worker notices nothing."""
    path = source_file(160 << 20)
    (memory / "memory.limit_in_bytes").write_text(str(64 << 20))
    (memory / "memory.oom_control").write_text("1")
    with Service(
        runtime_dir, f"ram0={path}", worker_cgroup=str(memory), restart_limit=1000, fault_around="4K"
    ) as service:
        client, other = service.client(), service.client("ram0", "shared")
        assert other.do("words(b, [1])") == [word(PAGE)]
        client.begin(f"check(b, {str(path)!r})")
        until(lambda: at_limit(service, memory), "the limit is reached", 60)
        assert other.do("words(b, [1])") == [word(PAGE)]
        other.begin(f"words(b, [{(95 << 20) // PAGE}])")
        assert service.status()["state"] == "running" and not client.answered()
        (memory / "memory.limit_in_bytes").write_text("-1")
        assert other.answer(60) == [word(95 << 20)]
        assert client.answer(60) == -1
        # Its worker may have stood at the limit before it could say that it is there.
        until(lambda: service.record(client)["state"] == "running", "nothing is given up")
        assert service.status()["totals"]["lost"] == 0 and service.events("quarantine") == []


def test_a_limit_that_the_oom_killer_holds(runtime_dir: Path, source_file: SourceFile, memory: Path) -> None:
    """Workers that are faster than the supervisor's look at the limit are killed by the kernel, and replaced as often
    as it takes. Their clients wait as long as there is no memory, and no client gets a wrong byte."""
    path = source_file(160 << 20)
    (memory / "memory.limit_in_bytes").write_text(str(64 << 20))
    with Service(
        runtime_dir, f"ram0={path}", worker_cgroup=str(memory), restart_limit=1000, fault_around="4K"
    ) as service:
        client, other = service.client(), service.client("ram0", "shared")
        assert other.do("words(b, [1])") == [word(PAGE)]
        client.begin(f"check(b, {str(path)!r})")
        until(lambda: at_limit(service, memory), "the limit is reached", 60)
        if killed(memory):
            until(lambda: service.events("restart"), "what was killed is replaced")
        assert other.do("words(b, [1])") == [word(PAGE)]
        assert service.status()["state"] == "running"
        (memory / "memory.limit_in_bytes").write_text("-1")
        assert client.answer(60) == -1
        assert other.do(f"check(b, {str(path)!r})") == -1
        assert service.status()["totals"]["lost"] == 0 and service.events("quarantine") == []


def at_limit(service: Service, group: Path) -> bool:
    """Whether placing waits, by our event or in the kernel, or the OOM killer has come."""
    waits = "under_oom 1" in (group / "memory.oom_control").read_text()
    return waits or killed(group) > 0 or any("none left" in text for text in service.events("memory"))


def killed(group: Path) -> int:
    """Processes of the cgroup that the OOM killer has ended."""
    lines = (group / "memory.oom_control").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE to break a disk with")
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_disk_that_cannot_be_read(runtime_dir: Path, tmp_path: Path, mode: str) -> None:
    """EIO for one stretch of the file: these pages are lost, loudly, and no others."""
    content = b"".join((page * PAGE // 8).to_bytes(8, "little").ljust(PAGE, b"\1") for page in range(64))
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(BrokenDisk(tmp_path, content, range(16 * PAGE, 20 * PAGE)))
        with Service(runtime_dir, f"ram0={path}") as service:
            client, other = service.client("ram0", mode), service.client("ram0", mode)
            good = [page for page in range(64) if page not in range(16, 20)]
            assert client.do(f"words(b, {good})") == [page * PAGE // 8 for page in good]
            with pytest.raises(PuppetError) as lost:
                client.do(f"b.ensure({17 * PAGE}, 8)")
            assert lost.value.kind == "PageLost"
            assert other.do(f"words(b, {good})") == [page * PAGE // 8 for page in good]
            until(lambda: "input/output error" in " ".join(service.events("lost")), "the loss is told")
            assert service.status()["totals"]["restarts"] == 0
            for one in (client, other):
                one.do("b.close()")


def test_a_cgroup_without_memory_lets_remote_pages_wait(
    runtime_dir: Path, source_file: SourceFile, memory: Path
) -> None:
    """Fault-around and background stop first, then missing pages wait, and come when the limit is raised. The kernel
    ends none of the cgroup's processes."""
    path = source_file(160 << 20)
    (memory / "memory.limit_in_bytes").write_text(str(160 << 20))
    with Source(f"ram0={path}") as source, InCgroup(runtime_dir, source.block(), cgroup=memory) as service:
        until(lambda: any("scarce in cgroup" in text for text in service.events("memory")), "background stops", 30)
        client = service.client()
        client.begin(f"check(b, {str(path)!r})")
        until(lambda: any("none left in cgroup" in text for text in service.events("memory")), "pages wait", 60)
        assert not client.answered(0.5), "it waits"
        assert killed(memory) == 0
        (memory / "memory.limit_in_bytes").write_text(str(512 << 20))
        assert client.answer(60) == -1
        until(lambda: "enough again" in service.events("memory")[-1], "it is said")
        assert service.status()["totals"]["lost"] == 0 and killed(memory) == 0


@pytest.mark.parametrize("whose", ["the service's", "the workers'"])
def test_a_cgroup_without_memory_lets_local_pages_wait(
    runtime_dir: Path, source_file: SourceFile, memory: Path, whose: str
) -> None:
    """Pages that a private client's worker places wait at the limit of the cgroup that pays for them."""
    path = source_file(160 << 20)
    (memory / "memory.limit_in_bytes").write_text(str(160 << 20))
    workers = {"worker_cgroup": str(memory)} if whose == "the workers'" else {}
    with InCgroup(runtime_dir, f"ram0={path}", cgroup=None if workers else memory, **workers) as service:
        client, other = service.client(), service.client()
        assert other.do("words(b, [1])") == [word(PAGE)]
        client.begin(f"check(b, {str(path)!r})")
        until(lambda: any("none left in cgroup" in text for text in service.events("memory")), "pages wait", 60)
        assert not client.answered(0.5), "it waits"
        assert other.do("words(b, [1])") == [word(PAGE)], "what is there is served"
        (memory / "memory.limit_in_bytes").write_text(str(512 << 20))
        assert client.answer(60) == -1
        until(lambda: "enough again" in service.events("memory")[-1], "it is said")
        assert service.status()["totals"]["lost"] == 0


def test_who_pays(runtime_dir: Path, source_file: SourceFile, memory: Path) -> None:
    """As the table in operations.md says: which memory cgroup each kind of page is charged to."""
    size = 16 << 20
    path = source_file(size)
    theirs = memory.with_name(f"{memory.name}-client")
    theirs.mkdir()

    def paid(act: Callable[[], object]) -> list[bool]:
        """Has the service's cgroup grown by a block, and the client's?"""
        groups = memory, theirs
        before = [int((group / "memory.usage_in_bytes").read_text()) for group in groups]
        act()
        return [
            int((group / "memory.usage_in_bytes").read_text()) - had > size // 2
            for group, had in zip(groups, before, strict=True)
        ]

    with Source(f"far={path}") as source:
        blocks = f"near={path}", f"both={path}", source.block("far")
        with InCgroup(runtime_dir, *blocks, cgroup=memory, background_rate="0") as service:
            client = service.client(None)
            client.do(f"open({str(theirs / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))")
            found = {}
            for name, mode in (("near", "private"), ("both", "shared"), ("far", "private")):
                client.attach(name, mode)
                found[name] = paid(lambda: client.do(f"check(b, {str(path)!r}, 'forward', 65536)"))
            found["written"] = paid(lambda: client.do(f"write(b, 0, 'ab' * {size})"))
            client.kill()
            client.status()
        until(lambda: not (theirs / "cgroup.procs").read_text(), "the client has left its cgroup")
    theirs.rmdir()
    service_pays, client_pays = [True, False], [False, True]
    assert found == {"near": service_pays, "both": client_pays, "far": service_pays, "written": client_pays}


def test_descriptors_of_each_process(runtime_dir: Path, source_file: SourceFile) -> None:
    """As the table in operations.md says."""

    def count(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}") as service:
        service.client()
        keeper = custodian(service)
        before = [count(pid) for pid in (service.pid, keeper)]
        clients = [service.client() for _ in range(4)]
        grown = [count(pid) - had for pid, had in zip((service.pid, keeper), before, strict=True)]
        assert 6 * len(clients) <= grown[0] <= 8 * len(clients) and grown[1] == 4 * len(clients), grown
        assert 17 <= count(service.worker(clients[0])) <= 21, count(service.worker(clients[0]))


class InCgroup(Service):
    """Its supervisor, and what that starts, are in a cgroup."""

    def __init__(self, directory: Path, *blocks: str, cgroup: Path | None, **options: Any) -> None:
        self._cgroup = cgroup
        super().__init__(directory, *blocks, **options)

    def start(self, *, program: tuple[str, ...] = (), **more: Any) -> None:
        enter = f"open({str(self._cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))" if self._cgroup else "pass"
        run = f"import os, sys; {enter}; from postcopy_supervisor.__main__ import main; sys.exit(main())"
        super().start(program=("-c", run), **more)
