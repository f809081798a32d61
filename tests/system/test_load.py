"""``postcopy load`` against real services: every pattern, both loops, threads, writes, kills, reports; and load that
several pytest workers make together on one supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import postcopy
from postcopy.queries import Control
from tests.conftest import SourceFile
from tests.system.service import environment, until
from tests.system.shared_service import shared_house

PATIENCE = 90.0
SIZE = 2_000_003

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

Load = Callable[..., dict[str, Any]]


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(SIZE, seed=4)


@pytest.fixture
def service(runtime_dir: Path, path: Path) -> Iterator[postcopy.Supervisor]:
    with postcopy.Supervisor({"ram0": path}, runtime_dir, fault_around="4K") as supervisor:
        yield supervisor


def loaded(*words: str, status: int = 0, cwd: Path | None = None, **more: str) -> dict[str, Any]:
    """The findings of ``postcopy load --json`` with these words."""
    command = [sys.executable, "-m", "postcopy", "load", "--json", *words]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment(**more), cwd=cwd)
    assert done.returncode == status, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_open_loop_keeps_its_rate(service: postcopy.Supervisor, path: Path) -> None:
    where = ("--runtime-dir", service.runtime_dir, "--verify", str(path))
    found = loaded("--clients", "2", "--rate", "200", "--seconds", "1", "--mode", "mixed", *where)
    assert found["touches"] + found["missed"] == 400
    assert found["response_us"]["p99"] >= found["response_us"]["p50"] > 0
    assert (found["wrong"], found["died"]) == (0, [])
    assert sum(found["timeline"]["touches"]) == found["touches"]
    assert found["residency"][-1][1] > 0


def test_threads_writes_think_and_ramp(service: postcopy.Supervisor, path: Path) -> None:
    words = ["--clients", "2", "--threads", "3", "--touches", "100", "--writes", "0.3", "--think", "0.001"]
    words += ["--ramp", "0.4", "--mode", "mixed", "--pattern", "stride", "--stride", "7"]
    found = loaded(*words, "--runtime-dir", service.runtime_dir, "--verify", str(path))
    assert found["touches"] == 200
    assert found["wrong"] == 0
    assert found["seconds"] > 0.2
    with postcopy.attach("ram0", service.runtime_dir) as block:  # what shared clients wrote is what was there
        assert bytes(block.buf) == path.read_bytes()


def test_a_compiled_toucher(service: postcopy.Supervisor, path: Path, tmp_path: Path) -> None:
    words = ["--clients", "2", "--threads", "2", "--touches", "300", "--writes", "0.5", "--mode", "mixed"]
    words += ["--compiled", "--runtime-dir", service.runtime_dir, "--verify", str(path)]
    found = loaded(*words)
    assert (found["touches"], found["wrong"], found["died"]) == (600, 0, [])
    assert 0 < found["fault_us"]["p50"] <= found["fault_us"]["max"]
    done = subprocess.run(
        [sys.executable, "-m", "postcopy", "load", *words],
        capture_output=True,
        timeout=PATIENCE,
        env=environment(PATH=str(tmp_path)),
    )
    assert done.returncode == 1
    assert done.stderr == b"postcopy: --compiled: no C compiler (cc) (Debian: gcc)\n"


@pytest.mark.parametrize(
    "words", [["--think", "60"], ["--rate", "50"], ["--threads", "3"], ["--pattern", "lockstep"]], ids=" ".join
)
def test_ctrl_c_tells_what_was_measured_until_then(path: Path, words: list[str]) -> None:
    """On a terminal it comes to everybody: the clients tell, the supervisor lives until they have."""
    command = [sys.executable, "-m", "postcopy", "load", "--json", "--serve", str(path), "--clients", "3", *words]
    pipe, env = subprocess.PIPE, environment()
    with subprocess.Popen([*command, "--seconds", "600"], stdout=pipe, stderr=pipe, env=env, process_group=0) as load:
        try:
            with Control(until(lambda: served_in(load.pid), "its supervisor is there", 60)) as control:
                # In a lockstep one client may always find the page that another one has just requested.
                until(lambda: sum(one["faults"] for one in of_clients(control)) >= 3, "they have begun", 60)
        except BaseException:
            load.kill()
            raise
        os.killpg(load.pid, signal.SIGINT)
        output, errors = load.communicate(timeout=PATIENCE)
    assert (load.returncode, errors) == (130, b"")
    found = json.loads(output)
    assert found["interrupted"] and found["died"] == []
    assert found["touches"] >= 3 and found["supervisor"]["faults"] >= 3
    assert found["present"] == found["touches"] - found["faults"]
    assert all(each["state"] == "done" for each in found["each"])


def served_in(pid: int) -> str:
    """The runtime directory of the supervisor that is this process's child, once somebody listens there."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        title = Path(f"/proc/{child}/cmdline").read_text().rstrip("\0")
        if title.startswith("postcopy_supervisor in "):
            directory = title.removeprefix("postcopy_supervisor in ")
            return directory if Path(directory, "private/router").exists() else ""
    return ""


def of_clients(control: Control) -> list[dict[str, Any]]:
    """The records of all three."""
    clients: list[dict[str, Any]] = control.status()["clients"]
    return clients if len(clients) == 3 else [{"faults": 0}]


def test_a_lockstep_of_limited_time_ends(service: postcopy.Supervisor) -> None:
    """Who has no time left must not be waited for."""
    found = loaded("--clients", "3", "--pattern", "lockstep", "--seconds", "0.4", "--runtime-dir", service.runtime_dir)
    assert [each["state"] for each in found["each"]] == ["done"] * 3


def test_killed_workers_and_a_report(tmp_path: Path, path: Path) -> None:
    target = tmp_path / "load.html"
    words = ["--serve", str(path), "--verify", str(path), "--clients", "4", "--rate", "50", "--seconds", "4"]
    found = loaded(*words, "--kill-workers", "0.3", "--report", str(target))
    assert len(found["kills"]) >= 3
    assert len({kill["client"] for kill in found["kills"][:4]}) == len(found["kills"][:4])
    assert found["supervisor"]["restarts"] >= len(found["kills"]) - 1
    assert found["wrong"] == 0
    assert "was killed (SIGKILL)" in target.read_text("utf-8")


def test_contents_by_a_rule(tmp_path: Path) -> None:
    (tmp_path / "load_pages.py").write_text(
        "def make(offset, length):\n    return bytes((n // 4096 + n) & 255 for n in range(offset, offset + length))\n"
        "def other(offset, length):\n    return bytes(length)\n"
    )
    source = "handler:load_pages:make?size=400K"
    words = ["--serve", source, "--clients", "2", "--touches", "50", "--mode", "shared"]
    assert loaded(*words, "--verify", source, cwd=tmp_path)["wrong"] == 0
    assert loaded(*words, "--verify", "handler:load_pages:other", cwd=tmp_path, status=1)["wrong"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "5", "--think", "1"],
        ["--pattern", "lockstep", "--threads", "2"],
        ["--writes", "0.5", "--mode", "shared"],
        ["--report", "load.pdf"],
        ["--verify", "handler:nothing"],
        ["--writes", "2"],
        ["--seconds", "inf"],
        ["--think", "1e300"],
        ["--ramp", "inf"],
        ["--rate", "inf"],
        ["--kill-workers", "inf"],
        ["--replay", "x", "--speed", "inf"],
        ["--serve", "zero:banana"],
    ],
)
def test_what_does_not_fit_together(words: list[str], runtime_dir: Path) -> None:
    command = [sys.executable, "-m", "postcopy", "load", *words, "--runtime-dir", str(runtime_dir)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment())
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_limit_of_time_ends_the_thinking_too(service: postcopy.Supervisor) -> None:
    found = loaded("--clients", "1", "--seconds", "0.3", "--think", "60", "--runtime-dir", service.runtime_dir)
    assert found["touches"] == 1 and found["seconds"] < 30


def test_nobody_thinks_after_the_last_touch(service: postcopy.Supervisor) -> None:
    found = loaded("--clients", "1", "--touches", "1", "--think", "60", "--runtime-dir", service.runtime_dir)
    assert found["touches"] == 1 and found["seconds"] < 30


def test_a_report_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    """Before anything is started, and nothing is left; where it goes wrong at the end the figures are out already."""
    command = [sys.executable, "-m", "postcopy", "load", "--runtime-dir", str(tmp_path / "none"), "--report"]
    (tmp_path / "there.png").mkdir()
    (tmp_path / "there-plots.png").mkdir()
    for name, wrong in (("there.png", b"there.png"), ("there.md", b"there-plots.png")):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1) and wrong in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"there.png", "there-plots.png"}


def test_two_loads_have_two_seeds_and_say_what_was_present(service: postcopy.Supervisor) -> None:
    where = ("--clients", "1", "--pattern", "sequential", "--touches", "489", "--runtime-dir", service.runtime_dir)
    first, second = loaded(*where), loaded(*where)
    assert first["asked"]["seed"] != second["asked"]["seed"]
    assert (first["faults"], second["faults"], second["present"]) == (489, 0, 489)
    command = [sys.executable, "-m", "postcopy", "load", *where, "--seed", "7"]
    text = subprocess.run(command, capture_output=True, timeout=PATIENCE, text=True).stdout
    assert "seed 7\n" in text and "489 of 489 touches were of pages already present: no page fault was meas" in text


def test_kills_that_were_not_made_are_said(service: postcopy.Supervisor) -> None:
    words = ["load", "--clients", "1", "--touches", "10", "--kill-workers", "60", "--runtime-dir", service.runtime_dir]
    done = subprocess.run([sys.executable, "-m", "postcopy", *words], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0 and b"no worker was killed" in done.stdout


# --- every pytest worker a load generator -----------------------------------------------------------------------------

SCENARIOS = [("random", "private"), ("sequential", "shared"), ("zipf", "mixed"), ("stride", "mixed")] * 2


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Runtime directory and contents of the service that all workers of this pytest run load together."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if os.environ.get("PYTEST_XDIST_WORKER") else place
    source = place / "shared-service.bin"
    if not source.exists():  # several may write it at once: the same bytes, and it appears whole
        half = source.with_suffix(f".{os.getpid()}")
        half.write_bytes(bytes(range(251)) * (SIZE * 2 // 251))
        half.replace(source)
    with shared_house(place / "shared-service", source) as directory:
        yield directory, source


@pytest.mark.parametrize(("number", "pattern", "mode"), [(n, *scenario) for n, scenario in enumerate(SCENARIOS)])
def test_every_test_worker_is_a_load_generator(common: tuple[str, Path], number: int, pattern: str, mode: str) -> None:
    """With ``pytest -n 8`` eight of them work on one supervisor at the same time; each checks every page it touches."""
    directory, source = common
    words = ["--clients", "3", "--pattern", pattern, "--mode", mode, "--rate", "100", "--seconds", "1"]
    words += ["--seed", str(number), "--writes", "0.2", "--runtime-dir", directory, "--verify", str(source)]
    found = loaded(*words)
    assert found["touches"] + found["missed"] == 300
    assert (found["wrong"], found["died"]) == (0, [])
