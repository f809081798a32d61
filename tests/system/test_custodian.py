"""A custodian that is killed: another takes its place with everything it kept, and no client notices."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy_protocol.messages import AskStop, ControlRefused
from tests.conftest import SourceFile
from tests.system.service import PAGE, Authenticator, Service, alive, called, descriptors, end_by_pidfd, until, word
from tests.system.test_resources import cgroup

BLOCK = 32 << 20


def custodian(service: Service) -> int:
    """The pid of the custodian that lives."""

    def names() -> list[int]:
        return [pid for pid in service.people() if called(pid) == "postcopy-cust"]

    return until(names, "there is a custodian")[0]


def kill_custodian(service: Service) -> int:
    pid = custodian(service)
    end_by_pidfd(pid, signal.SIGKILL, "postcopy-cust")
    until(lambda: not alive(pid), "it is dead")
    return pid


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_running_clients_do_not_notice(runtime_dir: Path, source_file: SourceFile, tmp_path: Path, mode: str) -> None:
    path, gate = source_file(BLOCK), Authenticator(tmp_path, 2)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        worker = service.worker(client)
        client.begin(gate.order(path))
        until(lambda: service.record(client)["faults"] > 20, "it faults")
        old = kill_custodian(service)
        assert service.block()["received"] < BLOCK // PAGE
        assert custodian(service) != old
        gate.open()
        assert client.answer() == -1
        assert service.record(client)["worker_pid"] in (worker, None), "None: all is there, and it is released"
        assert service.status()["totals"]["restarts"] == 0


def test_a_worker_killed_after_it_is_replaced(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for page, client in enumerate(clients):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        kill_custodian(service)
        for page, client in enumerate(clients, 10):
            service.kill_worker(client)
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        late = service.client()
        assert late.do("words(b, [20])") == [word(20 * PAGE)]


def test_killed_together_with_all_workers(runtime_dir: Path, source_file: SourceFile) -> None:
    """Then the supervisor alone holds the userfaultfds; nobody's page may become zeros."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 2]
        workers = [service.worker(client) for client in clients]
        for round_ in range(2):
            for pid in [custodian(service), *workers]:
                end_by_pidfd(pid, signal.SIGKILL, "postcopy-")
            for place, client in enumerate(clients):
                page = 10 * round_ + place
                assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
            workers = [service.worker(client) for client in clients]
        assert service.events("restart")


def test_killed_while_clients_come(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client(None) for _ in range(6)]
        for client in clients[:3]:
            client.begin("b = attach()")
        kill_custodian(service)
        for client in clients[3:]:
            client.begin("b = attach()")
        for page, client in enumerate(clients):
            client.answer()
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]


def test_stopped_it_is_overtaken_when_it_goes_on(runtime_dir: Path, source_file: SourceFile) -> None:
    """While it is stopped nobody can be forked: clients wait, and nothing is lost."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, late = service.client(), service.client(None)
        pid = custodian(service)
        end_by_pidfd(pid, signal.SIGSTOP, "postcopy-cust")
        try:
            worker = service.worker(client)
            end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
            client.begin("words(b, [5])")
            late.begin("b = attach()")
            assert service.status()["state"] == "running"
            assert not client.answered(0.5)
        finally:
            end_by_pidfd(pid, signal.SIGCONT, "postcopy-cust")
        assert client.answer() == [word(5 * PAGE)]
        late.answer()
        assert late.do("words(b, [6])") == [word(6 * PAGE)]


def test_stopped_for_good_it_is_replaced(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, late = service.client(), service.client(None)
        end_by_pidfd(custodian(service), signal.SIGSTOP, "postcopy-cust")
        end_by_pidfd(service.worker(client), signal.SIGKILL, "postcopy-w")
        client.begin("words(b, [5])")
        late.begin("b = attach()")
        assert client.answer() == [word(5 * PAGE)]
        late.answer()
        assert late.do("words(b, [6])") == [word(6 * PAGE)]
        assert any("the custodian" in event for event in service.events("watchdog"))


def test_nothing_is_kept_of_clients_that_left(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        keeper = service.client()
        kill_custodian(service)
        keeper.do("words(b, [1])")
        new = custodian(service)
        service.kill_worker(keeper)
        keeper.do("words(b, [30])")
        before = len(descriptors(new))
        for _ in range(3):
            client = service.client()
            client.do("words(b, [2])")
            client.kill()
        until(lambda: len(service.status()["clients"]) == 1, "they are forgotten")
        until(lambda: len(descriptors(new)) <= before, "the new custodian has dropped what was theirs")


def test_a_supervisor_dies_while_a_worker_is_stopped(runtime_dir: Path, source_file: SourceFile) -> None:
    """The kernel sends SIGHUP to a process group that becomes an orphan with a stopped member: to all of ours."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        others = [service.worker(clients[1]), custodian(service)]
        service.kill_worker(clients[0], signal.SIGSTOP)
        service.kill()
        assert clients[1].do("words(b, [5])") == [word(5 * PAGE)]
        service.recover()
        assert [service.worker(clients[1]), custodian(service)] == others
        for page, client in enumerate(clients, 10):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]


@pytest.fixture
def pids() -> Iterator[Path]:
    yield from cgroup("pids")


def test_another_cannot_be_started(runtime_dir: Path, source_file: SourceFile, pids: Path) -> None:
    """No process is left for it: those whose workers die wait until there is one, and nobody steps aside for whom no
    custodian would keep anything."""
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", fault_around="4K") as service:
        client, other = service.client(), service.client()
        (pids / "cgroup.procs").write_text(str(service.pid))
        (pids / "pids.max").write_text("1")
        end_by_pidfd(custodian(service), signal.SIGKILL, "postcopy-cust")
        until(lambda: any("cannot be started" in text for text in service.events("restart")), "it has been tried")
        service.kill_worker(client)
        client.begin("words(b, [3])")
        assert isinstance(service.ask(AskStop(True)), ControlRefused)
        assert other.do("words(b, [5])") == [word(5 * PAGE)]
        (pids / "pids.max").write_text("max")
        assert client.answer() == [word(3 * PAGE)]
        late = service.client()
        assert late.do("words(b, [7])") == [word(7 * PAGE)]


def test_no_descriptor_for_a_workers_pidfd(runtime_dir: Path, source_file: SourceFile) -> None:
    """Far below what it needs the supervisor lives on and serves; what it cannot have now waits until there is room."""
    with Service(runtime_dir, f"ram0={source_file(64 * PAGE)}", fault_around="4K") as service:
        client, other = service.client(), service.client()
        old, worker = custodian(service), service.worker(other)
        limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (10, limits[1]))
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        until(lambda: not alive(worker), "it is dead")
        for page, one in enumerate((client, other), 10):
            assert one.do(f"words(b, [{page}])", 20) == [word(page * PAGE)]
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)
        assert service.status()["totals"]["restarts"] == 1 and custodian(service) == old
        late = service.client()
        assert late.do("words(b, [12])") == [word(12 * PAGE)]
