"""How our programs are started: no module comes from the current directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_kernel.programs import command, environment

WINGS = ("client", "kernel", "protocol", "sources", "supervisor", "wire", "workers")
ROOT = Path(__file__).resolve().parents[2]


def test_a_module_of_the_current_directory_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text("print('run')\n")
    done = subprocess.run(command("strange"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "No module named strange" in done.stderr and not done.stdout


@pytest.mark.parametrize("path", ["", ":", "elsewhere:", ":/usr/nothing", ".", "./x:/usr/nothing:"])
def test_nor_by_an_entry_of_pythonpath_that_is_empty_or_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for place in (".", "elsewhere", "x"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "strange.py").write_text("print('run')\n")
    monkeypatch.setenv("PYTHONPATH", path)
    done = subprocess.run(command("strange"), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert environment().get("PYTHONPATH") == ("/usr/nothing" if "nothing" in path else None)


def test_the_rest_of_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    monkeypatch.setenv("SOMETHING", "else")
    assert environment() == dict(os.environ)


def test_an_isolated_interpreter_starts_isolated_ones(tmp_path: Path) -> None:
    program = f"import sys; sys.path.append({str(ROOT / 'kernel')!r}); from postcopy_kernel.programs import command\n"
    program += "print(command('m', 'x')[1:])"
    for flag in ("-I", "-P"):
        done = subprocess.run([sys.executable, flag, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str([flag, "-m", "m", "x"])


@pytest.mark.parametrize("wing", WINGS)
def test_every_program_is_started_so(wing: str) -> None:
    """The interpreter is named in one place only."""
    named = [
        path.relative_to(ROOT)
        for path in (ROOT / wing).rglob("*.py")
        if 'sys.executable, "-' in path.read_text("utf-8") and path.name != "programs.py"
    ]
    assert named == []
