"""Imports between the wings, read from the syntax trees (see docs/design.md).

Imports inside functions and under TYPE_CHECKING count too.
A rule is one test: it reads every file and reports every offender.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder of each wing, its import package, and the wings it may import beside itself.
PLAN = {
    "protocol": ("postcopy_protocol", frozenset[str]()),
    "kernel": ("postcopy_kernel", frozenset[str]()),
    "wire": ("postcopy_wire", frozenset({"postcopy_protocol"})),
    "supervisor": ("postcopy_supervisor", frozenset({"postcopy_protocol", "postcopy_kernel", "postcopy_wire"})),
    "workers": ("postcopy_workers", frozenset({"postcopy_protocol", "postcopy_kernel", "postcopy_wire"})),
    "sources": ("postcopy_sources", frozenset({"postcopy_protocol", "postcopy_kernel", "postcopy_wire"})),
    "client": ("postcopy", frozenset({"postcopy_protocol", "postcopy_kernel"})),
}
WINGS = frozenset(package for package, _ in PLAN.values())
NOT_BUILT_YET = frozenset[str]()

# `protocol` is pure: no module that can block, read a clock, make random numbers or reach the machine.
IMPURE = frozenset(
    """
    _ctypes _posixsubprocess _socket _thread asyncio concurrent ctypes fcntl mmap multiprocessing os pathlib posix
    random resource secrets select selectors shutil signal socket socketserver ssl subprocess tempfile threading time
    zmq
    """.split()
)
BEYOND = "(beyond the wing)"  # the target of a relative import with more dots than there are packages
JUNK_DRAWERS = frozenset({"utils", "util", "common", "helpers", "helper", "base", "manager", "managers", "misc"})
# What `import postcopy` must not load.
HEAVY = ("zmq", "typer", "rich", "numpy", "prctl", "pydantic", "textual", "postcopy_supervisor", "postcopy_workers")


@dataclass(frozen=True)
class Import:
    """One imported name of a file: the absolute ``module``, and the ``name`` of a ``from`` import, or ''."""

    module: str
    name: str
    line: int
    at_top: bool

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import of ``source``, a module in ``package`` (dotted), importlib and __import__ by literal included."""
    tree = ast.parse(source)
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, node in top)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node.module or "", node.level, package)
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, node in top)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, "", node.lineno, False)


def absolute(module: str, level: int, package: str) -> str:
    """Return the full name of what ``from <level dots><module> import`` reaches out of a module in ``package``."""
    if level == 0:
        return module
    parents = package.split(".")
    if level > len(parents):
        return BEYOND
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [module])])


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def imports_in(path: Path) -> tuple[Import, ...]:
    folder = path.relative_to(ROOT).parts[0]
    package = ".".join(path.relative_to(ROOT / folder).parent.parts)
    return tuple(imports_of(path.read_text("utf-8"), package))


def files_of_all_wings() -> list[Path]:
    return [path for folder in PLAN for path in files_of(folder)]


def report(path: Path, wrong: Iterable[Import]) -> list[str]:
    """Return one line per offending import."""
    return [f"{path.relative_to(ROOT)}:{one.line} imports {one.module} {one.name}".rstrip() for one in wrong]


@pytest.mark.parametrize("folder", sorted(PLAN))
def test_a_wing_holds_one_import_package(folder: str) -> None:
    package, _ = PLAN[folder]
    if folder in NOT_BUILT_YET and not (ROOT / folder).exists():
        pytest.skip(f"{folder} is not built yet")
    assert (ROOT / folder / package / "__init__.py").is_file()
    holds = {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert holds == {package}, f"{folder} must hold one import package"


def test_a_wing_imports_only_what_the_plan_allows() -> None:
    offenders = []
    for path in files_of_all_wings():
        package, allowed = PLAN[path.relative_to(ROOT).parts[0]]
        forbidden = (WINGS - allowed - {package}) | {BEYOND, "tests", "benchmarks", *PLAN}
        offenders += report(path, (one for one in imports_in(path) if one.root in forbidden))
    assert not offenders, "\n".join(offenders)


def test_protocol_is_pure() -> None:
    offenders = []
    for path in files_of("protocol"):
        offenders += report(path, (one for one in imports_in(path) if one.root in IMPURE))
    assert not offenders, "\n".join(offenders)


def test_ctypes_stays_in_the_kernel_wing() -> None:
    offenders = []
    for path in files_of_all_wings():
        wrong = [one for one in imports_in(path) if one.root in ("ctypes", "_ctypes", "cffi", "prctl")]
        if path.relative_to(ROOT).parts[0] == "kernel":
            # python-prctl belongs to the extra: the kernel wing imports it only inside the function that needs it.
            wrong = [one for one in wrong if one.root == "prctl" and one.at_top]
        offenders += report(path, wrong)
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(("folder", "allowed"), [("protocol", {"msgpack"}), ("kernel", {"prctl"})])
def test_the_lower_wings_import_next_to_nothing(folder: str, allowed: set[str]) -> None:
    known = sys.stdlib_module_names | allowed | {PLAN[folder][0]}
    offenders = []
    for path in files_of(folder):
        offenders += report(path, (one for one in imports_in(path) if one.root not in known))
    assert not offenders, "\n".join(offenders)


def test_there_is_no_junk_drawer() -> None:
    offenders = []
    for path in files_of_all_wings():
        names = {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts}
        if names & JUNK_DRAWERS:
            offenders.append(str(path.relative_to(ROOT)))
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    "package", sorted(package for folder, (package, _) in PLAN.items() if (ROOT / folder).exists())
)
def test_a_wing_can_be_imported_alone(package: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True, timeout=60)


def test_import_postcopy_is_light() -> None:
    program = "import sys, postcopy; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "postcopy" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import postcopy_workers.custodian", "postcopy_workers.custodian"),
        ("def f():\n    from postcopy_workers import custodian", "postcopy_workers"),
        ("import importlib\nimportlib.import_module('postcopy_workers')", "postcopy_workers"),
        ("from . import faces", "postcopy.cli"),
        ("from ..block import Block", "postcopy.block"),
        ("from .... import escape", BEYOND),
    ],
)
def test_this_file_sees_every_kind_of_import(source: str, module: str) -> None:
    assert module in {one.module for one in imports_of(source, "postcopy.cli")}


def test_the_rules_read_every_file() -> None:
    """A rule over an empty list would always hold."""
    for folder, (package, _) in PLAN.items():
        assert ROOT / folder / package / "__init__.py" in files_of(folder)
    assert len(files_of_all_wings()) > 100
    assert sum(len(imports_in(path)) for path in files_of_all_wings()) > 1000
