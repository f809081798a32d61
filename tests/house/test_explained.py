"""Everything that goes wrong is an event with its cause: in the log, in the history, in a page's story."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.messages import AskResume, ControlRefused, ResumeAnswer
from tests.conftest import SourceFile
from tests.house.house import PAGE, House, Puppet, PuppetError, until, word
from tests.house.remote import Source


def told(house: House, kind: str, **where: Any) -> list[dict[str, Any]]:
    """The events of this kind with these fields."""
    events = [event for event in house.status()["events"] if event["kind"] == kind]
    return [event for event in events if where.items() <= event.items()]


def test_a_restart_is_told_with_its_cause(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with House(runtime_dir, f"ram0={path}") as house:
        client = house.client()
        pid = house.kill_worker(client)
        number = house.record(client)["id"]
        until(
            lambda: told(house, "restart", worker=number, client=number, pid=pid, cause="signal SIGKILL"), "its cause"
        )
        (event,) = told(house, "restart")
        assert (event["restarts"], event["incarnation"]) == (1, 1)
        assert (
            f'event=restart client={number} worker={number} incarnation=1 pid={pid} restarts=1 cause="signal SIGKILL"'
            in house.log()
        )
        stopped = house.kill_worker(client, signal.SIGSTOP)
        client.begin("words(b, [10])")
        assert client.answer(20) == [word(10 * PAGE)]
        until(lambda: told(house, "restart", pid=stopped), "the second restart")
        (event,) = told(house, "restart", pid=stopped)
        assert event["cause"] == "watchdog: answers no fault for 5 s"
        assert told(house, "watchdog", worker=number, cause="answers no fault for 5 s")


# --- quarantine -------------------------------------------------------------------------------------------------------


def at(source: Source, path: Path, remote: bool) -> str:
    """The same content as a block of either kind."""
    return source.block() if remote else f"ram0={path}"


def resume(house: House, client: int) -> int | str:
    """Pages that are healed, or why not."""
    answer = house.ask(AskResume(client))
    assert isinstance(answer, ResumeAnswer | ControlRefused)
    return answer.healing if isinstance(answer, ResumeAnswer) else answer.reason


def quarantine(house: House, client: Puppet) -> int:
    """Crash its worker until it is given up (``restart_limit`` 0: once); the client's number."""
    house.kill_worker(client)
    until(lambda: house.record(client)["state"] == "quarantined", "it is given up")
    return int(house.record(client)["id"])


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_quarantine_that_waits_until_it_is_resumed(
    runtime_dir: Path, source_file: SourceFile, mode: str, remote: bool
) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "quarantine": "wait", "fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, House(runtime_dir, at(source, path, remote), **options) as house:
        client, other = house.client("ram0", mode), house.client("ram0", mode)
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(house, client)
        assert house.record(client)["worker_pid"] is None
        (event,) = told(house, "quarantined", client=number)
        assert event["cause"] == "1 crashes in 60 s, 0 are forgiven" and f"postcopy resume {number}" in event["detail"]
        assert client.do("words(b, [1])") == [word(PAGE)], "what is there stays readable"
        client.begin("words(b, [10])")
        assert not client.answered(1.0), "it waits"
        assert other.do("words(b, [10])") == [word(10 * PAGE)]
        assert client.answer() == [word(10 * PAGE)], "what others bring is there for it too"
        client.begin("words(b, [11])")
        assert not client.answered(6.0), "longer than the watchdog waits: it still waits, and is not killed"
        late = client.pid
        assert resume(house, number) == 0
        assert client.answer() == [word(11 * PAGE)] and house.worker(client) != late
        assert told(house, "resumed", client=number)
        assert house.record(client)["state"] == "running"
        assert client.do("words(b, [12])") == [word(12 * PAGE)]


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_what_quarantine_poisoned_is_healed_by_resume(
    runtime_dir: Path, source_file: SourceFile, mode: str, remote: bool
) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, House(runtime_dir, at(source, path, remote), **options) as house:
        client, other = house.client("ram0", mode), house.client("ram0", mode)
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(house, client)
        until(lambda: house.record(client)["worker_pid"], "a worker without a source")
        for page in (10, 11):
            with pytest.raises(PuppetError) as lost:
                client.do(f"b.ensure({page * PAGE}, 1)")
            assert lost.value.kind == "PageLost"
        until(lambda: house.record(client)["denied"] == 2, "they are noted")
        assert other.do("words(b, [11])") == [word(11 * PAGE)], "one of them is there for others"
        assert house.block()["lost"] == 0
        assert resume(house, number) == 2

        def healed() -> bool:
            try:
                client.do(f"b.ensure({10 * PAGE}, {2 * PAGE})")
            except PuppetError:
                return False
            return True

        until(healed, "both are healed")
        assert client.do("words(b, [10, 11, 12])") == [word(page * PAGE) for page in (10, 11, 12)]


def test_resume_of_nobody(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(4 * PAGE)}") as house:
        client = house.client()
        number = house.record(client)["id"]
        assert resume(house, number) == f"client {number} is not quarantined"
        assert resume(house, 0) == "client 0 is not quarantined"
        assert resume(house, 77) == "there is no client 77 here"


def test_a_client_attaches_and_leaves_in_a_quarantine_that_waits(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "quarantine": "wait", "fault_around": "4K"}
    with House(runtime_dir, f"ram0={path}", f"ram1={path}", **options) as house:
        client, doomed = house.client(), house.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(house, client)
        client.attach("ram1", called="c")
        client.do("b.close()")
        client.begin("words(c, [3])")
        assert not client.answered(1.0)
        assert resume(house, number) == 0
        assert client.answer() == [word(3 * PAGE)]
        quarantine(house, doomed)
        doomed.begin("words(b, [5])")
        doomed.kill()
        until(lambda: not house.record(doomed), "it is forgotten", 2)
