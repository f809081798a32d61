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


def test_the_stops_of_a_remote_fault_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8").partition("\n## How to follow a remote fault\n")[2]
    stops = re.findall(r"`([a-z_/]+\.py):(\w+)`", text.partition("\n## ")[0])
    assert 10 < len(stops) < 24
    files = {path: ROOT / path for path, _ in stops}
    assert [path for path, file in files.items() if not file.exists()] == []
    missing = [
        f"{path}:{name}"
        for path, name in stops
        if not re.search(rf"^ *(?:def|class) {name}\b", files[path].read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []
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
