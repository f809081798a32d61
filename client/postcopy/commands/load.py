"""``postcopy load``: many client processes touch a block at once; every touch may be checked against a file."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from postcopy_kernel.compiled import CompiledTouch
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name, parse_source

from ..errors import BadInput, PostcopyError
from ..load import expected
from ..load.client_group import ClientGroup, Progress, no_progress
from ..load.patterns import PATTERNS
from ..load.replay import share
from ..load.results import results_of
from ..load.toucher import Touching
from ..load.watch import Watch
from ..queries import Control
from ..supervisor import Supervisor
from .options import Json, RuntimeDir

MODES = ("private", "shared", "mixed")
MOST_CLIENTS = 4096
TOUCHES = 10_000
STOP_WITHIN = 5.0
"""Seconds for clients to report their results after Ctrl-C."""
LONGEST, FASTEST = 1e8, 1e9
"""Limits of seconds and of rates. Larger values, such as infinity, are typing errors, and no sleep accepts them."""
OWN_BLOCK = "load"

Clients = Annotated[int, typer.Option("--clients", min=1, max=MOST_CLIENTS, help="Number of client processes.")]
Pattern = Annotated[str, typer.Option("--pattern", metavar="|".join(PATTERNS), help="Order of the touches.")]
Touches = Annotated[int | None, typer.Option("--touches", min=1, help=f"Touches of each client [default: {TOUCHES}].")]
Seconds = Annotated[
    float | None, typer.Option("--seconds", min=0.001, max=LONGEST, help="Time limit, instead of --touches or with it.")
]
ModeOption = Annotated[str, typer.Option("--mode", metavar="|".join(MODES), help="mixed: alternating.")]
Rate = Annotated[
    float,
    typer.Option("--rate", min=0.0, max=FASTEST, help="Touches a second of each client, however long each takes."),
]
Think = Annotated[float, typer.Option("--think", min=0.0, max=LONGEST, help="Pause in seconds after each touch.")]
Ramp = Annotated[float, typer.Option("--ramp", min=0.0, max=LONGEST, help="Spread the starts over so many seconds.")]
Threads = Annotated[int, typer.Option("--threads", min=1, max=256, help="Threads of each client.")]
Writes = Annotated[float, typer.Option("--writes", min=0.0, max=1.0, help="Share of touches that write.")]
Stride = Annotated[int, typer.Option("--stride", min=1, help="Pages from one touch to the next, for --pattern stride.")]
Together = Annotated[
    bool, typer.Option("--together", help="For --pattern sequential: all begin at the first page, not apart.")
]
Verify = Annotated[
    str | None, typer.Option("--verify", metavar="FILE|zeros|handler:M:F", help="Check every page that is touched.")
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Touch in C, compiled now (cc): no Python in the latencies.")
]
KillWorkers = Annotated[
    float,
    typer.Option("--kill-workers", min=0.0, max=LONGEST, metavar="EVERY", help="SIGKILL a worker every EVERY seconds."),
]
Report = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html|.png|.md", help="Write a report (plots of x.md are in x-plots.png)."),
]
Replay = Annotated[
    str | None, typer.Option("--replay", metavar="TRACE", help="Repeat the touches of a trace (serve --record).")
]
Speed = Annotated[
    float, typer.Option("--speed", min=0.0, max=FASTEST, help="Speed of the replay; 0: without the trace's pauses.")
]
BlockName = Annotated[str | None, typer.Option("--block", metavar="NAME", help="Name of the block [default: first].")]
Serve = Annotated[
    str | None, typer.Option("--serve", metavar="SOURCE", help="Start a supervisor for SOURCE, end it afterwards.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same touches [default: a new random seed].")]


def load(
    clients: Clients = 4,
    pattern: Pattern = "random",
    touches: Touches = None,
    seconds: Seconds = None,
    mode: ModeOption = "private",
    rate: Rate = 0.0,
    think: Think = 0.0,
    ramp: Ramp = 0.0,
    threads: Threads = 1,
    writes: Writes = 0.0,
    stride: Stride = 16,
    together: Together = False,
    verify: Verify = None,
    compiled: Compiled = False,
    kill_workers: KillWorkers = 0.0,
    report: Report = None,
    replay: Replay = None,
    speed: Speed = 1.0,
    block: BlockName = None,
    serve: Serve = None,
    seed: Seed = None,
    as_json: Json = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Load test: parallel client processes touch a block, timed in the client."""
    touches = touches or (0 if seconds or replay else TOUCHES)
    step = Touching(pattern, touches, None, seconds or 0.0, rate, think, ramp, threads, writes, stride,
                    os.path.abspath(replay) if replay else "", speed, together=together)  # fmt: skip
    _check_options(step, mode)
    if serve is not None:
        parse_source(serve)
    verify = _check_contents(verify, writes, mode)
    modes = [("private", "shared")[n % 2] if mode == "mixed" else mode for n in range(clients)]
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    writer = _writer(report)
    with ExitStack() as stack:
        if compiled:
            step = replace(step, library=stack.enter_context(_compiled()).library)
        if serve is not None:
            directory = stack.enter_context(Supervisor({OWN_BLOCK: serve})).runtime_dir
        else:
            directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
        control = stack.enter_context(Control(directory))
        name = parse_block_name(block) if block is not None else _first_block(control, directory)
        if step.replay:
            share(step.replay, name, 0)  # so that an error in the trace is reported once, not by every client
        size = _check_size(directory, name, verify)
        group = stack.enter_context(ClientGroup(name, directory, modes, _steps(step), verify, seed))
        results = _run(group, control, name, step, kill_workers, seed)
    results |= {"block": name, "size": size, "mode": mode, "verified": verify is not None}
    results["pattern"] = "recorded" if step.replay else pattern
    results["asked"] = {**asdict(step), "kill_workers": kill_workers, "seed": seed, "served": serve}
    print(json.dumps(results)) if as_json else _show(results)
    if writer is not None:  # last, because a full disk must not lose the figures
        writer.write(results)
    _judge(results)
    if results["interrupted"]:
        raise KeyboardInterrupt


def _check_options(step: Touching, mode: str) -> None:
    if step.pattern not in PATTERNS:
        raise BadInput(f"--pattern {step.pattern!r} is none of {', '.join(PATTERNS)}")
    if mode not in MODES:
        raise BadInput(f"--mode {mode!r} is none of {', '.join(MODES)}")
    if step.rate and step.think:
        raise BadInput("--rate and --think exclude each other: the rate already decides when each touch is due")
    if step.together and (step.pattern != "sequential" or step.replay):
        raise BadInput("--together is for --pattern sequential: all clients begin at the first page")
    if step.pattern == "lockstep" and step.threads > 1:
        raise BadInput("--pattern lockstep needs --threads 1: all clients meet before each touch")
    if step.replay and (step.rate or step.think or step.writes or step.pattern != "random"):
        raise BadInput("--replay has its own order, times and writes: not with --pattern, --rate, --think, --writes")


def _check_contents(verify: str | None, writes: float, mode: str) -> str | None:
    """``--verify`` with an absolute path. Raises BadInput, OSError."""
    if verify is None:
        if writes and mode != "private":
            raise BadInput("--writes into shared memory needs --verify: only the expected bytes may be written")
        return None
    verify = verify if verify == expected.ZEROS or verify.startswith(expected.HANDLER) else os.path.abspath(verify)
    expected.parse(verify)
    return verify


@contextmanager
def _compiled() -> Iterator[CompiledTouch]:
    """Raises PostcopyError when it cannot be compiled."""
    try:
        touch = CompiledTouch()
    except OSError as error:
        raise PostcopyError(f"--compiled: {error.strerror or error} (Debian: gcc)") from error
    with closing(touch):
        yield touch


def _writer(report: str | None) -> Any:
    """The report's writer, checked before the test runs. Raises BadInput, PostcopyError."""
    if report is None:
        return None
    from ..load.report import ReportWriter

    return ReportWriter(os.path.abspath(report), sys.argv[1:])


def _steps(step: Touching) -> list[dict[str, Any]]:
    return [{"do": "wait"}, {"do": "touch", **asdict(step)}]


def _run(
    group: ClientGroup, control: Control, name: str, step: Touching, kill_every: float, seed: int
) -> dict[str, Any]:
    interrupted = False
    group.until("waiting")
    before = control.status()
    with touching(step.touches * len(group.clients)) as progress:
        origin = group.go()
        watch = Watch(control, group, name, origin, kill_every, seed)
        watch.first = before
        try:
            group.until("done", progress, watch.step)
        except KeyboardInterrupt:
            interrupted = True
            group.stop(STOP_WITHIN)
    seconds = (time.monotonic_ns() - origin) / 1e9
    if not watch.trouble:
        try:
            watch.sample()
        except PostcopyError as error:
            watch.trouble = str(error)
    return {**results_of(group, watch, seconds), "interrupted": interrupted}


def _first_block(control: Control, directory: str) -> str:
    blocks = control.status().get("blocks") or []
    if not blocks:
        raise PostcopyError(f"the supervisor in {directory} serves no block")
    return str(blocks[0]["name"])


def _check_size(directory: str, name: str, verify: str | None) -> int:
    """Bytes of the block. Attaching it here reports an error once, and not from every client."""
    from ..client import attach

    with attach(name, directory) as block:
        wanted = expected.size_of(verify) if verify is not None else None
        if wanted is not None and wanted != block.size:
            raise PostcopyError(f"block {name} has {block.size} bytes, {verify} has {wanted}")
        return block.size


@contextmanager
def touching(total: int) -> Iterator[Progress]:
    """A progress bar on a terminal's stderr; otherwise nothing. ``total`` 0: the number of touches is unknown."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = ("touches", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("touches", total=total or None)

        def show(touches: int) -> None:
            bar.update(task, completed=touches)

        yield show


def _latencies(figures: dict[str, float]) -> str:
    return f"p50 {figures['p50']} us, p99 {figures['p99']} us, max {figures['max']} us"


def _show(results: dict[str, Any]) -> None:
    asked = results["asked"]
    print(f"{results['clients']} clients, {results['pattern']}, {results['mode']}, block {results['block']}, "
          f"seed {asked['seed']}")  # fmt: skip
    print(f"{results['touches']} touches in {results['seconds']:.3f} s: {results['touches_per_s']:.0f} a second")
    print(f"{results['first_touches']} first touches of a page: {_latencies(results['latency_us'])}")
    waited = f": {_latencies(results['fault_us'])}" if results["faults"] else ""
    print(f"{results['faults']} of them found the page missing{waited}")
    print(_present(results))
    if "response_us" in results:
        print(f"every touch from when it was due: {_latencies(results['response_us'])}; "
              f"{results['missed']} were due and not made in time")  # fmt: skip
    if results["clients"] > 1:
        print(f"fairness between clients (1.0: equal shares) {results['fairness']:.3f}")
    if results["kills"]:
        print(f"{len(results['kills'])} workers killed, {results['supervisor'].get('restarts', 0)} restarted")
    elif asked["kill_workers"]:
        print("no worker was killed: the test was too short, or no worker was left (a complete block needs none)")
    if results["interrupted"]:
        print("interrupted: these are the results until then")
    if results["verified"]:
        print(f"{format_size(results['compared'])} compared, {results['wrong']} bytes wrong")


def _present(results: dict[str, Any]) -> str:
    """How much of the test measured memory that was already there, and not the service."""
    text = f"{results['present']} of {results['touches']} touches were of pages already present"
    if results["touches"] and not results["faults"]:
        text += ": no page fault was measured; start a new supervisor, or use --serve SOURCE"
    return text


def _judge(results: dict[str, Any]) -> None:
    """Raise PostcopyError when a client died or saw a wrong byte."""
    first = next((each["first_wrong"] for each in results["each"] if each.get("first_wrong") is not None), None)
    wrong = [f"{results['wrong']} bytes were wrong, the first at offset {first}"] if results["wrong"] else []
    if failures := [*results["died"][:3], *wrong]:
        more = f" ({len(results['died'])} clients in all)" if len(results["died"]) > 3 else ""
        raise PostcopyError("; ".join(failures) + more)
