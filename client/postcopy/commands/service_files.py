"""Files for those who run a supervisor: ``systemd-unit``, ``dashboard`` and ``alert-rules`` print them."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

from ..errors import BadInput

UNITS = {"supervisor": "postcopy.service", "firecracker": "postcopy-firecracker@.service"}
DASHBOARD, ALERTS = "grafana.json", "alerts.yaml"


def text_of(name: str) -> str:
    """One of the files."""
    return files("postcopy").joinpath("service_files", name).read_text("utf-8")


def systemd_unit(
    of: Annotated[str, typer.Argument(metavar="[supervisor|firecracker]", help="What the unit runs.")] = "supervisor",
) -> None:
    """Print a systemd unit with a sandbox; its first lines say how to install it."""
    if of not in UNITS:
        raise BadInput(f"there is no unit for {of!r}: {', '.join(UNITS)}")
    print(text_of(UNITS[of]), end="")


def dashboard() -> None:
    """Print a Grafana dashboard (JSON) for what serve --metrics answers."""
    print(text_of(DASHBOARD), end="")


def alert_rules() -> None:
    """Print alert rules for Prometheus (YAML, for its rule_files)."""
    print(text_of(ALERTS), end="")
