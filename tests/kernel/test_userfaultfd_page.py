"""docs/userfaultfd.md: its examples run as they stand there, and its tables have every status, mode and feature."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_kernel.userfaultfd import Feature, RegisterMode, Status
from tests.kernel.touching import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/userfaultfd.md").read_text("utf-8")


NOT_FOR_A_HANDLER = {"EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP", "MOVE"}  # shortened there; of one process only
EXAMPLES = re.findall(r"^```python\n(.*?)^```$.*?^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("require_userfaultfd")
@pytest.mark.parametrize(("program", "output"), EXAMPLES, ids=["missing", "write-protected"])
def test_an_example_runs_and_prints_what_the_page_says(program: str, output: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernel")}
    told = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program],
        env=environment,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (told.returncode, told.stdout.decode()) == (0, output), told.stderr.decode()


def test_every_status_is_explained() -> None:
    assert re.findall(r"^\| `([A-Z]+)` \|", PAGE, re.MULTILINE) == [status.name for status in Status]


def test_every_mode_and_feature_is_explained() -> None:
    assert set(re.findall(r"RegisterMode\.([A-Z]+)` \|", PAGE)) == {mode.name for mode in RegisterMode}
    assert not {feature.name for feature in Feature} - set(re.findall(r"Feature\.(\w+)`", PAGE)) - NOT_FOR_A_HANDLER
