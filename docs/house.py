"""Which module of the package imports which: the graph behind docs/architecture.md (tests/test_kit.py has the rules).

``python docs/house.py`` prints rooms and floors, and a circle if there is one.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import sys
from collections import defaultdict
from pathlib import Path

__all__ = ["ROOT_ROOMS", "circle", "floors", "import_graph", "imports", "modules", "name_of", "room_graph", "room_of"]

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "transcnn"
PAPER = ["attention", "grids", "masking", "layers", "blocks", "backbone", "variants", "levels"]
# Modules that are not of the room of their folder: the paper is eight files, and the names of the published tensors are
# known to it, while all else about checkpoints is above it.
ROOT_ROOMS = {**dict.fromkeys(PAPER, "the paper"), "__main__": "cli", "": "transcnn"}
ROOT_ROOMS["checkpoints.published"] = "checkpoints.published"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name within the package ('' for the package itself) -> file."""
    return {name_of(path, package): path for path in sorted(package.rglob("*.py"))}


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a module within the package, '' for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path, package: Path = PACKAGE) -> frozenset[str]:
    """Dotted names that a module imports, wherever in it, but for types alone; ours begin with 'transcnn'.

    Of ``from a import b`` that is a.b where this is a module of ours, else both a and a.b.
    """
    found: set[str] = set()
    own = ["transcnn", *path.relative_to(package).parts[:-1]]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*own[: len(own) - node.level + 1], *base.split(".")]).rstrip(".")
            for alias in node.names:
                file = package.joinpath(*base.split(".")[1:], alias.name)
                module = base.startswith("transcnn") and (file.with_suffix(".py").is_file() or file.is_dir())
                found.update({f"{base}.{alias.name}"} if module else {base, f"{base}.{alias.name}"})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found)


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each module -> the modules of ours that it imports, also inside functions."""
    known = modules(package)
    return {
        name: {other.partition(".")[2] for other in imports(path, package) if other.startswith("transcnn")}
        & set(known) - {name}
        for name, path in known.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, its first module again at the end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room_of(module: str) -> str:
    """The room of a module: the paper, another file of the root, or a folder of it."""
    return ROOT_ROOMS.get(module, module.partition(".")[0])


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between rooms."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, others in graph.items():
        rooms[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    return dict(rooms)


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """How far up each is: 0 imports nothing, others are one above the highest that they import. Needs no circles."""
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[other] for other in graph.get(name, ())), default=-1)
    return height


if __name__ == "__main__":
    graph = import_graph(Path(sys.argv[1]).resolve() if sys.argv[1:] else PACKAGE)
    rooms = room_graph(graph)
    print(len(graph), "modules,", len(rooms), "rooms; a circle of modules:", circle(graph) or "none")
    print("a circle of rooms:", circle(rooms) or "none")
    if not circle(graph):
        print(1 + max(floors(graph).values()), "floors of modules")
    if not circle(rooms):
        for level, name in sorted((level, name) for name, level in floors(rooms).items()):
            print(level, name, "->", ", ".join(sorted(rooms[name])))
