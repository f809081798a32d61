"""``postcopy demo``: serve a real file to many clients, kill a worker midway, check every byte."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from postcopy_protocol import counters
from postcopy_protocol.sizes import format_size

from ..errors import PostcopyError
from ..load.client_group import ClientGroup
from ..load.watch import kill_a_worker
from ..queries import Control
from ..supervisor import Supervisor
from .load import MOST_CLIENTS, touching

_BLOCK = "demo"
_TOUCHES = 4000
_PAGE = 4096


def demo(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="[default: a large file of this Python]")] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, max=MOST_CLIENTS, help="Client processes.")] = 4,
) -> None:
    """Serve a file to many clients, kill a worker midway, compare every byte they saw."""
    path = os.path.abspath(file) if file is not None else default_file()
    size = os.stat(path).st_size
    if not size:
        raise PostcopyError(f"{path} is empty: an empty file cannot be served")
    print(f"serving {path} ({format_size(size)}) to {clients} clients", file=sys.stderr)
    modes = ["private" if n < clients - clients // 2 else "shared" for n in range(clients)]
    begun = time.perf_counter()
    with (
        Supervisor({_BLOCK: path}) as supervisor,
        ClientGroup(_BLOCK, supervisor.runtime_dir, modes, _steps(size), path) as group,
        touching(2 * clients * _touches(size)) as progress,
    ):
        group.until("waiting", progress)
        # Half of the block is missing now, so the client needs a successor of its worker.
        killed = _kill_a_worker(supervisor.runtime_dir)
        group.go()
        group.until("done", progress)
        seconds = time.perf_counter() - begun
        with Control(supervisor.runtime_dir) as control:
            status = control.status()
    _show(group, status)
    _conclude(group, status, size, seconds, killed)


def default_file() -> str:
    """A large file that every machine has: this Python's library or program, or the largest file of its stdlib."""
    places = (sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"))
    names = (sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LDLIBRARY"))
    candidates = [Path(place) / name for place in places for name in names if place and name]
    candidates += [Path(os.path.realpath(sys.executable)), *Path(sysconfig.get_path("stdlib")).glob("*/*.so")]
    candidates += Path(sysconfig.get_path("stdlib")).glob("*.py")
    return str(max(candidates, key=_size_of))


def _size_of(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size if path.is_file() and os.access(path, os.R_OK) else 0
    return 0


def _touches(size: int) -> int:
    return min(_TOUCHES, -(-size // _PAGE))


def _steps(size: int) -> list[dict[str, Any]]:
    """Half of the block at random, a pause in which a worker is killed, all of it at random, all of it in order.

    The first step leaves half of the pages missing for the time after the kill."""
    half = max(1, -(-size // _PAGE) // 2)
    touch = {"do": "touch", "touches": _touches(size)}
    return [
        {**touch, "pattern": "random", "pages": [0, half]},
        {"do": "wait"},
        {**touch, "pattern": "random"},
        {"do": "compare"},
    ]


def _kill_a_worker(runtime_dir: str) -> int | None:
    """SIGKILL the worker of a client. Returns its pid; None without a worker."""
    with Control(runtime_dir) as control:
        for client in control.status()["clients"]:
            if killed := kill_a_worker(control, client):
                return killed
    return None


def _show(group: ClientGroup, status: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    by_pid = {record["pid"]: record for record in status["clients"]}
    table = Table("client", "mode", "pid", "touches", "compared", "wrong", "p50 us", "p99 us", "max us", "restarts")
    table.box = box.SIMPLE_HEAD
    for client in group.clients:
        seen = by_pid.get(client.pid, {})
        result = client.result or {
            "touches": client.touches,
            "compared": 0,
            "wrong": 0,
            "latency": [0] * counters.WORDS,
        }
        latency = counters.summary(result["latency"])
        cells = [client.index, client.mode, client.pid, result["touches"], format_size(result["compared"])]
        cells += [result["wrong"], latency["p50"], latency["p99"], latency["max"], seen.get("restarts", "-")]
        table.add_row(*(str(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _conclude(group: ClientGroup, status: dict[str, Any], size: int, seconds: float, killed: int | None) -> None:
    """Print totals and verdict. Raises PostcopyError when a byte was wrong or a client died."""
    totals, wrong = status["totals"], sum(client.result.get("wrong", 0) for client in group.clients)
    outcome = f"worker {killed} killed midway, {totals['restarts']} restarted" if killed else "no worker left to kill"
    print(
        f"{format_size(size)}, {len(group.clients)} clients, {seconds:.2f} s: {totals['faults']} faults, "
        f"{totals['placed']} pages placed, {totals['deduplicated']} deduplicated; {outcome}"
    )
    if died := group.failures():
        raise PostcopyError("; ".join(died[:3]))
    if wrong:
        raise PostcopyError(f"{wrong} bytes were wrong")
    print("every byte that every client saw equals the file's")
