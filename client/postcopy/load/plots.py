"""The plots of a report, by matplotlib (the extra ``report``), without a display. Times in seconds, latencies in
microseconds, as in the findings."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, RED, GREY, GREEN = "#2f6db5", "#d9822b", "#c23030", "#8a9ba8", "#29825b"
SIZE = (7.4, 3.4)
Findings = dict[str, Any]
Draw = Callable[[Any, Findings], None]
"""Draws into one axes."""


def latency(axes: Any, found: Findings) -> None:
    """Latency over percentiles, the percentiles spread so that each further nine has the same room."""
    lines = [("page was missing", "fault_percentiles_us", RED), ("all first touches", "percentiles_us", BLUE)]
    lines.append(("every touch, from when it was due", "response_percentiles_us", ORANGE))
    ticks: set[float] = set()
    for label, key, colour in lines:
        if points := found.get(key):
            ticks |= {percent for percent, _ in points}
            axes.plot([_nines(p) for p, _ in points], [us for _, us in points], "o-", label=label, color=colour, ms=4)
    shown = [percent for percent in sorted(ticks) if percent in (50, 90, 99, 99.9, 99.99, 99.999)]
    axes.set_xticks([_nines(percent) for percent in shown], [f"{percent:g} %" for percent in shown])
    axes.set_yscale("log")
    axes.set_xlabel("share of touches that were at least this fast")
    axes.set_ylabel("microseconds")
    axes.legend(frameon=False)


def _nines(percent: float) -> float:
    return -math.log10(1 - percent / 100)


def rate(axes: Any, found: Findings) -> None:
    """Faults and touches a second over time, kills marked."""
    times, width = _times(found), found["timeline"]["bin_s"]
    for name, label, colour in (("first_touches", "first touches", BLUE), ("faults", "page was missing", RED)):
        axes.step(times, [count / width for count in found["timeline"][name]], where="post", label=label, color=colour)
    other = axes.twinx()
    other.step(times, [count / width for count in found["timeline"]["touches"]], where="post", color=GREY, lw=0.8)
    other.set_ylabel("all touches a second", color=GREY)
    other.set_ylim(bottom=0)
    other.spines["top"].set_visible(False)
    _kills(axes, found)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("a second")
    axes.legend(facecolor="white", framealpha=0.8, edgecolor="white", loc="center right")


def slowest(axes: Any, found: Findings) -> None:
    """The slowest touch of each interval: what a kill costs is seen here."""
    points = [(at, us) for at, us in zip(_times(found), found["timeline"]["slowest_us"], strict=True) if us]
    axes.plot([at for at, _ in points], [us / 1000 for _, us in points], ".", color=BLUE, ms=4)
    _kills(axes, found)
    axes.set_yscale("log")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("slowest touch, ms")
    if found["kills"]:
        axes.legend(frameon=False)


def residency(axes: Any, found: Findings) -> None:
    """How much of the block has come."""
    points = found["residency"]
    axes.plot([at for at, _ in points], [100 * share for _, share in points], "-", color=GREEN)
    axes.fill_between([at for at, _ in points], [100 * share for _, share in points], color=GREEN, alpha=0.15)
    _kills(axes, found)
    axes.set_ylim(0, 102)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("% of the block received")


def rates(axes: Any, found: Findings) -> None:
    """Touches a second of each client: unequal bars are unfair service."""
    _bars(axes, found, [each.get("touches_per_s", 0.0) for each in found["each"]], "touches a second")
    axes.set_title(f"fairness {found['fairness']:.3f} (1: all the same)", fontsize=9, loc="right")


def tails(axes: Any, found: Findings) -> None:
    """p99 of each client's first touches."""
    _bars(axes, found, [each.get("latency_us", {}).get("p99", 0.0) for each in found["each"]], "p99, microseconds")


def _bars(axes: Any, found: Findings, values: list[float], label: str) -> None:
    modes = {"private": BLUE, "shared": ORANGE}
    for mode, colour in modes.items():
        places = [place for place, each in enumerate(found["each"]) if each["mode"] == mode]
        if places:
            axes.bar(places, [values[place] for place in places], color=colour, label=mode)
    axes.set_xlabel("client")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(label)
    axes.legend(frameon=True, fontsize=8, loc="lower right", facecolor="white", framealpha=0.8)


def _times(found: Findings) -> list[float]:
    return [number * found["timeline"]["bin_s"] for number in range(len(found["timeline"]["touches"]))]


def _kills(axes: Any, found: Findings) -> None:
    for number, kill in enumerate(found["kills"]):
        label = "worker killed" if not number else None
        axes.axvline(kill["at"], color=RED, lw=0.9, ls="--", alpha=0.7, label=label)


PANELS: dict[str, tuple[str, Draw]] = {
    "latency": ("How long a touch takes", latency),
    "rate": ("Faults over time", rate),
    "slowest": ("The slowest touches over time", slowest),
    "residency": ("How much has come", residency),
    "rates": ("Fairness: each client's share", rates),
    "tails": ("Fairness: each client's slow touches", tails),
}


def panel(name: str, found: Findings) -> str:
    """One plot as SVG."""
    figure = Figure(figsize=SIZE, layout="constrained")
    _draw(figure.add_subplot(), name, found)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().partition("<svg")[2].join(("<svg", ""))


def poster(found: Findings, title: str, target: str) -> None:
    """All plots in one PNG."""
    figure = Figure(figsize=(2 * SIZE[0], 3 * SIZE[1] + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=13)
    for place, name in enumerate(PANELS, 1):
        axes = figure.add_subplot(3, 2, place)
        axes.set_title(PANELS[name][0], fontsize=10, loc="left", weight="bold")
        _draw(axes, name, found)
    figure.savefig(target, format="png", dpi=110)


def _draw(axes: Any, name: str, found: Findings) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", alpha=0.25)
    PANELS[name][1](axes, found)
