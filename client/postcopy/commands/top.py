"""``postcopy top``: a live view in the terminal."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from postcopy_protocol.arguments import host_and_port
from postcopy_protocol.runtime_paths import runtime_directory

from ..errors import PostcopyError
from ..queries import Control
from .options import RuntimeDir


def top(
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two updates.")
    ] = 1.0,
    web: Annotated[
        str | None,
        typer.Option("--web", metavar="HOST:PORT", help="In a browser, by a link with a token."),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Live view of blocks, clients, sources and events. Press ? for the keys."""
    try:
        from ..top.app import Top
    except ImportError as error:
        raise PostcopyError(f"top needs textual: pip install 'postcopy[top]' ({error})") from None
    Control(runtime_dir).close()  # a missing supervisor is reported before the screen is cleared
    if web is not None:
        return _serve(web, interval, runtime_dir)
    if not _in_browser() and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise PostcopyError("top needs a terminal; programs use: postcopy status --json")
    reader = StatusReader(runtime_dir)
    try:
        Top(reader.read, interval).run()
    finally:
        reader.close()


def _in_browser() -> bool:
    """Is this the process of one window of --web?"""
    return os.environ.get("TEXTUAL_DRIVER", "").startswith("textual.drivers.web_driver")


def _serve(address: str, interval: float, runtime_dir: str | None) -> None:
    host, port = host_and_port(address)
    try:
        from ..top.web import TopServer
    except ImportError as error:
        raise PostcopyError(f"top --web needs textual-serve: pip install 'postcopy[web]' ({error})") from None
    directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
    TopServer(host, port, ["--interval", str(interval), "--runtime-dir", directory]).run()


class StatusReader:
    """Reads the status; connects again to a supervisor that was away."""

    def __init__(self, runtime_dir: str | None) -> None:
        self._directory = runtime_dir
        self._control: Control | None = None

    def read(self) -> dict[str, Any]:
        """Raises PostcopyError."""
        try:
            if self._control is None:
                self._control = Control(self._directory, timeout=5.0)
            self._control.check_listening()
            return self._control.status()
        except PostcopyError:
            self.close()
            raise

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
