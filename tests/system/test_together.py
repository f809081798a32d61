"""Clients that walk through one block together: ranks that read one model, clones that boot alike."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service

SIZE = 64 << 20
CLIENTS = 6


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_walking_together_costs_few_faults(runtime_dir: Path, source_file: SourceFile, kind: str, mode: str) -> None:
    """Without a share in the windows of the others most pages are a fault of their own."""
    path = source_file(SIZE)
    with ExitStack() as stack:
        block = f"ram0={path}"
        if kind == "remote":
            block = stack.enter_context(Source(block)).block()
        service = stack.enter_context(Service(runtime_dir, block, background_rate="0"))
        clients = [service.client("ram0", mode) for _ in range(CLIENTS)]
        for client in clients:
            client.begin(f"check(b, {str(path)!r}, 'forward', {PAGE})")
        assert [client.answer(120) for client in clients] == [-1] * CLIENTS
        status = service.status()
        faults = sum(client["faults"] for client in status["clients"])
        # Remote, each waits for each window: a window is up to 64 pages, local ones up to 256.
        assert faults < SIZE // PAGE // (4 if kind == "local" else 1), status["totals"]
        assert status["totals"]["requests"] < SIZE // PAGE // 8
        assert status["totals"]["restarts"] == 0
