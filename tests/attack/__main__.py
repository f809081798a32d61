"""``python -m tests.attack [--minutes N] [--seed S] [--json]``: attack a service and measure what that costs others.

Two honest clients touch missing pages of a local and of a remote block all the time. For each attack their fault p50
and p99 are compared with those beside a program that only burns CPU, because two busy programs on two processors slow
a fault down without any attack. Exit status 0: every bound holds, and at the end every byte is right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from postcopy.errors import PostcopyError
from postcopy_kernel.process import die_with_parent
from tests.attack.attacks import ATTACKS, STRANGER, Attack, Target
from tests.attack.scene import MIB, Scene, Touches

GROWTH = 64 * MIB
LOG = 256 << 10
SLOWER = 3.0
NOISE_US = 1_000_000.0
"""A p99 below this may be a scheduler's delay where all processors are busy. On a quiet machine read the figures."""


@dataclass
class Outcome:
    """One attack: attempts, the honest p50 and p99 beside a busy program and beside the attack (us), bytes."""

    attack: str
    user: str
    attempts: int
    touches: int
    calm: dict[str, tuple[float, float]]
    under: dict[str, tuple[float, float]]
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
    seconds = asked.minutes * 60 / len(attacks)
    outcomes, wrong = run(attacks, seed, seconds, sys.stderr)
    if asked.json:
        print(json.dumps({"seed": seed, "attacks": [asdict(outcome) for outcome in outcomes], "wrong_bytes": wrong}))
    else:
        show(outcomes, seed, wrong)
    return int(bool(wrong or any(outcome.broken for outcome in outcomes)))


def run(attacks: list[Attack], seed: int, seconds: float, progress: Any) -> tuple[list[Outcome], int]:
    """The outcomes, and how many of the two blocks have a wrong byte at the end."""
    outcomes = []
    with Scene(Random(seed)) as scene:
        with burning(scene):
            calm = scene.measure(max(2.0, min(seconds, 5.0)))
        for number, attack in enumerate(attacks):
            print(f"attack: {attack.name} by {attack.who} ({number + 1} of {len(attacks)})", file=progress, flush=True)
            outcomes.append(attacked(scene, attack, seed + number, seconds, calm))
        wrong = scene.wrong_blocks()
    return outcomes, wrong


def attacked(scene: Scene, attack: Attack, seed: int, seconds: float, calm: Touches) -> Outcome:
    before, log, fds = scene.memory(), scene.log_bytes(), scene.descriptors()
    with attacker(scene, attack, seed) as attempts:
        under = scene.measure(seconds)
        peak, most = scene.memory(), scene.descriptors()
    growth = {name: peak[name] - before[name] for name in peak}
    written = scene.log_bytes() - log
    broken = [f"{name} grew by {size >> 20} MiB" for name, size in growth.items() if size > GROWTH]
    if written > LOG:
        broken.append(f"the logs grew by {written >> 10} KiB")
    for block, (_, p99) in under.figures.items():
        if p99 > max(NOISE_US, SLOWER * calm.figures[block][1]):
            broken.append(f"{block} fault p99 {p99 / 1000:.1f} ms, {calm.figures[block][1] / 1000:.1f} ms without")
    broken += [f"{name} ended" for name in scene.replaced()]
    if under.stuck:
        broken.append(f"stuck: {', '.join(under.stuck)}")
    return Outcome(
        attack.name,
        attack.who,
        attempts(),
        under.count,
        calm.figures,
        under.figures,
        growth,
        most - fds,
        written,
        broken,
    )


@contextlib.contextmanager
def attacker(scene: Scene, attack: Attack, seed: int) -> Iterator[Any]:
    """A process that attacks; what is given counts its attempts, after its end."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            _become(attack.uid)
            die_with_parent(parent)
            _attack(attack, Target(str(scene.directory), scene.network, Random(seed)), writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    found = bytearray()
    try:
        yield lambda: int.from_bytes(found, "little")
    finally:
        os.kill(pid, signal.SIGTERM)
        if select.select([reader], [], [], 10.0)[0]:
            found += os.read(reader, 8)
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


@contextlib.contextmanager
def burning(scene: Scene) -> Iterator[None]:
    """A program of another user that only burns CPU."""
    with attacker(scene, Attack(_burn, STRANGER), 0):
        yield


def _burn(target: Target) -> None:
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
    print(f"\nseed {seed}; fault p50 / p99 in ms of an honest client, beside a busy program -> beside the attack\n")
    print(f"{'attack':22}{'by':18}{'attempts':>9}  {'local':28}{'remote':28}{'memory':>8}{'fds':>6}{'log':>9}")
    for one in outcomes:
        figures = "".join(f"{_pair(one.calm[block])} -> {_pair(one.under[block]):16}" for block in ("local", "remote"))
        grown = max(one.growth.values()) >> 10
        print(f"{one.attack:22}{one.user:18}{one.attempts:9}  {figures}{grown:6} K{one.descriptors:6}{one.log:8} B")
        for finding in one.broken:
            print(f"    BROKEN: {finding}")
    hurt = sum(bool(one.broken) for one in outcomes)
    print(f"\n{wrong} blocks with wrong or missing bytes; {hurt} attacks that hurt others")


def _pair(figures: tuple[float, float]) -> str:
    return f"{figures[0] / 1000:.2f}/{figures[1] / 1000:.2f}"


if __name__ == "__main__":
    os.environ.setdefault("POSTCOPY_TEST_ID", f"attack-{os.getpid()}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
