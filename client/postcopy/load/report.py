"""Reports that explain themselves: what was done, on which machine, the results, and the meaning of each figure.

``FILE.html`` is one page that contains its plots; ``FILE.md`` has them in ``FILE-plots.png``; ``FILE.png`` is one
picture of all plots."""

from __future__ import annotations

import html
import os
import platform
import shlex
import time
from typing import Any

from postcopy_protocol.sizes import format_size

from ..errors import BadInput, PostcopyError

Results = dict[str, Any]
ENDINGS = (".html", ".png", ".md")

MEANINGS = {
    "latency": "Read it from the left: half of the touches were at least as fast as the height over 50 %, 99 of 100 as "
    "fast as the height over 99 %. A line that climbs steeply at the right has rare, slow touches. A first touch of a "
    "page that another client had already requested is fast; one that found the page missing had to wait for it.",
    "rate": "Faults become fewer as the block fills: a page that has arrived is present for all clients. All touches "
    "(grey, axis at the right) go up for the same reason. Dashed lines are workers that were killed on purpose.",
    "slowest": "One point for each interval: the slowest touch that ended in it. After a kill the client of that "
    "worker waits until a successor has started; all other clients continue.",
    "residency": "The share of the block that has been placed. At 100 % no client waits, and all run at native speed.",
    "rates": "Touches a second of every client, from its first to its last. Equal bars: no client is preferred.",
    "tails": "One touch in a hundred of this client was slower than its bar. A single high bar is one client that is "
    "served badly.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2127; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem }
p.what { font-size: 1.05rem } code { background: #f0f2f5; padding: .1em .3em; border-radius: 3px }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #e5e8eb } td.n { text-align: right; font-variant-numeric: tabular-nums;
white-space: nowrap } figure { margin: 0 0 1rem } figure svg { width: 100%; height: auto } figcaption { color: #5f6b7c;
font-size: .92rem } .bad { color: #c23030; font-weight: bold } .good { color: #29825b } footer { color: #8a9ba8;
font-size: .85rem; margin-top: 3rem }
"""


class ReportWriter:
    """Writes a report to ``path``. ``arguments`` is the command line of the test.

    The plots of ``x.md`` are in ``x-plots.png``. The constructor checks all that can be checked before the test. Raises
    BadInput for an ending that is none of ENDINGS, OSError for a file that cannot be written, PostcopyError without
    matplotlib or when the plots would overwrite a file that is not from an earlier report."""

    def __init__(self, path: str, arguments: list[str]) -> None:
        stem, ending = os.path.splitext(path)
        self._path, self._ending = path, ending.lower()
        self._command = "postcopy " + shlex.join(arguments)
        if self._ending not in ENDINGS:
            raise BadInput(f"--report {path}: name it .html, .png or .md")
        if not os.path.isdir(os.path.dirname(path)):
            raise BadInput(f"--report {path}: there is no directory {os.path.dirname(path)}")
        try:
            from . import plots  # noqa: F401
        except ImportError as error:
            raise PostcopyError(f"--report needs matplotlib: pip install 'postcopy[report]' ({error})") from None
        self._picture = path
        _check_writable(path)
        if self._ending == ".md":
            self._picture = f"{stem}-plots.png"
            self._check_picture()
            _check_writable(self._picture)

    def _check_picture(self) -> None:
        """Only a picture that the earlier report of that name refers to may be overwritten."""
        if not os.path.isfile(self._picture):
            return
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                ours = f"![plots]({os.path.basename(self._picture)})" in file.read()
        except FileNotFoundError:
            ours = False
        if not ours:
            raise PostcopyError(
                f"--report {self._path}: its plots would overwrite {self._picture}, which is not of an earlier report; "
                "choose another name"
            )

    def write(self, results: Results) -> None:
        """Write the report. Raises OSError."""
        from . import plots

        if self._ending == ".html":
            panels = {name: plots.panel(name, results) for name in plots.PANELS}
            _save(self._path, as_html(results, self._command, panels))
            return
        plots.poster(results, heading(results), self._picture)
        if self._ending == ".md":
            _save(self._path, as_markdown(results, self._command, os.path.basename(self._picture)))


def _check_writable(path: str) -> None:
    """Raises OSError now, rather than after a long test. Changes no file, and leaves no new one."""
    new = not os.path.lexists(path)
    with open(path, "ab"):
        pass
    if new:
        os.unlink(path)


def _save(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def heading(results: Results) -> str:
    """One line."""
    return f"Load test: {results['clients']} clients on {format_size(results['size'])}, {results['pattern']}"


def what_was_done(results: Results) -> str:
    """A description of the test."""
    asked = results["asked"]
    each = f"{asked['touches']} times" if asked["touches"] else ""
    each += (" or " if each and asked["seconds"] else "") + (f"for {asked['seconds']:g} s" if asked["seconds"] else "")
    kinds = {
        "private": "private (copy-on-write)",
        "shared": "shared",
        "mixed": "half of them private (copy-on-write), half shared",
    }[results["mode"]]
    if asked.get("replay"):
        each = "as a trace had recorded it"
    loop = "each touch right after the previous one"
    if asked.get("replay"):
        loop = f"at the recorded times, {asked['speed']:g} times as fast" if asked["speed"] else loop
    elif asked["rate"]:
        loop = f"{asked['rate']:g} touches a second each, however long each took (open loop)"
    elif asked["think"]:
        loop = f"with {asked['think']:g} s of pause between touches"
    threads = f", {asked['threads']} threads each" if asked["threads"] > 1 else ""
    text = (
        f"{results['clients']} client processes{threads}, {kinds}, mapped the block “{results['block']}” "
        f"({format_size(results['size'])}) and touched single bytes of its pages, {each}, "
        f"in {results['pattern']} order, {loop}."
    )
    text += f" {asked['writes']:.0%} of the touches were writes." if asked["writes"] else ""
    text += f" The clients began over {asked['ramp']:g} s." if asked["ramp"] else ""
    if results["kills"]:
        text += f" Every {asked['kill_workers']:g} s one of the worker processes that place pages was killed (SIGKILL)."
    return (
        text + " A page was not in memory before its first touch: the client that touched it waited until it arrived."
    )


def verdict(results: Results) -> tuple[bool, str]:
    """Whether the test passed, and why."""
    if results["wrong"]:
        return False, f"{results['wrong']} bytes were not what they should be."
    if results["died"]:
        return False, f"{len(results['died'])} clients died: {'; '.join(results['died'][:3])}."
    if results["verified"]:
        return True, f"Every byte compared ({format_size(results['compared'])}) was right, and no client died."
    return True, "No client died. Contents were not compared (--verify)."


def rows(results: Results) -> list[tuple[str, str, str]]:
    """Figure, value, meaning."""
    told = [
        (
            "touches",
            f"{results['touches']:,}",
            f"in {results['seconds']:.2f} s: {results['touches_per_s']:,.0f} a second",
        ),
        ("first touches", f"{results['first_touches']:,}", "touches of a page that this client had not touched before"),
        ("faults", f"{results['faults']:,}", "of them found the page missing and waited for it"),
        *(_latencies("fault", results["fault_us"], "the page was missing") if results["faults"] else ()),
        *_latencies("first touch", results["latency_us"], "all first touches, missing or not"),
    ]
    if "response_us" in results:
        told += _latencies("response", results["response_us"], "every touch, counted from when it was due")
        told.append(("missed", f"{results['missed']:,}", "touches that were due and could not be made in time"))
    told.append(("fairness", f"{results['fairness']:.3f}", "1: equal rates; 1/n: one client got everything"))
    counted = results["supervisor"]
    if results["kills"]:
        restarts = f"{counted.get('restarts', 0)} successors started"
        told.append(("workers killed", f"{len(results['kills'])}", restarts))
    if "placed" in counted:
        around = f", {counted.get('placed_around', 0):,} of them ahead of the touch (fault-around)"
        told.append(("pages placed", f"{counted['placed']:,}", f"by the service{around}"))
        told.append(
            ("deduplicated", f"{counted['deduplicated']:,}", "faults on pages that were present or already requested")
        )
    return told


def _latencies(name: str, latency: dict[str, float], meaning: str) -> list[tuple[str, str, str]]:
    p50, p99, longest = (human(latency[key]) for key in ("p50", "p99", "max"))
    return [(f"{name}: p50, p99, max", f"{p50}, {p99}, {longest}", meaning)]


def human(us: float) -> str:
    """Microseconds with a readable unit."""
    if us >= 1e6:
        return f"{us / 1e6:.2f} s"
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


def machine() -> str:
    """The machine on which it was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    cpus = f"{os.cpu_count()} CPUs" + (f" ({model})" if model else "")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{cpus}, Linux {platform.release()}, Python {platform.python_version()}; load average at the end {load}"


def as_html(results: Results, command: str, pictures: dict[str, str]) -> str:
    """One page, nothing outside it."""
    from .plots import PANELS

    good, said = verdict(results)
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{html.escape(value)}</td><td>{html.escape(meaning)}</td></tr>"
        for name, value, meaning in rows(results)
    )
    figures = "".join(
        f"<h2>{html.escape(PANELS[name][0])}</h2><figure>{picture}<figcaption>{html.escape(MEANINGS[name])}"
        "</figcaption></figure>"
        for name, picture in pictures.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(heading(results))}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{html.escape(heading(results))}</h1>"
        f"<p class=what>{html.escape(what_was_done(results))}</p>"
        f"<p class={'good' if good else 'bad'}>{html.escape(said)}</p>"
        f"<table><tr><th>figure<th>value<th>what it is</tr>{table}</table>{figures}"
        f"<footer><p>Repeat it: <code>{html.escape(command)}</code><br>{html.escape(machine())}<br>{_when()}, postcopy "
        f"{html.escape(_version())}</p></footer></html>\n"
    )


def as_markdown(results: Results, command: str, picture: str) -> str:
    """The report as Markdown; the plots are in ``picture``."""
    from .plots import PANELS

    good, said = verdict(results)
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(results))
    meanings = "\n".join(f"- **{title}**: {MEANINGS[name]}" for name, (title, _) in PANELS.items())
    return (
        f"# {heading(results)}\n\n{what_was_done(results)}\n\n{'' if good else '**Failed.** '}{said}\n\n"
        f"| figure | value | what it is |\n| --- | ---: | --- |\n{table}\n\n![plots]({picture})\n\n{meanings}\n\n"
        f"Repeat it: `{command}`. {machine()}. {_when()}, postcopy {_version()}.\n"
    )


def _when() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _version() -> str:
    from .. import __version__

    return __version__
