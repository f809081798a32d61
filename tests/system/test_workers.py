"""Workers that are killed, stopped and outlived: their clients wait for the successor, never fail, never read zeros."""

from __future__ import annotations

import random
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Authenticator, Puppet, Service, alive, descriptors, end_by_pidfd, until, word

BLOCK = 48 << 20
KILLS = 5
"""Not more than the law of crashes forgives."""


def kill_now(service: Service, client: Puppet, killed: set[int]) -> bool:
    """SIGKILL its present worker, whatever that is at, unless it was ``killed`` before; says whether it did."""
    pid = int(service.record(client).get("worker_pid") or 0)
    if pid in killed or not alive(pid):
        return False
    try:
        end_by_pidfd(pid, signal.SIGKILL, "postcopy-")
    except (ProcessLookupError, FileNotFoundError):
        return False  # it has just ended by itself
    killed.add(pid)
    return True


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_killed_at_random_moments(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, mode: str
) -> None:
    path, gate = source_file(BLOCK), Authenticator(tmp_path, KILLS + 1)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, other = service.client("ram0", mode), service.client("ram0", mode)
        client.begin(gate.order(path))
        chance, killed = random.Random(7), set[int]()
        for _ in range(KILLS):
            assert not client.answered(chance.uniform(0.0, 0.05))
            until(partial(kill_now, service, client, killed), "a worker to kill")
            gate.open()
        other.begin(f"check(b, {str(path)!r}, 'random', 4096, 1)")
        assert [client.answer(), other.answer()] == [-1, -1]
        assert service.status()["totals"]["restarts"] == KILLS, "the last of them is what brought the last part"


def test_two_clients_of_both_modes_and_their_workers_killed_together(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path
) -> None:
    path, gate = source_file(BLOCK), Authenticator(tmp_path, 4)
    with Service(runtime_dir, f"ram0={path}", fault_around="16K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(gate.order(path, 4096, seed))
        killed: set[int] = set()
        for _ in range(3):
            for client in clients:
                until(partial(kill_now, service, client, killed), "a worker to kill")
            gate.open()
        assert [client.answer() for client in clients] == [-1, -1]


@pytest.mark.parametrize("taken", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_waiting_client_gets_its_page_after_the_kill(
    runtime_dir: Path, source_file: SourceFile, mode: str, taken: bool
) -> None:
    """A fault that the dead worker had ``taken`` (read) is told to nobody again without the successor's wake-all. Here
    the client, which holds its own userfaultfd, takes it, while the worker stands still."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client("ram0", mode)
        pid = service.kill_worker(client, signal.SIGSTOP)
        client.do("waiter = threading.Thread(target=b.ensure, args=(40960, 1), daemon=True); waiter.start()")
        if taken:
            assert client.do("len(os.read(b.session._userfaultfd.fd, 32))") == 32
        assert client.do("waiter.is_alive()")
        end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
        assert client.do("waiter.join(20) or waiter.is_alive()") is False
        assert client.do("words(b, [10])") == [word(10 * PAGE)]


def test_a_stopped_worker_is_replaced_by_the_watchdog(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client, other = service.client(), service.client("ram0", "shared")
        stopped = service.kill_worker(client, signal.SIGSTOP)
        client.begin("words(b, [10])")
        for page in range(20, 30):
            assert other.do(f"words(b, [{page}])") == [word(page * PAGE)]
        assert not client.answered(), "the worker is stopped"
        assert client.answer(15) == [word(10 * PAGE)]
        assert not alive(stopped)
        assert service.events("watchdog")
        assert service.worker(client) != stopped


def test_a_fault_that_was_read_and_forgotten(runtime_dir: Path, source_file: SourceFile) -> None:
    """The state after a worker was stopped between reading a fault and answering it: no fault is unread, one waits.
    The message is taken away by the client itself, which holds its own userfaultfd."""
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        stopped = service.kill_worker(client, signal.SIGSTOP)
        client.do("waiter = threading.Thread(target=b.ensure, args=(40960, 1), daemon=True); waiter.start()")
        assert client.do("len(os.read(b.session._userfaultfd.fd, 32))") == 32
        assert client.do("waiter.is_alive()")
        client.begin("waiter.join(20); result = read(b, 40960, 8)")
        client.answer(20)
        assert client.do("int.from_bytes(bytes.fromhex(result), 'little')") == word(10 * PAGE)
        assert not alive(stopped)


def test_an_idle_worker_is_left_in_peace(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        before = service.worker(client)
        until(lambda: service.status()["uptime_s"] > 7.5, "longer than the watchdog waits", 30)
        assert service.worker(client) == before
        assert service.status()["totals"]["restarts"] == 0


def test_a_quarantined_client_is_poisoned_and_others_go_on(runtime_dir: Path, source_file: SourceFile) -> None:
    """A worker that is killed again and again, whatever kills it, ends as quarantine for that client only."""
    path = source_file(BLOCK)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, other = service.client(), service.client("ram0", "shared")
        assert client.do("words(b, [1])") == [word(PAGE)]
        killed: set[int] = set()

        def quarantined() -> bool:
            kill_now(service, client, killed)
            return bool(service.record(client)["state"] == "quarantined")

        until(quarantined, "it is given up", 20)
        assert client.do("words(b, [1])") == [word(PAGE)], "what is there stays readable"
        assert other.do(f"check(b, {str(path)!r})") == -1
        assert client.do(f"check(b, {str(path)!r})") == -1, "what others brought is there for it too"
        assert service.events("quarantined")


# --- clients that end -------------------------------------------------------------------------------------------------


def gone(service: Service, pid: int, worker: int = 0) -> bool:
    """Is the client forgotten, and its worker ended?"""
    return all(record["pid"] != pid for record in service.status()["clients"]) and not (worker and alive(worker))


def faulting(service: Service, client: Puppet) -> bool:
    return bool(service.record(client)["faults"] > 20)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_client_killed_while_it_faults(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path, part = source_file(BLOCK), BLOCK // 4
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        doomed = [service.client("ram0", mode) for _ in range(3)]
        honest = service.client("ram0", mode)
        for seed, client in enumerate(doomed):
            worker = service.worker(client)
            if seed == 2:
                honest.begin(f"check(b, {str(path)!r}, 'random', 4096, 0, {3 * part})")
            # A part of its own: nobody else brings what it is to fault for.
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed + 9}, {seed * part}, {(seed + 1) * part})")
            until(partial(faulting, service, client), "it faults")
            client.kill()
            assert service.block()["received"] < BLOCK // PAGE
            until(partial(gone, service, client.pid, worker), "the client is forgotten, its worker ended", 5)
        assert honest.answer() == -1
        assert honest.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        assert service.status()["totals"]["restarts"] == 0


def test_a_client_killed_while_its_worker_is_stopped(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        worker = service.kill_worker(client, signal.SIGSTOP)
        client.begin("words(b, [3])")
        client.kill()
        until(partial(gone, service, client.pid, worker), "the client is forgotten, its worker ended", 5)


def more_than(before: list[list[str]], *pids: int) -> list[str]:
    """Descriptors of these processes that they did not have ``before``."""
    now = [Counter(descriptors(pid)) - Counter(fds) for pid, fds in zip(pids, before, strict=True)]
    return sorted(now[0] + now[1])


def test_fifty_clients_that_come_and_die_leave_no_descriptor(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", f"ram1={path}", fault_around="4K") as service:
        keeper = service.client("ram0", "shared")
        custodian = next(pid for pid in service.people() if pid != service.worker(keeper))
        before = [sorted(descriptors(pid)) for pid in (service.pid, custodian)]
        for number in range(50):
            # A forked child is a client of its own, and cheaper than a new process.
            mode = ("private", "shared")[number % 2]
            doom = f"c = attach('ram1', {mode!r}); words(c, [{number % 64}]); os.kill(os.getpid(), 9)"
            keeper.do(f"doom = {doom!r}")
            assert keeper.do("child('exec(doom)')") == "ended -9"
        until(lambda: len(service.status()["clients"]) == 1, "all are forgotten")

        until(lambda: more_than(before, service.pid, custodian) == [], "what the clients cost is given back")
        assert len(service.people()) == 2
        assert keeper.do(f"check(b, {str(path)!r})") == -1


def test_a_client_that_leaves_by_exec_or_exit(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        leaver = service.client()
        leaver.begin("os._exit(0)")
        assert leaver.status() == 0
        until(partial(gone, service, leaver.pid), "exit: forgotten", 5)
        turned = service.client()
        worker = service.worker(turned)
        turned.begin("os.execv('/bin/sleep', ['sleep', '60'])")
        until(partial(gone, service, turned.pid, worker), "exec: its memory is gone, so is its worker", 5)
