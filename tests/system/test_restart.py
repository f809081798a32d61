"""The service's people restarted in every order: the supervisor killed while clients live, and another in its place."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.conftest import SourceFile
from tests.system.service import PAGE, Authenticator, PuppetError, Service, alive, until, word

PAGES = 512


def crash(service: Service) -> None:
    service.process.kill()
    assert service.wait() == -signal.SIGKILL


def test_clients_run_on_when_the_supervisor_is_killed(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path
) -> None:
    """Local blocks need nobody but the worker: every byte still comes, in both modes."""
    path, gate = source_file(24 << 20), Authenticator(tmp_path, 2)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", orphan_timeout="0.1") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            # First pages of its own, of the part behind the gate: of the other the faster ones might leave it none.
            own = range(4000 + 30 * seed, 4030 + 30 * seed)
            client.begin(f"words(b, {own}) and {gate.order(path, 4096, seed)}")
        until(lambda: all(service.record(client)["faults"] > 20 for client in clients), "they fault")
        assert service.block()["received"] < (24 << 20) // PAGE
        crash(service)
        gate.open()
        assert [client.answer() for client in clients] == [-1] * 4
        people = service.people()
        assert people
        for client in clients:
            client.close()
        until(lambda: not any(alive(pid) for pid in people), "workers and custodian end with the last client", 10)
        clean(runtime_dir)


def clean(runtime_dir: Path) -> None:
    """What a killed supervisor cannot tidy up."""
    for name in ("door", "private/router"):
        (runtime_dir / name).unlink(missing_ok=True)


def test_a_client_without_a_house_is_told(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(PAGES * PAGE)}", orphan_timeout="0.1") as service:
        client = service.client()
        crash(service)
        for order in ("attach('ram0')", "attach('ram1', 'shared')"):
            try:
                client.do(order)
            except PuppetError as error:
                assert error.kind == "NoSupervisor" and str(runtime_dir) in error.text
            else:
                raise AssertionError("attached, to whom?")
        assert client.do("words(b, [8])") == [word(8 * PAGE)]
        assert client.do("child('words(b, [8])')") == "ended -11", "a fork's child is nobody's client: no zeros"
        client.do("b.close()")
        client.close()
        until(lambda: not service.people(), "nobody is left", 10)
        clean(runtime_dir)


def test_the_second_supervisor_serves_other_clients_beside_the_old_workers(
    runtime_dir: Path, source_file: SourceFile
) -> None:
    path, other = source_file(PAGES * PAGE), source_file(PAGES * PAGE, 7, "other.bin")
    with Service(runtime_dir, f"ram0={path}") as first:
        old = first.client("ram0", "shared")
        assert old.do("words(b, [1])") == [word(PAGE)]
        crash(first)
        with Service(runtime_dir, f"ram0={other}", abandon=True) as second:
            new = second.client("ram0", "shared")
            for page in (2, 300, 511):
                assert new.do(f"words(b, [{page}])") == [word(page * PAGE, 7)]
                assert old.do(f"words(b, [{page}])") == [word(page * PAGE)]
            old.attach("ram0", "private", "c")
            assert old.do("words(c, [9])") == [word(9 * PAGE, 7)]
            assert old.do("words(b, [9])") == [word(9 * PAGE)]
            assert not [event for event in second.status()["events"] if event["kind"] == "bug"]
            old.close()


def test_nothing_is_left_of_a_house_that_has_done_its_work(runtime_dir: Path, source_file: SourceFile) -> None:
    """The whole life of a service: no process, no socket, no memory but what clients still hold."""
    path = source_file(4 << 20)
    with Service(runtime_dir, f"ram0={path}", f"ram1={path}") as service:
        clients = [service.client(name, mode) for name in ("ram0", "ram1") for mode in ("private", "shared")]
        for client in clients:
            client.begin(f"check(b, {str(path)!r}, 'random')")
        assert [client.answer() for client in clients] == [-1] * 4
        people = service.people()
        service.audit()
        service.end()
        until(lambda: not any(alive(pid) for pid in people), "all are gone")
        assert not [entry for entry in runtime_dir.rglob("*") if not entry.is_dir()]
        maps = [Path(f"/proc/{client.pid}/maps").read_text() for client in clients]
        assert all("memfd:postcopy-ram" in text for text in maps), "what is attached stays attached"
        for client in clients:
            client.do("b.close()")
        maps = [Path(f"/proc/{client.pid}/maps").read_text() for client in clients]
        assert not any("memfd:postcopy-ram" in text for text in maps)
