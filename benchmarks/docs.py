"""Figures into the documentation: each benchmark's table stands between markers in docs/benchmarks.md.

The words around the tables are people's; the harness replaces only what stands between its markers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from textwrap import fill

from . import machine
from .bench import BenchmarkFailed
from .figures import Row, markdown

WIDTH = 100
PATH = os.path.join(machine.ROOT, "docs", "benchmarks.md")


def write_docs(found: machine.Facts, results: Mapping[str, Sequence[Row]], path: str = PATH) -> None:
    """Replace the tables of these benchmarks. Raises BenchmarkFailed where a marker is missing."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name, rows in results.items():
        text = _replaced(text, name, f"{fill(machine.in_words(found), WIDTH)}\n\n{markdown(rows)}", path)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _replaced(text: str, name: str, inner: str, path: str) -> str:
    begin, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{inner}\n{end}", text)
    if count != 1:
        raise BenchmarkFailed(f"{path} has {count} places for {name}; it needs one: {begin} ... {end}")
    return changed
