"""Which fault loop a real worker runs, and that status, metrics and doctor say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_workers import twin
from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, environment, word
from tests.system.test_metrics import scraped

HERE = "compiled" if twin.COMPILED else "python"


@pytest.mark.parametrize("pure", ["", "1"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_answers_by_the_loop_that_was_chosen(
    runtime_dir: Path, source_file: SourceFile, monkeypatch: pytest.MonkeyPatch, pure: str, mode: str
) -> None:
    monkeypatch.setenv(twin.VARIABLE, pure or ("" if twin.COMPILED else "1"))
    path, expected = source_file(1024 * PAGE), "python" if pure else HERE
    with Service(runtime_dir, f"ram0={path}", metrics="127.0.0.1:0") as service:
        client = service.client("ram0", mode)
        assert client.do("words(b, [1, 700])") == [word(PAGE), word(700 * PAGE)]
        assert service.record(client)["fault_loop"] == expected
        service.kill_worker(client)
        assert client.do("words(b, [2, 300])") == [word(2 * PAGE), word(300 * PAGE)], "its successor answers"
        record = service.record(client)
        assert record["fault_loop"] == expected and record["restarts"] == 1
        loops = scraped(service)["postcopy_fault_loops"]
        assert loops == {(("loop", name),): float(name == expected) for name in ("python", "compiled")}
        for order in ("sequential", "random"):
            assert client.do(f"check(b, {str(path)!r}, {order!r}, 4096)") == -1


def test_doctor_says_which_loop_workers_run() -> None:
    # Run with POSTCOPY_PURE=1 itself, this test does not know whether there is a compiled loop.
    chosen = [("", "compiled")] if twin.COMPILED else []
    for pure, expected in [*chosen, ("1", "Python")]:
        variables = environment(POSTCOPY_PURE=pure)
        done = subprocess.run(
            [sys.executable, "-m", "postcopy", "doctor", "--json"], env=variables, capture_output=True, timeout=60
        )
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        assert checks["fault loop"]["found"].startswith(expected)
