"""``postcopy status``: the state of the supervisor as tables or JSON, its events, and the story of a page."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from postcopy_protocol.arguments import page
from postcopy_protocol.sizes import format_size

from ..errors import AttachDenied, BadInput, NoSupervisor, PostcopyError
from ..queries import TIMEOUT, Control
from ..top.view import progress, waiting
from .options import Json, RuntimeDir
from .status_events import show_events, show_story

_POLL = 0.05


def status(
    wait: Annotated[
        float | None, typer.Option("--wait", min=0.0, help="Wait until the supervisor is ready, at most SECONDS.")
    ] = None,
    as_json: Json = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="First look for pages that the service did not place.")
    ] = False,
    events: Annotated[bool, typer.Option("--events", help="Show what happened and why, oldest first.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="With --events: continue with new events.")] = False,
    story: Annotated[
        str | None, typer.Option("--story", metavar="BLOCK+OFFSET", help="Show the history of one page.")
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show blocks, clients and totals; or events; or the history of one page."""
    if (events and story is not None) or (follow and not events):
        raise BadInput("use either --events or --story; --follow needs --events")
    place = None if story is None else page(story)
    plain = not events and place is None
    document = _wait_for(runtime_dir, wait, audit) if plain or audit or wait is not None else {}
    if events:
        show_events(runtime_dir, as_json=as_json, follow=follow)
    elif place is not None:
        show_story(runtime_dir, *place, as_json=as_json)
    elif as_json:
        print(json.dumps(document))
    else:
        _show(document)


def _wait_for(runtime_dir: str | None, wait: float | None, audit: bool) -> dict[str, Any]:
    """The status document; with ``wait``, once clients may attach. Raises NoSupervisor."""
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
        except PostcopyError as error:  # not started, or not answering yet
            if left <= 0:
                raise NoSupervisor(f"{error} (waited {wait} s)") from error
        time.sleep(min(_POLL, max(0.0, left)))


_BLOCKS = ("block", "kind", "size", "pages", "received", "lost", "waiting", "source")
_CLIENTS = (
    "client",
    "name",
    "pid",
    "worker",
    "state",
    "blocks",
    "faults",
    "placed",
    "restarts",
    "waiting",
    "p50 us",
    "p99 us",
)


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    head = f"{document.get('state')}, pid {document.get('pid')}, up {document.get('uptime_s', 0):.1f} s"
    console.print(head, highlight=False, markup=False)
    _table(console, _BLOCKS, [_block_row(block) for block in document.get("blocks", ())])
    _table(console, _CLIENTS, [_client_row(client) for client in document.get("clients", ())])
    for source in document.get("sources", ()):
        if far := progress(source):
            console.print(f"source {source.get('endpoint')}{far}", highlight=False, markup=False)
    totals = document.get("totals", {})
    shown = [f"{name} {value}" for name, value in totals.items() if isinstance(value, int) and name != "waiting"]
    shown += [f"refused {sum(totals['refused'].values())}"] if totals.get("refused") else []
    console.print(f"totals: {', '.join([*shown, f'waiting {waiting(totals)}'])}", highlight=False, markup=False)


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
    lost, source = str(block.get("lost", 0)), str(block.get("source"))
    return [str(block.get("name")), kind, size, str(pages), share, lost, waiting(block), source]


def _client_row(client: dict[str, Any]) -> list[str]:
    blocks = " ".join(f"{block.get('name')}:{block.get('mode')}" for block in client.get("blocks", ()))
    latency = client.get("latency_us", {})
    figures = [client.get(name, 0) for name in ("faults", "placed", "restarts")]
    texts = [client.get(name, "-") for name in ("id", "name", "pid", "worker_pid", "state")]
    return [
        str(cell)
        for cell in (*texts, blocks, *figures, waiting(client), latency.get("p50", "-"), latency.get("p99", "-"))
    ]
