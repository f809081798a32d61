"""``python -m tests.attack [--minutes N] [--seed S] [--json]``: attack a service and measure what that costs others.

Two honest clients touch missing pages of a local and of a remote block. Beside them runs, in turn and for less than a
second at a time: a program that only burns CPU; the attack, on another installation of the same machine; the attack, on
theirs. The first two slow faults down too, because there are more busy programs than processors. The second takes the
same processor time away as the third. So the ratio of these two is what the attack itself costs. It is judged with
confidence (``confidence.py``). An attack whose ratio is decided leaves its time to those that follow.

Exit status 0: no bound is broken, and at the end every byte is right. A minute decides no ratio but a gross one; it
takes about 20 seconds for each attack.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from postcopy.errors import PostcopyError
from postcopy_kernel.process import die_with_parent
from tests.attack.attacks import ATTACKS, STRANGER, Attack, Target
from tests.attack.confidence import EXCEEDS, HOLDS, OPEN, SURE, Ratio, ratio_of
from tests.attack.scene import BLOCKS, MIB, Installation, Scene, Touches

GROWTH = 64 * MIB
LOG = 256 << 10
SLOWER = 3.0
NOISE_US = 1_000_000.0
"""A p99 below this may be a scheduler's delay where all processors are busy, unless enough faults decide the ratio."""
SLICE_SECONDS = 0.5
BUSY_EVERY = 4
"""Rounds in which one has the busy program: nothing is judged by it."""
BUSY, NEIGHBOUR, UNDER = "busy", "neighbour", "under"
"""What runs beside the honest clients: see above."""
Figures = dict[str, tuple[float, float]]
"""p50 and p99 in us of each block."""


@dataclass
class Outcome:
    """One attack: attempts, faults of honest clients under it, what they took beside what; bytes."""

    attack: str
    user: str
    attempts: int
    touches: int
    busy: Figures
    neighbour: Figures
    under: Figures
    ratios: dict[str, Ratio]
    growth: dict[str, int]
    descriptors: int
    log: int
    broken: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="attack", description="Attack a service as three kinds of user.")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="time for all attacks together (1)")
    parser.add_argument("--seed", type=int, metavar="S", help="what is random (a new one each time)")
    parser.add_argument("--only", metavar="WORDS", default="", help="attacks with these words in their names")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    asked = parser.parse_args()
    if os.geteuid():
        parser.error("attacks run as several users: start it as root")
    attacks = [attack for attack in ATTACKS if asked.only in attack.name]
    if not attacks or asked.minutes <= 0:
        parser.error(f"no attack has the words {asked.only!r}" if not attacks else "--minutes must be positive")
    seed = Random().randrange(1 << 32) if asked.seed is None else asked.seed
    outcomes, wrong = run(attacks, seed, asked.minutes * 60, sys.stderr)
    if asked.json:
        print(json.dumps({"seed": seed, "attacks": [asdict(outcome) for outcome in outcomes], "wrong_bytes": wrong}))
    else:
        show(outcomes, seed, wrong)
    return int(bool(wrong or any(outcome.broken for outcome in outcomes)))


def run(attacks: list[Attack], seed: int, seconds: float, progress: Any) -> tuple[list[Outcome], int]:
    """The outcomes, and how many of the two blocks have a wrong byte at the end. ``seconds``: for all together."""
    outcomes = []
    with Scene(Random(seed), seconds) as scene:
        end = time.monotonic() + seconds
        for number, attack in enumerate(attacks):
            print(f"attack: {attack.name} by {attack.who} ({number + 1} of {len(attacks)})", file=progress, flush=True)
            share = max(seconds / len(attacks), (end - time.monotonic()) / (len(attacks) - number))
            outcomes.append(attacked(scene, attack, seed + number, share))
        wrong = scene.wrong_blocks()
    return outcomes, wrong


def attacked(scene: Scene, attack: Attack, seed: int, seconds: float) -> Outcome:
    before, log, fds = scene.memory(), scene.log_bytes(), scene.descriptors()
    touches = {beside: Touches() for beside in (BUSY, NEIGHBOUR, UNDER)}
    growth, most = dict.fromkeys(before, 0), fds
    with (
        attacker(Attack(_burn, STRANGER), scene, seed) as busy,
        attacker(attack, scene.neighbour, seed) as neighbour,
        attacker(attack, scene, seed) as under,
    ):
        turns = {BUSY: busy, NEIGHBOUR: neighbour, UNDER: under}
        end = time.monotonic() + seconds
        for turn in itertools.count():
            for beside, program in turns.items():
                if beside == BUSY and turn % BUSY_EVERY:
                    continue
                with program.running():
                    scene.measure(SLICE_SECONDS, touches[beside])
                    growth = {name: max(growth[name], size - before[name]) for name, size in scene.memory().items()}
                    most = max(most, scene.descriptors())
            ratios = {block: ratio_of(touches[UNDER].took[block], touches[NEIGHBOUR].took[block]) for block in BLOCKS}
            if time.monotonic() >= end or all(one.verdict(SLOWER) != OPEN for one in ratios.values()):
                break
    written = scene.log_bytes() - log
    broken = [f"{name} grew by {size >> 20} MiB" for name, size in growth.items() if size > GROWTH]
    if written > LOG:
        broken.append(f"the logs grew by {written >> 10} KiB")
    figures = {beside: {block: one.figures(block) for block in BLOCKS} for beside, one in touches.items()}
    for block, ratio in ratios.items():
        p99, fair = figures[UNDER][block][1], figures[NEIGHBOUR][block][1]
        if ratio.verdict(SLOWER) == EXCEEDS or p99 > max(NOISE_US, SLOWER * fair):
            text = f"{block} fault p99 {p99 / 1000:.1f} ms, {fair / 1000:.1f} ms beside the same attack elsewhere"
            broken.append(f"{text}: {ratio}")
    broken += [f"{name} ended" for name in scene.replaced()]
    if stuck := touches[UNDER].stuck:
        broken.append(f"stuck: {', '.join(stuck)}")
    count = sum(len(piece) for took in touches[UNDER].took.values() for piece in took)
    return Outcome(
        attack.name,
        attack.who,
        under.attempts,
        count,
        **figures,
        ratios=ratios,
        growth=growth,
        descriptors=most - fds,
        log=written,
        broken=broken,
    )


class Attacker:
    """A process that attacks while it is ``running``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.attempts = 0
        """Counted at its end."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGSTOP)


@contextlib.contextmanager
def attacker(attack: Attack, victim: Installation, seed: int) -> Iterator[Attacker]:
    """A process that attacks. It begins stopped."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            _become(attack.uid)
            die_with_parent(parent)
            os.kill(os.getpid(), signal.SIGSTOP)
            _attack(attack, Target(str(victim.directory), victim.network, Random(seed)), writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    program = Attacker(pid)
    try:
        os.waitpid(pid, os.WUNTRACED)
        yield program
    finally:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
        if select.select([reader], [], [], 10.0)[0]:
            program.attempts = int.from_bytes(os.read(reader, 8), "little")
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _attack(attack: Attack, target: Target, writer: int) -> None:
    """Attempts until SIGTERM. Whatever an attempt raises is none of ours."""
    attempts = 0

    def over(*_: object) -> None:
        os.write(writer, attempts.to_bytes(8, "little"))
        os._exit(0)

    signal.signal(signal.SIGTERM, over)
    while True:
        attempts += 1
        with contextlib.suppress(OSError, PostcopyError):
            attack.attempt(target)


def _burn(target: Target) -> None:
    """A program of another user that only burns CPU."""
    sum(range(10_000))


def _become(uid: int) -> None:
    """Whatever is imported later must be here already, because this user may not be able to read our files."""
    for module in ("client", "block", "populate", "session", "attach_socket"):
        importlib.import_module(f"postcopy.{module}")
    "127.0.0.1".encode("idna")  # as socket.create_connection does
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir("/")


def show(outcomes: list[Outcome], seed: int, wrong: int) -> None:
    """For people."""
    print(
        f"\nseed {seed}; fault p99 in ms of an honest client: beside a busy program / beside the same attack on another"
    )
    print(f"installation of this machine / under attack. x: the last, in times of the one before, and its {SURE:.0%}\n"
          "confidence interval\n")  # fmt: skip
    print(f"{'attack':25}{'by':18}{'attempts':>9}{'faults':>8}  {'local p99':26}{'x':16}{'remote p99':26}{'x':16}"
          f"{'memory':>9}{'fds':>6}{'log':>9}")  # fmt: skip
    for one in outcomes:
        grown = max(one.growth.values()) >> 10
        figures = "".join(f"{_row(one, block):26}{one.ratios[block]!s:16}" for block in BLOCKS)
        print(f"{one.attack:25}{one.user:18}{one.attempts:9}{one.touches:8}  {figures}{grown:7} K", end="")
        print(f"{one.descriptors:6}{one.log:8} B")
        for finding in one.broken:
            print(f"    BROKEN: {finding}")
    hurt = sum(bool(one.broken) for one in outcomes)
    found = Counter(ratio.verdict(SLOWER) for one in outcomes for ratio in one.ratios.values())
    print(f"\n{wrong} blocks with wrong or missing bytes; {hurt} attacks hurt others")
    print(f"at most {SLOWER:g} x, with confidence: {found[HOLDS]} figures; more: {found[EXCEEDS]}; "
          f"not decided (more minutes decide): {found[OPEN]}")  # fmt: skip


def _row(one: Outcome, block: str) -> str:
    return " / ".join(f"{figures[block][1] / 1000:.2f}" for figures in (one.busy, one.neighbour, one.under))


if __name__ == "__main__":
    os.environ.setdefault("POSTCOPY_TEST_ID", f"attack-{os.getpid()}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
