"""Hosts that help each other: a store and two hosts, each in a network of its own; the store is cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.system.remote import Source
from tests.system.service import Service, refused, until
from tests.system.stores import HttpStore, image, postcopy, program_of
from tests.wire.networks import Hosts, inside

PAGE, PAGES, CHUNK = 4096, 640, 256 << 10
OPTIONS: dict[str, Any] = {"background_rate": "0", "plain_tcp": True}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The directory of a store with tmp_path/image as vm1."""
    image(tmp_path / "image", PAGES)
    postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
    return tmp_path / "store"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts("s", "a", "b") as made:
        yield made


@pytest.mark.parametrize("holder", ["supervisor", "chunk cache"])
def test_the_store_is_cut_and_b_gets_what_a_has(
    hosts: Hosts, runtime_dir: Path, tmp_path: Path, store: Path, holder: str
) -> None:
    """A has touched the first half. Of the rest, what B needs waits for the store."""
    path, half = tmp_path / "image", PAGES // 2 * PAGE
    with inside(hosts.namespace("s")):
        server = HttpStore(store, "0.0.0.0")
    port = server.url.rpartition(":")[2]
    place = {host: f"store:http://{hosts.address('s', host)}:{port}/vm1" for host in "ab"}
    listen, cache = f"tcp://{hosts.address('a', 'b')}:7001", ("--chunk-cache", f"{tmp_path}/a")
    at_a = Path(f"{runtime_dir}/a")
    with ExitStack() as stack, inside(hosts.namespace("a")):
        stack.enter_context(server)
        a = stack.enter_context(Service(at_a, f"ram0={place['a']}", chunk_cache=f"{tmp_path}/a", **OPTIONS))
        assert a.client().do(f"b.ensure(0, {half})", 60) is None
        words = {
            "supervisor": ("ram0", ("--from", str(at_a), "--identity", "vm1", "--plain-tcp")),
            "chunk cache": (f"ram0={place['a']}", ("--plain-tcp", *cache)),
        }
        helper = Source(words[holder][0], listen=listen, options=words[holder][1])
        stack.enter_context(helper)
        everything = stack.pop_all()
    block = f"ram0=peers:{listen}/ram0,{place['b']}"
    with (
        everything,
        inside(hosts.namespace("b")),
        Service(runtime_dir, block, chunk_cache=f"{tmp_path}/b", **OPTIONS) as b,
    ):
        until(lambda: "advised" in helper.log(), "B is connected to A")
        hosts.cut("s")
        asked, client = server.chunks_asked(), b.client()
        content = path.read_bytes()
        assert bytes.fromhex(client.do(f"read(b, 0, {half // 2})", 60)) == content[: half // 2]
        os.kill(program_of(b), signal.SIGKILL)  # the next one finds no store: it uses the index that the host has kept
        assert bytes.fromhex(client.do(f"read(b, {half // 2}, {half // 2})", 60)) == content[half // 2 : half]
        assert server.chunks_asked() == asked
        hosts.cut("s", mend=True)
        client.begin(f"check(b, {str(path)!r}, 'random', 4096)")
        assert client.answer(90) == -1
        assert b.block()["source"] == block.removeprefix("ram0=")
        assert holder == "chunk cache" or server.chunks_asked() > asked


def test_hosts_that_stand_still_lie_or_know_another_block(runtime_dir: Path, tmp_path: Path, store: Path) -> None:
    """The nearest stands still, the second has another image, the third another block: the fourth and the store give
    what is right, and a host that goes on is asked again."""
    path = tmp_path / "image"
    image(tmp_path / "other", PAGES, seed=5)
    image(tmp_path / "small", 8)
    with (
        HttpStore(store) as server,
        Source(f"ram0={path}") as still,
        Source(f"ram0={tmp_path}/other") as liar,
        Source(f"ram0={tmp_path}/small") as small,
        Source(f"ram0={path}") as good,
    ):
        peers = ",".join(f"{one.endpoint}/ram0" for one in (still, liar, small, good))
        still.tell(signal.SIGSTOP)
        options = ("--chunk-cache-size", "0")
        relay = Source(f"ram0=peers:{peers},store:{server.url}/vm1", options=options)
        with relay, Service(runtime_dir, relay.block(), background_rate="0") as service:
            until(lambda: "has 32768 bytes" in relay.log(), "the small one is found")
            client = service.client()
            assert client.do(f"check(b, {str(path)!r}, 'forward', 4096)", 60) == -1
            assert "gave other bytes" in relay.log()
            still.tell(signal.SIGCONT)
            relay.end(signal.SIGTERM)
            counts = relay.log().partition("chunks came from ")[2]
            assert f"{good.endpoint}/ram0: 0" not in counts and f"{liar.endpoint}/ram0: 0" in counts, counts


def test_peers_want_keys(runtime_dir: Path, store: Path) -> None:
    status, text = refused(runtime_dir, f"ram0=peers:tcp://127.0.0.1:9/ram0,store:{store}/vm1")
    assert status == 2 and "tcp needs keys" in text and "--plain-tcp" in text
