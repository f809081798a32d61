"""``postcopy load``: many client processes touch a block at once; every touch may be checked against a file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from dataclasses import replace as replaced
from typing import Annotated, Any

import typer

from postcopy_kernel.compiled import CompiledTouch
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name, parse_source

from ..crowd import Crowd
from ..errors import BadInput, PostcopyError
from ..load import truth
from ..load.findings import findings
from ..load.patterns import PATTERNS
from ..load.replay import share
from ..load.watch import Watch
from ..queries import Control
from ..supervisor import Supervisor
from ..toucher import Touching
from .options import Json, RuntimeDir

MODES = ("private", "shared", "mixed")
MOST_CLIENTS = 4096
TOUCHES = 10_000
STOP_WITHIN = 5.0
"""Seconds that clients have after Ctrl-C to say what they have measured."""
LONGEST, FASTEST = 1e8, 1e9
"""Seconds, and a second: what is more, infinity among it, is a slip of the hand, and no sleep takes it."""
OWN_BLOCK = "load"


def add_to(app: typer.Typer) -> None:
    app.command()(load)


def load(
    clients: Annotated[int, typer.Option("--clients", min=1, max=MOST_CLIENTS, help="Client processes.")] = 4,
    pattern: Annotated[
        str, typer.Option("--pattern", metavar="|".join(PATTERNS), help="Order of the touches.")
    ] = "random",
    touches: Annotated[
        int | None, typer.Option("--touches", min=1, help=f"Touches of each client [default: {TOUCHES}].")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.001, max=LONGEST, help="Touch that long, instead or at most.")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="|".join(MODES), help="mixed: every other one.")] = "private",
    rate: Annotated[
        float,
        typer.Option(
            "--rate", min=0.0, max=FASTEST, help="Touches a second of each client, whatever they take (open loop)."
        ),
    ] = 0.0,
    think: Annotated[
        float, typer.Option("--think", min=0.0, max=LONGEST, help="Seconds between touches (closed loop).")
    ] = 0.0,
    ramp: Annotated[
        float, typer.Option("--ramp", min=0.0, max=LONGEST, help="Seconds over which the clients begin.")
    ] = 0.0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Touching threads of each client.")] = 1,
    writes: Annotated[float, typer.Option("--writes", min=0.0, max=1.0, help="Share of touches that write.")] = 0.0,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Pages from one touch to the next (stride).")] = 16,
    verify: Annotated[
        str | None,
        typer.Option("--verify", metavar="FILE|zeros|handler:M:F", help="Check every page touched."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Touch in C, compiled now (cc): no Python in the latencies.")
    ] = False,
    kill_workers: Annotated[
        float,
        typer.Option(
            "--kill-workers", min=0.0, max=LONGEST, metavar="EVERY", help="SIGKILL a worker every EVERY seconds."
        ),
    ] = 0.0,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.html|.png|.md", help="Write a report with plots.")
    ] = None,
    replay: Annotated[
        str | None, typer.Option("--replay", metavar="TRACE", help="The touches of a trace (serve --record).")
    ] = None,
    speed: Annotated[
        float,
        typer.Option(
            "--speed", min=0.0, max=FASTEST, help="So many times as fast as the trace; 0: without its pauses."
        ),
    ] = 1.0,
    block: Annotated[
        str | None, typer.Option("--block", metavar="NAME", help="[default: the first one served]")
    ] = None,
    serve: Annotated[
        str | None, typer.Option("--serve", metavar="SOURCE", help="Start a supervisor for it, end it at the end.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same touches.")] = 1,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Load test: parallel client processes touch a block, timed in the client."""
    _check_words(pattern, mode, rate, think, threads)
    if serve is not None:
        parse_source(serve)
    if replay and (rate or think or writes or pattern != "random"):
        raise BadInput("--replay has its own order, times and writes: not with --pattern, --rate, --think, --writes")
    step = Touching(
        pattern=pattern,
        touches=touches or (0 if seconds or replay else TOUCHES),
        seconds=seconds or 0.0,
        rate=rate,
        think=think,
        ramp=ramp,
        threads=threads,
        writes=writes,
        stride=stride,
        replay=os.path.abspath(replay) if replay else "",
        speed=speed,
    )
    if verify is not None:
        verify = verify if verify == truth.ZEROS or verify.startswith(truth.HANDLER) else os.path.abspath(verify)
        truth.parse(verify)
    elif writes and mode != "private":
        raise BadInput("--writes into shared memory needs --verify: what is written is what belongs there")
    modes = [("private", "shared")[n % 2] if mode == "mixed" else mode for n in range(clients)]
    write = _writer(report)
    with ExitStack() as stack:
        if compiled:
            step = replaced(step, library=stack.enter_context(_compiled()).library)
        if serve is not None:
            directory = stack.enter_context(Supervisor({OWN_BLOCK: serve})).runtime_dir
        else:
            directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
        control = stack.enter_context(Control(directory))
        name = parse_block_name(block) if block is not None else _first_block(control, directory)
        if step.replay:
            share(step.replay, name, 0)  # what is wrong with it is said once, not by every client
        size = _check_size(directory, name, verify)
        found = _run(stack.enter_context(Crowd(name, directory, modes, _steps(step), verify, seed)), control, name,
                     step, kill_workers, seed)  # fmt: skip
    pattern = "recorded" if step.replay else pattern
    found |= {"block": name, "size": size, "pattern": pattern, "mode": mode, "verified": verify is not None}
    found["asked"] = {**asdict(step), "kill_workers": kill_workers, "seed": seed, "served": serve}
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    if write is not None:  # last: a disk that is full by now must not take the figures along
        write(found)
    _judge(found)
    if found["interrupted"]:
        raise KeyboardInterrupt


def _check_words(pattern: str, mode: str, rate: float, think: float, threads: int) -> None:
    if pattern not in PATTERNS:
        raise BadInput(f"--pattern {pattern!r} is none of {', '.join(PATTERNS)}")
    if mode not in MODES:
        raise BadInput(f"--mode {mode!r} is none of {', '.join(MODES)}")
    if rate and think:
        raise BadInput("--rate and --think: an open loop has no think time, its rate says when the next touch is due")
    if pattern == "lockstep" and threads > 1:
        raise BadInput("--pattern lockstep is for one thread a client: all clients meet before each touch")


@contextmanager
def _compiled() -> Iterator[CompiledTouch]:
    """Raises PostcopyError where it cannot be compiled."""
    try:
        touch = CompiledTouch()
    except OSError as error:
        raise PostcopyError(f"--compiled: {error.strerror or error} (Debian: gcc)") from error
    with closing(touch):
        yield touch


def _writer(report: str | None) -> Callable[[dict[str, Any]], None] | None:
    """Who writes the report; found out before the test runs. Raises BadInput, PostcopyError."""
    if report is None:
        return None
    from ..load.pages import writer

    return writer(os.path.abspath(report), sys.argv[1:])


def _steps(step: Touching) -> list[dict[str, Any]]:
    return [{"do": "wait"}, {"do": "touch", **asdict(step)}]


def _run(crowd: Crowd, control: Control, name: str, step: Touching, kill_every: float, seed: int) -> dict[str, Any]:
    interrupted = False
    crowd.until("waiting")
    before = control.status()
    origin = crowd.go()
    watch = Watch(control, crowd, name, origin, kill_every, seed)
    watch.first = before
    with touching(step.touches * len(crowd.members)) as progress:
        try:
            crowd.until("done", progress, watch.look)
        except KeyboardInterrupt:
            interrupted = True
            crowd.stop(STOP_WITHIN)
    seconds = (time.monotonic_ns() - origin) / 1e9
    if not watch.trouble:
        try:
            watch.sample()
        except PostcopyError as error:
            watch.trouble = str(error)
    return {**findings(crowd, watch, seconds), "interrupted": interrupted}


def _first_block(control: Control, directory: str) -> str:
    blocks = control.status().get("blocks") or []
    if not blocks:
        raise PostcopyError(f"the supervisor in {directory} serves no block")
    return str(blocks[0]["name"])


def _check_size(directory: str, name: str, verify: str | None) -> int:
    """Attach once before the crowd does: what is wrong is then told once, by its own exception. Bytes of the block."""
    from ..client import attach

    with attach(name, directory) as block:
        wanted = truth.size_of(verify) if verify is not None else None
        if wanted is not None and wanted != block.size:
            raise PostcopyError(f"block {name} has {block.size} bytes, {verify} has {wanted}")
        return block.size


@contextmanager
def touching(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr; otherwise nothing. ``total`` 0: nobody knows how many it will be."""
    if not sys.stderr.isatty():
        yield lambda touches: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("touches", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("touches", total=total or None)
        yield lambda touches: bar.update(task, completed=touches)


# --- what people read -------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    latency = found["latency_us"]
    print(f"{found['clients']} clients, {found['pattern']}, {found['mode']}, block {found['block']}")
    print(f"{found['touches']} touches in {found['seconds']:.3f} s: {found['touches_per_s']:.0f} a second")
    print(
        f"{found['first_touches']} first touches of a page: p50 {latency['p50']} us, p99 {latency['p99']} us, "
        f"max {latency['max']} us"
    )
    fault = found["fault_us"]
    waited = f": p50 {fault['p50']} us, p99 {fault['p99']} us, max {fault['max']} us" if found["faults"] else ""
    print(f"{found['faults']} of them found the page missing{waited}")
    if "response_us" in found:
        response = found["response_us"]
        print(
            f"every touch from when it was due: p50 {response['p50']} us, p99 {response['p99']} us, "
            f"max {response['max']} us; {found['missed']} were due and not made in time"
        )
    if found["clients"] > 1:
        print(f"fairness between clients (1.0: all the same) {found['fairness']:.3f}")
    if found["kills"]:
        print(f"{len(found['kills'])} workers killed, {found['supervisor'].get('restarts', 0)} restarted")
    elif found["asked"]["kill_workers"]:
        print("no worker was killed: it was over before, or there was none any more (a complete block needs none)")
    if found["interrupted"]:
        print("interrupted: this is what was measured until then")
    if found["verified"]:
        print(f"{format_size(found['compared'])} compared, {found['wrong']} bytes wrong")


def _judge(found: dict[str, Any]) -> None:
    """Raise PostcopyError when a client died or saw a wrong byte."""
    first = next((each["first_wrong"] for each in found["each"] if each.get("first_wrong") is not None), None)
    wrong = [f"{found['wrong']} bytes were wrong, the first at offset {first}"] if found["wrong"] else []
    if trouble := [*found["died"][:3], *wrong]:
        more = f" ({len(found['died'])} clients in all)" if len(found["died"]) > 3 else ""
        raise PostcopyError("; ".join(trouble) + more)
