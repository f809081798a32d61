"""The screen of ``postcopy top``. It asks the supervisor in a thread, once an interval, and draws what has changed."""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar, Protocol

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static

from postcopy_protocol.sizes import format_size

from ..errors import PostcopyError
from . import view
from .clients import Clients

STYLES = {view.MISSING: "grey42", view.HOT: "bold yellow", view.RECEIVED: "green", view.LOST: "bold red"}
NAME_WIDTH, FIGURES_WIDTH = 12, 16
HELP = """\
s, S     sort by the next, the previous column
r        turn the order round
/        show only clients of this name, state, block or pid
escape   show all clients again
enter    look into the client of the line
e        events: a few lines, or half of the screen
p        pause
q, ^C    leave

blocks   · nothing received, ▁ to █ more and more,
         yellow: received just now, red X: lost
fault/s  faults answered a second
page/s   pages placed by its worker a second
p50, p99 from a fault's message to its release
waits    share of the time in page faults
deaths   workers of it that were replaced
oldest   faults that wait now, age of the oldest"""
"""Fits into a terminal of 80x24 without scrolling."""


class Ask(Protocol):
    """Returns a status. Raises PostcopyError."""

    def __call__(self) -> dict[str, Any]: ...


class Tell(Protocol):
    """Returns the text of a box."""

    def __call__(self) -> Text: ...


class Top(App[None]):
    """``ask`` is called in a thread, every ``interval`` seconds."""

    CSS = """
    #head { height: 1; background: $primary; color: $text; padding: 0 1 }
    #blocks { height: auto; max-height: 30%; padding: 0 1 }
    #sources { height: auto; max-height: 20%; padding: 0 1; color: $text-muted }
    #clients { height: 1fr; scrollbar-size-vertical: 1 }
    #events { height: 5; padding: 0 1; border-top: solid $primary }
    #events.large { height: 50% }
    #filter { height: 1; border: none; display: none }
    #filter.shown { display: block }
    Box { align: center middle }
    Box > VerticalScroll { width: 90%; max-width: 110; height: auto; max-height: 90%; border: round $primary;
        background: $surface; padding: 0 1 }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort back", show=False),
        Binding("r", "turn", "Reverse"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("escape", "all", "All", show=False),
        Binding("e", "events", "Events"),
        Binding("p", "pause", "Pause"),
        Binding("question_mark,h", "help", "Help", key_display="?"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, ask: Ask, interval: float = 1.0) -> None:
        super().__init__()
        self._ask = ask
        self._interval = interval
        self._now: view.Status = {}
        self._before: view.Status | None = None
        self._key = "fault_rate"
        self._turned = self._paused = False
        self._wanted = ""
        self._shown: dict[str, Text] = {}
        self.looks = 0
        """Number of status requests so far."""

    def compose(self) -> ComposeResult:
        yield Static(id="head", markup=False)
        yield VerticalScroll(Static(id="map", markup=False), id="blocks")
        yield Static(id="sources", markup=False)
        yield Clients(id="clients")
        yield Input(placeholder="name, state, block or pid", id="filter", compact=True)
        yield Static(id="events", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.client_list.focus()
        self.query_one("#blocks").can_focus = False
        self.set_interval(self._interval, self.look)
        self.call_later(self.look)

    @property
    def client_list(self) -> Clients:
        """The list of clients."""
        return self.query_one("#clients", Clients)

    async def look(self) -> None:
        """Ask and draw, unless paused."""
        if self._paused:
            return
        try:
            found = await asyncio.to_thread(self._ask)
        except PostcopyError as error:
            self._put("#head", Text(str(error), style="bold red"))
            return
        if not self._paused:
            self.looks += 1
            self._before, self._now = (self._now or None), found
            self.draw()

    def draw(self) -> None:
        """Draw the whole screen."""
        found = view.rows(self._now, self._before)
        self._put("#head", Text(view.headline(self._now, self._before, found)))
        self._put("#map", self._blocks())
        self._put("#sources", Text("\n".join(view.sources(self._now, self._before)), no_wrap=True))
        self._put("#events", self._events())
        self.client_list.show(view.arranged(found, self._key, turned=self._turned, wanted=self._wanted))

    def _put(self, name: str, text: Text) -> None:
        """Update a widget if its text has changed, with a new layout only if its number of lines has. Layout and
        drawing are nearly all of the cost of ``top``."""
        old = self._shown.get(name)
        if old != text:
            lines = None if old is None else old.plain.count("\n")
            self._shown[name] = text
            self.query_one(name, Static).update(text, layout=lines != text.plain.count("\n"))

    def _blocks(self) -> Text:
        was = {block["name"]: block for block in (self._before or {}).get("blocks", ())}
        width = max(8, self.size.width - NAME_WIDTH - FIGURES_WIDTH - 4)
        text = Text(no_wrap=True)
        for place, block in enumerate(self._now.get("blocks", ())):
            text.append("\n" if place else "")
            text.append(f"{block['name'][: NAME_WIDTH - 1]:{NAME_WIDTH}}", style="bold")
            text.append(f"{format_size(block['size']):>7} {view.share(block):>6}  ")
            for shade, kind in view.residency(block, was.get(block["name"]), width):
                text.append(shade, style=STYLES[kind])
        return text

    def _events(self) -> Text:
        """The newest events that fit, newest first."""
        lines, room = Text(no_wrap=True), max(1, self.query_one("#events").size.height)
        for event in reversed(self._now.get("events", ())[-room:]):
            lines.append(time.strftime("%H:%M:%S ", time.localtime(event["at"])), style="grey62")
            lines.append(f"{event['kind']:10} ", style="bold")
            lines.append(event["detail"] + "\n")
        lines.rstrip()
        return lines

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients of the newest status."""
        return [*self._now.get("clients", ())]

    def action_sort(self, step: int) -> None:
        keys = view.KEYS
        self._key = keys[(keys.index(self._key) + step) % len(keys)]
        self._turned = False
        self.notify(f"sorted by {view.COLUMNS[keys.index(self._key)]}", timeout=1.5)
        self.draw()

    def action_turn(self) -> None:
        self._turned = not self._turned
        self.draw()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.add_class("shown")
        box.focus()

    def action_all(self) -> None:
        self._wanted = self.query_one("#filter", Input).value = ""
        self._close_filter()
        self.draw()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).set_class(bool(self._wanted), "shown")
        self.client_list.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._wanted = event.value
        self.draw()

    def on_input_submitted(self) -> None:
        self._close_filter()

    def action_events(self) -> None:
        self.query_one("#events").toggle_class("large")
        self.call_after_refresh(self.draw)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.notify("paused: p goes on" if self._paused else "going on", timeout=1.5)

    def action_help(self) -> None:
        self.push_screen(Box(lambda: Text(HELP)))

    def on_clients_chosen(self, event: Clients.Chosen) -> None:
        self.push_screen(Box(lambda: self._details(event.number), self._interval))

    def _details(self, number: int) -> Text:
        clients = {client["id"]: client for client in self.clients}
        found = {row.number: row for row in view.rows(self._now, self._before)}
        if number not in clients:
            return Text("this client has left")
        text = Text()
        for name, value in view.details(clients[number], found[number]):
            text.append(f"{name:14} ", style="bold")
            text.append(value + "\n")
        return text


class Box(ModalScreen[None]):
    """Some text above everything else, updated every ``interval`` seconds (0: never). Any of its keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,question_mark", "dismiss", "Close")]

    def __init__(self, tell: Tell, interval: float = 0.0) -> None:
        super().__init__()
        self._tell = tell
        self._again = interval

    def compose(self) -> ComposeResult:
        yield VerticalScroll(Static(self._tell(), id="told"))
        yield Footer()

    def on_mount(self) -> None:
        if self._again:
            self.set_interval(self._again, lambda: self.query_one("#told", Static).update(self._tell()))
