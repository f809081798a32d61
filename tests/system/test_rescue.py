"""Supervisor, custodian and all workers are killed at once: the next ``serve --recover`` finds the clients again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel import other_process
from postcopy_kernel.crashpoints import VARIABLE
from postcopy_protocol.runtime_paths import RESCUE
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import (
    PAGE,
    Puppet,
    Service,
    alive,
    arguments,
    end_by_pidfd,
    environment,
    until,
    word,
)
from tests.system.service_manager import ServiceManager
from tests.system.test_custodian import custodian

PAGES = 256
SIZE = PAGES * PAGE
STRANGER = 65534
PLAIN: dict[str, Any] = {"fault_around": "4K", "background_rate": "0"}


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(SIZE)


def kill_all(service: Service) -> None:
    """SIGKILL to supervisor, custodian and every worker of it, together; returns when they have ended."""
    keeper = custodian(service)
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    pids = [keeper, *map(int, children)]
    pidfds = [os.pidfd_open(pid) for pid in pids]
    service.process.send_signal(signal.SIGKILL)
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    service.process.wait(10)
    until(lambda: not any(map(alive, pids)), "all have ended")


def begin(client: Puppet, *pages: int) -> None:
    client.begin(f"words(b, {list(pages)})")


def ends(client: Puppet, *pages: int) -> None:
    assert client.answer(30) == [word(page * PAGE) for page in pages]


def records(runtime_dir: Path) -> set[str]:
    return {entry.name for entry in (runtime_dir / RESCUE).iterdir()}


def refusal(service: Service, *options: str) -> str:
    """What a supervisor in the same directory says that refuses to start."""
    command = [*arguments(service.directory, service.blocks, dict(service.options)), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_local_and_remote_private_and_shared(runtime_dir: Path, path: Path) -> None:
    with (
        Source(f"ram1={path}") as source,
        Service(runtime_dir, f"ram0={path}", source.block("ram1"), **PLAIN) as service,
    ):
        clients = [service.client(name, mode) for name in ("ram0", "ram1") for mode in ("private", "shared")]
        clients[0].do(f"write(b, {5 * PAGE}, 'ff' * 8)")
        clients[1].do(f"write(b, {6 * PAGE}, 'ee' * 8)")
        for round_ in (1, 2):
            kill_all(service)
            for client in clients:
                begin(client, 10 * round_, 11 * round_)
            service.recover()
            for client in clients:
                ends(client, 10 * round_, 11 * round_)
        assert clients[0].do("words(b, [5])") == [2**64 - 1] and clients[1].do("words(b, [6])") != [word(6 * PAGE)]
        assert service.status()["totals"]["polluted"] == 0
        clients[2].do("c = attach('ram0')")
        assert clients[2].do("words(c, [7])") == [word(7 * PAGE)], "it resumes, and attaches one more block"
        assert [clients[2 + n].do(f"check(b, {str(path)!r}, 'random', 4096)") for n in range(2)] == [-1, -1]


def test_a_foreign_user_whose_zero_pages_are_recognised_afterwards(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", polluting=True, allow_uid=[STRANGER], **PLAIN) as service:
        own, foreign = service.client(), service.client(None)
        foreign.do(f"become({STRANGER})")
        foreign.do("from postcopy.session import Session\nfrom postcopy.deadline import Deadline")
        foreign.do("b = attach('ram0')")
        foreign.do("o = Session(directory, Deadline(10)).open('ram0', 'private', Deadline(10))")
        foreign.do("stray = memory.Mapping.of(o.memory, o.length, writable=False)")
        begin(own, 1)
        ends(own, 1)
        kill_all(service)
        assert foreign.do(f"memory.advise(stray.address, {64 * PAGE}, memory.POPULATE_READ)") == 0
        begin(own, 2, 3)
        begin(foreign, 3, 4)
        service.recover()
        ends(own, 2, 3)
        ends(foreign, 3, 4)
        assert own.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        assert foreign.do(f"words(b, {list(range(PAGES))})") == [word(page * PAGE) for page in range(PAGES)]


def test_pages_that_were_polluted_meanwhile_are_not_believed(runtime_dir: Path, path: Path) -> None:
    """The received map is found again with the client, so a page that is present and not in it is known."""
    with Service(runtime_dir, f"ram0={path}", polluting=True, **PLAIN) as service:
        client = service.client()
        client.do("from postcopy.session import Session\nfrom postcopy.deadline import Deadline")
        client.do("o = Session(directory, Deadline(10)).open('ram0', 'private', Deadline(10))")
        client.do("words(b, [1])")
        kill_all(service)
        client.do("m = memory.Mapping.of(o.memory, o.length, writable=False)")
        assert client.do(f"memory.advise(m.address + {40 * PAGE}, {PAGE}, memory.POPULATE_READ)") == 0
        service.recover()
        assert service.status(audit=True)["totals"]["polluted"] == 1


def test_a_client_without_a_received_map(runtime_dir: Path, path: Path) -> None:
    """Nothing proves which pages are ours, and no client may write: each page is placed again before it is given."""
    with Service(runtime_dir, f"ram0={path}", polluting=True, **PLAIN) as service:
        client = service.client()
        client.do("from postcopy.session import Session\nfrom postcopy.deadline import Deadline")
        client.do("o = Session(directory, Deadline(10)).open('ram0', 'private', Deadline(10))")
        client.do("words(b, [1, 2])")
        kill_all(service)
        client.do("m = memory.Mapping.of(o.memory, o.length, writable=False)")
        assert client.do(f"memory.advise(m.address + {40 * PAGE}, {PAGE}, memory.POPULATE_READ)") == 0
        client.do("b._map.release(); b._received.close(); o.close()")
        begin(client, 3)
        service.recover()
        ends(client, 3)
        assert "its received map is lost" in service.last_log()
        assert client.do("words(b, [1, 2, 40])") == [word(page * PAGE) for page in (1, 2, 40)]
        late = service.client()
        assert late.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1


def test_a_client_that_died_meanwhile_and_one_whose_pid_was_used_again(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        gone, stays = service.client(), service.client()
        kill_all(service)
        gone.kill()
        gone.status()
        # The other's record now names a process that was started at another time: so does a pid that was used again.
        begin(stays, 5)
        service.recover()
        ends(stays, 5)
        (record,) = service.status()["clients"]
        assert record["pid"] == stays.pid
        assert records(runtime_dir) == {"block-1", "client-2", "worker-2"}


def test_a_process_is_known_by_its_start_time() -> None:
    own = other_process.start_time(os.getpid())
    os.close(other_process.open_process(os.getpid(), own))
    for pid, started in ((os.getpid(), own + 1), (0, own), (1 << 22, own)):
        with pytest.raises(ProcessLookupError):
            other_process.open_process(pid, started)


def test_nothing_is_left_of_clients_that_all_died(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        kill_all(service)
        client.kill()
        client.status()
        service.start()
        service.await_ready()
        assert "nothing to recover" not in service.last_log() and service.status()["clients"] == []
        assert records(runtime_dir) == {"block-1"}


def test_without_recover_it_says_that_clients_wait(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        kill_all(service)
        begin(client, 5)
        text = refusal(service)
        assert "1 clients" in text and "--recover" in text and "--abandon" in text
        service.recover()
        ends(client, 5)


def test_another_file_is_refused_and_nothing_is_changed(runtime_dir: Path, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        kill_all(service)
        begin(client, 5)
        service.blocks = (f"ram0={other}",)
        assert "another file" in refusal(service, "--recover")
        service.blocks = (f"ram1={path}",)
        assert "ram0" in refusal(service, "--recover")
        service.blocks = (f"ram0={path}",)
        service.recover()
        ends(client, 5)


def test_a_supervisor_without_the_rights_says_what_it_cannot_do(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        kill_all(service)
        begin(client, 5)
        drop = "import prctl; prctl.cap_effective.limit(); prctl.cap_permitted.limit()"
        run = f"{drop}; import runpy; runpy.run_module('postcopy_supervisor', run_name='__main__')"
        command = arguments(runtime_dir, service.blocks, {**service.options, "recover": True})
        done = subprocess.run(
            [sys.executable, "-c", run, *command[3:]],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "cannot rescue client 1" in last and "CAP_CHECKPOINT_RESTORE" in last
        service.recover()
        ends(client, 5)


def test_workers_that_survived_are_ended_before_new_ones_begin(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        worker = service.worker(client)
        keeper = custodian(service)
        service.kill()
        end_by_pidfd(keeper, signal.SIGKILL, "postcopy-cust")
        until(lambda: not alive(keeper), "the custodian ends")
        begin(client, 5)
        ends(client, 5)
        assert alive(worker)
        service.recover()
        assert not alive(worker)
        begin(client, 6)
        ends(client, 6)


def test_a_copy_is_made_again(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", copy_on_serve=True, **PLAIN) as service:
        client = service.client()
        for _ in range(2):
            kill_all(service)
            begin(client, 5)
            service.recover()
            ends(client, 5)
        kill_all(service)
        begin(client, 6)
        content = path.read_bytes()
        path.write_bytes(content)
        assert "its copy of" in refusal(service, "--recover")
        service.start(abandon=True)
        service.await_ready()
        assert records(runtime_dir) == {"block-1"}


def test_a_whole_block_stays_what_it_is(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client(mode="shared")
        assert client.do(f"check(b, {str(path)!r}, 'forward', 4096)") == -1
        until(
            lambda: service.block()["received"] == PAGES and not service.record(client)["worker_pid"], "it is released"
        )
        client.do(f"write(b, {5 * PAGE}, 'ff' * 8)")
        kill_all(service)
        service.recover()
        late = service.client(mode="shared")
        assert late.do("words(b, [5])") == [2**64 - 1]


def test_the_records_are_removed_in_an_orderly_end(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        assert (runtime_dir / RESCUE / "client-1").stat().st_mode & 0o777 == 0o600
        client.do("b.close()")
        until(lambda: records(runtime_dir) == {"block-1"}, "its record is removed")


def test_killed_at_once_while_all_clients_read(runtime_dir: Path, path: Path) -> None:
    """Whatever a worker was doing: pages between COPY and mark, requests on their way."""
    with (
        Source(f"ram1={path}") as source,
        Service(runtime_dir, f"ram0={path}", source.block("ram1"), **PLAIN) as service,
    ):
        clients = [service.client(name, mode) for name in ("ram0", "ram1") for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        for _ in range(3):
            kill_all(service)
            service.recover()
        assert [client.answer(60) for client in clients] == [-1] * 4


def test_descriptors_of_the_service_manager_need_no_right(
    runtime_dir: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the protocol's text, with a manager of this test: nothing is fetched from the clients."""
    manager = ServiceManager(tmp_path)
    for name, value in manager.environment().items():
        monkeypatch.setenv(name, value)
    house, block = [f"house.{n}" for n in range(3)], [f"block-1.{n}" for n in range(3)]
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        clients = [service.client(mode=mode) for mode in ("private", "shared")]
        one, two = ([f"client-{number}.{n}" for n in range(3)] for number in (1, 2))
        manager.has(*house, *block, *one, *two)
        for round_ in (1, 2):
            kill_all(service)
            for client in clients:
                begin(client, 10 * round_)
            service.start(program=manager.program(unprivileged=True), recover=True)
            service.await_ready()
            assert "they were stored" in service.last_log()
            for client in clients:
                ends(client, 10 * round_)
            manager.has(*house, *block, *one, *two)
        clients[0].kill()
        manager.has(*house, *block, *two)
        kill_all(service)
        clients[1].kill()
        clients[1].status()
        service.start(program=manager.program(unprivileged=False), recover=True)
        service.await_ready()
        manager.has(*house, *block)
    manager.has()
    manager.close()


def test_half_a_store_is_completed_from_the_clients(
    runtime_dir: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = ServiceManager(tmp_path)
    for name, value in manager.environment().items():
        monkeypatch.setenv(name, value)
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        clients = [service.client(mode=mode) for mode in ("private", "shared")]
        until(lambda: "client-2.2" in manager.stored, "all is stored")
        kill_all(service)
        for name in ("client-1.1", "client-2.0", "block-1.1"):
            os.close(manager.stored.pop(name))
        for client in clients:
            begin(client, 5)
        service.start(program=manager.program(unprivileged=False), recover=True)
        service.await_ready()
        for client in clients:
            ends(client, 5)
    manager.has()
    manager.close()


@pytest.mark.parametrize("point", ["takeover.moved", "takeover.ready", "custodian.kept"])
def test_a_rescue_that_is_interrupted(
    runtime_dir: Path, path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The supervisor, or its new custodian, dies half way: what the custodian has not got is in the records still."""
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        clients = [service.client(mode=mode) for mode in ("private", "shared")]
        kill_all(service)
        for client in clients:
            begin(client, 5)
        monkeypatch.setenv(VARIABLE, f"{point}:3" if point == "custodian.kept" else point)
        service.start(recover=True)
        if point == "custodian.kept":
            until(service._ready, "it is ready", 40)
        else:
            assert service.wait(30) == -signal.SIGKILL
            monkeypatch.delenv(VARIABLE)
            service.recover()
        for client in clients:
            ends(client, 5)
