"""All attacks for a moment: honest clients go on, no process grows, no byte is wrong. CI runs them for a minute."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.system.service import ROOT, environment


@pytest.mark.xdist_group("chaos")
@pytest.mark.usefixtures("require_userfaultfd")
def test_attackers_hurt_nobody_else() -> None:
    command = [sys.executable, "-m", "tests.attack", "--minutes", "0.2", "--seed", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.stdout, done.stderr[-4000:]
    document = json.loads(done.stdout)
    broken = [f"{one['attack']} by {one['user']}: {'; '.join(one['broken'])}" for one in document["attacks"]]
    assert [line for line in broken if not line.endswith(": ")] == [], done.stderr[-2000:]
    assert document["wrong_bytes"] == 0
    idle = [one["attack"] for one in document["attacks"] if not one["attempts"]]
    assert not idle, "an attack that makes no attempt proves nothing"
    assert done.returncode == 0
