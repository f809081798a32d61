"""docs/userfaultfd.md: its example runs as it stands there, and its table has every status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_kernel.userfaultfd import Status
from tests.kernel.touching import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/userfaultfd.md").read_text("utf-8")


def fenced(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.mark.usefixtures("require_userfaultfd")
def test_the_example_runs_and_prints_what_the_page_says() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernel")}
    told = subprocess.run(
        [sys.executable, "-X", "dev", "-c", fenced("python")],
        env=environment,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (told.returncode, told.stdout.decode()) == (0, fenced("text")), told.stderr.decode()


def test_every_status_is_explained() -> None:
    assert re.findall(r"^\| `([A-Z]+)` \|", PAGE, re.MULTILINE) == [status.name for status in Status]
