"""The house: what an import needs, which room may know which, and that the words around the code are true."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import transcnn
from timing import allowed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from house import circle, import_graph, imports, name_of  # noqa: E402  (a script of docs, no package)

PACKAGE = ROOT / "src" / "transcnn"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
GRAPH = import_graph()

# What the extras bring: none of it is there after `pip install transcnn`.
EXTRAS = "datasets gradio jsonargparse lightning matplotlib onnx onnxruntime onnxscript openvino pandas pyarrow rich"
EXTRAS += " segmentation_models_pytorch sklearn tensorboard torchmetrics transformers webdataset"

# Hides the extras from an interpreter, as if they were not installed.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {set(EXTRAS.split())!r} else super().find_spec(name, path, target)
sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


# --- imports --------------------------------------------------------------------------------------------------------


COMMANDS_TRIED = [["train"], ["eval", "run"], ["predict", "run", "a.png"]]


@pytest.fixture(scope="module")
def without_extras() -> subprocess.CompletedProcess[str]:
    """An interpreter without the extras: what the package alone imports, which names timm knows after it, a network's
    output shape, and exit codes of commands that need an extra."""
    return run_python(
        HIDE + "import transcnn, transcnn.cli\n"
        "print({'torch', 'timm'} & set(sys.modules))\n"
        "import timm.models\n"
        "print(timm.is_model('transcnn_tiny'), type(sys.meta_path[0]).__name__ != '_AfterTimm')\n"
        "import torch\n"
        "model = timm.create_model('transcnn_test').eval()\n"
        "print(tuple(model(torch.zeros(1, 3, 64, 64)).shape))\n"
        f"print([transcnn.cli.main(command) for command in {COMMANDS_TRIED}])"
    )


def test_timm_knows_our_names_whichever_is_imported_first(without_extras: subprocess.CompletedProcess[str]) -> None:
    """And the package alone, as the command line imports it, needs no torch."""
    assert without_extras.stdout.splitlines()[:2] == ["set()", "True True"], without_extras.stderr


def test_core_alone_builds_every_model(without_extras: subprocess.CompletedProcess[str]) -> None:
    """With none of the extras installed, the package imports, and its networks run."""
    assert without_extras.returncode == 0, without_extras.stderr
    assert without_extras.stdout.splitlines()[2] == "(1, 10)"


def test_missing_extra_is_named(without_extras: subprocess.CompletedProcess[str]) -> None:
    assert without_extras.stdout.splitlines()[3] == "[2, 2, 2]", without_extras.stderr
    lines = without_extras.stderr.strip().splitlines()
    assert len(lines) == len(COMMANDS_TRIED)
    assert all('pip install "transcnn[train]"' in line for line in lines)


def test_subpackages_are_there_after_the_import(fresh_imports: dict[str, Any]) -> None:
    assert fresh_imports["rooms"] == {"optimize", "attention_maps"}


def test_import_is_quick(fresh_imports: dict[str, Any]) -> None:
    """Under one second of CPU time beyond torch and timm, and nothing heavy comes along."""
    assert fresh_imports["seconds"] < allowed(1)
    assert set(EXTRAS.split()).isdisjoint(fresh_imports["transcnn"])


def test_attention_needs_torch_alone() -> None:
    for name in ("attention", "grids", "masking"):
        roots = {imported.partition(".")[0] for imported in imports(PACKAGE / f"{name}.py")} - {"transcnn"}
        assert roots - set(sys.stdlib_module_names) == {"torch"}


ARROWS = {
    "errors": set(),
    "masking": set(),
    "grids": {"masking"},
    "attention": {"grids", "masking"},
    "checkpoints.published": {"errors"},
    "levels": {"errors"},
    "layers": set(),
    "blocks": {"attention", "grids", "layers", "masking"},
    "backbone": {"attention", "blocks", "grids", "layers", "masking"},
    "text": set(),
    "report.fonts": set(),
    "report.plots": {"checkpoints.files", "report.fonts", "errors", "text"},
    "report.page": {"checkpoints.files", "text", "plain"},
    "report.classify": {"checkpoints.files", "report.page", "report.plots", "errors", "text"},
}


@pytest.mark.parametrize(("room", "allowed"), ARROWS.items(), ids=list(ARROWS))
def test_what_a_module_may_import(room: str, allowed: set[str]) -> None:
    assert GRAPH[room] - {""} <= allowed


# The one-way imports between rooms: what may not be known, whatever the way.
NEVER = {
    "tasks": {"training", "commands", "demo", "cli"},
    "checkpoints": {"commands", "tasks", "training", "cli"},
    "training": {"commands", "cli"},
    "dense": {"commands", "tasks", "training", "checkpoints", "cli"},
    "plugging": {"commands", "tasks", "training", "checkpoints", "dense", "cli"},
    "fast": {"commands", "tasks", "training", "checkpoints", "data", "cli"},
}


def wrong_imports(name: str, known: set[str]) -> set[str]:
    """What a module imports although its room may not."""
    room = name.partition(".")[0]
    barred = NEVER.get(room, set()) | (set() if room in ("cli", "commands") else {"commands"})
    if name != "__main__":
        barred = barred | {"cli"}
    if room == "data":
        barred = barred | {other.partition(".")[0] for other in known} - {"data", "errors", "plain", "settings", "text"}
    return {other for other in known if other.partition(".")[0] in barred}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_one_way(path: Path) -> None:
    """cli → commands → training → tasks → data, dense, fast → the paper."""
    name = name_of(path)
    assert wrong_imports(name, GRAPH[name]) == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    """Nor by way of imports inside functions."""
    assert GRAPH.keys() >= {"attention", "backbone", "errors"}
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("name", "imported", "wrong"),
    [
        ("tasks.classify", {"data.sets", "training.run"}, {"training.run"}),
        ("checkpoints.loading", {"commands.train", "errors"}, {"commands.train"}),
        ("checkpoints.loading", {"commands"}, {"commands"}),
        ("explain.maps", {"commands.predict", "attention"}, {"commands.predict"}),
        ("attention", {"cli"}, {"cli"}),
        ("commands.train", {"cli", "commands.predict", "training.run"}, {"cli"}),
        ("data.sources.tar", {"errors", "data.images", "fast"}, {"fast"}),
        ("cli", {"commands.train", "errors"}, set()),
        ("training.run", {"tasks.base", "data.sets"}, set()),
    ],
)
def test_an_arrow_that_points_back_is_found(name: str, imported: set[str], wrong: set[str]) -> None:
    assert wrong_imports(name, imported) == wrong


def test_a_circle_is_found() -> None:
    graph = {"cli": {"training"}, "training": {"tasks"}, "tasks": {"data"}, "data": {"errors"}, "errors": set()}
    assert circle(graph) == []
    graph["data"] = {"training", "errors"}
    assert set(circle(graph)) == {"training", "tasks", "data"}


def test_imports_are_seen_wherever_they_are(tmp_path: Path) -> None:
    for name in ("data/__init__", "data/images", "tasks/__init__", "tasks/base", "errors"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("")
    module = tmp_path / "tasks" / "classify.py"
    module.write_text(
        "import torch.nn\nfrom typing import TYPE_CHECKING\nfrom ..data import images\nfrom . import base\n"
        "if TYPE_CHECKING:\n    from ..training import run\ntry:\n    import timm\nexcept ImportError:\n    pass\n"
        "def late():\n    from ..errors import UserError\n    class Inner:\n        from transcnn import cli\n"
    )
    found = {"torch.nn", "typing", "typing.TYPE_CHECKING", "transcnn.data.images", "transcnn.tasks.base", "timm"}
    found |= {"transcnn.errors", "transcnn.errors.UserError", "transcnn", "transcnn.cli"}
    assert imports(module, tmp_path) == found


def extras_asked_for(source: str) -> set[str]:
    """The extras that calls of ``require(module, extra)`` name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
            found |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return found


PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
(_TABLE,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^\[", PYPROJECT, re.MULTILINE | re.DOTALL)
EXTRAS_THERE = set(re.findall(r"^(\w+) = \[", _TABLE, re.MULTILINE))


@pytest.mark.parametrize("path", [path for path in MODULES if "transcnn.errors.require" in imports(path)], ids=name_of)
def test_an_extra_that_is_asked_for_exists(path: Path) -> None:
    assert extras_asked_for(path.read_text(encoding="utf-8")) <= EXTRAS_THERE


def test_an_extra_that_lacks_is_found() -> None:
    source = 'a = require("onnxruntime", "onnx")\ndef late():\n    errors.require(name, "export").run()\n'
    assert extras_asked_for(source) == {"onnx", "export"}
    assert "onnx" not in EXTRAS_THERE
    assert {"train", "export", "data", "dense", "demo"} <= EXTRAS_THERE


def test_formats_need_extras_that_exist() -> None:
    from transcnn.export.exporting import FORMATS

    asked = {extra for kind in FORMATS.values() for _, extra in kind.needs}
    assert "export" in asked
    assert asked <= EXTRAS_THERE


PUBLIC_TIMM = {
    "timm",
    "timm.models",
    "timm.layers",
    "timm.data",
    "timm.optim",
    "timm.scheduler",
    "timm.loss",
    "timm.utils",
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_public_timm(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(a.name in PUBLIC_TIMM for a in node.names if a.name.partition(".")[0] == "timm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "timm":
            assert node.module in PUBLIC_TIMM
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


# --- the words around the code --------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader would."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("transcnn_tiny").state_dict(), "TransCNN-Tiny.pth")
    snippets = blocks("python")
    assert len(snippets) >= 4
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    logits, maps, y = names["logits"], names["maps"], names["y"]
    assert tuple(logits.shape) == (2, 10)  # pyright: ignore
    assert [tuple(m.shape[2:]) for m in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]  # pyright: ignore
    assert tuple(y.shape) == (2, 64, 45, 60)  # pyright: ignore


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("transcnn ")])
def test_readme_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transcnn.cli import load_command, parse

    monkeypatch.chdir(ROOT)
    _, command, *arguments = shlex.split(line)
    parsed = parse(command, load_command(command), arguments)
    assert parsed


@pytest.mark.skipif(not Path("/usr/bin/make").exists(), reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "coverage", "faults", "lint", "install"])
def test_makefile_knows(target: str) -> None:
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_names_the_make_targets_that_are() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z]+)`?$", "\n".join(shell_lines()), re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z]+)`", README))
    assert named >= {"demo", "test"}
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_readme_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert "docs/images/hmhsa.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


ROWS = re.findall(r"^\| ((?:transcnn|hatnet)_\w+) \| ([\d.]+) M \| (\d+) \|", README, re.MULTILINE)


def test_readme_table_has_all_published_models() -> None:
    models = [timm.get_pretrained_cfg(name) for name in timm.list_models(module="variants", pretrained=True)]
    published = {config.architecture for config in models if "yun-liu" in (config.url or "")}
    assert len(published) == 8
    assert {name for name, _, _ in ROWS} == published


@pytest.mark.parametrize(("name", "millions", "size"), ROWS, ids=[row[0] for row in ROWS])
def test_readme_table(name: str, millions: str, size: str) -> None:
    model = timm.create_model(name, device="meta")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions
    assert timm.get_pretrained_cfg(name).input_size[1:] == (int(size), int(size))


def test_one_version() -> None:
    """The package's own attribute is the source; the other files must not fall behind."""
    version = transcnn.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version  # pyright: ignore
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1) == version  # pyright: ignore
    literals = [path for path in MODULES if version in re.findall(r'["\'](\d+\.\d+\.\d+)["\']', path.read_text())]
    assert literals == [PACKAGE / "__init__.py"]


def test_pins_satisfy_the_ranges() -> None:
    """constraints.txt pins each package that pyproject.toml names, within its range."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[re.sub(r"[-_.]+", "-", pin.name).lower()] = next(iter(pin.specifier)).version
    wanted = [Requirement(line) for line in metadata("transcnn").get_all("Requires-Dist") or []]
    assert len(wanted) > 20
    for requirement in wanted:
        if requirement.name != "transcnn":
            pinned = pins.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
            assert pinned, f"{requirement.name} has no pin in constraints.txt"
            assert Version(pinned) in requirement.specifier, f"{requirement} and {pinned}"


def test_ci_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert (PACKAGE / "py.typed").exists()
