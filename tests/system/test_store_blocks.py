"""``serve ram0=store:...`` with real stores: every byte, whatever the store, the cache and the processes do."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from postcopy_protocol.caibx import chunk_path
from postcopy_sources.storage.compression import packed
from tests.system.remote import await_state, source_of
from tests.system.service import Service, alive, refused, until
from tests.system.stores import SECRET, HttpStore, SeaweedFS, image, postcopy, program_of

PAGE, CHUNK = 4096, 256 << 10
PAGES = 640


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("POSTCOPY_CHUNK_CACHE", str(cache))
    return cache


@pytest.fixture
def packed_image(tmp_path: Path) -> Path:
    """A file, and beside it the store that has it as vm1."""
    image(tmp_path / "image", PAGES)
    postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
    return tmp_path / "image"


@pytest.fixture
def store(packed_image: Path) -> Iterator[HttpStore]:
    with HttpStore(packed_image.parent / "store") as server:
        yield server


def check(service: Service, path: Path, seed: int = 0, within: float = 60.0) -> None:
    assert service.client().do(f"check(b, {str(path)!r}, 'random', 4096, {seed})", within) == -1


def command_lines() -> bytes:
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += path.read_bytes()
    return found


def test_every_byte_from_s3(
    runtime_dir: Path,
    packed_image: Path,
    s3: SeaweedFS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server stands still for a while: clients wait."""
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    postcopy("pack", packed_image, "s3://vms/p/vm1")
    with Service(runtime_dir, "ram0=store:s3://vms/p/vm1", background_rate="0") as service:
        client = service.client()
        s3.stand_still()
        client.begin(f"check(b, {str(packed_image)!r}, 'random', 4096)")
        assert not client.answered(1.0)
        s3.go_on()
        assert client.answer(60) == -1
        assert SECRET.encode() not in command_lines() and SECRET not in service.log()
        assert service.block()["source"] == "store:s3://vms/p/vm1"


@pytest.mark.parametrize("rate", ["0", "auto"])
def test_every_byte_over_http_and_zeros_without_a_fetch(runtime_dir: Path, tmp_path: Path, rate: str) -> None:
    path = tmp_path / "image"
    data = image(path, 128) + bytes(CHUNK * 3) + b"\1" * PAGE + bytes(7 * PAGE + 5)
    path.write_bytes(data)
    postcopy("pack", path, f"{tmp_path}/store/vm1")
    zero_chunk = chunk_path(hashlib.sha256(bytes(CHUNK)).digest())
    assert (tmp_path / "store" / zero_chunk).exists()
    with (
        HttpStore(tmp_path / "store") as store,
        Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate=rate) as service,
    ):
        check(service, path)
        assert zero_chunk not in store.asked
        assert set(store.asked.values()) == {1}


def test_chunks_of_another_tool_are_served(runtime_dir: Path, tmp_path: Path) -> None:
    """They begin inside pages."""
    from tests.system.test_snapshots import run, tool

    image(tmp_path / "image", PAGES)
    (tmp_path / "store").mkdir()
    run(tool("casync"), "make", f"--store={tmp_path}/store", tmp_path / "store" / "vm1.caibx", tmp_path / "image")
    with Service(runtime_dir, f"ram0=store:{tmp_path}/store/vm1") as service:
        check(service, tmp_path / "image")


def test_a_second_supervisor_fetches_nothing(runtime_dir: Path, tmp_path: Path, store: HttpStore) -> None:
    path = tmp_path / "image"
    for _ in range(2):
        with Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0") as service:
            check(service, path)
            asked = store.chunks_asked()
    assert store.chunks_asked() == asked
    damaged = 0
    for chunk in (tmp_path / "cache").glob("??/*"):
        content = bytearray(chunk.read_bytes())
        content[damaged * 4099 % len(content)] ^= 1
        chunk.write_bytes(content)
        damaged += 1
    with Service(runtime_dir, f"ram0=store:{store.url}/vm1") as service:
        check(service, path)
        assert "is removed" in service.log()
    assert asked < store.chunks_asked() <= asked + damaged


def test_supervisors_of_a_host_share_one_fetch(runtime_dir: Path, tmp_path: Path, store: HttpStore) -> None:
    store.delay = 0.05
    block = f"ram0=store:{store.url}/vm1"
    other = Path(f"{runtime_dir}/other")
    with Service(other, block, background_rate="0") as one, Service(runtime_dir, block, background_rate="0") as two:
        clients = [service.client() for service in (one, two)]
        for client in clients:
            client.begin(f"check(b, {str(tmp_path / 'image')!r}, 'forward', 4096)")
        assert [client.answer(60) for client in clients] == [-1, -1]
        chunks = {path: count for path, count in store.asked.items() if path.endswith(".cacnk")}
        assert set(chunks.values()) == {1}


@pytest.mark.parametrize("what", ["flip", "short", b"bomb", 404, 503])
def test_what_is_wrong_is_lost_and_healed(
    runtime_dir: Path, tmp_path: Path, store: HttpStore, what: str | int | bytes
) -> None:
    """Never zeros, never other bytes: SIGBUS. And when the store is right again, the page."""
    data = (tmp_path / "image").read_bytes()
    with Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0") as service:
        client = service.client()
        store.only, store.what = ".cacnk", packed(bytes(1 << 30)) if what == b"bomb" else what
        page = next(page for page in range(PAGES) if any(data[page * PAGE : (page + 1) * PAGE]))
        client.begin(f"read(b, {page * PAGE}, 8)")
        until(lambda: service.block()["lost"], "the page is lost", 60)
        assert client.status(30) == -signal.SIGBUS
        reason = service.events("lost")[-1]
        assert "chunk" in reason or "cannot read" in reason, reason
        store.what = ""
        until(lambda: not service.block()["lost"], "the page is healed", 60)
        check(service, tmp_path / "image")


def test_the_program_is_restarted_and_ends_with_its_supervisor(
    runtime_dir: Path, tmp_path: Path, store: HttpStore
) -> None:
    path = tmp_path / "image"
    with Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0") as service:
        client = service.client()
        first = program_of(service)
        os.kill(first, signal.SIGKILL)
        client.begin(f"check(b, {str(path)!r}, 'random', 4096)")
        assert client.answer(90) == -1
        second = program_of(service)
        assert second != first
        check(service, path)
        late = service.client()
        service.kill()
        until(lambda: not alive(second), "the program has ended with its supervisor")
        late.begin(f"check(b, {str(path)!r}, 'random', 4096, 7)")
        service.recover()
        assert late.answer(60) == -1
        third = program_of(service)
    assert not alive(third)


def test_a_program_that_is_killed_before_it_serves_is_started_again(
    runtime_dir: Path, tmp_path: Path, store: HttpStore
) -> None:
    store.only, store.what = ".caibx", "hang"
    service = Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0")
    try:
        until(lambda: store.asked.get("vm1.caibx"), "it asks for the index", 40)
        os.kill(program_of(service), signal.SIGKILL)
        store.what = ""
        until(lambda: "ready" in service.log(), "it is ready", 60)
        assert "it is started again" in service.log()
    finally:
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0
        service._drop()


def test_another_snapshot_under_the_name_is_refused(runtime_dir: Path, tmp_path: Path, store: HttpStore) -> None:
    """Its source would give clients a mixture of two images."""
    data = (tmp_path / "image").read_bytes()
    with Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0") as service:
        client = service.client()
        assert bytes.fromhex(client.do("read(b, 4096, 16)")) == data[4096:4112]
        image(tmp_path / "other", PAGES, seed=9)
        postcopy("pack", tmp_path / "other", f"{tmp_path}/store/vm1")
        os.kill(program_of(service), signal.SIGKILL)
        until(lambda: any("another one now" in event for event in service.events("source-refused")), "refused", 60)
        until(lambda: source_of(service)["state"] == "paused", "paused")
        (tmp_path / "store" / "vm1.caibx").unlink()
        postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
        os.kill(program_of(service), signal.SIGKILL)
        client.begin(f"check(b, {str(tmp_path / 'image')!r}, 'random', 4096)")
        await_state(service, "up", 60)
        assert client.answer(60) == -1


def test_a_cache_that_cannot_be_written(runtime_dir: Path, tmp_path: Path, store: HttpStore) -> None:
    (tmp_path / "cache").write_text("a file, no directory")
    with Service(runtime_dir, f"ram0=store:{store.url}/vm1") as service:
        check(service, tmp_path / "image")
        assert service.log().count("chunks are not kept") == 1


def test_a_start_that_cannot_be(runtime_dir: Path, tmp_path: Path, store: HttpStore) -> None:
    for source, why in (
        (f"{store.url}/vm2", "there is no snapshot vm2"),
        (f"{tmp_path}/nothing/vm1", "there is no snapshot vm1"),
        ("http://127.0.0.1:9/vm1", "no server listens there"),
    ):
        status, text = refused(runtime_dir, f"ram0=store:{source}")
        said = [line for line in text.splitlines() if "waiting for the source" not in line]
        assert status == 1 and len(said) == 1 and said[0].startswith("postcopy serve: ") and why in said[0], text
