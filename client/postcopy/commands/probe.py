"""``postcopy probe``: check that another program follows the rules of post-copy, under load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from postcopy_protocol.geometry import PAGE_2M, PAGE_4K

from ..errors import BadInput, PostcopyError
from .attach import Order, Process
from .options import Json, Timeout

if TYPE_CHECKING:
    from ..verdicts import Verdicts

DEVICES = ("blk", "none")
PAGE_SIZE_OF = {"4K": PAGE_4K, "2M": PAGE_2M}


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Check another program's post-copy support.", no_args_is_help=False)
    group.callback()(_probe)
    group.command("vhost-user")(probe_vhost_user)
    group.command("firecracker")(probe_firecracker)
    app.add_typer(group, name="probe")


def _probe() -> None:
    """Check another program's post-copy support: rules and load."""


def probe_vhost_user(
    socket: Annotated[str, typer.Argument(metavar="SOCKET", help="Where the back-end listens.")],
    device: Annotated[str, typer.Option("--device", metavar="blk|none", help="none: only the handshake.")] = "blk",
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="FILE", help="The disk's contents; reads are compared with it.")
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", min=1, max=1_000_000, help="Number of requests, at most.")
    ] = 1000,
    rate: Annotated[float, typer.Option("--rate", min=0.0, help="Requests a second [default: no limit].")] = 0.0,
    duration: Annotated[float, typer.Option("--duration", min=0.0, help="Stop after SECONDS.")] = 0.0,
    queues: Annotated[int, typer.Option("--queues", min=0, max=16, help="Number of queues [default: all].")] = 0,
    depth: Annotated[int, typer.Option("--depth", min=1, max=64, help="Requests in flight in each queue.")] = 16,
    writes: Annotated[bool, typer.Option("--writes", help="Overwrite the upper half of the disk.")] = False,
    kill_workers: Annotated[int, typer.Option("--kill-workers", min=0, help="Kill the fault handler N times.")] = 0,
    delays: Annotated[int, typer.Option("--delays", min=0, help="Stop the fault handler N times for a while.")] = 0,
    delay: Annotated[float, typer.Option("--delay", min=0.0, max=2.0, help="Seconds of each delay.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same requests.")] = 1,
    pid: Process = None,
    order: Order = "standard",
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Check a vhost-user back-end: every rule of post-copy, real requests on missing pages, trouble on the way.

    Starts a supervisor of its own. Exit status 0: every rule is held (quirks are named); 1: one is broken."""
    from ..vhost_user.probe.run import Settings, probe

    if device not in DEVICES:
        raise BadInput(f"--device {device!r} is none of {', '.join(DEVICES)}")
    if order not in ("standard", "rust-vmm"):
        raise BadInput(f"--order {order!r} is neither standard nor rust-vmm")
    if kill_workers + delays >= requests:
        raise BadInput(f"--requests {requests} are too few for {kill_workers} kills and {delays} delays")
    settings = Settings(
        socket=socket,
        device=device,
        disk=disk,
        requests=requests,
        queues=queues,
        depth=depth,
        rate=rate,
        duration=duration,
        writes=writes,
        kills=kill_workers,
        delays=delays,
        delay=delay,
        seed=seed,
        timeout=timeout,
        pid=pid,
        order=order,
    )
    report = probe(settings)
    _conclude(report, f"the back-end at {socket}", as_json)


def probe_firecracker(
    words: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="Starts the handler; {socket} and {memory} are replaced by paths."),
    ],
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="FILE", help="What it serves [default: a file that is made].")
    ] = None,
    pages: Annotated[int, typer.Option("--pages", min=16, help="Pages of the file that is made.")] = 2048,
    page_size: Annotated[str, typer.Option("--page-size", metavar="4K|2M", help="Of the machines' memory.")] = "4K",
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="Kill the handler N times; 0: never.")] = 1,
    delays: Annotated[int, typer.Option("--delays", min=0, help="Stop the handler N times for a while.")] = 1,
    delay: Annotated[float, typer.Option("--delay", min=0.0, max=10.0, help="Seconds of each delay.")] = 0.5,
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="It serves one machine: start it once more for each.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="RULE", help="Try only this (repeat).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same order of reads.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that a machine may wait.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Check a page-fault handler of Firecracker by simulated machines: content, removals, races, restarts, lies.

    Exit status 0: every rule that applies is held; 1: one is broken."""
    from ..firecracker.probe import STEPS, Settings, probe

    if page_size not in PAGE_SIZE_OF:
        raise BadInput(f"--page-size {page_size!r} is neither 4K nor 2M")
    if not any("{socket}" in word for word in words):
        raise BadInput("COMMAND has no {socket}: it would not know where to listen")
    if unknown := set(only or ()) - set(STEPS):
        raise BadInput(f"--only {sorted(unknown)[0]} is none of {', '.join(STEPS)}")
    settings = Settings(
        command=tuple(words),
        memory=memory,
        pages=pages,
        page_size=PAGE_SIZE_OF[page_size],
        restarts=restarts,
        delays=delays,
        delay=delay,
        one_shot=one_shot,
        only=frozenset(only or ()),
        seed=seed,
        timeout=timeout,
    )
    _conclude(probe(settings), f"the handler {words[0]}", as_json)


def _conclude(report: Verdicts, subject: str, as_json: bool) -> None:
    """Print the report. Raises PostcopyError, which is exit status 1, unless it is passed."""
    print(json.dumps(report.document()) if as_json else "\n".join(report.lines()), flush=True)
    if not report.passed:
        raise PostcopyError(f"{subject} breaks a rule: {', '.join(report.broken) or 'the handshake did not complete'}")
