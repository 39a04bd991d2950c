"""The page on a data set: what to look at first, tables, a sheet of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.files import atomic_write
from ..data.images import BrokenImage
from ..report.classify import save_figures
from ..report.numbers import plot_histograms
from ..report.page import html_page, html_table, write_rows
from ..report.plots import plot_images
from ..text import html, json_text
from .known import number_rows, values_of
from .samples import DataSet

__all__ = ["class_rows", "fact_rows", "write_page"]

EXAMPLES = 24
SOME = 8  # names on a line
MOST_ROWS = 100  # of a table on the page
WORDS = {"multilabel": "Labels", "regress": "Numbers"}


def write_page(folder: Path, title: str, data: DataSet, found: dict[str, Any]) -> None:
    """Write ``index.html``, ``examples.png``, ``data.json`` and ``problems.csv``."""
    figures: dict[str, Any] = {"examples.png": lambda: plot_images(_examples(data), "Examples")}
    if data.task == "regress":
        figures["numbers.png"] = lambda: plot_histograms(values_of(data), data.class_names)
    save_figures(folder, figures, data.class_names)
    text = json_text(found, indent=1) + "\n"
    atomic_write(folder / "data.json", lambda path: path.write_text(text, encoding="utf-8"))
    problems = _problems(found)
    write_rows(folder / "problems.csv", problems, ["what", "file", "split", "label", "reason"])
    head, rows = class_rows(found)
    warnings = "".join(f"<li>{html(line)}</li>" for line in found["warnings"])
    shown = [[row["what"], row["file"], row["split"], row["label"], row["reason"]] for row in problems[:MOST_ROWS]]
    link = '<p>All of them as a file: <a href="problems.csv">problems.csv</a></p>'
    parts = [
        f"<h1>{html(title)}</h1>",
        f"<h2>What to look at first</h2><ul>{warnings}</ul>" if warnings else "<p>Nothing looks wrong.</p>",
        html_table([], fact_rows(found)),
        f"<h2>{WORDS.get(data.task, 'Classes')}</h2>",
        html_table(head, rows[:MOST_ROWS]),
        f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else "",
        '<p><img src="numbers.png" alt="Histograms of the numbers"></p>' if "numbers.png" in figures else "",
        '<h2>Examples</h2><p><img src="examples.png" alt="Images with their labels, boxes or label maps"></p>',
        "<h2>Files to look at</h2>" if shown else "",
        html_table(["What", "File", "Split", "Label", "Reason"], shown),
        link if shown else "",
    ]
    page = html_page(parts, title)
    atomic_write(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8", errors="backslashreplace"))


def class_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of classes, largest first: counts by split, or shares of the pixels; of numbers how they lie."""
    if "numbers" in found:
        return number_rows(found)
    splits = list(found["splits"])
    totals = {split: max(1, sum(row.get(split, 0) for row in found["classes"].values())) for split in splits}
    shares = found["counted"] == "pixels"

    def cell(row: dict[str, int], split: str) -> str:
        return f"{100 * row.get(split, 0) / totals[split]:.2f} %" if shares else f"{row.get(split, 0):,}"

    ordered = sorted(found["classes"].items(), key=lambda entry: -sum(entry[1].values()))
    rows = [[name, *(cell(row, split) for split in splits)] for name, row in ordered]
    return ["class", *(f"{split} {found['counted']}" for split in splits)], rows


def fact_rows(found: dict[str, Any]) -> list[list[str]]:
    """Names and values of what is about the whole."""
    sizes, duplicates = found["sizes"], found["duplicates"]
    rows = [["images", ", ".join(f"{count:,} {split}" for split, count in found["splits"].items())]]
    if found["opened"] < found["images"]:
        rows.append(["opened", f"{found['opened']:,} of {found['images']:,}"])
    if sizes:
        ends = ", ".join(f"{word} {sizes[word][0]}x{sizes[word][1]}" for word in ("smallest", "median", "largest"))
        rows.append(["sizes", f"{ends}; {sizes['distinct']:,} different ones"])
        rows.append(["modes", ", ".join(f"{count:,} {mode}" for mode, count in found["modes"].items())])
        rows.append(["formats", ", ".join(f"{count:,} {kind}" for kind, count in found["formats"].items())])
        rows.append(["size on disk", f"{found['bytes'] / 1e6:,.1f} MB"])
    if "box_sizes" in found:
        kinds = ", ".join(f"{count:,} {word}" for word, count in found["box_sizes"].items())
        rows.append(["boxes", f"{kinds}; {found['images_without_boxes']:,} images without any"])
    for key, word in (("largest_class", "largest class"), ("smallest_class", "smallest class")):
        if key in found and found["counted"] != "pixels":
            rows.append([word, f"{found[key][0]} ({found[key][1]:,} {found['counted']})"])
    if "labels_per_image" in found:
        several = ", ".join(f"{number}: {count:,}" for number, count in found["labels_per_image"].items())
        rows.append(["labels an image", f"{several} images"])
        if found["unknown"]:
            unknown = ", ".join(f"{name}: {count:,}" for name, count in list(found["unknown"].items())[:SOME])
            rows.append(["not known", f"{unknown}{' and others' if len(found['unknown']) > SOME else ''}"])
    if "unlabelled" in found:
        rows.append(["rows without a label", f"{found['unlabelled']:,}"])
    rows.append(["can't be used", f"{len(found['broken']):,}"])
    rows.append(["odd", f"{len(found['odd']):,}"])
    copies = f"{duplicates['copies']:,}, {duplicates['across_splits']:,} images in several splits"
    return [*rows, ["exact copies", copies]]


def _problems(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each file to look at."""
    empty = {"split": "", "label": ""}
    rows: list[dict[str, Any]] = [
        {"what": "can't be used", "file": name, **empty, "reason": reason} for name, reason in found["broken"]
    ]
    for number, group in enumerate(found["duplicates"]["files"], 1):
        for name, split, label in group:
            reason = f"equal to the others of group {number}"
            rows.append({"what": "copy", "file": name, "split": split, "label": label, "reason": reason})
    return rows + [{"what": "odd", "file": name, **empty, "reason": reason} for name, reason in found["odd"]]


def _examples(data: DataSet) -> list[tuple[Any, list[str]]]:
    """Images of all classes in turn, or spread over the data set, as they are learnt."""
    chosen = _one_of_each(data) if data.task in ("classify", "multilabel") else list(range(len(data.samples)))
    if data.task == "regress":  # from the smallest number to the largest
        chosen = np.argsort(values_of(data)[:, 0], kind="stable").tolist()
    chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, min(EXAMPLES, len(chosen))).astype(int))]
    cells = []
    for i in chosen:
        sample = data.samples[i]
        try:
            image, truth = sample.load()
        except BrokenImage:
            continue
        drawn, words = data.drawn(sample, image, truth)
        cells.append((drawn, [words, sample.name.rpartition("/")[2]]))
    return cells


def _one_of_each(data: DataSet) -> list[int]:
    """Indices of the samples, one of each class, then another of each, and so on; as many as are shown."""
    by_class: dict[str, list[int]] = {}
    for i, sample in enumerate(data.samples):
        by_class.setdefault(str(sample.label), []).append(i)
    rounds = max((len(members) for members in by_class.values()), default=0)
    found: list[int] = []
    for turn in range(rounds):
        found += [members[turn] for members in by_class.values() if turn < len(members)]
        if len(found) >= EXAMPLES and turn:
            break
    return sorted(found[: max(EXAMPLES, len(by_class))], key=lambda i: str(data.samples[i].label))
