"""The code blocks of the manual, and a folder in which they can be run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if path.name not in ("changelog.md", "contributing.md")
)

_MARK = re.compile(r"<!-- (file|not run): (.*?) -->", re.DOTALL)

COMMANDS = ("starmerge", "pip", "python", "docker", "jq", "llama-quantize", "id")
"""What shell blocks call; anything else is an error."""


_ANSWER = """answer() {
    case "$1" in
        "demo prepare") echo BASE ;;
        "demo list") echo demo:digits demo:past ;;
    esac
}
"""
"""What commands print whose output a block goes on with."""


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    line: int
    language: str
    code: str
    file: str | None
    """What the page calls it as a file: ``<!-- file: NAME -->`` before the block."""
    not_run: str | None
    """Why nobody can run it here: ``<!-- not run: WHY -->`` before the block."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page in their order, without the directives of Sphinx."""
    found = []
    marks: dict[str, str] = {}
    for token in MarkdownIt().parse((DOCS / page).read_text(encoding="utf-8")):
        if token.type == "html_block" and _MARK.search(token.content):
            marks = {kind: " ".join(text.split()) for kind, text in _MARK.findall(token.content)}
        elif token.type in ("fence", "code_block"):
            language = token.info.strip()
            if not language.startswith("{") and token.map is not None:
                where = token.map[0] + 1
                given = marks.get("file"), marks.get("not run")
                found.append(Block(page, where, language, token.content, *given))
            marks = {}
        elif token.nesting >= 0:
            marks = {}
    return found


def calls_of(block: Block, folder: Path) -> list[list[str]]:
    """Run a shell block where its commands only tell how they are called; return their calls."""
    told = folder / ".calls"
    told.write_text("")
    tell = "".join(
        f"{name}() {{ {{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >> .calls; "
        'answer "$*"; }\n'
        for name in COMMANDS
    )
    ran = subprocess.run(
        ["/bin/bash", "-e", "-u", "-c", f"PATH=\n{_ANSWER}{tell}{block.code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{block}: {ran.stderr}"
    calls = told.read_text().split("\x1e")[:-1]
    told.unlink()
    return [call.split("\x1f")[:-1] for call in calls]


def put(source: Path, place: Path) -> None:
    """Put a file or a folder somewhere, without copying what is in it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copy(source, place)
    elif not place.exists():
        shutil.copytree(source, place, copy_function=os.link)
