"""``postcopy probe firecracker``: our own handler holds every rule, and each rule is seen broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.service import Service, environment

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

FAKE = (sys.executable, str(Path(__file__).with_name("fake_handler.py")), "{socket}", "{memory}")
PATIENCE = 300.0


def probe(*words: str, timeout: float = 30.0, status: int = 1) -> dict[str, Any]:
    """The report; ``words`` are options, ``--`` and the command."""
    command = [sys.executable, "-m", "postcopy", "probe", "firecracker", "--json", "--timeout", str(timeout), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    report["states"] = {rule["rule"]: rule["state"] for rule in report["rules"]}
    report["details"] = {rule["rule"]: rule["detail"] for rule in report["rules"]}
    if status:
        assert len(done.stderr.splitlines()) == 1 and "breaks a rule" in done.stderr
    return report


def test_our_handler_holds_every_rule(runtime_dir: Path, source_file: SourceFile) -> None:
    memory = source_file(512 * 4096)
    with Service(runtime_dir, f"vm0={memory}"):
        ours = [sys.executable, "-m", "postcopy", "attach", "firecracker", "--listen", "{socket}", "--block", "vm0"]
        report = probe("--memory", str(memory), "--", *ours, "--runtime-dir", str(runtime_dir), status=0)
    assert set(report["states"].values()) == {"held"} and report["verdict"] == "passed"
    assert report["reads"] > 8 * 512 and report["first_read_us"]["p50"] <= report["first_read_us"]["p99"]


def test_a_right_handler_that_forgets_at_its_death() -> None:
    """It keeps nothing, so a restart is the end of its machine: that one rule is broken."""
    report = probe("--pages", "128", "--only", "restarts", "--only", "storm", "--", *FAKE, timeout=5)
    assert [rule for rule, state in report["states"].items() if state == "broken"] == ["restarts"]
    assert "after the handler was killed" in report["details"]["restarts"]


@pytest.mark.parametrize(
    ("faults", "tried", "rules"),
    [
        (("forgets", "dies", "keeps"), ("removed", "races", "hostile", "lets-go"), ()),
        (("wrong", "across"), ("regions", "kernel-faults"), ("content",)),
        (("zeros",), ("versions", "storm", "delays"), ("content",)),
        (("lazy",), ("removed",), ("prompt",)),
        (("first",), ("several",), ()),
    ],
)
def test_each_rule_is_seen_broken(faults: tuple[str, ...], tried: tuple[str, ...], rules: tuple[str, ...]) -> None:
    only = [word for rule in tried for word in ("--only", rule)]
    report = probe("--pages", "128", *only, "--", *FAKE, *faults, timeout=2.5)
    assert {rule for rule, state in report["states"].items() if state == "broken"} >= {*tried, *rules}


def test_a_handler_for_one_machine() -> None:
    report = probe("--pages", "64", "--one-shot", "--", *FAKE, "first", status=0)
    assert {rule for rule, state in report["states"].items() if state == "not applicable"} == {
        *("several", "hostile", "restarts", "restart-removed"),
    }


@pytest.mark.parametrize(
    ("words", "reason", "status"),
    [
        (["--", sys.executable, "-c", "raise SystemExit('no such machine')", "{socket}"], "no such machine", 1),
        (["--", "/nonexistent/handler", "{socket}"], "No such file", 1),
        (["true"], "no {socket}", 2),
        (["--only", "content", "--", "true", "{socket}"], "--only content is none of versions", 2),
    ],
)
def test_a_handler_that_does_not_start(words: list[str], reason: str, status: int) -> None:
    command = [sys.executable, "-m", "postcopy", "probe", "firecracker", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status and reason in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
