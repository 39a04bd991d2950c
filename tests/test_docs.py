"""The pages of docs/: the site builds without a warning and from here alone, and its commands and snippets hold."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from transcnn.cli import load_command, parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
SPAN = re.compile(r"`(transcnn \w+ [^`]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Each line of README, pages and recipes that calls our command, also within the text, with where it stands."""
    found = []
    for page in (ROOT / "README.md", *PAGES):
        text = page.read_text(encoding="utf-8")
        for language, block in FENCE.findall(text):
            lines = block.splitlines() if language in ("sh", "bash", "") else []
            found += [(page.name, line.removeprefix("$ ")) for line in lines if re.match(r"(\$ )?transcnn ", line)]
        found += [(page.name, " ".join(line.split())) for line in SPAN.findall(FENCE.sub("", text))]
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        lines = re.findall(r"^# (?:command)? +(transcnn .*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        assert lines, f"{recipe.name} has no command"
        found += [(recipe.name, line) for line in lines]
    return sorted({(where, line) for where, line in found if "--help" not in line})


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, command, *arguments = shlex.split(line, comments=True)
    assert parse(command, load_command(command), arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_import_what_there_is(page: Path) -> None:
    """They need runs and images of the reader's, so they aren't run; but they are Python, and their names exist."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transcnn"):
                exec(compile(ast.Module([node], []), page.name, "exec"), {})
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transcnn":
                import transcnn

                assert hasattr(transcnn, node.attr)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='needs the extra "docs"')
    pytest.importorskip("mkdocstrings", reason='needs the extra "docs"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    loaded = re.compile(
        r'(?:<script[^>]+src|<link[^>]+(?:stylesheet|preload|preconnect)[^>]*href|<img[^>]+src)="?(https?:[^">]+)'
    )
    assert [url for page in pages for url in loaded.findall(page.read_text(encoding="utf-8"))] == []
