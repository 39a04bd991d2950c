"""The report of a run: what its tables say, and that every picture is drawn for any number of classes."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transcnn.errors import UserError
from transcnn.report.classify import class_table, confused_pairs, read_history, save_figures, write_report
from transcnn.report.page import facts_of
from transcnn.report.plots import (
    Wrong,
    new_figure,
    plot_classes,
    plot_confusion,
    plot_history,
    plot_map,
    plot_precision_recall,
    plot_wrong,
    style,
)
from transcnn.text import printable

CONFUSION = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
NAMES = ["ash", "birch", "cedar"]
# A formula to matplotlib, a tag to a browser, letters that the font lacks, and a name longer than any label.
ODD_NAMES = ["$x_1$ & <b>bold</b>", "猫", "line\nbreak", "a name that is much longer than any label could ever be " * 3]


def history(epochs: int) -> dict[str, list[float]]:
    """As the training loop writes it."""
    steps = range(epochs)
    return {
        "epoch": [i + 1 for i in steps],
        "train_loss": [2 / (i + 1) for i in steps],
        "val_loss": [2.2 / (i + 1) for i in steps],
        "val_top1": [1 - 0.8 / (i + 1) for i in steps],
        "val_top5": [1 - 0.3 / (i + 1) for i in steps],
        "lr": [1e-3 / (i + 1) for i in steps],
    }


def wrong(count: int, size: tuple[int, ...] = (8, 8, 3)) -> list[Wrong]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (count, *size), dtype=np.uint8)
    return [Wrong(pixels[i], 0, "birch", i / count, f"folder/{i}.png") for i in range(count)]


class Page(HTMLParser):
    """The links, pictures, headings and cells of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.files: list[str] = []
        self.cells: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.files += [value for name, value in attrs if name in ("src", "href") and value]
        self.inside = tag
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "td":
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_class_table() -> None:
    rows = class_table(CONFUSION, NAMES)
    assert [row["class"] for row in rows] == ["ash", "birch", "cedar"]
    assert rows[0] == {
        "class": "ash",
        "images": 10,
        "right": 8,
        "accuracy": 0.8,
        "precision": 1.0,
        "taken_for": "birch",
    }
    assert rows[1]["accuracy"] == 1.0
    assert rows[1]["precision"] == 5 / 7
    assert rows[1]["taken_for"] == ""
    assert rows[2]["accuracy"] is None, "without images there is no accuracy"
    assert rows[2]["precision"] is None


def test_confused_pairs() -> None:
    confusion = np.array([[5, 1, 4], [3, 90, 1], [0, 0, 7]])
    pairs = [tuple(pair.values()) for pair in confused_pairs(confusion, NAMES)]
    assert pairs == [
        ("ash", "cedar", 4, 0.4),
        ("birch", "ash", 3, 3 / 94),
        ("ash", "birch", 1, 0.1),
        ("birch", "cedar", 1, 1 / 94),
    ]


def test_read_history(tmp_path: Path) -> None:
    """Lightning writes a row for each logging call, with the other cells empty."""
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss,val/loss\n1,10,3.0,\n1,20,2.5,\n1,20,,2.0\n2,40,1.5,\n2,40,,nan\n")
    columns = read_history(file)
    assert set(columns) == {"train/loss", "val/loss"}
    np.testing.assert_array_equal(columns["train/loss"], [[1, 2], [2.5, 1.5]])
    np.testing.assert_array_equal(columns["val/loss"], [[1], [2.0]])
    assert list(read_history({"val_loss": [2.0, 1.0]})["val_loss"][0]) == [1, 2]
    file.write_text("")
    assert read_history(file) == {}


@pytest.mark.parametrize("classes", [1, 2, 10, 37, 101])
def test_report_of_any_size(tmp_path: Path, classes: int) -> None:
    confusion = np.random.default_rng(classes).integers(0, 9, (classes, classes))
    names = (ODD_NAMES + [f"class {i}" for i in range(classes)])[:classes]
    metrics: dict[str, Any] = {"top1": 0.123456, "images": 7, "measured_on": "val & more", "per_class": [1, 2]}
    entries = [entry._replace(prediction=0) for entry in wrong(classes)]
    page = write_report(tmp_path, history(classes), confusion, names, entries, metrics)
    assert page == tmp_path / "report" / "index.html"
    content = Page(page)
    drawn = {"curves.png", "confusion.png", "classes.png", "wrong.png", "classes.csv"}
    if classes > 1:
        drawn.add("confused.csv")
    assert set(content.files) == drawn
    for file in content.files:
        assert (page.parent / file).stat().st_size > 0
    assert {"0.1 %", "val & more"} <= set(content.cells)
    assert "7 images" in page.read_text()
    assert {printable(row["class"]) for row in class_table(confusion, names)[:50]} <= set(content.cells)
    with open(page.parent / "classes.csv", newline="", encoding="utf-8") as file:
        assert sorted(row["class"] for row in csv.DictReader(file)) == sorted(map(printable, names)), (
            "names are whole in the table"
        )


def test_nothing_trained_and_nothing_wrong(tmp_path: Path) -> None:
    """A perfect score has no mistakes to show, and pictures of an earlier report don't stay."""
    write_report(tmp_path, history(3), CONFUSION, NAMES, wrong(2), {})
    page = write_report(tmp_path, None, np.diag([3, 3, 3]), NAMES, [], {})
    content = Page(page)
    assert set(content.files) == {"confusion.png", "classes.png", "classes.csv"}
    assert not (page.parent / "wrong.png").exists()
    assert not (page.parent / "curves.png").exists()
    assert "No class was predicted as another." in page.read_text()
    assert "None to show." in page.read_text()


def test_many_classes_without_mistakes(tmp_path: Path) -> None:
    page = write_report(tmp_path, None, np.eye(101, dtype=int), [str(i) for i in range(101)], [], {})
    assert set(Page(page).files) == {"classes.png", "classes.csv"}


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (3,)])
def test_confusion_of_another_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=re.escape(f"for 3 class names, got shape {shape}")):
        write_report(tmp_path, None, np.zeros(shape, int), NAMES, [], {})


def test_nothing_is_cut_off() -> None:
    """Every text lies inside its picture, however long names are."""
    with style():
        figures = [
            plot_confusion(np.ones((4, 4), int), ODD_NAMES),
            plot_confusion(np.ones((44, 44), int), ODD_NAMES * 11),
            plot_classes(class_table(np.ones((4, 4), int), ODD_NAMES)),
            plot_wrong([entry._replace(truth=3, prediction=ODD_NAMES[3]) for entry in wrong(7)], ODD_NAMES),
            plot_history(read_history(history(5))),
        ]
        for figure in figures:
            assert figure is not None
            figure.draw_without_rendering()
            box = figure.get_tightbbox()  # inches, of all that is drawn
            width, height = figure.get_size_inches()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width
            assert box.y1 <= height


def test_history_panels() -> None:
    """One line for each measure; of the learning rates the highest group stands for all."""
    columns = history(4) | {
        "lr-AdamW/pg2": [2.0, 1.0, 0.5, 0.2],
        "train_loss_step": [9.0] * 4,
        "images_per_s": [1.0] * 4,
    }
    with style():
        figure = plot_history(read_history(columns))
    assert figure is not None
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["Loss", "Accuracy", "Learning rate"]
    labels = {title: [str(line.get_label()) for line in axes.lines] for title, axes in panels.items()}
    assert labels == {"Loss": ["train loss", "val loss"], "Accuracy": ["val top1", "val top5"], "Learning rate": ["lr"]}
    np.testing.assert_array_equal(panels["Learning rate"].lines[0].get_ydata(), [2.0, 1.0, 0.5, 0.2])
    assert len({(line.get_color(), line.get_linestyle()) for line in panels["Accuracy"].lines}) == 2
    assert plot_history({}) is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_wrong_answers_in_any_mode(mode: str) -> None:
    image = Image.new("I;16", (5, 4), 30000) if mode == "I;16" else Image.new("RGB", (5, 4), "red").convert(mode)
    with style():
        figure = plot_wrong([(image, 0, 1, 0.5, "a.png")], NAMES)
    assert figure is not None
    (shown,) = figure.axes[0].images
    assert shown.get_array().shape[:2] == (4, 5)
    assert [text.get_text() for text in figure.texts][1:] == ["is ash", "predicted as birch", "50 %, a.png"]


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 5), np.uint8, (4, 5)),
        ((4, 5, 1), np.uint8, (4, 5)),
        ((4, 5, 2), np.uint8, (4, 5)),
        ((4, 5, 3), np.float32, (4, 5, 3)),
        ((4, 5, 4), np.uint8, (4, 5, 3)),
        ((4, 5, 12), np.float32, (4, 5)),
    ],
)
def test_wrong_answers_from_arrays(shape: tuple[int, ...], dtype: Any, expected: tuple[int, ...]) -> None:
    with style():
        figure = plot_wrong([(np.ones(shape, dtype), 0, 1, 0.5, "a.png")], NAMES)
    assert figure is not None
    pixels = figure.axes[0].images[0].get_array()
    assert pixels.shape == expected
    if dtype == np.float32:
        assert pixels.max() == 255


def test_the_most_confident_thirty_are_shown() -> None:
    with style():
        figure = plot_wrong(wrong(40), NAMES)
    assert figure is not None
    assert len(figure.axes) == 30
    scores = [int(text.get_text().split(" %")[0]) for text in figure.texts[3::3]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 98


def test_letters_of_any_script_are_drawn_or_missed_once(caplog: pytest.LogCaptureFixture) -> None:
    """Fonts come from what is installed; what no font has is told once, not for every figure."""
    from transcnn.report import fonts

    assert fonts.font_families(["cat", "Straße", "кошка"]) == ["DejaVu Sans"]
    letters = frozenset(map(ord, "猫\U0010ffff"))
    fonts._warned.clear()
    files = fonts._files_for(letters)
    assert "no installed font has" in caplog.text
    assert any(ord("猫") in fonts._letters(file) for file in files) or "猫" in caplog.text
    caplog.clear()
    fonts._files_for(letters)
    assert caplog.text == ""
    assert fonts.image_font(12, ["cat"]).getlength("cat") > 0
    assert fonts.image_font(12, ["猫 cat"]).getlength("猫 cat") > 0


def test_the_heading_and_the_figures_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/transcnn", "eval", "runs/a b", "<x>"])
    (tmp_path / "config.yaml").write_text("model: transcnn_tiny\n")
    metrics = {"task": "classify", "top1": 70.0, "loss": 0.51234, "images": 12345, "split": "val", "data": "photos"}
    metrics |= {"train_seconds": 5400.0, "images_per_second": 1234.5, "input_size": [3, 64, 48], "epochs": 3}
    text = write_report(tmp_path / "eval", None, CONFUSION, NAMES, [], metrics).read_text(encoding="utf-8")
    for expected in (
        "<title>transcnn_tiny on photos</title>",
        "<h1>transcnn_tiny on photos</h1>",
        "classification · validation split, 12,345 images · input 64×48, 3 channels",
        "<code>transcnn eval &#x27;runs/a b&#x27; &#x27;&lt;x&gt;&#x27;</code>",
        "<td>top-1</td><td>70.0 %</td>",
        "<td>0.5123</td>",
        "<td>1.5 h</td>",
        "<td>1,234</td>",
        'name="viewport"',
        '<div class="wide">',
    ):
        assert expected in text, expected
    monkeypatch.setattr("sys.argv", ["/bin/pytest"])
    assert "<code>" not in write_report(tmp_path / "eval", None, CONFUSION, NAMES, [], metrics).read_text()


def test_bars_end_at_100_percent() -> None:
    with style():
        figure = plot_classes(class_table(CONFUSION, NAMES))
    assert figure.axes[0].get_xlim() == (0, 1)


def test_correct_predictions_stand_beside_wrong_ones(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    page = write_report(tmp_path, None, CONFUSION, NAMES, wrong(2), {}, correct=[(image, 1, 1, 0.97, "a.png")])
    assert {"wrong.png", "correct.png"} <= set(Page(page).files)


def test_precision_recall() -> None:
    curves = {"ash": np.linspace(1, 0, 101), "birch": np.ones(101)}
    with style():
        figure = plot_precision_recall(curves, "Precision over recall")
    assert figure is not None
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["ash", "birch", "mean of 2 classes"]
    np.testing.assert_allclose(figure.axes[0].lines[2].get_ydata(), np.linspace(1, 0.5, 101))
    assert plot_precision_recall({}, "") is None


def test_a_figure_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full half way, and where an older one lies."""

    write = Path.write_bytes

    def cut(path: Path, content: bytes) -> None:
        write(path, bytes(content)[: len(content) // 2])
        raise OSError(28, "No space left on device")

    (tmp_path / "old.png").write_bytes(b"whole")
    monkeypatch.setattr(Path, "write_bytes", cut)
    for name in ("old.png", "new.png"):
        with pytest.raises(UserError, match=f"can't write .*{name}: No space left"):
            save_figures(tmp_path, {name: lambda: new_figure(1, 1)}, NAMES)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.png", b"whole")]


def test_a_map_of_the_images(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 45, 200).tolist()
    points = np.random.default_rng(1).normal(size=(200, 2))
    axes = plot_map(points, labels, [f"class {i}" for i in range(45)]).axes[0]
    assert len(axes.collections) == 21  # the most frequent, and all others
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 200
    page = write_report(tmp_path, None, CONFUSION, NAMES, [], {}, points=(points[:3], [0, 1, 2]))
    assert (tmp_path / "report" / "map.png").is_file()
    assert "Map of the images" in page.read_text(encoding="utf-8")
    page = write_report(tmp_path, None, CONFUSION, NAMES, [], {}, points=(points[:3], [0, 1, 2]), map_by="tsne")
    assert "by t-SNE of what" in page.read_text(encoding="utf-8")
    assert plot_map(points, labels, [f"class {i}" for i in range(45)], "tsne").axes[0].get_xlabel() == ""
    page = write_report(tmp_path, None, CONFUSION, NAMES, [], {})
    assert "Map of the images" not in page.read_text(encoding="utf-8")
    assert not (tmp_path / "report" / "map.png").exists()


def test_a_runs_own_accuracies_are_percents_however_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 % of 1,000 classes isn't 20 %."""
    seen = {}
    draw = plot_history
    monkeypatch.setattr(
        "transcnn.report.classify.plot_history", lambda *a, **k: seen.setdefault("figure", draw(*a, **k))
    )
    (tmp_path / "metrics.csv").write_text("epoch,val_top1\n1,0.1\n2,0.2\n")
    write_report(tmp_path, tmp_path / "metrics.csv", CONFUSION, NAMES, [], {})
    formatter = seen["figure"].axes[0].yaxis.get_major_formatter()
    assert formatter.format_pct(0.2, 10) == "0.2%"


def test_fonts_are_sought_for_names_of_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr("transcnn.report.classify.save_figures", lambda folder, figures, words: texts.extend(words))
    write_report(tmp_path, None, CONFUSION, NAMES, [wrong(1)[0]._replace(name="folder/猫.png")], {})
    assert texts == [*NAMES, "猫.png"]


def test_what_is_no_number_is_a_dash() -> None:
    chosen = facts_of({"val_macro_f1": 83.25, "val_map50": 61.0, "val_auroc": 0.9, "val_loss": 0.5})
    assert [value for _, value in chosen] == ["83.2 %", "61.0 %", "0.9", "0.5000"]
    facts = facts_of({"top1": float("nan"), "seconds": float("nan"), "loss": 0.5})
    assert facts == [["top-1", "–"], ["seconds", "–"], ["loss", "0.5000"]]
