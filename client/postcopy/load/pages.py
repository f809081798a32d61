"""Reports that a stranger understands: what was done, on which machine, what came out, and what each figure means.

``FILE.html`` is one page with its plots inside; ``FILE.md`` has them in ``FILE.png`` beside it; ``FILE.png`` alone is a
poster of all plots.
"""

from __future__ import annotations

import html
import os
import platform
import shlex
import time
from collections.abc import Callable
from typing import Any

from postcopy_protocol.sizes import format_size

from ..errors import BadInput, PostcopyError

Findings = dict[str, Any]
ENDINGS = (".html", ".png", ".md")

MEANINGS = {
    "latency": "Read it from the left: half of the touches were at least as fast as the height over 50 %, 99 of 100 as "
    "fast as the height over 99 %. A line that climbs steeply at the right has rare, slow touches. A first touch of a "
    "page that another client had brought already is fast; one that found the page missing had to wait for it.",
    "rate": "Faults become fewer as the block fills: what has come once is there for everybody. All touches (grey, "
    "axis at the right) go up for the same reason. Dashed lines are workers that were killed on purpose.",
    "slowest": "One point for each interval: the slowest touch that ended in it. After a kill the client of that "
    "worker waits until a successor has started; everybody else goes on.",
    "residency": "The share of the block that has been placed, by whoever asked first. At 100 % nobody has to wait any "
    "more and clients run at native speed.",
    "rates": "Touches a second of every client, from its first to its last. Equal bars: nobody is preferred.",
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


def writer(path: str, words: list[str]) -> Callable[[Findings], None]:
    """What writes findings to ``path``; ``words`` is the command line that will have made them.

    Raises BadInput for an ending that is none of ENDINGS, OSError for what cannot be written to, PostcopyError when
    there is no matplotlib.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise BadInput(f"--report {path}: name it .html, .png or .md")
    if not os.path.isdir(os.path.dirname(path)):
        raise BadInput(f"--report {path}: there is no directory {os.path.dirname(path)}")
    try:
        from . import plots
    except ImportError as error:
        raise PostcopyError(f"--report needs matplotlib: pip install 'postcopy[report]' ({error})") from None
    for target in {path, os.path.splitext(path)[0] + ".png"} if ending == ".md" else {path}:
        _check_writable(target)
    command = "postcopy " + shlex.join(words)

    def write(found: Findings) -> None:
        if ending == ".html":
            text = as_html(found, command, {name: plots.panel(name, found) for name in plots.PANELS})
            _save(path, text)
            return
        poster = os.path.splitext(path)[0] + ".png"
        plots.poster(found, heading(found), poster)
        if ending == ".md":
            _save(path, as_markdown(found, command, os.path.basename(poster)))

    return write


def _check_writable(path: str) -> None:
    """Raises OSError now, rather than after a long test. Neither a new file stays behind nor is an old one changed."""
    new = not os.path.lexists(path)
    with open(path, "ab"):
        pass
    if new:
        os.unlink(path)


def _save(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# --- the words --------------------------------------------------------------------------------------------------------


def heading(found: Findings) -> str:
    """One line."""
    return f"Load test: {found['clients']} clients on {format_size(found['size'])}, {found['pattern']}"


def what_was_done(found: Findings) -> str:
    """The test in plain words."""
    asked = found["asked"]
    each = f"{asked['touches']} times" if asked["touches"] else ""
    each += (" or " if each and asked["seconds"] else "") + (f"for {asked['seconds']:g} s" if asked["seconds"] else "")
    kinds = {
        "private": "private (copy-on-write)",
        "shared": "shared",
        "mixed": "half of them private (copy-on-write), half shared",
    }[found["mode"]]
    if asked.get("replay"):
        each = "as a trace had recorded it"
    loop = "each touch as soon as the last was over"
    if asked.get("replay"):
        loop = f"at the recorded times, {asked['speed']:g} times as fast" if asked["speed"] else loop
    elif asked["rate"]:
        loop = f"{asked['rate']:g} touches a second each, whether or not the last was over (open loop)"
    elif asked["think"]:
        loop = f"with {asked['think']:g} s of thinking between touches"
    threads = f", {asked['threads']} threads each" if asked["threads"] > 1 else ""
    text = (
        f"{found['clients']} client processes{threads}, {kinds}, mapped the block “{found['block']}” "
        f"({format_size(found['size'])}) and touched single bytes of its pages, {each}, in {found['pattern']} order, "
        f"{loop}."
    )
    text += f" {asked['writes']:.0%} of the touches were writes." if asked["writes"] else ""
    text += f" The clients began over {asked['ramp']:g} s." if asked["ramp"] else ""
    if found["kills"]:
        text += f" Every {asked['kill_workers']:g} s one of the processes that bring pages was killed (SIGKILL)."
    return text + " A page that nobody had needed before was not in memory: whoever touched it waited until it came."


def verdict(found: Findings) -> tuple[bool, str]:
    """Was it all right? And in words."""
    if found["wrong"]:
        return False, f"{found['wrong']} bytes were not what they should be."
    if found["died"]:
        return False, f"{len(found['died'])} clients died: {'; '.join(found['died'][:3])}."
    if found["verified"]:
        return True, f"Every byte compared ({format_size(found['compared'])}) was right, and no client died."
    return True, "No client died. Contents were not compared (--verify)."


def rows(found: Findings) -> list[tuple[str, str, str]]:
    """Figure, value, meaning."""
    told = [
        ("touches", f"{found['touches']:,}", f"in {found['seconds']:.2f} s: {found['touches_per_s']:,.0f} a second"),
        ("first touches", f"{found['first_touches']:,}", "touches of a page that this client had not touched before"),
        ("faults", f"{found['faults']:,}", "of them found the page missing and waited for it"),
        *(_latencies("fault", found["fault_us"], "the page was missing") if found["faults"] else ()),
        *_latencies("first touch", found["latency_us"], "all first touches, missing or not"),
    ]
    if "response_us" in found:
        told += _latencies("response", found["response_us"], "every touch, counted from when it was due")
        told.append(("missed", f"{found['missed']:,}", "touches that were due and could not be made in time"))
    told.append(("fairness", f"{found['fairness']:.3f}", "1: every client got the same rate; 1/n: one got everything"))
    counted = found["supervisor"]
    if found["kills"]:
        restarts = f"{counted.get('restarts', 0)} successors started"
        told.append(("workers killed", f"{len(found['kills'])}", restarts))
    if "placed" in counted:
        around = f", {counted.get('placed_around', 0):,} of them ahead of the touch (fault-around)"
        told.append(("pages placed", f"{counted['placed']:,}", f"by the supervisor's people{around}"))
        told.append(("deduplicated", f"{counted['deduplicated']:,}", "faults at pages that were there or on their way"))
    return told


def _latencies(name: str, latency: dict[str, float], meaning: str) -> list[tuple[str, str, str]]:
    p50, p99, longest = (human(latency[key]) for key in ("p50", "p99", "max"))
    return [(f"{name}: p50, p99, max", f"{p50}, {p99}, {longest}", meaning)]


def human(us: float) -> str:
    """Microseconds in the unit that people would choose."""
    if us >= 1e6:
        return f"{us / 1e6:.2f} s"
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


def machine() -> str:
    """Where it was measured."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    cpus = f"{os.cpu_count()} CPUs" + (f" ({model})" if model else "")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{cpus}, Linux {platform.release()}, Python {platform.python_version()}; load average at the end {load}"


# --- the pages --------------------------------------------------------------------------------------------------------


def as_html(found: Findings, command: str, pictures: dict[str, str]) -> str:
    """One page, nothing outside it."""
    from .plots import PANELS

    good, said = verdict(found)
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{html.escape(value)}</td><td>{html.escape(meaning)}</td></tr>"
        for name, value, meaning in rows(found)
    )
    figures = "".join(
        f"<h2>{html.escape(PANELS[name][0])}</h2><figure>{picture}<figcaption>{html.escape(MEANINGS[name])}"
        "</figcaption></figure>"
        for name, picture in pictures.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(heading(found))}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><h1>{html.escape(heading(found))}</h1>"
        f"<p class=what>{html.escape(what_was_done(found))}</p>"
        f"<p class={'good' if good else 'bad'}>{html.escape(said)}</p>"
        f"<table><tr><th>figure<th>value<th>what it is</tr>{table}</table>{figures}"
        f"<footer><p>Repeat it: <code>{html.escape(command)}</code><br>{html.escape(machine())}<br>{_when()}, postcopy "
        f"{html.escape(_version())}</p></footer></html>\n"
    )


def as_markdown(found: Findings, command: str, picture: str) -> str:
    """The same for a text file; the plots are in ``picture``."""
    from .plots import PANELS

    good, said = verdict(found)
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(found))
    meanings = "\n".join(f"- **{title}**: {MEANINGS[name]}" for name, (title, _) in PANELS.items())
    return (
        f"# {heading(found)}\n\n{what_was_done(found)}\n\n{'' if good else '**Failed.** '}{said}\n\n"
        f"| figure | value | what it is |\n| --- | ---: | --- |\n{table}\n\n![plots]({picture})\n\n{meanings}\n\n"
        f"Repeat it: `{command}`. {machine()}. {_when()}, postcopy {_version()}.\n"
    )


def _when() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _version() -> str:
    from .. import __version__

    return __version__
