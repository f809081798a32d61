"""Everything that goes wrong is an event with its cause: in the log, in the history, in a page's story."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.messages import AskResume, AskStory, ControlRefused, ResumeAnswer, StoryAnswer
from tests.conftest import SourceFile
from tests.system.remote import Source, await_state
from tests.system.service import PAGE, Puppet, PuppetError, Service, environment, until, word


def told(service: Service, kind: str, **where: Any) -> list[dict[str, Any]]:
    """The events of this kind with these fields."""
    events = [event for event in service.status()["events"] if event["kind"] == kind]
    return [event for event in events if where.items() <= event.items()]


def test_a_restart_is_told_with_its_cause(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        pid = service.kill_worker(client)
        number = service.record(client)["id"]
        until(
            lambda: told(service, "restart", worker=number, client=number, pid=pid, cause="signal SIGKILL"), "its cause"
        )
        (event,) = told(service, "restart")
        assert (event["restarts"], event["incarnation"]) == (1, 1)
        line = f"event=restart client={number} name=puppet.py worker={number} incarnation=1 pid={pid} restarts=1"
        assert f'{line} cause="signal SIGKILL"' in service.log()
        stopped = service.kill_worker(client, signal.SIGSTOP)
        client.begin("words(b, [10])")
        assert client.answer(20) == [word(10 * PAGE)]
        until(lambda: told(service, "restart", pid=stopped), "the second restart")
        (event,) = told(service, "restart", pid=stopped)
        assert event["cause"] == "watchdog: answers no fault for 5 s"
        assert told(service, "watchdog", worker=number, cause="answers no fault for 5 s")


# --- quarantine -------------------------------------------------------------------------------------------------------


def at(source: Source, path: Path, remote: bool) -> str:
    """The same content as a block of either kind."""
    return source.block() if remote else f"ram0={path}"


def resume(service: Service, client: int) -> int | str:
    """Pages that are healed, or why not."""
    answer = service.ask(AskResume(client))
    assert isinstance(answer, ResumeAnswer | ControlRefused)
    return answer.unpoisoning if isinstance(answer, ResumeAnswer) else answer.reason


def quarantine(service: Service, client: Puppet) -> int:
    """Crash its worker until it is given up (``restart_limit`` 0: once); the client's number."""
    service.kill_worker(client)
    until(lambda: service.record(client)["state"] == "quarantined", "it is given up")
    return int(service.record(client)["id"])


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_quarantine_that_waits_until_it_is_resumed(
    runtime_dir: Path, source_file: SourceFile, mode: str, remote: bool
) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "quarantine": "wait", "fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, at(source, path, remote), **options) as service:
        client, other = service.client("ram0", mode), service.client("ram0", mode)
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(service, client)
        assert service.record(client)["worker_pid"] is None
        (event,) = told(service, "quarantined", client=number)
        assert event["cause"] == "1 crashes in 60 s, 0 are forgiven" and f"postcopy resume {number}" in event["detail"]
        assert client.do("words(b, [1])") == [word(PAGE)], "what is there stays readable"
        client.begin("words(b, [10])")
        assert not client.answered(1.0), "it waits"
        assert other.do("words(b, [10])") == [word(10 * PAGE)]
        assert client.answer() == [word(10 * PAGE)], "what others bring is there for it too"
        client.begin("words(b, [11])")
        assert not client.answered(6.0), "longer than the watchdog waits: it still waits, and is not killed"
        waiting = service.record(client)["worker_pid"]
        assert resume(service, number) == 0
        assert client.answer() == [word(11 * PAGE)] and service.worker(client) != waiting
        assert told(service, "resumed", client=number)
        assert service.record(client)["state"] == "running"
        assert client.do("words(b, [12])") == [word(12 * PAGE)]


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_what_quarantine_poisoned_is_healed_by_resume(
    runtime_dir: Path, source_file: SourceFile, mode: str, remote: bool
) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, at(source, path, remote), **options) as service:
        client, other = service.client("ram0", mode), service.client("ram0", mode)
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(service, client)
        until(lambda: service.record(client)["worker_pid"], "a worker without a source")
        for page in (10, 11):
            with pytest.raises(PuppetError) as lost:
                client.do(f"b.ensure({page * PAGE}, 1)")
            assert lost.value.kind == "PageLost"
        until(lambda: service.record(client)["denied"] == 2, "they are noted")
        assert other.do("words(b, [11])") == [word(11 * PAGE)], "one of them is there for others"
        assert service.block()["lost"] == 0
        assert resume(service, number) == 2

        def healed() -> bool:
            try:
                client.do(f"b.ensure({10 * PAGE}, {2 * PAGE})")
            except PuppetError:
                return False
            return True

        until(healed, "both are healed")
        assert client.do("words(b, [10, 11, 12])") == [word(page * PAGE) for page in (10, 11, 12)]


def test_resume_of_nobody(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(4 * PAGE)}") as service:
        client = service.client()
        number = service.record(client)["id"]
        assert resume(service, number) == f"client {number} is not quarantined"
        assert resume(service, 0) == "client 0 is not quarantined"
        assert resume(service, 77) == "there is no client 77 here"


def test_a_client_attaches_and_leaves_in_a_quarantine_that_waits(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "quarantine": "wait", "fault_around": "4K"}
    with Service(runtime_dir, f"ram0={path}", f"ram1={path}", **options) as service:
        client, doomed = service.client(), service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        number = quarantine(service, client)
        client.attach("ram1", called="c")
        client.do("b.close()")
        client.begin("words(c, [3])")
        assert not client.answered(1.0)
        assert resume(service, number) == 0
        assert client.answer() == [word(3 * PAGE)]
        quarantine(service, doomed)
        doomed.begin("words(b, [5])")
        doomed.kill()
        until(lambda: not service.record(doomed), "it is forgotten", 5)


# --- stories ----------------------------------------------------------------------------------------------------------


def story(service: Service, page: int, name: str = "ram0") -> dict[str, Any]:
    answer = service.ask(AskStory(name, page * PAGE + 17))
    assert isinstance(answer, StoryAnswer), answer
    told = json.loads(answer.document)
    assert isinstance(told, dict)
    return told


def test_the_story_of_a_page_of_a_file(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client, other = service.client(), service.client("ram0", "shared")
        before = story(service, 7)
        assert (before["state"], before["present"], before["waiting"], before["request"]) == (
            "missing",
            False,
            [],
            None,
        )
        assert before["offset"] == 7 * PAGE and before["source"] == str(path)
        assert [one["modes"] for one in before["clients"]] == [["private"], ["shared"]]
        assert client.do("words(b, [7])") == [word(7 * PAGE)]
        until(lambda: story(service, 7)["state"] == "received", "it is marked")
        after = story(service, 7)
        assert (after["present"], after["polluted"], after["life"]) == (True, False, [])
        assert "not recorded" in after["not_recorded"]
        path.write_bytes(path.read_bytes()[: 20 * PAGE])
        with pytest.raises(PuppetError):
            other.do(f"b.ensure({30 * PAGE}, 1)")
        until(lambda: story(service, 30)["state"] == "lost", "it is lost")
        # The mark lies in memory that all share; why it was made is a message, which comes in its own time.
        life = until(lambda: story(service, 30)["life"], "its worker has said why")
        assert {one["kind"] for one in life} == {"source-changed"}
        assert all(one["cause"] for one in life)


def test_the_story_of_a_page_from_elsewhere(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K", "source_timeout": "3"}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        client, other = service.client(), service.client()
        number = service.record(client)["id"]
        assert client.do("words(b, [7])") == [word(7 * PAGE)]
        (asked,) = story(service, 7)["life"]
        assert (asked["kind"], asked["client"], asked["offset"], asked["length"]) == ("asked", number, 7 * PAGE, PAGE)
        assert asked["attempts"] == 1 and 0 < asked["took_ms"] < 15000 and asked["at"] <= asked["answered_at"]
        source.tell(signal.SIGSTOP)
        for one in (client, other):
            one.begin("words(b, [9])")
        until(lambda: len(story(service, 9)["waiting"]) == 2, "both stand there")
        request = story(service, 9)["request"]
        assert request["state"] == "sent" and request["client"] in story(service, 9)["waiting"]
        await_state(service, "paused")
        assert story(service, 9)["request"]["state"] == "queued"
        (paused,) = told(service, "pause", source=source.endpoint)
        assert paused["cause"] == "nothing heard for 3 s"
        source.tell(signal.SIGCONT)
        assert [one.answer() for one in (client, other)] == [[word(9 * PAGE)]] * 2
        life = story(service, 9)["life"]
        assert [one["kind"] for one in life] == ["asked"] * len(life) and "took_ms" in life[-1]
        assert story(service, 9)["waiting"] == [] and story(service, 9)["request"] is None
        assert told(service, "recover", source=source.endpoint)


def postcopy(service: Service, *words: str) -> tuple[int, str, str]:
    """Exit status, output and complaint of the command line."""
    command = [sys.executable, "-m", "postcopy", *words, "--runtime-dir", str(service.directory)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False, text=True)
    return done.returncode, done.stdout, done.stderr.strip()


@pytest.mark.timeout(400)  # it starts many programs, one after the other
def test_the_command_line(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(64 * PAGE)
    options: dict[str, Any] = {"restart_limit": 0, "restart_backoff": 0.5, "quarantine": "wait"}
    with Service(runtime_dir, f"ram0={path}", **options) as service:
        client = service.client()
        number = quarantine(service, client)
        until(lambda: told(service, "restart"), "it is told")
        policy = service.status()["restart_policy"]
        assert (policy["limit"], policy["backoff_s"], policy["quarantine"]) == (0, 0.5, "wait")
        status, said, _ = postcopy(service, "status", "--events", "--json")
        assert status == 0
        assert {event["kind"] for event in json.loads(said)["events"]} == {"quarantined", "restart"}
        status, said, _ = postcopy(service, "status", "--events")
        assert status == 0 and "signal SIGKILL" in said and len(said.splitlines()) == 2
        for place in ("ram0+28K", "ram0+0x7000", "ram0+28672"):
            status, said, _ = postcopy(service, "status", "--story", place, "--json")
            assert status == 0 and json.loads(said)["page"] == 7
        status, said, _ = postcopy(service, "status", "--story", "ram0+0")
        assert status == 0 and f"client {number}" in said and "quarantined" in said and "not recorded" in said
        for words, wanted in (
            (("status", "--story", "ram0"), 2),
            (("status", "--story", "ram0+0xg"), 2),
            (("status", "--story", "ram0+-1"), 2),
            (("status", "--story", "+4K"), 2),
            (("status", "--story", "ram0+4K", "--events"), 2),
            (("status", "--follow"), 2),
            (("status", "--story", "ram9+4K"), 1),
            (("status", "--story", "ram0+1G"), 1),
            (("resume", "x"), 2),
            (("resume", "77"), 1),
        ):
            status, said, complaint = postcopy(service, *words)
            assert (status, said) == (wanted, "") and len(complaint.splitlines()) == 1, (words, status, complaint)
        assert postcopy(service, "resume", str(number)) == (0, f"client {number} continues\n", "")
        status, _, complaint = postcopy(service, "resume", str(number))
        assert status == 1 and complaint == f"postcopy: client {number} is not quarantined"
