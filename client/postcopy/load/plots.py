"""The plots of a report, by matplotlib (the extra ``report``), without a display. Times in seconds, latencies in
microseconds, as in the results."""

from __future__ import annotations

import io
import math
from typing import Any, Protocol

from matplotlib.figure import Figure

BLUE, ORANGE, RED, GREY, GREEN = "#2f6db5", "#d9822b", "#c23030", "#8a9ba8", "#29825b"
SIZE = (7.4, 3.4)
Results = dict[str, Any]


class Draw(Protocol):
    """Draws one plot into ``axes``."""

    def __call__(self, axes: Any, results: Results, /) -> None: ...


def latency(axes: Any, results: Results) -> None:
    """Latency over percentiles; each further nine of the percentile has the same width."""
    lines = [("page was missing", "fault_percentiles_us", RED), ("all first touches", "percentiles_us", BLUE)]
    lines.append(("every touch, from when it was due", "response_percentiles_us", ORANGE))
    ticks: set[float] = set()
    for label, key, colour in lines:
        if points := results.get(key):
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


def rate(axes: Any, results: Results) -> None:
    """Faults and touches a second over time, kills marked."""
    times, width = _times(results), results["timeline"]["bin_s"]
    for name, label, colour in (("first_touches", "first touches", BLUE), ("faults", "page was missing", RED)):
        axes.step(
            times, [count / width for count in results["timeline"][name]], where="post", label=label, color=colour
        )
    other = axes.twinx()
    other.step(times, [count / width for count in results["timeline"]["touches"]], where="post", color=GREY, lw=0.8)
    other.set_ylabel("all touches a second", color=GREY)
    other.set_ylim(bottom=0)
    other.spines["top"].set_visible(False)
    _kills(axes, results)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("a second")
    axes.legend(facecolor="white", framealpha=0.8, edgecolor="white", loc="center right")


def slowest(axes: Any, results: Results) -> None:
    """The slowest touch of each interval; shows what a kill costs."""
    points = [(at, us) for at, us in zip(_times(results), results["timeline"]["slowest_us"], strict=True) if us]
    axes.plot([at for at, _ in points], [us / 1000 for _, us in points], ".", color=BLUE, ms=4)
    _kills(axes, results)
    axes.set_yscale("log")
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("slowest touch, ms")
    if results["kills"]:
        axes.legend(frameon=False)


def residency(axes: Any, results: Results) -> None:
    """How much of the block has come."""
    points = results["residency"]
    axes.plot([at for at, _ in points], [100 * share for _, share in points], "-", color=GREEN)
    axes.fill_between([at for at, _ in points], [100 * share for _, share in points], color=GREEN, alpha=0.15)
    _kills(axes, results)
    axes.set_ylim(0, 102)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("% of the block received")


def rates(axes: Any, results: Results) -> None:
    """Touches a second of each client: unequal bars are unfair service."""
    _bars(axes, results, [each.get("touches_per_s", 0.0) for each in results["each"]], "touches a second")
    axes.set_title(f"fairness {results['fairness']:.3f} (1: all the same)", fontsize=9, loc="right")


def tails(axes: Any, results: Results) -> None:
    """p99 of each client's first touches."""
    _bars(axes, results, [each.get("latency_us", {}).get("p99", 0.0) for each in results["each"]], "p99, microseconds")


def _bars(axes: Any, results: Results, values: list[float], label: str) -> None:
    modes = {"private": BLUE, "shared": ORANGE}
    for mode, colour in modes.items():
        places = [place for place, each in enumerate(results["each"]) if each["mode"] == mode]
        if places:
            axes.bar(places, [values[place] for place in places], color=colour, label=mode)
    axes.set_xlabel("client")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(label)
    axes.legend(frameon=True, fontsize=8, loc="lower right", facecolor="white", framealpha=0.8)


def _times(results: Results) -> list[float]:
    return [number * results["timeline"]["bin_s"] for number in range(len(results["timeline"]["touches"]))]


def _kills(axes: Any, results: Results) -> None:
    for number, kill in enumerate(results["kills"]):
        label = "worker killed" if not number else None
        axes.axvline(kill["at"], color=RED, lw=0.9, ls="--", alpha=0.7, label=label)


PANELS: dict[str, tuple[str, Draw]] = {
    "latency": ("How long a touch takes", latency),
    "rate": ("Faults over time", rate),
    "slowest": ("The slowest touches over time", slowest),
    "residency": ("Pages received over time", residency),
    "rates": ("Fairness: each client's share", rates),
    "tails": ("Fairness: each client's slow touches", tails),
}


def panel(name: str, results: Results) -> str:
    """One plot as SVG."""
    figure = Figure(figsize=SIZE, layout="constrained")
    _draw(figure.add_subplot(), name, results)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().partition("<svg")[2].join(("<svg", ""))


def poster(results: Results, title: str, target: str) -> None:
    """All plots in one PNG."""
    figure = Figure(figsize=(2 * SIZE[0], 3 * SIZE[1] + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=13)
    for place, name in enumerate(PANELS, 1):
        axes = figure.add_subplot(3, 2, place)
        axes.set_title(PANELS[name][0], fontsize=10, loc="left", weight="bold")
        _draw(axes, name, results)
    figure.savefig(target, format="png", dpi=110)


def _draw(axes: Any, name: str, results: Results) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", alpha=0.25)
    PANELS[name][1](axes, results)
