"""Commands that ask the supervisor: status, stop, export."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Annotated, Any

import typer

from postcopy_protocol.messages import ExportProgress
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..errors import AttachDenied, BadInput, NoSupervisor, PostcopyError
from ..queries import TIMEOUT, Control
from .explaining import show_events, show_story
from .options import Json, RuntimeDir, page_place

_POLL = 0.05
_ASK_EVERY = 0.2


def add_to(app: typer.Typer) -> None:
    for command in (status, resume, stop, export):
        app.command()(command)


def status(
    wait: Annotated[
        float | None, typer.Option("--wait", min=0.0, help="Wait until it is ready, SECONDS at most.")
    ] = None,
    as_json: Json = False,
    audit: Annotated[bool, typer.Option("--audit", help="Look for pages that nobody of ours placed, first.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Show what happened, and why, oldest first.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="With --events: go on as they happen.")] = False,
    story: Annotated[
        str | None, typer.Option("--story", metavar="BLOCK+OFFSET", help="Show what is known of one page's life.")
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show what the supervisor sees: blocks, clients, totals; or events, or the story of a page."""
    if (events and story is not None) or (follow and not events):
        raise BadInput("--events and --story go one at a time, and --follow goes with --events")
    page = None if story is None else page_place(story)
    plain = not events and page is None
    document = _wait_for(runtime_dir, wait, audit) if plain or audit or wait is not None else {}
    if events:
        show_events(runtime_dir, as_json=as_json, follow=follow)
    elif page is not None:
        show_story(runtime_dir, *page, as_json=as_json)
    elif as_json:
        print(json.dumps(document))
    else:
        _show(document)


def _wait_for(runtime_dir: str | None, wait: float | None, audit: bool) -> dict[str, Any]:
    """The status; with ``wait``, once clients may attach. Raises NoSupervisor."""
    if wait is None:
        with Control(runtime_dir) as control:
            return control.status(audit=audit)
    limit = time.monotonic() + wait
    while True:
        left = limit - time.monotonic()
        try:
            with Control(runtime_dir, timeout=min(TIMEOUT, max(left, _POLL))) as control:
                document = control.status(audit=audit)
            if document.get("state") != "starting":
                return document
            raise NoSupervisor(f"the supervisor in {control.directory} is still starting")
        except AttachDenied:
            raise
        except PostcopyError as error:  # nobody there, or not answering yet
            if left <= 0:
                raise NoSupervisor(f"{error} (waited {wait} s)") from error
        time.sleep(min(_POLL, max(0.0, left)))


def stop(
    keep_workers: Annotated[
        bool, typer.Option("--keep-workers", help="Leave clients and workers to a successor (serve --recover).")
    ] = False,
    runtime_dir: RuntimeDir = None,
) -> None:
    """End the supervisor and wait until it has ended."""
    with Control(runtime_dir) as control:
        pid = control.stop(keep_workers=keep_workers)
        print(f"the supervisor in {control.directory} (pid {pid}) has ended")
        if keep_workers:
            print("its clients and their workers go on; take them over: postcopy serve ... --recover")


def resume(
    client: Annotated[int, typer.Argument(metavar="CLIENT", min=0, max=2**63 - 1, help="Its number in status.")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """End the quarantine of a client: a fresh worker, its crashes forgiven, what it was denied brought again."""
    with Control(runtime_dir) as control:
        healing = control.resume(client)
        print(f"client {client} goes on" + (f"; {healing} pages that it was denied are brought" if healing else ""))


def export(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    file: Annotated[str, typer.Argument(metavar="FILE")],
    runtime_dir: RuntimeDir = None,
) -> None:
    """Let the supervisor write a whole block to FILE."""
    parse_block_name(name)
    with Control(runtime_dir) as control:
        state = control.export(name, file)
        try:
            state = _follow(control, state)
        except KeyboardInterrupt:
            control.progress(state.job, cancel=True)
            raise
        if state.state != "done":
            raise PostcopyError(
                f"export of {name} to {os.path.abspath(file)} {state.state}: {state.detail or 'no reason'}"
            )
        print(f"{name}: {format_size(state.written)} written to {file}")


def _follow(control: Control, state: ExportProgress) -> ExportProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        bar = progress.add_task("export", total=state.size)
        while state.state == "running":
            time.sleep(_ASK_EVERY)
            state = control.progress(state.job)
            progress.update(bar, completed=state.written)
    return state


# --- the status for people --------------------------------------------------------------------------------------------

_BLOCKS = ("block", "kind", "size", "pages", "received", "lost", "source")
_CLIENTS = ("client", "name", "pid", "worker", "state", "blocks", "faults", "placed", "restarts", "p50 us", "p99 us")


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    head = f"{document.get('state')}, pid {document.get('pid')}, up {document.get('uptime_s', 0):.1f} s"
    console.print(head, highlight=False, markup=False)
    _table(console, _BLOCKS, [_block_row(block) for block in document.get("blocks", ())])
    _table(console, _CLIENTS, [_client_row(client) for client in document.get("clients", ())])
    totals = ", ".join(
        f"{name} {value}" for name, value in document.get("totals", {}).items() if isinstance(value, int)
    )
    console.print(f"totals: {totals}", highlight=False, markup=False)


def _table(console: Any, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _block_row(block: dict[str, Any]) -> list[str]:
    pages = block.get("pages", 0)
    share = f"{block.get('received', 0) / pages:.1%}" if pages else "-"
    kind, size = str(block.get("kind")), format_size(block.get("size", 0))
    return [str(block.get("name")), kind, size, str(pages), share, str(block.get("lost", 0)), str(block.get("source"))]


def _client_row(client: dict[str, Any]) -> list[str]:
    blocks = " ".join(f"{block.get('name')}:{block.get('mode')}" for block in client.get("blocks", ()))
    latency = client.get("latency_us", {})
    figures = [client.get(name, 0) for name in ("faults", "placed", "restarts")]
    words = [client.get(name, "-") for name in ("id", "name", "pid", "worker_pid", "state")]
    return [str(cell) for cell in (*words, blocks, *figures, latency.get("p50", "-"), latency.get("p99", "-"))]
