"""Which module of the package imports which: the graph behind docs/architecture.md (tests/test_kit.py has the rules).

``python docs/house.py`` prints rooms and floors, and a circle if there is one.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ROOT_ROOMS", "circle", "floors", "import_graph", "modules", "room_graph", "room_of"]

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "transcnn"
PAPER = ["attention", "layers", "blocks", "backbone", "variants", "levels"]
# Modules that are not of the room of their folder: the paper is six files, and the names of the published tensors are
# known to it, while all else about checkpoints is above it.
ROOT_ROOMS = {**dict.fromkeys(PAPER, "the paper"), "__main__": "cli", "": "transcnn"}
ROOT_ROOMS["checkpoints.published"] = "checkpoints.published"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name within the package ('' for the package itself) -> file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(package: Path = PACKAGE, *, everywhere: bool = True) -> dict[str, set[str]]:
    """Each module -> the modules of ours that it imports; ``everywhere``: also inside functions."""
    known = modules(package)
    return {name: _imported(name, path, known, everywhere, package.name) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path], everywhere: bool, package: str) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = name.split(".") if name else []
    home = own if path.name == "__init__.py" else own[:-1]
    found: set[str] = set()
    for node in _nodes(tree, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == package}
        elif isinstance(node, ast.ImportFrom):
            words = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*home[: len(home) - node.level + 1], *words]
            elif words[:1] == [package]:
                base = words[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return found & set(known)


def _nodes(tree: ast.Module, everywhere: bool) -> Iterable[ast.AST]:
    """Statements that run at import; all but those for type checkers where ``everywhere``."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


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
