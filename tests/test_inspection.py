"""``transcnn data``: what is counted, found and drawn before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transcnn.commands.data import data
from transcnn.commands.train import train
from transcnn.data.sets.classify import open_splits
from transcnn.errors import UserError
from transcnn.inspection import copies
from transcnn.inspection.copies import copies_between_splits


def test_class_folders_in_figures(split_folder, class_image, tmp_path, capsys):
    root = split_folder
    for i in range(100):
        shutil.copy(root / "train" / "class_0" / f"00{i % 8}.png", root / "train" / "class_0" / f"more{i:03}.png")
    shutil.copy(root / "train" / "class_1" / "000.png", root / "val" / "class_1" / "leak.png")
    shutil.copy(root / "train" / "class_2" / "000.png", root / "train" / "class_1" / "other.png")
    (root / "val" / "class_2" / "bad.png").write_bytes(b"no image")
    class_image(0, 50, (400, 20)).save(root / "train" / "class_0" / "long.png")
    class_image(0, 51, 4).save(root / "train" / "class_0" / "tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    class_image(0, 52, (40, 30)).save(root / "train" / "class_0" / "turned.jpg", exif=exif)
    found = data(root, out=tmp_path / "page")
    assert found["images"] == 48 + 100 + 1 + 1 + 1 + 3
    assert found["splits"] == {"train": 24 + 100 + 1 + 3, "val": 24 + 2}
    assert found["classes"]["class_0"] == {"train": 111, "val": 8}
    assert found["largest_class"] == ["class_0", 119]
    assert found["sizes"]["smallest"] == [4, 4]
    assert found["sizes"]["largest"] == [400, 20]
    assert found["modes"] == {"RGB": 153}
    assert found["formats"] == {"PNG": 152, "JPEG": 1}
    assert [Path(name).name for name, _ in found["broken"]] == ["bad.png"]
    odd = {Path(name).name: reason for name, reason in found["odd"]}
    assert odd == {"long.png": "20 times as long as wide", "tiny.png": "4x4 pixels",
                   "turned.jpg": "turned by its EXIF orientation"}  # fmt: skip
    duplicates = found["duplicates"]
    assert (duplicates["across_splits"], duplicates["contradicting"]) == (1, 1)
    assert duplicates["copies"] == 100 + 1 + 1
    assert {entry[2] for entry in duplicates["files"][0]} == {"class_1", "class_2"}
    text = capsys.readouterr()
    assert "class_0" in text.out
    for line in ("1 images are there under several labels", "1 images are in several splits", "can't be used"):
        assert line in text.err
    assert json.loads((tmp_path / "page" / "data.json").read_text()) == found
    page = (tmp_path / "page" / "index.html").read_text()
    assert "in several splits" in page
    assert "bad.png" in page
    with Image.open(tmp_path / "page" / "examples.png") as sheet:
        assert sheet.width > 600
    assert "leak.png" in (tmp_path / "page" / "problems.csv").read_text()


def test_rare_and_empty_classes_are_named(make_class_folder):
    root = make_class_folder(classes=2, per_class=10)
    for i in range(1, 10):
        (root / "class_1" / f"00{i}.png").unlink()
    found = data(root, quiet=True)
    assert found["warnings"] == ["'class_0' has 10 times as many images as 'class_1'"]
    assert data(root, limit_images=3, quiet=True)["opened"] == 3
    with pytest.raises(UserError, match="limit_images must be 1 or more"):
        data(root, limit_images=0, quiet=True)
    with pytest.raises(UserError, match="no such data"):
        data("nowhere", quiet=True)


def test_boxes_in_figures(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
    for i, lines in enumerate(["0 .5 .5 .2 .2\n1 .5 .5 .5 .5", "", "0 .2 .2 .1 .1 .3 .1 .3 .3"]):
        split = "val" if i == 2 else "train"
        Image.new("RGB", (200, 200), (i, 0, 0)).save(tmp_path / f"images/{split}/{i}.png")
        (tmp_path / f"labels/{split}/{i}.txt").write_text(lines)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell, platelet, none]\n")
    found = data(tmp_path, out=tmp_path / "page", quiet=True)
    assert (found["task"], found["counted"]) == ("detect", "boxes")
    assert found["classes"] == {"cell": {"train": 1, "val": 1}, "platelet": {"train": 1, "val": 0},
                                "none": {"train": 0, "val": 0}}  # fmt: skip
    assert found["box_sizes"] == {"small": 0, "medium": 2, "large": 1}
    assert found["images_without_boxes"] == 1
    assert found["warnings"] == ["there is nothing of the class 'none'"]
    assert (tmp_path / "page" / "examples.png").is_file()


def test_label_maps_in_figures(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        labels = np.zeros((10, 20), np.uint8)
        labels[:, :5] = 1
        Image.new("RGB", (20, 10), (split == "val" and "red") or "blue").save(tmp_path / f"images/{split}/a.png")
        Image.fromarray(labels).save(tmp_path / f"labels/{split}/a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "images/val/alone.png")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    found = data(tmp_path, out=tmp_path / "page", quiet=True)
    assert (found["task"], found["counted"]) == ("segment", "pixels")
    assert found["classes"] == {"road": {"train": 150, "val": 150}, "sky": {"train": 50, "val": 50}}
    assert found["broken"] == [["images/val/alone.png", "no label map of this name"]]
    assert "75.00 %" in (tmp_path / "page" / "index.html").read_text()


def test_the_digits_need_no_files():
    found = data(quiet=True, limit_images=10)
    assert found["images"] == 1797
    assert found["sizes"]["largest"] == [8, 8]
    assert found["warnings"] == []


def test_training_warns_of_copies_between_splits(split_folder, no_report, tmp_path, capsys):
    assert copies_between_splits(open_splits(str(split_folder))) == []
    shutil.copy(split_folder / "train" / "class_1" / "001.png", split_folder / "val" / "class_2" / "leak.png")
    settings: dict[str, Any] = dict(model="transcnn_test", img_size=32, epochs=1, limit_batches=1, accelerator="cpu")
    train(split_folder, **settings, out=tmp_path / "run", num_workers=0)
    line = next(line for line in capsys.readouterr().err.splitlines() if "several splits" in line)
    assert line.startswith("transcnn: 1 image is in several splits, such as ")
    assert "001.png' (train)" in line
    assert "leak.png' (val)" in line


def test_copies_are_looked_for_within_bounds(split_folder, monkeypatch):
    shutil.copy(split_folder / "train" / "class_1" / "001.png", split_folder / "val" / "class_2" / "leak.png")
    splits = open_splits(str(split_folder))
    assert len(copies_between_splits(splits)) == 1
    monkeypatch.setattr(copies, "MOST_BYTES", 10)
    assert copies_between_splits(splits) == []
    monkeypatch.setattr(copies, "MOST_IMAGES", 10)
    assert copies_between_splits(splits) == []
    monkeypatch.undo()
    without = SimpleNamespace(train=open_splits(None).train, val=None, test=None)
    assert copies_between_splits(without) == []


def test_labels_and_numbers_of_a_table(tmp_path, class_image, capsys):
    """Counts a label, what isn't known, rows that say nothing; how numbers are distributed, and a page of each."""
    for i in range(12):
        class_image(i % 2, i, 16).save(tmp_path / f"{i}.png")
    rows = ["file,tags,sea,sky,price,same,split"]
    for i in range(12):
        tags = "nan" if i == 11 else ["sea;sky", "sea", "", "sky;tree"][i % 4]
        cells = ["" if i == 3 else int(i % 2 == 0), 1, "" if i in (5, 11) else f"{i}.5", 7]
        rows.append(",".join(map(str, [f"{i}.png", tags, *cells, "test" if i > 8 else "train"])))
    (tmp_path / "t.csv").write_text("\n".join(rows))
    found = data(tmp_path / "t.csv", task="multilabel", target=["tags"], out=tmp_path / "labels")
    assert found["images"] == 11
    assert found["classes"] == {
        "sea": {"train": 5, "test": 1},
        "sky": {"train": 5, "test": 0},
        "tree": {"train": 2, "test": 0},
    }
    assert found["labels_per_image"] == {"0": 3, "1": 3, "2": 5}
    assert (found["unlabelled"], found["unknown"]) == (1, {})
    assert found["largest_class"] == ["sea", 6]
    assert "1 rows have no label" in capsys.readouterr().err
    page = (tmp_path / "labels" / "index.html").read_text()
    assert "<h2>Labels</h2>" in page
    assert json.loads((tmp_path / "labels" / "data.json").read_text()) == found

    found = data(tmp_path / "t.csv", task="multilabel", target=["sea,sky"], quiet=True)
    assert found["unknown"] == {"sea": 1}
    assert "every image has the label 'sky'" in found["warnings"]

    found = data(tmp_path / "t.csv", task="regress", target=["price", "same"], out=tmp_path / "numbers")
    train = found["numbers"]["price"]["train"]
    assert (train["known"], train["unknown"], train["min"], train["max"]) == (8, 1, 0.5, 8.5)
    assert train["median"] == np.median([0.5, 1.5, 2.5, 3.5, 4.5, 6.5, 7.5, 8.5])
    assert "'same' is the same number for all images" in found["warnings"]
    out = capsys.readouterr().out
    assert "8 of 9" in out
    assert "median" in out
    assert (tmp_path / "numbers" / "numbers.png").is_file()
    assert "numbers.png" in (tmp_path / "numbers" / "index.html").read_text()
