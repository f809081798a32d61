"""The list of clients: a widget that draws only the visible lines, for any number of clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from . import view

WIDE = (4, 15, 8, 11, 16, 8, 8, 7, 7, 6, 6, 8)
NARROW = (4, 9, 7, 11, 9, 7, 0, 0, 6, 5, 6, 6)
"""Widths of the columns, for 80 characters (one of them a scroll bar's) and up to those that WIDE takes; 0: not
shown."""
LEFT = frozenset({"client", "state", "blocks"})
HEAD, PLAIN, CHOSEN = Style(bold=True, underline=True), Style(), Style(reverse=True)
STATES = {name: Style(color=colour) for name, colour in
          (("running", "green"), ("paused", "yellow"), ("restarting", "yellow"), ("quarantined", "red"))}  # fmt: skip


class Clients(ScrollView, can_focus=True):
    """Rows with a cursor, which stays on its client when the order changes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "move(-1000000)", show=False),
        Binding("end", "move(1000000)", show=False),
        Binding("enter", "choose", "Look into"),
    ]

    class Chosen(Message):
        """The details of this client are wanted."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.rows: list[view.Row] = []
        self._cursor = 0

    @property
    def _widths(self) -> Sequence[int]:
        return WIDE if self.size.width > sum(WIDE) + len(WIDE) else NARROW

    @property
    def chosen(self) -> int | None:
        """Number of the client under the cursor."""
        return self.rows[self._cursor].number if self.rows else None

    def show(self, rows: Sequence[view.Row]) -> None:
        """Show these rows."""
        chosen = self.chosen
        grown = len(rows) != len(self.rows)
        self.rows = list(rows)
        place = next((at for at, row in enumerate(self.rows) if row.number == chosen), self._cursor)
        self._cursor = max(0, min(place, len(self.rows) - 1))
        if grown:
            self._measure()
        self.refresh()

    def on_resize(self) -> None:
        self._measure()

    def _measure(self) -> None:
        self.virtual_size = Size(len(_line(view.COLUMNS, self._widths)), len(self.rows) + 1)

    def render_line(self, y: int) -> Strip:
        """The head is fixed; the lines below it scroll."""
        left, top = self.scroll_offset
        width = self.size.width
        at = y - 1 + top
        if y == 0:
            segments = [Segment(_line(view.COLUMNS, self._widths), HEAD)]
        elif at < len(self.rows):
            style = CHOSEN if at == self._cursor and self.has_focus else PLAIN
            segments = _segments(self.rows[at], self._widths, style)
        else:
            return Strip.blank(width, self.rich_style)
        return Strip(segments).crop_extend(left, left + width, self.rich_style).apply_style(self.rich_style)

    def action_move(self, step: int) -> None:
        if self.rows:
            self._cursor = max(0, min(self._cursor + step, len(self.rows) - 1))
            self._follow()
            self.refresh()

    def action_page(self, pages: int) -> None:
        self.action_move(pages * max(1, self.size.height - 2))

    def action_choose(self) -> None:
        if self.chosen is not None:
            self.post_message(self.Chosen(self.chosen))

    def on_click(self, event: Click) -> None:
        at = event.y - 1 + self.scroll_offset.y
        if 0 <= at < len(self.rows) and event.y > 0:
            self._cursor = at
            self.refresh()

    def _follow(self) -> None:
        """Scroll so that the cursor is visible below the head."""
        seen = max(1, self.size.height - 1)
        top = min(self._cursor, max(round(self.scroll_offset.y), self._cursor - seen + 1))
        if top != round(self.scroll_offset.y):
            self.scroll_to(y=top, animate=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(
        f"{cell[:width]:{width}}" if name in LEFT else f"{cell[:width]:>{width}}"
        for name, cell, width in zip(view.COLUMNS, cells, widths, strict=True)
        if width
    )


def _segments(row: view.Row, widths: Sequence[int], style: Style) -> list[Segment]:
    text, state = _line(row.cells(), widths), view.COLUMNS.index("state")
    start = sum(widths[:state]) + state
    end = start + widths[state]
    return [
        Segment(text[:start], style),
        Segment(text[start:end], style + STATES.get(row.state, PLAIN)),
        Segment(text[end:], style),
    ]
