"""``postcopy trace``: read the traces of ``serve --record``."""

from __future__ import annotations

import json
import subprocess
from itertools import islice
from typing import Annotated, Any

import typer

from postcopy_kernel.programs import command, environment

from .. import traces
from ..errors import PostcopyError
from ..load.report import human
from .options import Json

File = Annotated[str, typer.Argument(metavar="FILE")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Read the traces of serve --record.", no_args_is_help=True, add_completion=False)
    for action in (show, summary, diff, replay):
        group.command()(action)
    app.add_typer(group, name="trace")


def show(
    file: File,
    client: Annotated[int | None, typer.Option("--client", help="Only faults of this client.")] = None,
    block: Annotated[str | None, typer.Option("--block", metavar="NAME", help="Only faults of this block.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="At most so many faults.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Every fault: time since the start, client, block, page, kind, duration."""
    found = traces.read(file)
    if block is not None and block not in (names := {known.name for known in found.head.blocks}):
        raise PostcopyError(f"{file} has no block {block}; it has {', '.join(sorted(names))}")
    wanted = (
        fault
        for fault in found.faults
        if (client is None or fault.client == client) and (block is None or found.name(fault.block) == block)
    )
    for fault in islice(wanted, limit):
        told = traces.as_document(found, fault)
        if as_json:
            print(json.dumps(told))
        else:
            how = "write" if fault.write else "read"
            print(
                f"{told['at']:12.6f}  client {fault.client:<4} {told['block']} page {fault.page:<8} {how:5} "
                f"{told['kind']:8} {human(told['latency_us'])}"
            )


def summary(file: File, as_json: Json = False) -> None:
    """Number of faults, their pages, order and durations."""
    told = traces.summary(traces.read(file))
    if as_json:
        print(json.dumps(told))
        return
    rate = f", {told['faults_per_s']:.0f} a second" if told["faults_per_s"] else ""
    print(f"{told['faults']} faults in {told['seconds']:.3f} s{rate}")
    for block in told["blocks"]:
        _print_block(block)


def _print_block(block: dict[str, Any]) -> None:
    latency = block["latency_us"]
    share = f" ({block['share_of_block']:.1%} of the block)" if block["share_of_block"] is not None else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in block["kinds"].items())
    print(f"block {block['block']}: {block['faults']} faults of {block['clients']} clients: {kinds}")
    print(f"  {block['pages']} different pages{share}, {block['in_order']:.0%} in order, {block['writes']} writes")
    print(f"  p50 {human(latency['p50'])}, p99 {human(latency['p99'])}, max {human(latency['max'])}")


def diff(first: File, second: Annotated[str, typer.Argument(metavar="FILE")], as_json: Json = False) -> None:
    """Compare two traces: common pages, and latencies."""
    told = traces.difference(traces.read(first), traces.read(second))
    if as_json:
        print(json.dumps(told))
        return
    for block in told["blocks"]:
        print(
            f"block {block['block']}: {block['in_both']} pages in both, {block['only'][0]} only in the first, "
            f"{block['only'][1]} only in the second: overlap {block['overlap']:.1%}"
        )
        for which, faults, latency in zip(("first", "second"), block["faults"], block["latency_us"], strict=True):
            p50, p99 = human(latency["p50"]), human(latency["p99"])
            print(f"  {which + ':':7} {faults} faults, p50 {p50}, p99 {p99}")


def replay(
    snapshot: Annotated[str, typer.Argument(metavar="STORE/NAME", help="The snapshot with the working set.")],
    without: Annotated[str, typer.Argument(metavar="FILE", help="The trace of a run without replay.")],
    after: Annotated[str | None, typer.Argument(metavar="[FILE]", help="The trace of a run with replay.")] = None,
    block: Annotated[str, typer.Option("--block", metavar="NAME", help="Which block of the traces.")] = "",
    as_json: Json = False,
) -> None:
    """What the working set of a snapshot is worth: coverage, waste, and the time that a replay saves."""
    first, second = traces.read(without), traces.read(after) if after is not None else None
    told = traces.replayed(_working_set(snapshot), first, second, block)
    if as_json:
        print(json.dumps(told))
        return
    print(f"{told['needed_pages']} pages are needed, {told['coverage']:.1%} of them are in the working set")
    print(f"  {told['set_pages']} pages are in the set, {told['waste']:.1%} of them are not needed")
    print(f"  clients waited {told['waited_s']:.3f} s, {told['waited_for_set_s']:.3f} s of it for pages of the set")
    if second is not None:
        faults, left = told["faults"]
        print(f"  with replay: {left} faults instead of {faults}, {told['waited_with_replay_s']:.3f} s waited")
        print(f"  the replay saved {told['saved_s']:.3f} s")


def _working_set(snapshot: str) -> traces.WorkingSet:
    """Ask the program that reads stores. Raises PostcopyError with its own words."""
    words = command("postcopy_sources.storage", "inspect", snapshot, "--pages", "--json")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("postcopy inspect: ")
        raise PostcopyError(reason or f"{snapshot} cannot be read ({done.returncode})")
    found = json.loads(done.stdout)
    if found["working_set"] is None:
        raise PostcopyError(f"{snapshot} has no working set: record one with serve --record-working-set")
    ranges = found["working_set"]["ranges"]
    pages = frozenset(page for first, count in ranges for page in range(first, first + count))
    return traces.WorkingSet(snapshot, found["size"], pages)
