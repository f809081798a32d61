"""Bad stores, bad credentials, bad caches: one clear line, or a page that is healed. Never wrong bytes, never a secret.

| claim | test |
| --- | --- |
| a wrong bucket, wrong keys, an index that is cut or edited: ``serve`` does not start, and says which | here, 1 |
| ... the commands say the same | test_snapshots.test_wrong_places_and_credentials, test_damage_is_named |
| any edit of an index is refused, or it is consistent | test_caibx.test_an_edited_index_is_refused |
| a chunk that is missing, short, corrupt or a bomb is lost, then healed | test_store_blocks.test_what_is_wrong |
| a store that never answers: lost after some seconds, then healed | here, 2 |
| ... that answers 500, 503 or slowly is asked again | test_what_is_wrong, test_snapshots.test_a_store_that_fails |
| a cache that is full, or can only be read, costs speed only | here, 3 |
| a cache that is damaged is not believed | test_store_blocks.test_a_second_supervisor, test_chunks (hypothesis) |
| chunks of another size, or of other tools, are served | test_store_blocks.test_chunks_of_another_tool, here, 4 |
| clocks that jump concern nothing but which chunks are removed first | here, 5; test_chunks.test_the_oldest_chunks |
| all of it at once, beside kills | scripts/chaos --store, test_chaos.test_chaos_over_a_store |
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopy_protocol.caibx import SHA256, digest_of
from postcopy_sources.storage.chunk_cache import ChunkCache
from postcopy_sources.storage.chunk_reader import ChunkReader, Wanted
from postcopy_sources.storage.compression import packed
from postcopy_sources.storage.stores import DirectoryStore
from tests.system.service import Service, refused, until
from tests.system.stores import SECRET, HttpStore, SeaweedFS, image, postcopy

PAGE, PAGES = 4096, 640


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTCOPY_CHUNK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store with tmp_path/image as vm1."""
    image(tmp_path / "image", PAGES)
    postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
    return tmp_path / "store"


def check(service: Service, path: Path, seed: int = 0) -> None:
    assert service.client().do(f"check(b, {str(path)!r}, 'random', 4096, {seed})", 90) == -1


def test_1_serve_says_what_is_wrong_with_the_store(
    runtime_dir: Path, tmp_path: Path, place: Path, s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    postcopy("pack", tmp_path / "image", "s3://failures/vm1", variables=s3.variables)
    index = (place / "vm1.caibx").read_bytes()
    for name, data in (("cut", index[:-40]), ("edited", index[:70] + b"\xff" + index[71:])):
        (place / f"{name}.caibx").write_bytes(data)
    for change, source, why in (
        ({"AWS_SECRET_ACCESS_KEY": SECRET[::-1]}, "s3://failures/vm1", "the secret key is wrong"),
        ({}, "s3://no-such-bucket/vm1", "bucket does not exist"),
        ({}, f"{place}/cut", "cut.caibx"),
        ({}, f"{place}/edited", "edited.caibx"),
    ):
        for variable, value in (s3.variables | change).items():
            monkeypatch.setenv(variable, value)
        status, text = refused(runtime_dir, f"ram0=store:{source}")
        said = [line for line in text.splitlines() if "waiting for the source" not in line]
        assert status and len(said) == 1 and why in said[0], text
        assert SECRET not in text and SECRET[::-1] not in text


def test_2_a_store_that_never_answers(runtime_dir: Path, tmp_path: Path, place: Path) -> None:
    with (
        HttpStore(place) as store,
        Service(runtime_dir, f"ram0=store:{store.url}/vm1", background_rate="0") as service,
    ):
        client = service.client()
        store.only, store.what = ".cacnk", "hang"
        data = (tmp_path / "image").read_bytes()
        page = next(page for page in range(PAGES) if any(data[page * PAGE : (page + 1) * PAGE]))
        client.begin(f"read(b, {page * PAGE}, 8)")
        until(lambda: service.block()["lost"], "the page is lost", 60)
        assert client.status(30) == -signal.SIGBUS
        assert "does not answer in time" in service.events("lost")[-1]
        store.what = ""
        until(lambda: not service.block()["lost"], "it is healed", 90)
        check(service, tmp_path / "image")


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "test", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_3_a_cache_that_is_full_or_can_only_be_read(runtime_dir: Path, tmp_path: Path, place: Path, how: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    with (
        mounted(cache, "size=600k", "mode=0700") if how == "full" else mounted(cache, "ro", "mode=0700"),
        Service(runtime_dir, f"ram0=store:{place}/vm1", background_rate="0") as service,
    ):
        check(service, tmp_path / "image")
        assert service.log().count("chunks are not kept") == 1


def test_4_another_chunk_size_under_a_name_of_its_own(runtime_dir: Path, tmp_path: Path, place: Path) -> None:
    postcopy("pack", tmp_path / "image", f"{place}/small", "--chunk-size", "4K")
    postcopy("pack", tmp_path / "image", f"{place}/large", "--chunk-size", "2M", "--digest", "sha512-256")
    blocks = [f"{name}=store:{place}/{name}" for name in ("small", "large")]
    with Service(runtime_dir, *blocks, background_rate="0") as service:
        for name in ("small", "large"):
            assert service.client(name).do(f"check(b, {str(tmp_path / 'image')!r}, 'random', 4096)", 90) == -1


def test_5_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock goes back and forth by years; what is read stays right, and the cache keeps its bounds."""
    chunks = [bytes([number]) * (64 << 10) for number in range(8)]
    store = DirectoryStore(str(tmp_path / "store"))
    wanted = [Wanted(digest_of(chunk, SHA256), len(chunk), SHA256) for chunk in chunks]
    for chunk, one in zip(chunks, wanted, strict=True):
        name = one.id.hex()
        store.put(f"{name[:4]}/{name}.cacnk", packed(chunk))
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    with ChunkCache(str(tmp_path / "cache"), 5 * 66 << 10) as cache:
        for turn in range(24):
            jump[0] = (0.0, 3e8, -3e8)[turn % 3]
            reader = ChunkReader(store, cache)
            assert reader.chunk(wanted[turn % 8]) == chunks[turn % 8]
            cache.trim()
        kept = sum(file.stat().st_size for file in (tmp_path / "cache").glob("??/*"))
        assert kept <= 5 * 66 << 10
