"""The shape of the code, read from the syntax trees: no import circle, no large file or function, no retired word.

The rules are those of CONTRIBUTING.md. A folder is one node for the folder above it, so files in a folder may import
one another only in one direction, and so may the folders of a wing: what imports is above, what is imported is below.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.unit.test_wings import PLAN, ROOT, imports_in

FILE_LINES = 500
FUNCTION_LINES = 60
LONG_FILES = frozenset({"messages.py"})
"""A list of messages is as long as the list."""

BANNED_WORDS = (
    *"anew attendant briefing custody errand estate fleet flying furniture happening hasten house knock landed".split(),
    *"nobody porter reception rendezvous somebody stranger thereof visitor whoever wish workforce".split(),
    "lanes?",
)
"""Words for which the code has better ones (see docs/glossary.md): regular expressions of whole words, parts of an
identifier too."""
ALLOWED = re.compile(r'"house"|\'house\'|`nobody`|`house`')
"""The custodian's key, which a supervisor of another version reads, and the user account."""
BANNED = re.compile(
    rf"(?<![A-Za-z])(?:{'|'.join(BANNED_WORDS)})(?:s|es|ed)?(?![a-z])"
    rf"|(?<![A-Z])(?:{'|'.join(word.capitalize() for word in BANNED_WORDS)})(?:s|es|ed)?(?![a-z])"
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def modules_of(folder: str) -> dict[tuple[str, ...], Path]:
    """Every module of a wing by its dotted path; a package's own ``__init__`` ends with that name."""
    return {path.relative_to(ROOT / folder).with_suffix("").parts: path for path in python_files(folder)}


def edges_of(folder: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(importer, imported) for each import between two modules of a wing."""
    modules = modules_of(folder)
    for parts, path in modules.items():
        for one in imports_in(path):
            module = tuple(one.module.split("."))
            for target in ((*module, one.name), module, (*module, "__init__")):
                if target in modules and target != parts:
                    yield parts, target
                    break


def graphs_of(folder: str) -> dict[tuple[str, ...], dict[str, set[str]]]:
    """For each folder of a wing: its entries (files and folders), and which of them import which."""
    graphs: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for importer, imported in edges_of(folder):
        depth = next(at for at, (one, other) in enumerate(zip(importer, imported, strict=False)) if one != other)
        if importer[depth] != "__init__":  # a package's face may import what is inside
            graphs.setdefault(importer[:depth], {}).setdefault(importer[depth], set()).add(imported[depth])
    return graphs


@pytest.mark.parametrize("folder", sorted(PLAN))
def test_imports_point_one_way(folder: str) -> None:
    circles = []
    for place, graph in graphs_of(folder).items():
        try:
            tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circles.append(f"{'/'.join(place)}: {' <- '.join(error.args[1])}")
    assert not circles, "\n".join(circles)


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in python_files(*PLAN, "benchmarks")}
    long = [
        f"{path.relative_to(ROOT)}: {lines}"
        for path, lines in lengths.items()
        if lines > FILE_LINES and path.name not in LONG_FILES
    ]
    assert not long, "\n".join(long)


def test_no_function_is_long() -> None:
    long = []
    for path in python_files(*PLAN, "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long, "\n".join(long)


def retired_words_in(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for found in BANNED.finditer(ALLOWED.sub("", line)):
            yield number, found.group(0)


@pytest.mark.parametrize("folder", [*sorted(PLAN), "benchmarks", "scripts", "examples", "docs", "."])
def test_no_retired_word_is_left(folder: str) -> None:
    paths = (ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*")
    found = [
        f"{path.relative_to(ROOT)}:{line} {word}"
        for path in sorted(paths)
        if path.is_file() and path.suffix in (".py", ".md", ".c", ".service", ".json", ".yml", "")
        if "__pycache__" not in path.parts
        for line, word in retired_words_in(path.read_text("utf-8", errors="replace"))
    ]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("self._house = 1", "house"),
        ("class HouseSource:", "House"),
        ("two errands wait", "errands"),
        ("a worker_lane of it", "lane"),
        ("a lane_mark and the lanes", "lane"),
        ('keep("house", b"")', ""),
        ("a plane lands in a warehouse, with a wishlist", ""),
    ],
)
def test_the_words_are_found_as_words(line: str, word: str) -> None:
    assert next((found for _, found in retired_words_in(line)), "") == word
