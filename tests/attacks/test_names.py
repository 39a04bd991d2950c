"""Names of files and classes that hold anything: shown and written harmlessly, in every kind of output."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

import fuzz
from transcnn.data.paths import same_path
from transcnn.data.sources import remote
from transcnn.data.sources.opening import open_source
from transcnn.errors import UserError
from transcnn.report.answers import Detections
from transcnn.report.classify import write_report
from transcnn.report.output_folder import OutputFolder
from transcnn.report.overlay import draw_detections, legend, palette
from transcnn.report.page import heading, html_table, write_rows
from transcnn.report.plots import plot_classes, style
from transcnn.report.predictions import print_table, write_csv
from transcnn.settings import TrainSettings, as_plain
from transcnn.text import csv_cell, html, json_text, markdown, printable, rich_text, without_passwords

NASTY = [
    os.fsdecode(b"\xff.png"),
    "two\nlines.png",
    "\x1b[2J\x1b]0;owned\x07.png",
    "\x9b31m.png",  # an escape in one character
    "a\rb.png",
    '=HYPERLINK("http://evil.example","a")',
    "@SUM(1+1)*cmd|'/C calc'!A0",
    "+1+1",
    "-1+1",
    "=1+1",
    "[/b]",
    "[bold red]x[/bold red]",
    "[link=http://evil.example]x[/link]",
    "\\[/b]",
    "name\\",
    "<img src=x onerror=alert(1)>",
    "</title><script>alert(1)</script>",
    '"onmouseover="alert(1)',
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "a | b | c",
    "`rm -rf`",
    "# heading",
    "evil\u202egnp.exe",
    "$\\frac{a}{b}$",
    "--> <!--",
    "猫 🙂.png",
    "",
    " ",
    "\x00",
    "\ud800",
]
PIECES = [*NASTY, *"\\[]<>&\"'=+-@|`*_#\t\n\r\x1b\x07\x7f\x85\u2028\u200b\u202e\udcff猫é🙂 abc.png123"]


def made_up(count: int) -> list[str]:
    """Names put together at random, the same each time."""
    draw = random.Random(0)
    return [*NASTY, *("".join(draw.choices(PIECES, k=draw.randint(1, 8))) for _ in range(count - len(NASTY)))]


NAMES = made_up(fuzz.CASES)


def harmless(text: str) -> bool:
    """Nothing that a terminal acts on, and text that every file can hold."""
    text.encode("utf-8")
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_a_name_is_one_line_that_shows_everything() -> None:
    for name in NAMES:
        shown = printable(name)
        assert harmless(shown)
        assert "\n" not in shown
        assert printable(shown) == shown
    for plain in ("cat", "schöne Grüße", "猫", "🙂", "naïve café.jpg", "a\u3000b"):
        assert printable(plain) == plain
    assert printable(os.fsdecode(b"\xff.png")) == "\\xff.png"
    assert printable("a\nb\x1b[1m") == "a\\nb\\x1b[1m"


def test_terminal() -> None:
    """No markup is read, no escape arrives, each name is there as it is shown."""
    for name in NAMES:
        table = Table(box=None, show_header=False)
        table.add_row(rich_text(name))
        console = Console(file=io.StringIO(), width=10_000, force_terminal=True, color_system=None, highlight=False)
        console.print(table)
        written = console.file.getvalue()  # pyright: ignore
        assert harmless(written)
        assert printable(name).strip() in written


def test_csv(tmp_path: Path) -> None:
    write_rows(tmp_path / "names.csv", [{"class": name, "accuracy": 0.5} for name in NAMES], ["class", "accuracy"])
    text = (tmp_path / "names.csv").read_text(encoding="utf-8")
    assert harmless(text)
    with (tmp_path / "names.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(NAMES)
    for row, name in zip(rows, NAMES, strict=True):
        cell = row["class"]
        assert cell in (printable(name), f"'{printable(name)}")
        assert not re.match(r"[=+\-@\t\r]", cell) or re.fullmatch(r"[-+][\d.]+(e\d+)?", cell)
    assert csv_cell("-1") == "-1"
    assert csv_cell("=1+1") == "'=1+1"
    assert csv_cell(None) is None


def test_json() -> None:
    """Names come back as they were, so that a program finds the files again."""
    text = json_text(NAMES, indent=2)
    assert harmless(text)
    assert json.loads(text) == json.loads(json.dumps(NAMES))  # to JSON two halves of a pair are one character
    assert json_text({"猫": "é"}) == '{"猫": "é"}'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not attrs or attrs == [("class", "wide")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html() -> None:
    page = html_table(["name"], [[name] for name in NAMES])
    assert harmless(page)
    parser = Tags()
    parser.feed(page)
    assert set(parser.tags) == {"div", "table", "tr", "th", "td"}
    assert parser.tags.count("td") == len(NAMES)
    assert all(printable(name) in parser.text for name in NAMES)
    assert '"' not in html('"onmouseover="alert(1)')


def test_markdown() -> None:
    markdown_it = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    for name in NAMES:
        text = markdown(name)
        assert harmless(text.replace("\u200b", ""))
        found = markdown_it.parse(f"| {text} | x |\n|---|---|\n| {text} | y |\n")
        inner = [child for token in found for child in token.children or ()]
        assert {token.type for token in inner} <= {"text", "text_special"}
        assert sum(token.type == "td_open" for token in found) == 2


# --- figures, files and commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figures(tmp_path: Path, ending: str) -> None:
    rows = [{"class": name, "images": 1, "right": 1, "accuracy": 1.0} for name in NASTY]
    with style():
        plot_classes(rows).savefig(tmp_path / f"names.{ending}")
    if ending == "svg":
        from xml.etree import ElementTree

        text = (tmp_path / "names.svg").read_text(encoding="utf-8")
        assert harmless(text)
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert not tags & {"script", "a", "img", "image", "foreignObject"}


def test_drawn_names() -> None:
    image = Image.new("RGB", (200, 100))
    assert legend(image, NASTY, palette(len(NASTY))).width == 200
    found = {
        "boxes": np.array([[1.0, 1, 50, 50]] * len(NASTY)),
        "labels": np.arange(len(NASTY)),
        "scores": np.full(len(NASTY), 0.9),
    }
    assert draw_detections(image, found, NASTY, palette(len(NASTY)), 0.5).size == (200, 100)


def test_report(tmp_path: Path) -> None:
    confusion = np.full((len(NASTY), len(NASTY)), 2)
    names = [f"{i}{name}" for i, name in enumerate(NASTY)]
    image = np.zeros((8, 8, 3), np.uint8)
    wrong = [(image, 0, 1, 0.9, name) for name in NASTY]
    page = write_report(tmp_path, None, confusion, names, wrong, {"data": "<script>alert(1)</script>", "top1": 50.0})
    text = page.read_text(encoding="utf-8")
    assert harmless(text)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert harmless((tmp_path / "report" / "confused.csv").read_text(encoding="utf-8"))


def test_predictions_of_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the CSV file and COCO's JSON of predict."""
    rows = [{"file": name, "top": [{"label": name, "score": 0.5}]} for name in NAMES]
    rows += [{"file": name, "error": name} for name in NASTY]
    print_table(rows)
    written = capsys.readouterr().out
    assert harmless(written)
    assert len(written.splitlines()) == len(rows) + 1
    write_csv(tmp_path / "p.csv", rows, 1)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    out = OutputFolder(tmp_path / "out", coco=True)
    found = {"boxes": np.array([[1.0, 1, 5, 5]]), "labels": np.array([0]), "scores": np.array([0.9])}
    for name in NASTY:
        out._add_coco(dataclasses.replace(Detections.of(found, ["a"], {}), file=name))
    out.finish()
    kept = json.loads((out.folder / "predictions.json").read_text(encoding="utf-8"))
    assert [row["file_name"] for row in kept] == NASTY


@pytest.mark.parametrize("task", ["classify", "multilabel", "regress", "segment", "detect"])
def test_tables_of_eval(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Class names with markup ended eval with a traceback, or were shown as nothing."""
    from transcnn.tasks import get_task, multilabel

    learner = object.__new__(get_task(task))
    figures: dict[str, Any] = {
        "top1": 1.0,
        "miou": 1.0,
        "pixel_accuracy": 1.0,
        "mean_accuracy": 1.0,
        "map": 1.0,
        "loss": 1.0,
    }
    figures |= {"images": 3, "images_per_second": 2.0, "split": "val", "data": "[/b]\x1b[1m"}
    names = ["[/b]", "[red]cat[/red]", "\x1b[2J", os.fsdecode(b"\xff")]
    for kind in ("accuracy", "precision", "recall", "f1", "iou", "ap"):
        figures[f"class_{kind}"] = dict.fromkeys(names, 5.0)
    figures |= {"columns": {name: {"images": 3} for name in names}}
    figures |= {"labels": {name: {"images": 3, "threshold": 0.5} for name in names}}
    figures |= dict.fromkeys(multilabel.FIGURES, 5.0)
    learner.print_table(figures)
    written = capsys.readouterr().out
    assert harmless(written)
    for shown in ("[/b]", "[red]cat[/red]", "\\x1b[2J", "\\xff"):
        assert shown in written


def test_the_tables_of_a_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings may be anything, too; at 80 columns no name of one is cut."""
    from transcnn.cli import main
    from transcnn.settings import TrainSettings, as_plain
    from transcnn.training.dryrun import flat

    monkeypatch.setenv("COLUMNS", "80")

    name = "[/b]\x1b[2J\n=1+1"
    assert (
        main(["train", name, "--model", "transcnn_test", "--batch_size", "2", "--accelerator", "cpu", "--dry_run"]) == 0
    )
    written = capsys.readouterr().out
    assert harmless(written)
    assert "[/b]\\x1b[2J\\n=1+1" in written
    assert all(f" {name} " in written for name, _ in flat(as_plain(TrainSettings())))
    assert max(len(line) for line in written.splitlines()) <= 80


def test_the_command_line_reads_and_tells_names(tmp_path: Path) -> None:
    """Files of such names are predicted; a terminal without UTF-8 is given what it can show."""
    from transcnn.commands.predict import predict

    names = [name for name in NASTY if name and "/" not in name and "\x00" not in name and name != "\ud800"]
    for name in names:
        Image.new("RGB", (32, 32), "red").save(tmp_path / name, format="PNG")
    files = [str(tmp_path / name) for name in names]
    rows = predict("transcnn_nano.cifar10", files, csv=str(tmp_path / "p.csv"), quiet=True)
    assert [row["file"] for row in rows] == files
    assert all("top" in row for row in rows)
    code = (
        "import sys; from transcnn.report.predictions import print_table; from transcnn.cli import main; main(['-V']); "
    )
    code += "print_table([{'file': '猫\\x1b', 'top': []}])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\\u732b\\x1b" in done.stdout


def test_class_names_of_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an exported file says of itself is written by anybody; so are the texts that ONNX has room for."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from transcnn.cli import main

    names = list(dict.fromkeys([*NASTY, *NAMES[:1000]]))
    helper = onnx.helper
    weight = np.random.default_rng(0).normal(size=(3, len(names))).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["x"], name="\x1b[2J"),
        helper.make_node("Flatten", ["x"], ["y"]),
    ]
    nodes.append(helper.make_node("MatMul", ["y", "w"], ["logits"]))
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["b\n", 3, "h", "[/b]"])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b\n", len(names)])
    graph = helper.make_graph(nodes, "<img>", [images], [logits], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.doc_string = model.producer_name = "\x1b[2J" * 10_000
    about = {"class_names": names, "data_config": fuzz.CONFIG, "task": "classify", "[/b]\n\x1b": "x" * 1_000_000}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    onnx.save(model, tmp_path / "x.onnx")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "x.png")
    argv = ["predict", str(tmp_path / "x.onnx"), str(tmp_path / "x.png"), f"--top_k={len(names)}", "--accelerator=cpu"]
    for more in ([f"--csv={tmp_path / 'x.csv'}"], ["--json"]):
        assert main([*argv, *more]) == 0
        written = capsys.readouterr().out
        assert harmless(written)
        assert "two\\nlines.png" in written
        assert len(written.splitlines()) < 10 or "--json" in more
    assert harmless((tmp_path / "x.csv").read_text(encoding="utf-8"))
    found = json.loads(written)[0]["top"]
    assert {row["label"] for row in found} >= {name for name in NASTY if name}


SECRET = "https://me:s3cr@t@203.0.113.7/photos"
SHOWN = "https://203.0.113.7/photos"


def test_passwords_in_urls_are_neither_kept_nor_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and reports are handed on."""
    assert without_passwords(f"{SECRET}, s3://bucket/a@b and a@b.c") == f"{SHOWN}, s3://bucket/a@b and a@b.c"
    assert as_plain(TrainSettings(data=SECRET))["data"] == SHOWN
    assert as_plain(TrainSettings())["data"] is None
    assert same_path(SECRET, SHOWN)
    assert not same_path(SECRET, f"{SHOWN}2")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/transcnn", "eval", "run", SECRET])
    assert SHOWN in heading(tmp_path, {"model": "x"})[1]
    assert "s3cr" not in heading(tmp_path, {"model": "x"})[1]
    monkeypatch.setenv("TRANSCNN_CACHE", str(tmp_path))
    monkeypatch.setattr(remote, "MAX_TRIES", 1)

    def fail(url: str, *args: Any) -> None:
        raise OSError(f"no answer from {url}")

    monkeypatch.setattr("fsspec.open", fail)
    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    for data in (SECRET, f"{SECRET}/x.parquet"):
        with pytest.raises(UserError, match="can't fetch https://203") as caught:
            open_source(data)
        assert "s3cr" not in str(caught.value)
