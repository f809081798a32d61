"""A worker that cannot reach the supervisor's router yet drops what it asks; its hello makes up for it: the wake of
nothing that answers it makes its client ask again. Forced here, by a router that is away until its supervisor makes it
again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import Service, called, end_by_pidfd, until, word

PAGE = 4096


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_asked_before_the_channel_is_up(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(1 << 20)
    router, away = runtime_dir / "private/router", runtime_dir / "private/away"
    options: dict[str, Any] = {"fault_around": "4K", "background_rate": "0", "start_timeout": 60}
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **options) as service:
        client = service.client("ram0", mode)
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        killed = service.worker(client)
        router.rename(away)
        end_by_pidfd(killed, signal.SIGKILL, "postcopy-w")
        client.begin("words(b, [9])")
        # The document comes over the router too, so it is the worker's own figures that say that it has asked.
        until(lambda: killed not in service.people() and len(workers(service)) == 1, "the next worker is there")
        assert client.answer() == [word(9 * PAGE)]
        assert client.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        status = service.status()
        assert status["totals"]["restarts"] == 1
        assert "runtime-dir" in [event["kind"] for event in status["events"]], "its router was made again"
        away.unlink()


def workers(service: Service) -> list[int]:
    return [pid for pid in service.people() if called(pid) == "postcopy-w1"]
