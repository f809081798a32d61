"""``postcopy probe vhost-user``: check that a back-end follows the rules of post-copy, under load."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import BadInput, PostcopyError
from .attach import Order, Process
from .options import Json, Timeout

DEVICES = ("blk", "none")


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Check another program's post-copy support.", no_args_is_help=False)
    group.callback()(_probe)
    group.command("vhost-user")(probe_vhost_user)
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
    print(json.dumps(report.document()) if as_json else "\n".join(report.lines()), flush=True)
    if not report.passed:
        broken = [rule for rule, state in report.states.items() if state == "broken"]
        raise PostcopyError(
            f"the back-end at {socket} breaks a rule: {', '.join(broken) or 'the handshake did not complete'}"
        )
