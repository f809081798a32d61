"""The walls of the service, read from the syntax trees: who may import whom (see docs/design.md).

Imports inside functions and under TYPE_CHECKING count too: a wall with a door for "only sometimes" is no wall.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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

# `protocol` is pure: what can block, look at a clock, roll dice or reach the machine stays out of it.
IMPURE = frozenset(
    """
    _ctypes _posixsubprocess _socket _thread asyncio concurrent ctypes fcntl mmap multiprocessing os pathlib posix
    random resource secrets select selectors shutil signal socket socketserver ssl subprocess tempfile threading time
    zmq
    """.split()
)
BEYOND = "(beyond the wing)"  # where more dots lead than there are packages
JUNK_DRAWERS = frozenset({"utils", "util", "common", "helpers", "helper", "base", "manager", "managers", "misc"})
# What a light client must not pull in at `import postcopy`.
HEAVY = ("zmq", "typer", "rich", "numpy", "prctl", "pydantic", "textual", "postcopy_supervisor", "postcopy_workers")


@dataclass(frozen=True)
class Import:
    """One imported name of a file: ``module`` absolute, ``name`` what a ``from`` import takes out of it, or ''."""

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
    """Full name of what ``from <level dots><module> import`` reaches out of a module in ``package``."""
    if level == 0:
        return module
    parents = package.split(".")
    if level > len(parents):
        return BEYOND
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [module])])


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports_in(path: Path) -> list[Import]:
    folder = path.relative_to(ROOT).parts[0]
    package = ".".join(path.relative_to(ROOT / folder).parent.parts)
    return list(imports_of(path.read_text("utf-8"), package))


def files(*folders: str) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for folder in folders for path in files_of(folder)]


def complain(path: Path, wrong: list[Import]) -> str:
    places = (f"{path.relative_to(ROOT)}:{one.line} imports {one.module} {one.name}".rstrip() for one in wrong)
    return "; ".join(places)


@pytest.mark.parametrize("folder", sorted(PLAN))
def test_every_wing_stands(folder: str) -> None:
    package, _ = PLAN[folder]
    if folder in NOT_BUILT_YET and not (ROOT / folder).exists():
        pytest.skip(f"{folder} is not built yet")
    assert (ROOT / folder / package / "__init__.py").is_file()
    holds = {path.name for path in (ROOT / folder).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert holds == {package}, f"{folder} must hold one import package"


@pytest.mark.parametrize("path", files(*PLAN))
def test_a_wing_imports_only_what_the_plan_allows(path: Path) -> None:
    package, allowed = PLAN[path.relative_to(ROOT).parts[0]]
    wrong = [one for one in imports_in(path) if one.root in WINGS - allowed - {package}]
    wrong += [one for one in imports_in(path) if one.root in (BEYOND, "tests", "benchmarks", *PLAN)]
    assert not wrong, complain(path, wrong)


@pytest.mark.parametrize("path", files("protocol"))
def test_protocol_is_pure(path: Path) -> None:
    wrong = [one for one in imports_in(path) if one.root in IMPURE]
    assert not wrong, complain(path, wrong)


@pytest.mark.parametrize("path", files(*PLAN))
def test_ctypes_stays_in_the_kernel_wing(path: Path) -> None:
    wrong = [one for one in imports_in(path) if one.root in ("ctypes", "_ctypes", "cffi", "prctl")]
    if path.relative_to(ROOT).parts[0] == "kernel":
        # python-prctl is of the extra: even here only inside the function that needs it.
        wrong = [one for one in wrong if one.root == "prctl" and one.at_top]
    assert not wrong, complain(path, wrong)


@pytest.mark.parametrize(("folder", "allowed"), [("protocol", {"msgpack"}), ("kernel", {"prctl"})])
def test_the_lower_wings_need_next_to_nothing(folder: str, allowed: set[str]) -> None:
    for path in files_of(folder):
        known = sys.stdlib_module_names | allowed | {PLAN[folder][0]}
        wrong = [one for one in imports_in(path) if one.root not in known]
        assert not wrong, complain(path, wrong)


@pytest.mark.parametrize("path", files(*PLAN))
def test_there_is_no_junk_drawer(path: Path) -> None:
    names = {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts}
    assert not names & JUNK_DRAWERS


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
