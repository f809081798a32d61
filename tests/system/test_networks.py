"""Across machines: two network namespaces, a line with delay between them, CURVE on, and a source that dies twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source, await_state, kinds, source_of
from tests.system.service import PAGE, Authenticator, Service, environment, refused, until, word
from tests.wire.networks import HERE, Networks, inside, two_networks
from tests.wire.relay import Relay

CLIENTS = 16
SIZE = 8 * (1 << 20) + 4099
DELAY = 0.02


@pytest.fixture
def networks() -> Iterator[Networks]:
    with two_networks() as made:
        yield made


def keys(directory: Path, *names: str) -> dict[str, str]:
    """Places of key files by name, made as a person makes them; the secret one is that with ``_secret`` behind."""
    for name in names:
        command = [sys.executable, "-m", "postcopy", "keygen", str(directory / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment())
    return {name: str(directory / f"{name}.key") for name in names}


def curve(key: dict[str, str], *allowed: str) -> tuple[str, ...]:
    """Options of a source that lets these in."""
    words = ["--curve-secret", key["source"] + "_secret"]
    for name in allowed:
        words += ["--allow-key", key[name]]
    return tuple(words)


def test_sixteen_clients_over_a_slow_line_while_the_source_dies_twice(
    networks: Networks, runtime_dir: Path, source_file: SourceFile, tmp_path: Path
) -> None:
    path, gate = source_file(SIZE), Authenticator(tmp_path, 3)
    key = keys(tmp_path, "source", "supervisor")
    source = Source(f"ram0={path}", listen=f"tcp://{HERE}:7001", options=curve(key, "supervisor"))
    options: dict[str, Any] = {
        "curve_secret": key["supervisor"] + "_secret",
        "source_key": key["source"],
        "source_timeout": "1",
        "background_rate": "32K",  # beside the clients; it would need minutes for what they leave
        "fault_around": "16K",
    }
    with inside(networks.source):
        source.start()
        relay = Relay(f"tcp:{HERE}:7000", f"tcp:{HERE}:7001")
    relay.delay(DELAY)
    with (
        relay,
        source,
        inside(networks.clients),
        Service(runtime_dir, f"ram0={relay.endpoint}/ram0", **options) as service,
    ):
        clients = [service.client("ram0", ("private", "shared")[number % 2]) for number in range(CLIENTS)]
        for seed, client in enumerate(clients):
            client.begin(gate.order(path, 65536, seed))
        pages = service.block()["pages"]
        for life, part in enumerate((0.15, 0.45), 1):
            until(lambda part=part: service.block()["received"] > part * pages, "they are in the middle", 30)  # type: ignore[misc]
            source.end()
            await_state(service, "paused")
            assert service.block()["received"] < pages and service.status()["state"] == "paused"
            with inside(networks.source):
                source.start()
            begun = time.monotonic()
            await_state(service, "up", 10)
            print(f"recovered in {time.monotonic() - begun:.2f} s, {service.block()['received']} of {pages} pages")
            assert kinds(service, "source", "pause", "recover") == ["source", *["pause", "recover"] * life]
            gate.open()
        assert [client.answer(60) for client in clients] == [-1] * CLIENTS
        document = service.status()
        assert document["totals"]["restarts"] == 0 and document["blocks"][0]["lost"] == 0
        until(lambda: service.block()["complete"], "the block is whole")
        until(lambda: "complete" in source.log(), "the source is told")
        print({name: document["totals"][name] for name in ("faults", "requests", "deduplicated")}, source_of(service))


def test_the_line_is_cut_and_stalls(
    networks: Networks, runtime_dir: Path, source_file: SourceFile, tmp_path: Path
) -> None:
    """A cut line is made again, a stalled one is a lost source; nothing is asked for twice that came."""
    path = source_file(1 << 20)
    key = keys(tmp_path, "source", "supervisor")
    source = Source(f"ram0={path}", listen=f"tcp://{HERE}:7001", options=curve(key, "supervisor"))
    options: dict[str, Any] = {
        "curve_secret": key["supervisor"] + "_secret",
        "source_key": key["source"],
        "source_timeout": "1",
        "background_rate": "0",
        "fault_around": "4K",
    }
    with inside(networks.source):
        source.start()
        relay = Relay(f"tcp:{HERE}:7000", f"tcp:{HERE}:7001")
    with (
        relay,
        source,
        inside(networks.clients),
        Service(runtime_dir, f"ram0={relay.endpoint}/ram0", **options) as service,
    ):
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        relay.cut()
        assert client.do("words(b, [2])", 15) == [word(2 * PAGE)]
        await_state(service, "up")
        relay.stall()
        client.begin("words(b, [3])")
        await_state(service, "paused")
        assert not client.answered()
        relay.go()
        assert client.answer() == [word(3 * PAGE)]
        relay.refuse()
        client.begin("words(b, [4])")
        await_state(service, "paused")
        relay.accept()
        assert client.answer() == [word(4 * PAGE)]
        assert client.do(f"check(b, {str(path)!r})") == -1


@pytest.mark.parametrize("wrong", ["supervisor", "source", "none"])
def test_with_a_wrong_key_nobody_gets_a_byte(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, wrong: str
) -> None:
    """A supervisor that is not allowed, one that takes the source for another, and one without keys: never up."""
    key = keys(tmp_path, "source", "supervisor", "stranger")
    with listening(source_file(PAGE), curve(key, "supervisor")) as (source, endpoint):
        ours, theirs = key["supervisor"] + "_secret", key["source"]
        options: dict[str, Any] = {
            "supervisor": {"curve_secret": key["stranger"] + "_secret", "source_key": theirs},
            "source": {"curve_secret": ours, "source_key": key["stranger"]},
        }.get(wrong, {})
        words = ("--plain-tcp",) if wrong == "none" else ()
        service = Service(runtime_dir, f"ram0={endpoint}/ram0", *words, **options)
        try:
            until(lambda: "waiting for the source" in service.log(), "it says that it waits")
            if wrong == "supervisor":
                until(lambda: "is refused: its key is not allowed" in source.log(), "the source says so too")
            assert "ready" not in service.log() and "advised" not in source.log()
            service.process.send_signal(signal.SIGTERM)
            assert service.wait() == 0
        finally:
            service._drop()


@contextmanager
def listening(path: Path, options: tuple[str, ...]) -> Iterator[tuple[Source, str]]:
    """A source on this machine's own loopback, at a port that was free."""
    with Source(f"ram0={path}", listen="tcp://127.0.0.1:0", options=options) as source:
        yield source, source.log().partition("ready:")[2].splitlines()[0].rpartition(" at ")[2]


def test_plain_tcp_only_by_name(runtime_dir: Path, source_file: SourceFile) -> None:
    with listening(source_file(PAGE), ("--plain-tcp",)) as (_, endpoint):
        status, said = refused(runtime_dir, f"ram0={endpoint}/ram0")
        assert status in (1, 2) and "\n" not in said
        assert "--plain-tcp" in said and "--curve-secret" in said and endpoint in said
        assert not (runtime_dir / "door").exists()
        with Service(runtime_dir, f"ram0={endpoint}/ram0", "--plain-tcp") as service:
            assert service.client().do("words(b, [0])") == [word(0)]


def test_a_secret_that_others_can_read_is_none(runtime_dir: Path, tmp_path: Path) -> None:
    """Here as at the source, which refuses it too (tests/wire/test_source.py)."""
    key = keys(tmp_path, "here", "source")
    Path(key["here"] + "_secret").chmod(0o644)
    options: dict[str, Any] = {"curve_secret": key["here"] + "_secret", "source_key": key["source"]}
    status, said = refused(runtime_dir, "ram0=tcp://127.0.0.1:1/ram0", options=options)
    assert status in (1, 2) and "chmod 600" in said and "\n" not in said


def test_a_source_with_keys_beside_one_without(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    """tcp with CURVE and ipc in one supervisor, in either order."""
    key = keys(tmp_path, "source", "supervisor")
    options: dict[str, Any] = {"curve_secret": key["supervisor"] + "_secret", "source_key": key["source"]}
    near = Source(f"ram0={source_file(PAGE, 3, 'near')}")
    with listening(source_file(PAGE), curve(key, "supervisor")) as (_, endpoint), near:
        blocks = [f"far={endpoint}/ram0", near.block("ram0", "near")]
        for order in (blocks, blocks[::-1]):
            with Service(runtime_dir, *order, **options) as service:
                client = service.client("far")
                client.attach("near", "shared", "c")
                assert client.do("[words(b, [0]), words(c, [0])]") == [[word(0)], [word(0, 3)]]
