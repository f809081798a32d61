"""``python -m benchmarks [NAME ...] [--json FILE] [--pairs N] [--quick] [--stretch] [--write-docs]``.

``python -m benchmarks compare DIRECTORY`` compares the faults of this checkout with those of another one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial

from . import (
    attach,
    back_end,
    bulk,
    clients8,
    clones,
    compare,
    cpu,
    growth,
    limits,
    links,
    local,
    machine,
    observing,
    qemu_source,
    recovery,
    remote,
    scaling,
    sequential,
    store,
    together,
    transport,
    twin,
)
from .bench import Bench, BenchmarkFailed, Measure, Scale
from .docs import write_docs
from .figures import HEADINGS, Row, as_document

BENCHMARKS: Mapping[str, Measure] = {
    "local": local.run,
    "clients8": clients8.run,
    "twin": twin.run,
    "growth": growth.run,
    "cpu": cpu.run,
    "limits": limits.run,
    "scaling": scaling.run,
    "sequential": sequential.run,
    "together": together.run,
    "bulk": bulk.run,
    "attach": attach.run,
    "recovery": recovery.run,
    "remote": remote.run,
    "transport": transport.run,
    "links": links.run,
    "back-end": back_end.run,
    "observing": observing.run,
    "qemu": qemu_source.run,
    "store": store.run,
    "clones": clones.run,
}
HELD_TO_GOALS = ("together",)
FORMAT = 1
"""Version of the JSON document."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, also where a goal is missed (but for HELD_TO_GOALS); 1 a part failed, missed such a goal
    or read a wrong byte; 2 usage; 130 Ctrl-C.

    The rows of the parts that did not fail are printed and written in every case."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    benchmarks: dict[str, Measure] = {name: BENCHMARKS[name] for name in BENCHMARKS}
    if asked.names[:1] == ["compare"]:
        if len(asked.names) != 2:
            parser.error("compare needs one argument: the directory of the other checkout")
        benchmarks = {"compare": partial(compare.run, other=asked.names[1])}
        asked.names = ["compare"]
    names = asked.names or list(benchmarks)
    if unknown := [name for name in names if name not in benchmarks]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(benchmarks)}")
    scale = Scale(quick=asked.quick, stretch=asked.stretch, pairs=asked.pairs or (1 if asked.quick else 7))
    found = machine.facts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `with`: nothing of ours stays behind
    results: dict[str, list[Row]] = {}
    interrupted = False
    begun = time.monotonic()
    try:
        with Bench(scale) as bench:
            for name in names:
                results[name] = bench.part(name, benchmarks[name])
    except BenchmarkFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupted = True  # what is measured by now is worth having
    if asked.json != "-":
        _print_table(found, results)
    if asked.json:
        _write_json(asked.json, found, scale, results, time.monotonic() - begun)
    failed = {name for name, rows in results.items() if any(row.failed for row in rows)}
    if asked.write_docs:
        write_docs(found, {name: rows for name, rows in results.items() if name not in failed})
    missed = {name for name in HELD_TO_GOALS if any(row.verdict == "missed" for row in results.get(name, ()))}
    return 130 if interrupted else int(bool(failed | (set() if scale.quick else missed)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure postcopy against the same work in C.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", metavar="FILE", help="write every sample and the machine's facts there ('-': stdout)")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs of runs for each ratio (7)")
    parser.add_argument("--quick", action="store_true", help="only prove that it runs: the figures mean nothing")
    parser.add_argument("--stretch", action="store_true", help="also what takes long: 1,000 clients")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    return parser


def _write_json(
    target: str, found: machine.Facts, scale: Scale, results: Mapping[str, list[Row]], seconds: float
) -> None:
    document = {
        "format": FORMAT,
        "machine": found,
        "quick": scale.quick,
        "pairs": scale.pairs,
        "seconds": seconds,
        "benchmarks": {name: as_document(rows) for name, rows in results.items()},
    }
    text = json.dumps(document, indent=1)
    if target == "-":
        print(text)
        return
    with open(target, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def _print_table(found: machine.Facts, results: Mapping[str, list[Row]]) -> None:
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: enough for every column, so that lines can be cut and searched.
    console = Console(width=max(shutil.get_terminal_size().columns, 100) if os.isatty(1) else 200, highlight=False)
    table = Table(title=machine.in_words(found), title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading == "median" else "left")
    for rows in results.values():
        for row in rows:
            table.add_row(*row.cells(), style="red" if row.verdict in ("missed", "failed") else None)
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
