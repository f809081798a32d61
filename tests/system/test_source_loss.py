"""A source that is lost, comes back, comes back as another, or has lost pages: clients wait, and see no wrong byte."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.codec import encode
from postcopy_protocol.return_path import Pages, RangeKind, pack_range
from tests.conftest import SourceFile
from tests.system.remote import Source, await_state, kinds, source_of
from tests.system.service import PAGE, Authenticator, Puppet, PuppetError, Service, until, word
from tests.wire.evil import EvilSource, odd

SIZE = 2048 * PAGE
SLOW: dict[str, Any] = {"background_rate": "0", "fault_around": "4K", "source_timeout": "1"}
CHANGES = ("source", "pause", "recover")


@pytest.fixture
def source(source_file: SourceFile) -> Iterator[Source]:
    """Of a file of SIZE."""
    with Source(f"ram0={source_file(SIZE)}") as source:
        yield source


def began(service: Service, *orders: str) -> list[Puppet]:
    """Clients of both modes in turn, each with its order begun and its first request sent."""
    clients = [service.client("ram0", ("private", "shared")[number % 2]) for number in range(len(orders))]
    for client, order in zip(clients, orders, strict=True):
        client.begin(order)
        # Without figures it has ended already: poisoned, before we looked.
        until(lambda client=client: service.record(client).get("requests", True), "it asks")  # type: ignore[misc]
    return clients


def path_of(source: Source) -> Path:
    return Path(source._blocks[0].partition("=")[2])


def test_killed_and_back_while_clients_run(runtime_dir: Path, source: Source, tmp_path: Path) -> None:
    """Twice. Waiters wait, everything is right, and the events are one pause and one recover each."""
    with Service(runtime_dir, source.block(), **SLOW) as service:
        path, gate = path_of(source), Authenticator(tmp_path, 3)
        # First a page of its own, of the last part: of the first the faster ones might leave it none to ask for.
        orders = (f"words(b, [{2040 + seed}]) and {gate.order(path, 4096, seed)}" for seed in range(4))
        clients = began(service, *orders)
        for life in range(2):
            source.end()
            await_state(service, "paused")
            assert service.status()["state"] == "paused"
            gate.open()  # who was through with its part goes on, to where it must wait as well
            stood = service.block()["received"]
            assert not any(client.answered(0.5) for client in clients), "they wait"
            assert service.block()["received"] == stood < SIZE // PAGE, "and nothing comes meanwhile"
            source.start()
            await_state(service, "up")
            until(lambda stood=stood: service.block()["received"] > stood, "it goes on")  # type: ignore[misc]
            assert kinds(service, *CHANGES) == ["source", *["pause", "recover"] * (life + 1)]
        assert [client.answer(60) for client in clients] == [-1] * 4
        assert service.status()["state"] == "running" and not service.events("source-refused")
        assert service.status()["totals"]["restarts"] == 0


def test_what_is_received_stays_usable(runtime_dir: Path, source: Source) -> None:
    with Service(runtime_dir, source.block(), **SLOW) as service:
        assert service.client().do("words(b, [5, 6])") == [word(5 * PAGE), word(6 * PAGE)]
        source.end()
        await_state(service, "paused")
        late = service.client("ram0", "shared")
        assert late.do("words(b, [5, 6])") == [word(5 * PAGE), word(6 * PAGE)]
        late.begin("words(b, [7])")
        assert not late.answered(1)
        late.kill()
        late.status()


def test_waiters_wait_longer_than_any_watchdog(runtime_dir: Path, source: Source) -> None:
    """Nobody is killed, nothing is poisoned, because a source is away for long."""
    with Service(runtime_dir, source.block(), **SLOW) as service:
        source.end()
        (client,) = began(service, "words(b, [7])")
        worker = service.worker(client)
        begun = time.monotonic()
        until(lambda: client.answered(1) or time.monotonic() - begun > 9, "nine seconds", 20)
        assert not client.answered()
        source.start()
        assert client.answer(15) == [word(7 * PAGE)]
        assert service.worker(client) == worker and service.status()["totals"]["restarts"] == 0
        assert not service.events("watchdog")


@pytest.mark.parametrize("waits", [False, True])
def test_a_restart_faster_than_the_timeout(runtime_dir: Path, source: Source, waits: bool) -> None:
    """Nobody sees it go; found out at the next Ping at the latest, and before that by whoever asks."""
    with Service(runtime_dir, source.block(), background_rate="0", fault_around="4K", source_timeout="30") as service:
        client = service.client()
        assert client.do("words(b, [7])") == [word(7 * PAGE)]
        if waits:
            source.tell(signal.SIGSTOP)
            client.begin("words(b, [8])")
            until(lambda: source_of(service)["in_flight"], "it asks")
        source.end()
        source.start()
        if not waits:
            client.begin("words(b, [8])")
        assert client.answer(5) == [word(8 * PAGE)]
        await_state(service, "up")
        assert kinds(service, *CHANGES) == ["source", "pause", "recover"]


def test_a_source_that_stands_still(runtime_dir: Path, source: Source) -> None:
    with Service(runtime_dir, source.block(), **SLOW) as service:
        source.tell(signal.SIGSTOP)
        (client,) = began(service, "words(b, [7, 8, 9])")
        await_state(service, "paused")
        source.tell(signal.SIGCONT)
        assert client.answer(5) == [word(page * PAGE) for page in (7, 8, 9)]
        assert kinds(service, *CHANGES) == ["source", "pause", "recover"]


@pytest.mark.parametrize("what", ["content", "size"])
def test_another_content_at_the_endpoint(
    runtime_dir: Path, source: Source, source_file: SourceFile, tmp_path: Path, what: str
) -> None:
    """Refused with the values of both sides; clients wait on, and run on when the right one is back."""
    other = source_file(SIZE, 3, "other") if what == "content" else source_file(SIZE + 1, 0, "other")
    with Service(runtime_dir, source.block(), **SLOW) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        source.end()
        await_state(service, "paused")
        right = source._blocks
        source.start(f"ram0={other}")
        for client in clients:
            client.begin("words(b, [7, 2047])")
        (said,) = until(lambda: service.events("source-refused"), "it is refused")
        assert f"it was {SIZE} bytes of" in said and f"{other.stat().st_size} bytes of" in said
        assert not any(client.answered(1) for client in clients)
        assert service.block()["received"] == 0 and len(service.events("source-refused")) == 1
        source.end()
        source.start(*right)
        assert [client.answer(10) for client in clients] == [[word(7 * PAGE), word(2047 * PAGE)]] * 2


def test_another_source_of_the_same_content(runtime_dir: Path, source: Source, source_file: SourceFile) -> None:
    copy = source_file(SIZE, 0, "copy")
    with Service(runtime_dir, source.block(), **SLOW) as service:
        source.end()
        (client,) = began(service, f"check(b, {str(copy)!r}, 'random')")
        path_of(source).unlink()
        source.start(f"ram0={copy}")
        assert client.answer(20) == -1


def test_poison_on_source_loss(runtime_dir: Path, source: Source) -> None:
    """Who waits gets SIGBUS or PageLost, who comes later too; never zeros. What is received stays."""
    with Service(runtime_dir, source.block(), on_source_loss="poison", **SLOW) as service:
        keeper = service.client()
        assert keeper.do("words(b, [5])") == [word(5 * PAGE)]
        source.tell(signal.SIGSTOP)
        toucher, sharer, ensurer = began(service, "words(b, [7])", "words(b, [8])", f"b.ensure({9 * PAGE}, 1, 20)")
        await_state(service, "paused")
        assert [client.status() for client in (toucher, sharer)] == [-signal.SIGBUS] * 2
        with pytest.raises(PuppetError) as told:
            ensurer.answer(5)
        assert told.value.kind == "PageLost"
        assert keeper.do("words(b, [5])") == [word(5 * PAGE)]
        late = service.client("ram0", "shared")
        late.begin("words(b, [10])")
        assert late.status() == -signal.SIGBUS
        source.tell(signal.SIGCONT)
        await_state(service, "up")
        fresh = [service.client("ram0", mode) for mode in ("private", "shared")]
        assert [client.do("words(b, [7, 8, 9, 10])") for client in fresh] == [
            [word(page * PAGE) for page in (7, 8, 9, 10)]
        ] * 2
        assert ensurer.do(f"b.ensure({20 * PAGE}, 1, 20)") is None


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_file_that_is_cut_at_the_source(runtime_dir: Path, source: Source, mode: str) -> None:
    """Its pages are lost, and named; never zeros, never a mixture."""
    with Service(runtime_dir, source.block(), **SLOW) as service:
        client = service.client("ram0", mode)
        assert client.do("words(b, [5])") == [word(5 * PAGE)]
        os.truncate(path_of(source), 1000 * PAGE + 7)
        for page in (1000, 1500):
            with pytest.raises(PuppetError) as told:
                client.do(f"b.ensure({page * PAGE}, 1, 20)")
            assert told.value.kind == "PageLost"
            toucher = service.client("ram0", mode)
            toucher.begin(f"words(b, [{page}])")
            assert toucher.status() == -signal.SIGBUS
        assert client.do("words(b, [5])") == [word(5 * PAGE)]
        assert service.block()["lost"] >= 2
        assert any("1000" in said and "cut" in said for said in service.events("lost"))


def test_lost_pages_are_healed_by_a_source_that_has_them(runtime_dir: Path, source: Source) -> None:
    path = path_of(source)
    whole = path.read_bytes()
    with Service(runtime_dir, source.block(), **SLOW) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        os.truncate(path, 1000 * PAGE)
        for client in clients:
            with pytest.raises(PuppetError):
                client.do(f"b.ensure({1500 * PAGE}, 1, 20)")
        source.end()
        path.write_bytes(whole)
        await_state(service, "paused")
        source.start()
        await_state(service, "up")
        for client in [*clients, service.client("ram0", "shared")]:
            client.do(f"b.ensure({1500 * PAGE}, 1, 20)")
            assert client.do("words(b, [1500])") == [word(1500 * PAGE)]
        assert service.block()["lost"] == 0


def test_lost_pages_that_are_pushed_are_healed(runtime_dir: Path, source_file: SourceFile) -> None:
    """The source was there all the time: whoever was denied them gets them, as after a source's return."""
    with (
        EvilSource(source_file(16 * PAGE)) as evil,
        Service(runtime_dir, f"ram0={evil.endpoint}/ram0", **SLOW) as service,
    ):
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        evil.right, evil.before = False, lambda _, message: odd(message, kinds=bytes((RangeKind.LOST,)))
        for client in clients:
            with pytest.raises(PuppetError):
                client.do(f"b.ensure({5 * PAGE}, 1, 20)")
        head = encode(Pages(evil.stream, 0, pack_range(4 * PAGE, 4 * PAGE), b"\0", ""))
        evil.push([head, evil.data[4 * PAGE : 8 * PAGE]])
        until(lambda: kinds(service, "healed"), "it is told")
        for client in [*clients, service.client("ram0", "shared")]:
            client.do(f"b.ensure({5 * PAGE}, 1, 20)")
            assert client.do("words(b, [5, 7])") == [word(5 * PAGE), word(7 * PAGE)]
        assert service.block()["lost"] == 0
