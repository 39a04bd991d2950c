"""The public names: those of docs/reference.md exist, and README, docs and examples use no others."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

import transcnn
from transcnn.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = re.findall(
    r"^::: transcnn\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE
)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_can_be_imported(name):
    room, _, last = f"transcnn.{name}".rpartition(".")
    thing = getattr(importlib.import_module(room), last)
    assert callable(thing)
    assert thing.__doc__


def test_every_name_of_the_package_is_public():
    assert set(transcnn.__all__) <= set(PUBLIC)


def test_every_command_is_imported_by_one_pattern():
    modules = {name: target for name, (target, _) in COMMANDS.items()}
    verb = {"eval": "evaluate"}  # eval is taken in Python
    assert modules == {name: f"transcnn.commands.{verb.get(name, name)}:{verb.get(name, name)}" for name in COMMANDS}
    assert {f"commands.{verb.get(name, name)}.{verb.get(name, name)}" for name in COMMANDS} <= set(PUBLIC)


def test_rooms_are_there_after_the_import_of_the_package():
    for room in ("commands", "errors", "explain", "export", "fast", "settings"):
        assert getattr(transcnn, room).__name__ == f"transcnn.{room}"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = transcnn.nothing  # pyright: ignore


def snippets(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    return [textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)]


def used(code: str) -> set[str]:
    """Names of ours, without ``transcnn.``, that a piece of Python imports or reads off the package."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transcnn":
            base = (node.module or "").partition(".")[2]
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Attribute):
            words = ast.unparse(node).split(".")
            if words[0] == "transcnn" and all(word.isidentifier() for word in words):
                found.add(".".join(words[1:]))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_use_public_names_alone(path):
    rooms = {name.rpartition(".")[0] for name in PUBLIC} | {"__version__"}
    names = {name for code in snippets(path) for name in used(code)}
    assert {name for name in names if name not in PUBLIC and name not in rooms} == set()
