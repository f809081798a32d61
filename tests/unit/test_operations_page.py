"""docs/operations.md is true: ``operations_claims.toml`` names the tests of each of its claims."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "operations.md"
CLAIMS = Path(__file__).with_name("operations_claims.toml")
Claims = dict[str, dict[str, list[str] | str]]


def claims() -> Claims:
    return tomllib.loads(CLAIMS.read_text("utf-8"))


def units(page: str) -> Iterator[tuple[str, str]]:
    """The heading above, and the words, of each paragraph, table row (without a table's head) and item of a list."""
    heading = ""
    for block in re.split(r"\n\s*\n", re.sub(r"^```.*?^```\n", "", page, flags=re.MULTILINE | re.DOTALL)):
        block = block.strip()
        if block.startswith("#"):
            heading = block.lstrip("# ")
        elif block.startswith("|"):
            rows = [row.strip("| ") for row in block.splitlines()[1:] if not re.fullmatch(r"[|\s:-]+", row)]
            yield from ((heading, " ".join(row.split())) for row in rows)
        elif block:
            yield from ((heading, " ".join(item.removeprefix("- ").split())) for item in re.split(r"\n(?=- )", block))


@cache
def functions(file: Path) -> frozenset[str]:
    return frozenset(
        node.name for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    )


def exists(test: str) -> bool:
    module, _, name = test.partition("::")
    file = TESTS / f"{module}.py"
    return file.exists() and f"test_{name}" in functions(file)


def test_every_claim_has_a_test_and_every_test_a_claim() -> None:
    found, known = list(units(PAGE.read_text("utf-8"))), claims()
    without = [
        (heading, text[:60])
        for heading, text in found
        if sum(text.startswith(beginning) for beginning in known.get(heading, {})) != 1
    ]
    assert without == [], "add the tests of what the page says to operations_claims.toml"
    texts = {heading: [text for under, text in found if under == heading] for heading, _ in found}
    gone = [
        (heading, beginning)
        for heading, entries in known.items()
        for beginning in entries
        if not any(text.startswith(beginning) for text in texts.get(heading, ()))
    ]
    assert gone == [], "the page does not say that any more"


def test_the_tests_that_are_named_exist() -> None:
    named = [
        test for entries in claims().values() for tests in entries.values() if isinstance(tests, list) for test in tests
    ]
    assert len(named) > 200
    assert [test for test in named if not exists(test)] == []


def test_what_has_no_test_says_why() -> None:
    assert all(tests for entries in claims().values() for tests in entries.values())
