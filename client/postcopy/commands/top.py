"""``postcopy top``: what happens, live."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..errors import PostcopyError
from ..queries import Control
from .options import RuntimeDir


def add_to(app: typer.Typer) -> None:
    app.command()(top)


def top(
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between looks.")] = 1.0,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Live view: blocks and what of them has come, clients, sources, events. Press ? for the keys."""
    try:
        from ..top.app import Top
    except ImportError as error:
        raise PostcopyError(f"top needs textual: pip install 'postcopy[top]' ({error})") from None
    Control(runtime_dir).close()  # nobody there is said before the screen is taken
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise PostcopyError("top needs a terminal; for programs there is: postcopy status --json")
    eyes = Eyes(runtime_dir)
    try:
        Top(eyes.look, interval).run()
    finally:
        eyes.close()


class Eyes:
    """Asks for the status; a supervisor that was away is looked for anew."""

    def __init__(self, runtime_dir: str | None) -> None:
        self._directory = runtime_dir
        self._control: Control | None = None

    def look(self) -> dict[str, Any]:
        """Raises PostcopyError."""
        try:
            if self._control is None:
                self._control = Control(self._directory, timeout=5.0)
            self._control.knock()
            return self._control.status()
        except PostcopyError:
            self.close()
            raise

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
