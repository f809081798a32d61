"""The residency map in the status."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import SourceFile
from tests.system.service import Service


def test_the_map_shows_where_pages_have_come(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(300 * 4096 + 5)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0", "private")
        client.do("[b.buf[at * 4096] for at in (0, 1, 2, 6, 300)]")
        service.await_received(5)
        found = service.block()["map"]
        assert found["pages"] == 3  # 301 pages in at most 128 stretches
        assert found["received"] == [3, 0, 1] + [0] * 97 + [1]
        assert found["lost"] == []
