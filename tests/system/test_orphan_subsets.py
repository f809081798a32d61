"""``--on-orphan`` for every set of processes that may be killed together: supervisor, custodian, workers.

Missing pages come, wait for a supervisor, or are SIGBUS within the timeout: never zeros, never no choice at all."""

from __future__ import annotations

import os
import signal
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, PuppetError, Service, alive, until, word
from tests.system.test_custodian import custodian
from tests.system.test_orphan_watcher import first, read

PAGES = 64
PLAIN: dict[str, Any] = {"fault_around": "4K", "background_rate": "0", "orphan_timeout": 0.5}
SUBSETS = list(chain.from_iterable(combinations(("supervisor", "custodian", "workers"), n) for n in (1, 2, 3)))


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(PAGES * PAGE)


def kill(service: Service, clients: list[Puppet], victims: tuple[str, ...]) -> None:
    """SIGKILL to these at once. All are stopped first, so that none has the time to replace another."""
    pids = {"supervisor": [service.pid], "custodian": [custodian(service)]}
    pids["workers"] = [service.worker(client) for client in clients]
    chosen = [pid for victim in victims for pid in pids[victim]]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in chosen:
            os.kill(pid, number)
    if "supervisor" in victims:
        service.process.wait(10)
    until(lambda: not any(map(alive, chosen)), "all have ended")


def waits(client: Puppet) -> bool:
    return not client.answered(1.2)


@pytest.mark.parametrize(
    ("victims", "policy"),
    [
        pytest.param(victims, policy, id="-".join((*victims, policy)))
        for victims, policy in product(SUBSETS, ("poison", "wait"))
        if policy == "poison" or "supervisor" in victims  # a living supervisor asks for no policy
    ],
)
def test_local_and_remote(runtime_dir: Path, path: Path, victims: tuple[str, ...], policy: str) -> None:
    with (
        Source(f"ram1={path}") as source,
        Service(runtime_dir, f"ram0={path}", source.block("ram1"), on_orphan=policy, **PLAIN) as service,
    ):
        kinds = product(("ram0", "ram1"), ("private", "shared"))
        clients = {f"{name} {mode}": service.client(name, mode) for name, mode in kinds}
        for client in clients.values():
            assert read(client, 1) == first(1)
        kill(service, list(clients.values()), victims)
        for client in clients.values():
            client.begin(f"syscall_read(b, {2 * PAGE})")
        served = "supervisor" not in victims
        local = served or victims != ("supervisor", "custodian", "workers")
        answers: dict[str, object] = {}
        for name, client in clients.items():
            if served or (local and name.startswith("ram0")):
                assert client.answer(30) == first(2), name
            elif policy == "poison":
                with pytest.raises(PuppetError, match="Bad address"):
                    client.answer(30)
                answers[name] = read(client, 3)
                assert read(client, 1) == first(1)
            else:
                answers[name] = waits(client)
        assert all(answer is (None if policy == "poison" else True) for answer in answers.values()), answers
        if served:
            return
        service.recover()
        for name, client in clients.items():
            if name in answers and policy == "wait":
                assert client.answer(30) == first(2)
            for page in (2, 3, 4):
                until(lambda client=client, page=page: read(client, page) == first(page), f"{name}: {page} is healed")  # type: ignore[misc]


def test_the_worker_of_one_client_hides_no_other_client(runtime_dir: Path, path: Path) -> None:
    """Supervisor, custodian and one of two workers die: that one's client is SIGBUS, the other is served."""
    with Service(runtime_dir, f"ram0={path}", on_orphan="poison", **PLAIN) as service:
        gone, stays = service.client(), service.client(mode="shared")
        pids = [service.worker(gone), custodian(service)]
        service.process.send_signal(signal.SIGKILL)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        service.process.wait(10)
        gone.begin(f"syscall_read(b, {2 * PAGE})")
        with pytest.raises(PuppetError, match="Bad address"):
            gone.answer(30)
        assert read(stays, 3) == first(3)
        service.recover()
        until(lambda: read(gone, 2) == first(2), "healed")
        assert stays.do("words(b, [4])") == [word(4 * PAGE)]
