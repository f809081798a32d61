"""Files for those who run a supervisor: ``systemd-unit``, ``dashboard`` and ``alert-rules`` print them."""

from __future__ import annotations

from importlib.resources import files

UNIT, DASHBOARD, ALERTS = "postcopy.service", "grafana.json", "alerts.yaml"


def text_of(name: str) -> str:
    """One of the files."""
    return files("postcopy").joinpath("service_files", name).read_text("utf-8")


def systemd_unit() -> None:
    """Print a systemd unit with a user of its own and a sandbox; its first lines say how to install it."""
    print(text_of(UNIT), end="")


def dashboard() -> None:
    """Print a Grafana dashboard (JSON) for what serve --metrics answers."""
    print(text_of(DASHBOARD), end="")


def alert_rules() -> None:
    """Print alert rules for Prometheus (YAML, for its rule_files)."""
    print(text_of(ALERTS), end="")
