"""A short run of chaos, and proof that a run finds what it is there to find."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos import leaks
from tests.chaos import round as rounds
from tests.chaos.contents import PAGE, SEATS, SLOT_EVERY, ZONE, Contents
from tests.chaos.leaks import Leaks
from tests.chaos.monkey import CROWD_KINDS, HOUSE, HOUSE_KINDS, WEIGHTS, Act, acts
from tests.chaos.round import Plan, Round
from tests.chaos.store import STORE_KINDS
from tests.chaos.tally import Tally
from tests.system.service import ROOT, environment

WITHIN = 400.0


@pytest.mark.timeout(WITHIN + 30)
def test_chaos_for_a_short_while(tmp_path: Path) -> None:
    """``scripts/chaos --minutes 30`` is the same for long."""
    command = [sys.executable, "-m", "tests.chaos", "--json", "--seed", "20261122", "--directory", str(tmp_path)]
    command += ["--minutes", "0.4", "--round-seconds", "24", "--clients", "10", "--mib", "32", "--gap", "0.6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert document["kills"] >= 5 and document["findings"] == []
    assert document["counts"]["local faults"] > 100 and document["counts"]["remote faults"] > 100


@pytest.mark.timeout(WITHIN + 30)
def test_chaos_with_machines(tmp_path: Path) -> None:
    """``scripts/chaos --machines 20 --guests 20 --minutes 10`` is the same for long."""
    command = [sys.executable, "-m", "tests.chaos", "--json", "--seed", "15", "--directory", str(tmp_path)]
    command += ["--minutes", "0.25", "--round-seconds", "15", "--clients", "2", "--machines", "2", "--guests", "2"]
    command += ["--mib", "4", "--gap", "1", "--pause", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert document["findings"] == [] and document["counts"]["wrong bytes"] == 0
    assert document["kills"] > 1 and document["counts"]["programs"] >= 6


@pytest.mark.timeout(WITHIN + 30)
def test_chaos_over_a_store(tmp_path: Path) -> None:
    """``scripts/chaos --store --minutes 10`` is the same for long."""
    command = [sys.executable, "-m", "tests.chaos", "--json", "--store", "--seed", "7", "--directory", str(tmp_path)]
    command += ["--minutes", "0.25", "--round-seconds", "15", "--clients", "6", "--mib", "16", "--gap", "0.8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert document["findings"] == [] and document["counts"]["wrong bytes"] == 0
    assert document["counts"]["remote faults"] > 100 and set(document["by_kind"]) & set(STORE_KINDS)


# --- it finds what is wrong -------------------------------------------------------------------------------------------

PLAN = Plan(clients=3, pages=2048, seconds=5.0, pause=0.01)


def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    tally = Tally()
    round_ = Round(PLAN, 1, [], tally, tmp_path)
    with round_.files[0].open("r+b") as file:
        file.seek(1000 * PAGE + 77)
        byte = file.read(1)[0]
        file.seek(1000 * PAGE + 77)
        file.write(bytes((byte ^ 1,)))
    found = round_.play()
    assert found and all("wrong bytes" in finding for finding in found)
    assert '"page": 1000' in found[0] and '"first": 77' in found[0] and '"wrong": 1,' in found[0]
    assert tally.counts["wrong bytes"] >= 1


def test_a_client_that_waits_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog takes five seconds to end this wait."""
    monkeypatch.setattr(rounds, "STUCK_AFTER", 2.0)

    def stop() -> Iterator[Act]:
        yield Act(1, "worker stop for good", 0.0, 0.0, (0.0, 0.0, 0.0), 0)
        yield Act(2, "worker kill", 1e9, 0.0, (), 0)

    tally = Tally()
    found = Round(Plan(3, 2048, 20.0, 0.01), 2, [stop()], tally, tmp_path).play()
    assert found and "is stuck" in found[0] and tally.counts["stuck clients"]
    assert "userfaultfd" in (tmp_path / "processes.txt").read_text()


class Leaking(Leaks):
    """Leaves a process and a file."""

    def after_the_last_client(self) -> list[str]:
        self.stray = subprocess.Popen(["sleep", "600"], env=self.stage.environment)
        (self.stage.place / "left").touch()
        return super().after_the_last_client()


def test_what_is_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "LEAVE_WITHIN", 5.0)
    tally = Tally()
    round_ = Round(Plan(2, 256, 2.0, 0.01), 3, [], tally, tmp_path)
    round_.leaks = leaking = Leaking(round_.stage)
    found = round_.play()
    leaking.stray.wait(5)
    assert any(f"process {leaking.stray.pid}" in finding for finding in found), found
    assert "leak: left in the runtime directory" in found and tally.counts["leaks"] == 2


# --- the oracle and the seed ------------------------------------------------------------------------------------------


def test_the_oracle_knows_every_byte() -> None:
    contents, chance = Contents(5), random.Random(1)
    for page in (0, 3, 1000):
        good = contents.page(1, page)
        assert len(good) == PAGE and contents.check(1, page, good) == []
        for _ in range(50):
            at = chance.randrange(PAGE)
            bad = bytearray(good)
            bad[at] ^= 1 << chance.randrange(8)
            zone = page % SLOT_EVERY == 0 and at >= ZONE
            assert contents.check(1, page, bytes(bad)) == [at - at % 8 if zone else at]
        assert contents.check(1, page, bytes(PAGE)) and contents.describe(bytes(PAGE)) == "zeros"
        assert contents.check(1, page, contents.page(2, page)) and contents.check(1, page, contents.page(1, page + 1))
        assert contents.describe(contents.page(2, 7)) == "page 7 of block 2, seed 5"


def test_the_oracle_knows_whose_slot_it_is() -> None:
    contents = Contents(5)
    page, seat = 2 * SLOT_EVERY, 9
    at = ZONE + 8 * seat
    word = contents.slot_key(1, page, seat) << 32 | 77
    written = bytearray(contents.page(1, page))
    written[at : at + 8] = word.to_bytes(8, "little")
    assert contents.check(1, page, bytes(written)) == []
    assert contents.check(1, page, bytes(written), {seat: word}) == []
    assert contents.check(1, page, bytes(written), {seat: word + 1}) == [at], "a lost write"
    assert contents.check(1, page, contents.page(1, page), {seat: word}) == [at], "an undone write"
    written[at + 8 : at + 16] = word.to_bytes(8, "little")
    assert contents.check(1, page, bytes(written)) == [at + 8], "into somebody else's slot"
    assert seat < SEATS


def test_acts_are_the_seeds() -> None:
    every = frozenset(WEIGHTS)
    first, again = list(islice(acts(7, 1.0, every), 500)), list(islice(acts(7, 1.0, every), 500))
    assert first == again != list(islice(acts(8, 1.0, every), 500))
    assert {act.kind for act in first} == every == CROWD_KINDS | HOUSE_KINDS
    assert {act.who for act in islice(acts(7, 1.0, HOUSE_KINDS), 500)} == set(HOUSE)
    assert {act.who for act in islice(acts(7, 1.0, CROWD_KINDS), 500)} == {"worker", "client"}
    without = {act.kind for act in islice(acts(7, 1.0, every, frozenset({"supervisor", "worker kill"})), 500)}
    assert not without & {"worker kill", "supervisor kill", "supervisor stop"} and "worker stop" in without
    assert list(acts(7, 1.0, HOUSE_KINDS, frozenset(HOUSE))) == []
