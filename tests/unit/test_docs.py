"""The Markdown pages: links resolve, commands and options exist, messages are real, lines are short.

``test_shape.py`` looks for retired words in them."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("protocol", "kernel", "wire", "supervisor", "workers", "sources", "client")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "protocol" / "README.md"])
GUIDES = [page for page in PAGES if page.parent != ROOT / "protocol"]
LINE, PARAGRAPH = 100, 80
GROUPS = ("attach", "probe", "restore", "trace")
OTHER_PROGRAMS = {"--no-pci", "--vdev", "--no-mlockall", "--device", "--oldest", "--full"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken(page: Path) -> Iterator[str]:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    assert list(broken(page)) == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    elsewhere = {"protocol.md", "changelog.md", "contributing.md"}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} | elsewhere


def test_pre_commit_checks_what_scripts_check_checks() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    script = (ROOT / "scripts" / "check").read_text("utf-8")
    checks = re.findall(r"^(\.venv/bin/.+)$", script, re.MULTILINE)
    assert len(checks) >= 3
    assert re.findall(r"^ +entry: (.+)$", config, re.MULTILINE) == checks


# --- commands and options ---------------------------------------------------------------------------------------------


def shell_lines(text: str) -> Iterator[str]:
    """The commands of the shell blocks, one a line, without comments and the texts behind ``<<``."""
    for block in fenced(text, "sh"):
        block = re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r"[|;&]", line.partition(" # ")[0])


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of postcopy that a page names, without the word ``postcopy``."""
    spans = re.findall(r"`(postcopy [^`]+)`", prose(text))
    for line in [*shell_lines(text), *spans]:
        if line.strip().startswith("postcopy "):
            yield shlex.split(line.strip().replace("...", ""))[1:]


def split(words: list[str]) -> tuple[tuple[str, ...], set[str]]:
    """The name of the command and its options; behind ``--`` are those of another program."""
    words = words[: words.index("--")] if "--" in words else words
    depth = 2 if words[0] in GROUPS or words[:2] == ["source", "qemu"] else 1
    name = tuple(word for word in words[:depth] if not word.startswith("-"))
    return name, {word.partition("=")[0] for word in words[len(name) :] if word.startswith("--")}


ASK_FOR_HELP = """
import json, os, sys
from postcopy import __main__ as program
from postcopy.commands import application
application()
for command in json.loads(sys.argv[1]):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(theirs, 1)
        os.close(ours)
        sys.argv = ["postcopy", *command, "--help"]
        program.main()
    os.close(theirs)
    with open(ours) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps("" if status else text), flush=True)
"""


@cache
def helps() -> dict[tuple[str, ...], str]:
    """What ``postcopy COMMAND --help`` prints, for each command in the pages. One interpreter forks for all of them."""
    named = sorted(every_command())
    paths = os.pathsep.join(str(ROOT / wing) for wing in WINGS)
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP, json.dumps(named)],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "TERM": "dumb"},
        capture_output=True,
        timeout=200,
        check=True,
    )
    return dict(zip(named, map(json.loads, done.stdout.splitlines()), strict=True))


def every_command() -> dict[tuple[str, ...], set[str]]:
    """What the pages name: commands and their options."""
    named: dict[tuple[str, ...], set[str]] = {}
    for page in GUIDES:
        for words in commands(page.read_text("utf-8")):
            name, options = split(words)
            named.setdefault(name, set()).update(options)
    return named


def test_every_command_and_its_options_exist() -> None:
    named = every_command()
    assert {("serve",), ("attach", "vhost-user"), ("trace", "diff")} <= set(named)
    assert [command for command, text in helps().items() if not text] == []
    unknown = {
        command: missing
        for command, options in named.items()
        if (missing := {one for one in options if not re.search(rf"{one}\b", helps()[command])})
    }
    assert unknown == {}


def test_every_option_in_prose_exists() -> None:
    known = "\n".join(helps().values())
    scripts = [*(ROOT / "scripts").iterdir(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*/*.py")]
    known += "\n".join(file.read_text("utf-8") for file in scripts if file.is_file() and file != Path(__file__))
    for page in GUIDES:
        spans = " ".join(re.findall(r"`([^`\n]+)`", prose(page.read_text("utf-8"))))
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", spans)) - OTHER_PROGRAMS
        assert {one for one in named if not re.search(rf"{one}\b", known)} == set(), name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_can_be_pasted(page: Path) -> None:
    """Shell blocks are valid shell, Python blocks valid Python."""
    text = page.read_text("utf-8")
    for block in fenced(text, "sh"):
        done = subprocess.run(["bash", "-n"], input=block.encode(), capture_output=True, timeout=20, check=False)
        assert (done.returncode, done.stderr) == (0, b""), block
    for block in fenced(text, "python"):
        ast.parse(block)


# --- messages ---------------------------------------------------------------------------------------------------------


def quoted_messages() -> list[str]:
    """The messages in the first column of the tables in docs/troubleshooting.md."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    tables = re.findall(r"^\| message contains .*?(?=^$)", text, re.MULTILINE | re.DOTALL)
    return [
        message
        for table in tables
        for row in table.splitlines()
        for message in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]


def test_messages_in_troubleshooting_are_real() -> None:
    files = [file for wing in WINGS for file in (ROOT / wing).rglob("*.py")]
    # A message may be cut into several literals: join those that stand on lines of their own.
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text("utf-8") for file in files))
    assert len(quoted_messages()) > 15
    assert [message for message in quoted_messages() if message not in source] == []


# --- the way of a fault -----------------------------------------------------------------------------------------------


MOST_STOPS = 19


@cache
def definitions(path: Path) -> dict[str, list[str]]:
    """By the dotted name of each definition in a module: the docstring of a class, or the text of the function or
    method, of which a closure is a part."""
    found: dict[str, list[str]] = {}
    source = path.read_text("utf-8")
    lines = source.splitlines()

    def walk(parent: ast.AST, names: tuple[str, ...], text: str) -> None:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                plain = isinstance(node, ast.ClassDef)
                own = text or ("" if plain else "\n".join(lines[node.lineno - 1 : node.end_lineno]))
                found.setdefault(".".join([*names, node.name]), []).append(own or ast.get_docstring(node) or "")
                walk(node, (*names, node.name), own)
            else:
                walk(node, names, text)

    walk(ast.parse(source), (), "")
    return found


@cache
def defined() -> Counter[str]:
    """How often each dotted name, and each last part of one, is defined in all wings."""
    names = [name for wing in WINGS for file in (ROOT / wing).rglob("*.py") for name in definitions(file)]
    return Counter(names) + Counter(name.rpartition(".")[2] for name in names if "." in name)


def leads_to(text: str, name: str) -> bool:
    """Does a text name this definition: in full, or by a last part that nothing else has?"""
    last = name.rpartition(".")[2]
    return bool(re.search(rf"\b{re.escape(name)}\b", text)) or (
        defined()[last] == 1 and bool(re.search(rf"\b{last}\b", text))
    )


def way_of_a_fault() -> str:
    text = (ROOT / "docs" / "design.md").read_text("utf-8").partition("\n## How to follow a remote fault\n")[2]
    return text.partition("\n## ")[0]


def test_a_remote_fault_can_be_followed_by_go_to_definition() -> None:
    """Each stop is named by the stop before it, or, after one that returns, by the one before that. A message is named
    in the same way, and its docstring names the stop that takes it."""
    rows = re.findall(r"^\| (\d*) ?\| (\w+) \| `([a-z_/]+\.py):([\w.]+)` \|", way_of_a_fault(), re.MULTILINE)
    numbers = [int(number) for number, *_ in rows if number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 10 < len(numbers) <= MOST_STOPS
    texts = []
    for _, _, path, name in rows:
        found = definitions(ROOT / path).get(name, [])
        assert len(found) == 1, f"{path}:{name} is defined {len(found)} times"
        texts.append(found[0])
    for at, (_, process, _, name) in enumerate(rows[1:], 1):
        taken = rows[at - 1][1] == "message"
        same = at > 1 and process in ("message", rows[at - 2][1]) and not taken
        before = texts[at - 1] + (texts[at - 2] if same else "")
        assert leads_to(before, name), f"{rows[at - 1][3]} does not lead to {name}"


def test_the_functions_in_the_way_of_a_fault_exist() -> None:
    named = set(re.findall(r"`([A-Za-z_]+\.[A-Za-z_]+)`", way_of_a_fault()))
    assert len(named) > 15
    assert {name for name in named if defined()[name] != 1} == set()
    assert [path for path in modules_named() if not (ROOT / path).exists()] == []


def modules_named() -> list[str]:
    """Modules with their whole path in docs/design.md."""
    return re.findall(r"`([a-z]+/postcopy_?[a-z]*/[a-z_/]+\.py)`", (ROOT / "docs" / "design.md").read_text("utf-8"))


# --- lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_lines_and_paragraphs_are_short(page: Path) -> None:
    lines = prose(page.read_text("utf-8")).splitlines()
    long = [line for line in lines if len(line) > LINE and not line.startswith(("|", "![")) and " " in line.strip()]
    assert long == []
    plain = [
        not line.strip() or line.startswith(("|", "#", "- ", "<!--", ":::", "    ")) or line[:1].isdigit()
        for line in lines
    ]
    for breaks, group in groupby(zip(plain, lines, strict=True), key=lambda pair: pair[0]):
        words = " ".join(line for _, line in group).split()
        assert breaks or len(words) <= PARAGRAPH, " ".join(words[:12])
