"""Frames, the chunk cache and the reader of chunks: nothing that is wrong is ever taken for the chunk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy_protocol.caibx import SHA256, SHA512_256, digest_of, format_index, index_of
from postcopy_protocol.errors import BadInput, PageLost
from postcopy_sources.storage import chunk_reader
from postcopy_sources.storage.chunk_cache import ChunkCache
from postcopy_sources.storage.chunk_reader import ChunkReader, Wanted
from postcopy_sources.storage.compression import WrongChunk, packed, unpacked
from postcopy_sources.storage.pace import Pace
from postcopy_sources.storage.snapshots import load
from postcopy_sources.storage.store_source import SnapshotSource
from postcopy_sources.storage.stores import Entry, Missing, Refused, StoreFailed

DATA = b"".join(bytes([n]) * 4096 for n in range(5)) + b"tail"
NAME = hashlib.sha256(DATA).digest()
WANTED = Wanted(NAME, len(DATA), SHA256)


@pytest.mark.parametrize("digest", [SHA256, SHA512_256])
@pytest.mark.parametrize("data", [b"x", DATA, os.urandom(5000), bytes(300000)])
def test_a_chunk_there_and_back(data: bytes, digest: str) -> None:
    assert unpacked(packed(data, 3), digest_of(data, digest), len(data), digest) == data


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "empty"),
        (packed(DATA) + packed(b"more"), "follows"),
        (packed(DATA)[:-1], "cut short"),
        (packed(bytes(1 << 28)), "more than"),
        (packed(DATA[:-1]), "cut short"),
        (packed(DATA[:-1] + b"!"), "digest"),
        (b"\x1f\x8b" + DATA, "no zstd"),
        (DATA, "no zstd"),
    ],
)
def test_what_is_no_chunk(frame: bytes, why: str) -> None:
    with pytest.raises(WrongChunk, match=why):
        unpacked(frame, NAME, len(DATA), SHA256)


def test_a_frame_may_not_ask_for_much_memory() -> None:
    """A head of 9 bytes can ask for a window of gigabytes."""
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([20 << 3]) + b"\x01\x00\x00"
    with pytest.raises(WrongChunk):
        unpacked(head, NAME, len(DATA), SHA256)


def cached(directory: Path) -> Path:
    (path,) = [path for path in directory.glob("??/*") if len(path.name) == 64]
    return path


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_damage_in_the_cache_is_never_read(tmp_path: Path, data: st.DataObject) -> None:
    with ChunkCache(str(tmp_path / "cache"), 1 << 30) as cache:
        damage_and_read(tmp_path, cache, data)


def damage_and_read(tmp_path: Path, cache: ChunkCache, data: st.DataObject) -> None:
    cache.put(NAME, DATA)
    path = cached(tmp_path / "cache")
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "add", "zeros"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "add":
            content += b"x"
        case _:
            content = bytearray(len(content))
    path.write_bytes(content)
    found = cache.open(NAME, len(DATA))
    if found is not None:
        for page in range(6):
            length = min(4096, len(DATA) - page * 4096)
            try:
                assert found.read(page * 4096, length, wait=True) == DATA[page * 4096 : page * 4096 + length]
            except ValueError:
                continue
        found.close()
    reader = ChunkReader(FakeStore(lambda: packed(DATA)), cache)
    assert reader.chunk(WANTED) == DATA
    again = cache.open(NAME, len(DATA))
    assert again is not None
    again.close()


def test_a_chunk_under_the_name_of_another(tmp_path: Path) -> None:
    """Its own digests are right."""
    other = bytes(reversed(DATA))
    with ChunkCache(str(tmp_path), 1 << 30) as cache:
        cache.put(NAME, other)
        wrong = cached(tmp_path)
        cache.put(hashlib.sha256(other).digest(), other)
        next(path for path in tmp_path.glob("??/*") if path.name not in (wrong.name, "lock")).replace(wrong)
        assert cache.open(NAME, len(DATA)) is None and not wrong.exists()


def test_the_oldest_chunks_are_removed(tmp_path: Path) -> None:
    names = [hashlib.sha256(bytes([n])).digest() for n in range(20)]
    size = 4096 + 64
    cache = ChunkCache(str(tmp_path), 10 * size)
    for number, name in enumerate(names):
        cache.put(name, bytes([number]) * 4096)
        for path in tmp_path.glob(f"??/{name.hex()}"):
            os.utime(path, (number, number if number != 3 else time.time() + 9e6))
    (tmp_path / names[0].hex()[:2]).mkdir(exist_ok=True)
    left = tmp_path / names[0].hex()[:2] / f"{names[0].hex()}.tmp-1-1"
    left.touch()
    os.utime(left, (1, 1))
    cache.trim(0.5)
    cache.close()
    there = [number for number, name in enumerate(names) if list(tmp_path.glob(f"??/{name.hex()}"))]
    assert there[0] == 3 and there[1:] == list(range(21 - len(there), 20)) and 4 <= len(there) <= 6
    assert not left.exists()


def test_a_cache_of_others_or_without_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    with pytest.raises(BadInput, match="other users"):
        ChunkCache(str(shared), 1 << 20)
    (tmp_path / "file").touch()
    cache = ChunkCache(str(tmp_path / "file" / "cache"), 1 << 20)
    cache.put(NAME, DATA)
    with cache.fetching(NAME, 1.0) as waited:
        assert not waited
    assert ChunkReader(FakeStore(lambda: packed(DATA)), cache).chunk(WANTED) == DATA
    assert caplog.text.count("chunks are not kept") == 1


def test_one_process_of_a_host_fetches_a_chunk(tmp_path: Path) -> None:
    """The lock of a process that is killed is free."""
    program = (
        "import sys\nfrom postcopy_sources.storage.chunk_cache import ChunkCache\n"
        "with ChunkCache(sys.argv[1], 1 << 20).fetching(bytes.fromhex(sys.argv[2]), 9.0) as waited:\n"
        "    print(waited, flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path), NAME.hex()]
    with (
        ChunkCache(str(tmp_path), 1 << 20) as cache,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout is not None and other.stdout.readline() == "False\n"
        threading.Timer(0.3, other.kill).start()
        begun = time.monotonic()
        with cache.fetching(NAME, 60.0) as waited:
            assert waited and 0.1 < time.monotonic() - begun < 50


class FakeStore:
    """Answers what ``make`` returns or raises; counts."""

    shown, writable = "fake", False

    def __init__(self, make: Callable[[], bytes]) -> None:
        self.make, self.asked = make, 0

    def get(self, key: str, limit: int, on_answer: Callable[[], object] = lambda: None) -> bytes:
        self.asked += 1
        return self.make()

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        raise NotImplementedError

    def has(self, key: str) -> bool:
        raise NotImplementedError

    def list(self) -> Iterator[Entry]:
        raise NotImplementedError

    def walk(self) -> Iterator[Entry]:
        raise NotImplementedError

    def delete(self, keys: Iterable[str]) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        raise NotImplementedError


def test_failures_are_tried_again_with_longer_pauses() -> None:
    answers: list[bytes | Exception] = [StoreFailed("503"), packed(DATA)[:-1], b"", packed(DATA)]

    def make() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    slept: list[float] = []
    reader = ChunkReader(FakeStore(make), None, slept.append)
    assert reader.chunk(WANTED) == DATA and reader.fetched == 1
    assert len(slept) == 3 and all(0.5 * p <= s <= 1.5 * p for p, s in zip((0.1, 0.2, 0.4), slept, strict=True))


def test_a_missing_chunk_is_lost_at_once_and_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_reader, "FIRST_HEAL", 0.01)
    there = threading.Event()

    def make() -> bytes:
        if not there.is_set():
            raise Missing("it is not there")
        return packed(DATA)

    store = FakeStore(make)
    reader, healed = ChunkReader(store, None), threading.Event()
    reader.on_healed.append(lambda chunk: healed.set())
    with pytest.raises(PageLost, match="not there"):
        reader.chunk(WANTED)
    asked = store.asked
    with pytest.raises(PageLost, match="not there"):
        reader.chunk(WANTED)  # at once: a range that fails is read again page by page
    assert store.asked - asked < 5
    there.set()
    assert healed.wait(20) and reader.chunk(WANTED) == DATA


def test_readers_at_once_share_one_fetch() -> None:
    go, found = threading.Event(), list[bytes]()

    def make() -> bytes:
        go.wait(20)
        return packed(DATA)

    store = FakeStore(make)
    reader = ChunkReader(store, None)
    threads = [threading.Thread(target=lambda: found.append(reader.chunk(WANTED))) for _ in range(8)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert found == [DATA] * 8 and store.asked == 1


def test_copies_of_indexes_are_used_while_the_store_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not when the snapshot is gone, or the credentials are refused; and not a copy that is damaged."""
    index = format_index(index_of([(NAME, len(DATA))], len(DATA)))
    answers: list[bytes | Exception] = []

    def make() -> bytes:
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    store = FakeStore(make)
    with ChunkCache(str(tmp_path), 1 << 20) as cache:
        answers[:] = [index, Missing("no sidecar")]
        key = load(store, "vm", cache).key
        answers[:] = [StoreFailed("503")]
        assert load(store, "vm", cache).key == key and "copy of the index" in caplog.text
        for error in (Missing("gone"), Refused("secret key")):
            answers[:] = [error]
            with pytest.raises(type(error)):
                load(store, "vm", cache)
        (copy,) = (tmp_path / "index").iterdir()
        copy.write_bytes(copy.read_bytes()[:-1])
        answers[:] = [StoreFailed("503")]
        with pytest.raises(StoreFailed):
            load(store, "vm", cache)


def test_the_background_waits_for_room_and_clients_do_not() -> None:
    """A chunk of the background that a client comes to wait for waits no longer."""
    chunks = [bytes([number]) * 5000 for number in range(4)]
    wanted = {digest_of(chunk, SHA256): chunk for chunk in chunks}
    go, asked = threading.Event(), list[str]()

    class Slow(FakeStore):
        def get(self, key: str, limit: int, on_answer: Callable[[], object] = lambda: None) -> bytes:
            asked.append(key)
            assert go.wait(60)
            on_answer()
            return packed(next(chunk for name, chunk in wanted.items() if name.hex() in key))

    reader = ChunkReader(Slow(lambda: b""), None)
    reader.pace.window = 1.0
    ones = [Wanted(name, 5000, SHA256) for name in wanted]
    pool = ThreadPoolExecutor(8)

    def await_asked(count: int) -> None:
        wait_until(lambda: len(asked) >= count)

    first = pool.submit(reader.chunk, ones[0], urgent=False)
    await_asked(1)
    second = pool.submit(reader.chunk, ones[1], urgent=False)
    urgent = pool.submit(reader.chunk, ones[2])
    await_asked(2)
    assert ones[1].id.hex() not in "".join(asked), "there is no room for it"
    hurried = pool.submit(reader.chunk, ones[1])
    await_asked(3)
    assert ones[1].id.hex() in asked[2]
    joined = pool.submit(reader.chunk, ones[0])
    wait_until(lambda: ones[0].id in reader._hurried)
    go.set()
    found = [future.result(20) for future in (first, second, urgent, hurried, joined)]
    assert found == [chunks[0], chunks[1], chunks[2], chunks[1], chunks[0]] and len(asked) == 3
    assert not reader._hurried
    pool.shutdown()


def test_a_client_that_comes_before_the_background_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_reader, "ROOM_SECONDS", 60.0)
    reader, go, begun = ChunkReader(FakeStore(lambda: packed(DATA)), None), threading.Event(), threading.Event()

    def from_cache(wanted: Wanted) -> None:
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(reader, "_from_cache", from_cache)
    with ThreadPoolExecutor(2) as pool:
        background = pool.submit(reader.chunk, WANTED, urgent=False)
        assert begun.wait(20)
        urgent = pool.submit(reader.chunk, WANTED)
        try:
            wait_until(lambda: reader._hurried)
            reader.pace.in_flight = 99
        finally:
            go.set()
        assert urgent.result(20) == background.result(20) == DATA and not reader._hurried


def test_hosts_are_asked_for_a_part_of_the_time_of_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[float]()

    def chunk(*arguments: object) -> None:
        deadline = arguments[-1]
        assert isinstance(deadline, float)
        given.append(deadline)

    wanted = Wanted(NAME, len(DATA), SHA256, 0, SimpleNamespace(chunk=chunk))  # type: ignore[arg-type]
    for fetch_seconds in (10.0, 0.5):
        monkeypatch.setattr(chunk_reader, "FETCH_SECONDS", fetch_seconds)
        began = time.monotonic()
        assert ChunkReader(FakeStore(lambda: packed(DATA)), None).chunk(wanted) == DATA
        longest = min(chunk_reader.PEER_SECONDS, fetch_seconds)
        assert began + longest <= given.pop() <= time.monotonic() + longest


def test_the_length_of_a_range_does_not_make_it_background() -> None:
    count, size = 8, 64 << 10
    urgencies = list[bool]()

    def chunk(wanted: Wanted, *, urgent: bool) -> bytes:
        urgencies.append(urgent)
        return bytes(wanted.length)

    reader = SimpleNamespace(chunk=chunk, knows=lambda chunk: True, on_healed=[], pace=Pace())
    index = index_of(((bytes([number]) * 32, size) for number in range(count)), size)
    snapshot = SimpleNamespace(index=index, sidecar=None, identity="x")
    with ThreadPoolExecutor(4) as pool:
        block = SnapshotSource("ram0", snapshot, reader, pool)  # type: ignore[arg-type]
        for read, length, urgent in (
            (block.read, 4 * size, True),
            (block.read, 4096, True),
            (block.read_background, 4 * size, False),
            (block.read_background, 4096, False),
        ):
            assert read(0, length) == bytes(length) and set(urgencies) == {urgent}
            urgencies.clear()


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)
