"""``postcopy load``: many client processes touch a block at once; every touch may be checked against a file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from postcopy_protocol import statistics
from postcopy_protocol.places import runtime_directory
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..crowd import Crowd, Member
from ..errors import BadInput, PostcopyError
from .options import Json, RuntimeDir

PATTERNS = ("random", "sequential", "zipf", "lockstep")
MODES = ("private", "shared", "mixed")
MOST_CLIENTS = 4096


def add_to(app: typer.Typer) -> None:
    app.command()(load)


def load(
    clients: Annotated[int, typer.Option("--clients", min=1, max=MOST_CLIENTS, help="Client processes.")] = 4,
    pattern: Annotated[
        str, typer.Option("--pattern", metavar="|".join(PATTERNS), help="Order of the touches.")
    ] = "random",
    touches: Annotated[int, typer.Option("--touches", min=1, help="Touches of each client.")] = 10_000,
    mode: Annotated[str, typer.Option("--mode", metavar="|".join(MODES), help="mixed: every other one.")] = "private",
    verify: Annotated[str | None, typer.Option("--verify", metavar="FILE", help="Check every page touched.")] = None,
    block: Annotated[
        str | None, typer.Option("--block", metavar="NAME", help="[default: the first one served]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same touches.")] = 1,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Load test: parallel client processes touch a block, timed in the client."""
    if pattern not in PATTERNS:
        raise BadInput(f"--pattern {pattern!r} is none of {', '.join(PATTERNS)}")
    if mode not in MODES:
        raise BadInput(f"--mode {mode!r} is none of {', '.join(MODES)}")
    if verify is not None:
        os.close(os.open(verify, os.O_RDONLY))
    directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
    name = parse_block_name(block) if block is not None else _first_block(directory)
    _check_size(directory, name, verify)
    modes = [("private", "shared")[n % 2] if mode == "mixed" else mode for n in range(clients)]
    steps: list[dict[str, Any]] = [{"do": "wait"}, {"do": "touch", "pattern": pattern, "touches": touches}]
    with Crowd(name, directory, modes, steps, verify, seed) as crowd:
        crowd.until("waiting")
        begun = time.perf_counter()
        crowd.go()
        with touching(touches * clients) as progress:
            crowd.until("done", progress)
        report = _report(crowd, time.perf_counter() - begun)
    report |= {"block": name, "pattern": pattern, "mode": mode, "verified": verify is not None}
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    _judge(report)


def _first_block(directory: str) -> str:
    from ..control import Control

    with Control(directory) as control:
        blocks = control.status().get("blocks") or []
    if not blocks:
        raise PostcopyError(f"the supervisor in {directory} serves no block")
    return str(blocks[0]["name"])


def _check_size(directory: str, name: str, file: str | None) -> None:
    """Attach once before the crowd does: what is wrong is then told once, by its own exception."""
    from ..client import attach

    with attach(name, directory) as block:
        if file is not None and os.stat(file).st_size != block.size:
            raise PostcopyError(f"block {name} has {block.size} bytes, {file} has {os.stat(file).st_size}")


@contextmanager
def touching(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr; otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda touches: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    with Progress("touches", BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("touches", total=total)
        yield lambda touches: bar.update(task, completed=touches)


def _report(crowd: Crowd, seconds: float) -> dict[str, Any]:
    done = [member.result for member in crowd.members if member.result]
    words = statistics.merge(result["words"] for result in done)
    touches = sum(member.touches for member in crowd.members)
    return {
        "clients": len(crowd.members),
        "touches": touches,
        "first_touches": words[statistics.FAULTS],
        "seconds": round(seconds, 6),
        "touches_per_s": round(touches / seconds, 1),
        "compared": sum(result["compared"] for result in done),
        "wrong": sum(result["wrong"] for result in done),
        "died": crowd.failures(),
        "latency_us": statistics.summary(words),
        "each": [_each(member) for member in crowd.members],
    }


def _each(member: Member) -> dict[str, Any]:
    result = {key: value for key, value in member.result.items() if key != "words"}
    if member.result:
        result["latency_us"] = statistics.summary(member.result["words"])
    figures = {"pid": member.process.pid, "mode": member.mode, "state": member.state, "touches": member.touches}
    return {**figures, **result}


def _show(report: dict[str, Any]) -> None:
    latency = report["latency_us"]
    print(f"{report['clients']} clients, {report['pattern']}, {report['mode']}, block {report['block']}")
    print(f"{report['touches']} touches in {report['seconds']:.3f} s: {report['touches_per_s']:.0f} a second")
    print(
        f"{report['first_touches']} first touches of a page: p50 {latency['p50']} us, p99 {latency['p99']} us, "
        f"max {latency['max']} us"
    )
    if report["verified"]:
        print(f"{format_size(report['compared'])} compared, {report['wrong']} bytes wrong")


def _judge(report: dict[str, Any]) -> None:
    """Raise PostcopyError when a client died or saw a wrong byte."""
    first = next((each["first_wrong"] for each in report["each"] if each.get("first_wrong") is not None), None)
    wrong = [f"{report['wrong']} bytes were wrong, the first at offset {first}"] if report["wrong"] else []
    if trouble := [*report["died"][:3], *wrong]:
        more = f" ({len(report['died'])} clients in all)" if len(report["died"]) > 3 else ""
        raise PostcopyError("; ".join(trouble) + more)
