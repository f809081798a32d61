"""``python -m tests.chaos --minutes N --seed S``: rounds of chaos until the time is over or something is found.

Exit status: 0 nothing was found; 1 something was (a directory with the evidence is named); 2 usage.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import report
from tests.chaos.monkey import CROWD_KINDS, EVERYTHING, HOUSE_KINDS, WEIGHTS, acts
from tests.chaos.round import Plan, Round
from tests.chaos.store import LEFT_OUT, StoreRound
from tests.chaos.tally import Tally

ENOUGH_MEMORY = 2 << 30
"""Bytes that must be available before a round; less would make the machine's killer part of the chaos."""


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    tally, began = Tally(), time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="postcopy-chaos-", dir=asked.directory))
    if not asked.json:
        print(f"seed {asked.seed}; evidence, if any, in {directory}", flush=True)
    _play(asked, tally, directory, began)
    if tally.findings:
        (directory / "findings").write_text("\n".join(tally.findings) + "\n")
    else:
        shutil.rmtree(directory)
    evidence = str(directory) if tally.findings else ""
    document = report.document(tally, asked.seed, asked.clients, time.monotonic() - began, evidence)
    if asked.json:
        print(json.dumps(document, indent=1))
    else:
        report.print_table(document)
    return 1 if tally.findings or document["not_nothing"] else 0


def _play(asked: argparse.Namespace, tally: Tally, directory: Path, began: float) -> None:
    """Round after round."""
    without = frozenset(word for text in asked.without for word in text.split(","))
    without |= LEFT_OUT if asked.store else frozenset()
    if asked.machines + asked.guests:
        without |= {"everything"}  # a machine cannot give its userfaultfd to the next supervisor, as a program does
    monkeys = [acts(asked.seed, asked.gap, kinds, without) for kinds in (CROWD_KINDS, HOUSE_KINDS)]
    if asked.everything:
        monkeys.append(acts(asked.seed, asked.everything, EVERYTHING))
    seeds = random.Random(asked.seed ^ 0xC0FFEE)
    while (left := asked.minutes * 60 - (time.monotonic() - began)) > 0 and not tally.findings:
        if report.available_memory() < ENOUGH_MEMORY:
            tally.findings.append("less than 2 GiB of memory are available: no round begun")
            return
        tally.rounds += 1
        place = directory / f"round-{tally.rounds}"
        place.mkdir()
        seconds = max(10.0, min(asked.round_seconds, left))
        plan = Plan(asked.clients, asked.mib * 256, seconds, asked.pause, tuple(asked.option), asked.namespaces)
        plan.machines, plan.guests = asked.machines, asked.guests
        tally.findings += (StoreRound if asked.store else Round)(
            plan, seeds.getrandbits(40), monkeys, tally, place
        ).play()
        if not tally.findings:
            shutil.rmtree(place)
        if not asked.json:
            print(report.line(tally, time.monotonic() - began), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description="Kill, stop and cut everybody; check every byte.")
    parser.add_argument("--minutes", type=float, default=2.0, help="begin no round after that (2)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--clients", type=int, default=32, help="programs at a time, half private, half shared (32)")
    parser.add_argument("--machines", type=int, default=0, help="simulated Firecrackers at a time, beside them (0)")
    parser.add_argument("--guests", type=int, default=0, help="guests of KVM at a time (0)")
    parser.add_argument("--mib", type=int, default=128, help="size of each of the two blocks in MiB (128)")
    parser.add_argument("--round-seconds", type=float, default=90.0, help="chaos in a round of fresh blocks (90)")
    parser.add_argument("--gap", type=float, default=0.9, help="seconds between a monkey's acts on average (0.9)")
    help = "kill supervisor, custodian and all workers at once, every so many seconds on average, beside the other acts"
    parser.add_argument("--everything", type=float, default=0.0, metavar="SECONDS", help=help)
    parser.add_argument("--pause", type=float, default=0.04, help="seconds between a program's operations (0.04)")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="KIND[,KIND]",
        help=f"leave out these acts, or all of these victims: {', '.join(WEIGHTS)}",
    )
    parser.add_argument(
        "--namespaces", action="store_true", help="source and supervisor in two network namespaces, tcp between them"
    )
    help = "the remote block comes from a store and a host nearby: they fail too, and so does the chunk cache"
    parser.add_argument("--store", action="store_true", help=help)
    parser.add_argument("--option", action="append", default=[], help="one more word for the supervisor's command line")
    parser.add_argument("--directory", default="/tmp", help="where the files and the evidence are (/tmp)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
