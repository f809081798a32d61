"""The worker's package once more, without its statistics: to measure what they cost.

A copy whose common fault (``_shared``, ``_private`` of ``fast_answers``) counts and times nothing: every store into the
statistics page and the clock around them are removed from the source, all else stays. The tidying of page tables, which
is due by their count, is due here by the number of the page: as often, where pages come at random, once each. A
supervisor that is started with the copy's directory first in PYTHONPATH
forks these workers; nothing in the real ones knows of it.
"""

from __future__ import annotations

import ast
import os
import shutil
from importlib.util import find_spec

from .bench import BenchmarkFailed

ANSWERS = {"_shared": 4, "_private": 5}
"""The closures of common faults, and how many statements of each are statistics: two stores, clock, histograms."""
TIDYING = "if not page % TIMED: tidy(TIMED)"
TAKEN_OUT = {"counters", "begun", "plain"}


class Blind(ast.NodeTransformer):
    """Takes out what only serves the statistics; ``taken`` counts the statements."""

    def __init__(self) -> None:
        self.taken = 0

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return self._kept(node, any(_named(target) & TAKEN_OUT for target in node.targets))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        return self._kept(node, bool(_named(node.target) & TAKEN_OUT))

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if {"begun"} & {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}:
            tidies = any(isinstance(name, ast.Name) and name.id == "tidy" for name in ast.walk(node))
            self._kept(node, True)
            return ast.parse(TIDYING).body[0] if tidies else None
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """``begun or clock()``: the clock."""
        first = node.values[0]
        return node.values[-1] if isinstance(first, ast.Name) and first.id == "begun" else self.generic_visit(node)

    def _kept(self, node: ast.AST, taken: bool) -> ast.AST | None:
        self.taken += taken
        return None if taken else node


def package(directory: str) -> str:
    """Make it below ``directory``; what must come first in PYTHONPATH. Raises BenchmarkFailed when the fault handler is
    not any more as it is known here."""
    found = find_spec("postcopy_workers")
    if found is None or not found.submodule_search_locations:
        raise BenchmarkFailed("postcopy_workers is not installed")
    place = os.path.join(directory, "unseen")
    target = os.path.join(place, "postcopy_workers")
    shutil.copytree(found.submodule_search_locations[0], target, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.path.join(target, "fast_answers.py")
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ANSWERS:
            _blind(node)
    with open(path, "w", encoding="utf-8") as file:
        file.write(ast.unparse(tree))
    return place


def _blind(method: ast.FunctionDef) -> None:
    """Only the closure: what is prepared around it costs no fault anything."""
    closure = next(node for node in method.body if isinstance(node, ast.FunctionDef))
    blind = Blind()
    blind.generic_visit(closure)
    if blind.taken != ANSWERS[method.name]:
        told = f"{method.name} has {blind.taken} statements of statistics, {ANSWERS[method.name]} are known"
        raise BenchmarkFailed(f"{told}: see unseen.py")


def _named(target: ast.AST) -> set[str]:
    """The name that an assignment is to, or that it indexes."""
    inner = target.value if isinstance(target, ast.Subscript) else target
    return {inner.id} if isinstance(inner, ast.Name) else set()
