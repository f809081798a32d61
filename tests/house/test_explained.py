"""Everything that goes wrong is an event with its cause: in the log, in the history, in a page's story."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from tests.conftest import SourceFile
from tests.house.house import PAGE, House, until, word


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
