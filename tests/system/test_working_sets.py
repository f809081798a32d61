"""Record and replay: what one run needs is there before the next run asks, also when the snapshot has changed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.remote import source_of
from tests.system.service import Service, refused, until
from tests.system.stores import HttpStore, image, postcopy

PAGE, PAGES = 4096, 2048


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTCOPY_CHUNK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store with the snapshot vm1 of tmp_path/image."""
    image(tmp_path / "image", PAGES)
    postcopy("pack", tmp_path / "image", f"{tmp_path}/store/vm1")
    return tmp_path / "store"


@pytest.fixture
def slow(place: Path) -> Iterator[HttpStore]:
    with HttpStore(place) as server:
        server.delay = 0.02
        yield server


def run(runtime_dir: Path, source: str, pages: list[int], data: bytes, **options: Any) -> int:
    """One run that needs these pages: the pages that clients have waited for."""
    with Service(runtime_dir, f"ram0=store:{source}", **options) as service:
        client = service.client()
        if options.get("replay"):
            until(lambda: "replay of ram0" in service.log(), "the replay is over", 60)
        before = source_of(service)["requests"]
        for page in pages:
            assert bytes.fromhex(client.do(f"read(b, {page * PAGE}, 64)")) == data[page * PAGE : page * PAGE + 64]
        requests: int = source_of(service)["requests"] - before
        return requests


def recorded(place: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(postcopy("inspect", f"{place}/vm1", "--json"))["working_set"]
    return found


def test_what_was_recorded_is_there_before_it_is_asked_for(
    runtime_dir: Path, tmp_path: Path, place: Path, slow: HttpStore
) -> None:
    data = (tmp_path / "image").read_bytes()
    pages = random.Random(3).sample(range(PAGES), 300)
    assert run(runtime_dir, f"{place}/vm1", pages, data, record_working_set=True) == 300
    assert recorded(place) == {"runs": 1, "pages": 300, "bytes": 300 * PAGE}
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K", "chunk_cache_size": "0"}
    first, second = str(tmp_path / "without"), str(tmp_path / "with")
    without = run(runtime_dir, f"{slow.url}/vm1", pages, data, record=first, **options)
    asked = slow.chunks_asked()
    with_replay = run(runtime_dir, f"{slow.url}/vm1", pages, data, replay=True, record=second, **options)
    assert without == 300 and with_replay <= 0.03 * without
    assert slow.chunks_asked() - asked <= asked
    worth = json.loads(postcopy("trace", "replay", f"{place}/vm1", first, second, "--json"))
    assert worth["coverage"] == 1.0 and worth["waste"] == 0.0 and worth["saved_s"] > 0.9 * worth["waited_s"] > 0
    assert worth["faults"][0] == 300 and worth["faults"][1] <= 9
    # A second run adds its pages, and a changed snapshot keeps those of unchanged chunks.
    run(runtime_dir, f"{place}/vm1", [*pages[:10], 7], data, record_working_set=True)
    merged = recorded(place)
    assert merged["runs"] == 2 and merged["pages"] in (300, 301)
    other = bytearray(data)
    other[5 * 64 * PAGE] ^= 1
    (tmp_path / "image").write_bytes(other)
    postcopy("pack", tmp_path / "image", f"{place}/vm1")
    assert recorded(place) == merged
    assert run(runtime_dir, f"{slow.url}/vm1", pages, bytes(other), replay=True, **options) <= 0.03 * 300


def test_what_cannot_be_recorded_or_replayed(runtime_dir: Path, tmp_path: Path, slow: HttpStore) -> None:
    source = f"ram0=store:{slow.url}/vm1"
    status, text = refused(runtime_dir, source, options={"record_working_set": True})
    assert status == 1 and "can only be read" in text
    status, text = refused(runtime_dir, source, options={"record_working_set": True, "replay": True})
    assert status == 2 and "exclude each other" in text
    with Service(runtime_dir, source, replay=True) as service:
        assert service.client().do(f"check(b, {str(tmp_path / 'image')!r}, 'random', 4096)", 60) == -1
        assert "no working set" in service.log()
    (tmp_path / "trace").write_bytes(b"PCTRACE1")
    assert "no trace" in postcopy("trace", "replay", f"{slow.url}/vm1", tmp_path / "trace", status=2)
