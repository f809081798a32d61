"""``postcopy demo``: the main job from end to end on a real file, with a worker killed in the middle of it."""

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

from ..crowd import Crowd
from ..errors import PostcopyError
from ..load.watch import kill_a_worker
from ..queries import Control
from ..supervisor import Supervisor
from .load import MOST_CLIENTS, touching

_BLOCK = "demo"
_TOUCHES = 4000
_PAGE = 4096


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="[default: a large file of this Python]")] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, max=MOST_CLIENTS, help="Client processes.")] = 4,
) -> None:
    """Serve a file to many clients, kill a worker midway, compare every byte they saw."""
    path = os.path.abspath(file) if file is not None else default_file()
    size = os.stat(path).st_size
    if not size:
        raise PostcopyError(f"{path} is empty: there is nothing to serve")
    print(f"serving {path} ({format_size(size)}) to {clients} clients", file=sys.stderr)
    modes = ["private" if n < clients - clients // 2 else "shared" for n in range(clients)]
    begun = time.perf_counter()
    with (
        Supervisor({_BLOCK: path}) as supervisor,
        Crowd(_BLOCK, supervisor.runtime_dir, modes, _steps(size), path) as crowd,
        touching(2 * clients * _touches(size)) as progress,
    ):
        crowd.until("waiting", progress)
        # Before they go on: half of the block is missing, so the client cannot be done without a successor.
        killed = _kill_a_worker(supervisor.runtime_dir)
        crowd.go()
        crowd.until("done", progress)
        seconds = time.perf_counter() - begun
        with Control(supervisor.runtime_dir) as control:
            status = control.status()
    _show(crowd, status)
    _conclude(crowd, status, size, seconds, killed)


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
    """Half of the block at random, a pause in which a worker is shot, then all of it at random, and all of it in order.
    Touching only half of it first leaves pages that are missing when the worker dies."""
    half = max(1, -(-size // _PAGE) // 2)
    touch = {"do": "touch", "touches": _touches(size)}
    return [
        {**touch, "pattern": "random", "pages": [0, half]},
        {"do": "wait"},
        {**touch, "pattern": "random"},
        {"do": "compare"},
    ]


def _kill_a_worker(runtime_dir: str) -> int | None:
    """SIGKILL the worker of a client; its pid, or None when there is none (any more)."""
    with Control(runtime_dir) as control:
        for client in control.status()["clients"]:
            if killed := kill_a_worker(control, client):
                return killed
    return None


def _show(crowd: Crowd, status: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    by_pid = {client["pid"]: client for client in status["clients"]}
    table = Table("client", "mode", "pid", "touches", "compared", "wrong", "p50 us", "p99 us", "max us", "restarts")
    table.box = box.SIMPLE_HEAD
    for member in crowd.members:
        seen = by_pid.get(member.process.pid, {})
        result = member.result or {
            "touches": member.touches,
            "compared": 0,
            "wrong": 0,
            "words": [0] * counters.WORDS,
        }
        latency = counters.summary(result["words"])
        cells = [member.index, member.mode, member.process.pid, result["touches"], format_size(result["compared"])]
        cells += [result["wrong"], latency["p50"], latency["p99"], latency["max"], seen.get("restarts", "-")]
        table.add_row(*(str(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _conclude(crowd: Crowd, status: dict[str, Any], size: int, seconds: float, killed: int | None) -> None:
    """The totals, and the verdict. Raises PostcopyError when a byte was wrong or a client died."""
    totals, wrong = status["totals"], sum(member.result.get("wrong", 0) for member in crowd.members)
    shot = f"worker {killed} killed midway, {totals['restarts']} restarted" if killed else "no worker left to kill"
    print(
        f"{format_size(size)}, {len(crowd.members)} clients, {seconds:.2f} s: {totals['faults']} faults, "
        f"{totals['placed']} pages placed, {totals['deduplicated']} deduplicated; {shot}"
    )
    if died := crowd.failures():
        raise PostcopyError("; ".join(died[:3]))
    if wrong:
        raise PostcopyError(f"{wrong} bytes were wrong")
    print("every byte that every client saw is the file's")
