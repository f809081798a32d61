"""Death at every named step (``postcopy_kernel.crashpoints``): every byte is right afterwards, and nobody waits.

The scenario of a point goes by its first word. A point without a scenario fails, and so does one that nobody passes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel import crashpoints
from postcopy_kernel.crashpoints import POINTS, VARIABLE
from tests.conftest import SourceFile
from tests.system.remote import Source, await_state
from tests.system.service import PuppetError, Service, environment, until
from tests.system.test_firecracker import handler, machine
from tests.system.test_rescue import kill_all

SIZE = 2 << 20
Scenario = Callable[[str, Path, Path, pytest.MonkeyPatch], None]


def passed(service: Service, number: int = 1) -> bool:
    """Has the service replaced so many workers?"""
    return bool(service.status()["totals"]["restarts"] >= number)


def in_a_worker(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    """The fifth fault of each client's first worker ends it; a successor goes on."""
    patch.setenv(VARIABLE, f"{point}:5")
    remote = point in ("worker.unasked", "worker.asked", "worker.told")
    modes = ("private",) if point in ("worker.marked", "worker.woken") else ("private", "shared")
    with Source(f"ram0={path}") as source:
        block = source.block() if remote else f"ram0={path}"
        with Service(directory, block, fault_around="4K", background_rate="0") as service:
            clients = [service.client("ram0", mode) for mode in modes]
            for number, client in enumerate(clients, 1):  # each needs pages that nobody has had before
                client.do(f"words(b, {list(range(40 * number, 40 * number + 30))})", 60)
                until(lambda number=number: passed(service, number), f"{number} workers have died there")  # type: ignore[misc]
            assert [client.do(f"check(b, {str(path)!r}, 'random', 4096)", 60) for client in clients] == [-1] * len(
                modes
            )
            assert service.status()["totals"]["restarts"] == len(modes)


def in_a_machines_worker(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Its worker dies with the message of a removal in its hand: the successor must know of it."""
    patch.setenv(VARIABLE, f"{point}:3")
    with Service(directory, f"ram0={path}", fault_around="4K") as service:
        patch.delenv(VARIABLE)
        listens = path.with_name("machine.sock")
        with handler(service, listens) as face, machine(listens, path, (SIZE // 4096,)) as guest:
            face.until_line("attached")
            assert guest.do("touch1 1") and guest.do("touch1 2")
            assert guest.do("balloon 300 1")
            until(lambda: passed(service), "the worker has died there")
            assert guest.do("touch1 300")
            assert guest.do("touch 2 1") == 0


def in_the_custodian(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(VARIABLE, point)
    with Service(directory, f"ram0={path}", fault_around="4K") as service:
        for mode in ("private", "shared"):
            assert service.client("ram0", mode).do(f"check(b, {str(path)!r}, 'random', 4096)", 60) == -1
        assert any("custodian" in detail for detail in service.events("restart"))


def in_a_source(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    source = Source(f"ram0={path}")
    patch.setenv(VARIABLE, f"{point}:5")
    options: dict[str, Any] = {"fault_around": "4K", "background_rate": "0", "source_timeout": "1"}
    with source:
        patch.delenv(VARIABLE)
        with Service(directory, source.block(), **options) as service:
            clients = [service.client("ram0", mode) for mode in ("private", "shared")]
            for seed, client in enumerate(clients):
                client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
            process = source.process
            assert process is not None and process.wait(30) == -signal.SIGKILL
            source.process = None
            await_state(service, "paused")
            source.start()
            assert [client.answer(60) for client in clients] == [-1, -1]


def dies(service: Service, patch: pytest.MonkeyPatch) -> None:
    """The supervisor dies of its point; the next one takes over, and lives."""
    assert service.wait(30) == -signal.SIGKILL, service.log()
    patch.delenv(VARIABLE)
    service.recover()


def in_a_placing_supervisor(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv(VARIABLE, f"{point}:5")
    options: dict[str, Any] = {"fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, Service(directory, source.block(), **options) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        dies(service, patch)
        assert [client.answer(60) for client in clients] == [-1, -1]


LEAVING = ("door.Unmap", "door.Unmapped", "door.Goodbye")
RETURNING = ("door.Resume", "door.Resumed")


def at_the_door(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    """One client works on while another is on its way in, or out, or comes back."""
    blocks = f"ram0={path}", f"ram1={path}"
    patch.setenv(VARIABLE, f"{point}:{1 if point in LEAVING + RETURNING else 2}")
    with Service(directory, *blocks, fault_around="4K") as service:
        keeper, guest = service.client("ram0", "shared"), service.client(None)
        keeper.begin(f"check(b, {str(path)!r}, 'random', 4096)")
        if point in LEAVING + RETURNING:
            guest.attach("ram1")
        if point in RETURNING:
            service.kill()
            service.recover()
            guest.begin("c = attach('ram0')")
        else:
            guest.begin("b.close()" if point in LEAVING else "b = attach('ram1')")
        dies(service, patch)
        try:
            guest.answer(60)
        except PuppetError as error:  # what was begun may fail for want of a supervisor, and for nothing else
            assert error.kind == "NoSupervisor", error
        guest.attach("ram1")
        assert guest.do(f"check(b, {str(path)!r}, 'random', 4096)", 60) == -1
        assert keeper.answer(60) == -1
        guest.kill()
        until(
            lambda: [one["pid"] for one in service.status()["clients"]] == [keeper.pid], "nothing of the guest is left"
        )


def in_a_rescue(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    """A supervisor dies while it rescues clients whose service has died altogether: the next one does it."""
    with Source(f"ram1={path}") as source:
        blocks = f"ram0={path}", source.block("ram1")
        with Service(directory, *blocks, fault_around="4K", background_rate="0") as service:
            clients = [service.client(name, mode) for name in ("ram0", "ram1") for mode in ("private", "shared")]
            for client in clients:
                client.do("words(b, [1, 2])")
            kill_all(service)
            for seed, client in enumerate(clients):
                client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
            patch.setenv(VARIABLE, point)
            service.start(recover=True)
            dies(service, patch)
            assert [client.answer(60) for client in clients] == [-1] * 4


def in_a_take_over(point: str, directory: Path, path: Path, patch: pytest.MonkeyPatch) -> None:
    with Source(f"ram1={path}") as source:
        blocks = f"ram0={path}", source.block("ram1")
        with Service(directory, *blocks, fault_around="4K", background_rate="0") as service:
            clients = [service.client(name, mode) for name in ("ram0", "ram1") for mode in ("private", "shared")]
            for client in clients:
                client.do("words(b, [1, 2])")
            service.kill()
            for seed, client in enumerate(clients):
                client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
            patch.setenv(VARIABLE, f"{point}:{2 if point == 'takeover.half' else 1}")
            service.start(recover=True)
            dies(service, patch)
            assert [client.answer(60) for client in clients] == [-1] * 4


SCENARIOS: dict[str, Scenario] = {
    "machine": in_a_machines_worker,
    "page": in_a_placing_supervisor,
    "door": at_the_door,
    "takeover": in_a_take_over,
    "rescue": in_a_rescue,
    "worker": in_a_worker,
    "custodian": in_the_custodian,
    "source": in_a_source,
}


@pytest.mark.parametrize("point", POINTS)
def test_death_at(point: str, runtime_dir: Path, source_file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS.get(point.partition(".")[0])
    assert scenario, f"no scenario for {point}"
    scenario(point, runtime_dir, source_file(SIZE), monkeypatch)


# --- the points themselves --------------------------------------------------------------------------------------------


def python(code: str, word: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from postcopy_kernel.crashpoints import *\n{code}"]
    return subprocess.run(command, env=environment(**{VARIABLE: word}), capture_output=True, text=True, timeout=60)


def test_the_nth_passing_of_the_point_that_is_armed() -> None:
    code = "for n in range(9):\n at('page.placed')\n at('page.marked')\n print(n, flush=True)"
    done = python(code, "page.marked:3")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "0\n1\n")
    assert python(code, "").returncode == 0 and python(code, "page.arrived").returncode == 0
    assert python(f"disarm()\n{code}", "page.marked").returncode == 0
    done = python("around('page.arrived', print, 'page.placed')('in between', flush=True)", "page.placed")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "in between\n")
    assert python("before('page.arrived', print)('never')", "page.arrived").stdout == ""


@pytest.mark.parametrize("word", ["nonsense", "page", "page.placed:", "page.placed:x", "page.placed:-1", ":3"])
def test_a_word_that_is_no_point(word: str) -> None:
    done = python("print('lives')", word)
    assert done.returncode == 1 and "unknown point" in done.stderr


def test_nothing_is_wrapped_where_nothing_is_armed() -> None:
    """What stands on the way of a fault is the very function that would be there without any of this."""
    from postcopy_workers.placing import Calls, system_calls

    assert VARIABLE not in os.environ
    thing, act = object(), print
    assert (
        crashpoints.before("page.marked", act) is act and crashpoints.around("page.arrived", act, "page.placed") is act
    )
    assert crashpoints.watched(thing, "copy", "page.arrived", "page.placed") is thing
    assert system_calls() == Calls()
