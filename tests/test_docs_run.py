"""What README and docs tell readers to type is typed here: commands through the CLI, Python blocks as they stand.

Each page runs from top to bottom in a folder with stand-ins for the reader's photographs and runs; tests/docs_rules.py
says what is made smaller, what is slow, and what can't run and why.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import transcnn
from docs_rules import DENSE, INSTEAD, NOT_RUN, SLOW, SMALLER
from transcnn.cli import load_command, main, parse
from transcnn.commands.train import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash")


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """("python", block) and ("command", line), in order; a line may go on after a backslash."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            yield "python", block
        elif language in SHELL or (not language and re.search(r"^(\$ )?transcnn ", block, re.MULTILINE)):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").strip()
                if (language in SHELL and line and not line.startswith("#")) or re.match(r"transcnn ", line):
                    yield "command", line


def inline(page: Path) -> list[str]:
    """Commands within sentences and tables that have arguments."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [line for line in re.findall(r"`(transcnn [a-z]+ [^`]+)`", text) if "…" not in line]


def rule(rules: Any, page: Path, line: str) -> Any:
    return next(
        (entry for entry in rules if re.search(entry if isinstance(entry, str) else entry[0], f"{page.name}: {line}")),
        None,
    )


def check_only(kind: str, line: str) -> None:
    """Python compiles; our commands parse."""
    if kind == "python":
        ast.parse(line)
    elif line.startswith("transcnn "):
        _, command, *arguments = shlex.split(line, comments=True)
        assert parse(command, load_command(command), arguments)


def run(page: Path, slow: bool, names: dict[str, Any]) -> tuple[int, int]:
    """Run a page's steps; how many ran, and how many were only parsed."""
    counts = [0, 0]
    for kind, text in steps(page):
        for old, new in INSTEAD:
            text = text.replace(old, new)
        lines = text.splitlines() if kind == "python" else [text]
        hopeless = [line for line in lines if rule(NOT_RUN, page, line)]
        if (hopeless and kind == "command") or (not slow and any(rule(SLOW, page, line) for line in lines)):
            check_only(kind, text)
            counts[1] += 1
            continue
        counts[0] += 1
        if kind == "python":
            kept = "\n".join("" if line in hopeless else line for line in lines)
            exec(compile(kept, f"{page.name}", "exec"), names)
        else:
            smaller = rule(SMALLER, page, text)
            arguments = shlex.split(text, comments=True)[1:] + (shlex.split(smaller[1]) if smaller else [])
            assert main(arguments) == 0, text
    return counts[0], counts[1]


@pytest.fixture(scope="module")
def stand_ins(class_image: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages speak of: photographs, a trained run, a published checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    for part, count in {"train": 8, "val": 3, "test": 3}.items():
        for label in range(3):
            (folder / "photos" / part / f"class_{label}").mkdir(parents=True)
            for i in range(count):
                image = class_image(label, 100 * len(part) + i, 48)
                image.save(folder / "photos" / part / f"class_{label}" / f"{i}.jpg")
    (folder / "album").mkdir()
    for i, name in enumerate(("photo.jpg", "holiday.jpg", "street.jpg", "smear.jpg", "album/1.jpg", "album/2.jpg")):
        class_image(i % 3, i, (240, 160)).save(folder / name)
    for name in ("recipes", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    settings: dict[str, Any] = dict(model="transcnn_test", img_size=32, epochs=1, limit_batches=2, batch_size=4)
    train(str(folder / "photos"), **settings, quiet=True, out=str(folder / "runs" / "RUN"))
    for name in ("my-run", "classifier"):
        (folder / "runs" / name).symlink_to("RUN")
    return folder


@pytest.fixture
def place(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stand-ins as the current folder."""
    shutil.copytree(stand_ins, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "here"


def names_of(page: Path) -> dict[str, Any]:
    """What a page's snippets take for granted."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "transcnn": transcnn}
    if page.name in ("explain.md", "speed.md"):
        names |= {
            "model": transcnn.create_model("transcnn_test", num_classes=3).eval(),
            "image": torch.randn(3, 160, 200),
        }
    if page.name == "explain.md":
        names["values"] = torch.rand(160, 200)
    if page.name == "README.md":
        torch.save(transcnn.create_model("transcnn_tiny").state_dict(), "TransCNN-Tiny.pth")
    if page.name == "plug.md":
        import timm

        names["host_checkpoint"] = timm.create_model("resnet50").state_dict()
    if page.name == "export.md":
        from transcnn.checkpoints.loading import load

        loaded = load("runs/RUN")
        names |= {"model": loaded.model, "names": loaded.class_names, "data_config": loaded.preprocessing}
    return names


def dense_data() -> None:
    """Tiny folders under the names of the packs that the pages on segmentation and detection use."""
    rng = np.random.default_rng(0)
    for part, count in {"train": 4, "val": 2, "test": 2}.items():
        for kind in ("images", "labels"):
            (Path("camvid.tar") / kind / part).mkdir(parents=True)
        Path("bccd.tar/images").mkdir(parents=True, exist_ok=True)
        Path("bccd.tar/annotations").mkdir(parents=True, exist_ok=True)
        images, found = [], []
        for i in range(count):
            pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
            Image.fromarray(pixels).save(f"camvid.tar/images/{part}/{i}.png")
            Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(f"camvid.tar/labels/{part}/{i}.png")
            name, number = f"{part}{i}.png", 10 * len(part) + i
            Image.fromarray(pixels).save(f"bccd.tar/images/{name}")
            images.append({"id": number, "file_name": name, "width": 96, "height": 64})
            found.append(
                {"id": number, "image_id": number, "category_id": 1, "bbox": [9, 9, 30, 30], "area": 900, "iscrowd": 0}
            )
        sheet = {"images": images, "annotations": found, "categories": [{"id": 1, "name": "cell"}]}
        Path(f"bccd.tar/annotations/{part}.json").write_text(json.dumps(sheet))


QUICK = [page for page in PAGES if any(True for _ in steps(page))]


@pytest.mark.filterwarnings("default")  # what other libraries warn of is their tests' concern
@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path, place: Path) -> None:
    ran, parsed = run(page, False, names_of(page) if page.name in ("README.md", "explain.md", "speed.md") else {})
    assert ran + parsed > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", QUICK, ids=lambda page: page.name)
def test_a_page_does_all_that_it_says(page: Path, place: Path) -> None:
    if page.name in ("segmentation.md", "detection.md", "large-images.md"):
        dense_data()
    if page.name == "large-images.md":
        assert main(shlex.split(f"train camvid.tar --task segment --out runs/STREETS {DENSE}")) == 0
    if page.name == "detection.md":
        shutil.copytree("bccd.tar", "shapes")
    ran, parsed = run(page, True, names_of(page))
    assert ran + parsed > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_tutorial_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its images, its training as it stands, and the lines that are promised for its end.

    Rounding differs from CPU to CPU. With the environment variable ``TRANSCNN_TUTORIAL`` set, what comes out is
    written into the page, and the picture of the star is drawn again.
    """
    page = ROOT / "docs" / "tutorial.md"
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    promised = re.search(r"^```\n(epoch .*?\n)```", text, re.MULTILINE | re.DOTALL)
    assert promised
    draw, learn, explain = (
        next(step for step in steps(page) if words in step[1]) for words in ("ImageDraw", "train shapes", "star.png")
    )
    exec(compile(draw[1], page.name, "exec"), {})
    assert main(shlex.split(learn[1])[1:]) == 0
    told = capfd.readouterr()
    printed = re.sub(r"  [\d,]+ images/s.*", "", told.err + told.out).splitlines()
    words = [line.split()[0] for line in promised[1].splitlines()]
    lines = [[line for line in printed if line.startswith(word)][-1] for word in words]
    assert main(shlex.split(explain[1])[1:]) == 0
    if os.environ.get("TRANSCNN_TUTORIAL"):
        page.write_text(text.replace(promised[1], "\n".join([*lines, ""])), encoding="utf-8")
        shutil.copy("star.png", ROOT / "docs" / "images" / "tutorial_star.png")
        return
    for line, expected in zip(lines, promised[1].splitlines(), strict=True):
        number = r"(?<![\w/])\d+(?:\.\d+)?(?![/\w])"
        assert re.sub(number, "#", line) == re.sub(number, "#", expected)
        for got, wanted in zip(re.findall(number, line), re.findall(number, expected), strict=True):
            assert abs(float(got) - float(wanted)) <= (4 if float(wanted) > 10 else 0.1), (line, expected)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in inline(page):
        if not re.search(r"COMMAND|NAME\b|--help", line):
            check_only("command", line)


def test_every_rule_is_for_something() -> None:
    """A rule that fits nothing any more goes."""
    told = [f"{page.name}: {line}" for page in PAGES for _, text in steps(page) for line in text.splitlines()]
    for pattern in (*(rule[0] for rule in SMALLER), *SLOW, *(rule[0] for rule in NOT_RUN[1:])):
        assert any(re.search(pattern, line) for line in told), pattern
