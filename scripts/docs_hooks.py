"""What mkdocs needs beyond docs/: pages that stand elsewhere in the repository, and links to them.

On GitHub, or in an editor, the links of docs/ lead to files of the repository. On the built pages a link to a page that
stands elsewhere leads to its copy, and a link to any other file becomes the path of that file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "protocol/README.md": "protocol.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
COPIED = ("protocol/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand outside docs/."""
    for path in COPIED:
        files.append(File.generated(config, PAGES[path], content=_moved(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/ to files outside of it."""
    if page.file.generated_by is not None:
        return markdown
    return _turned(markdown, "docs")


def _moved(path: str) -> str:
    return _turned((ROOT / path).read_text("utf-8"), str(Path(path).parent))


def _turned(markdown: str, directory: str) -> str:
    def turn(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        full = (ROOT / directory / target).resolve()
        if not full.is_relative_to(ROOT):
            return found[0]
        path = str(full.relative_to(ROOT))
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/systemd/"):
            return f"{text} (`{path}`)"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(turn, markdown)
