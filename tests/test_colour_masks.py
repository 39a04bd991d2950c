"""Label maps in colours by a table of colours, and where tools put masks and names of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transcnn.data.images import BrokenImage
from transcnn.data.sets.segment import open_set, open_splits
from transcnn.data.sources.class_files import ColourTable
from transcnn.errors import UserError

COLOURS = [(0, 0, 0), (64, 128, 64), (192, 0, 128)]
NAMES = ["Void", "Animal", "Arch way"]
IDS = np.arange(12 * 16).reshape(12, 16) % 3


def put(image: Path, label: Path, pixels: np.ndarray) -> None:
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12)).save(image)
    Image.fromarray(pixels.astype(np.uint8)).save(label)


def coloured() -> np.ndarray:
    return np.array(COLOURS)[IDS]


ROWS = [(*map(str, colour), name) for colour, name in zip(COLOURS, NAMES, strict=True)]
TABLES = {
    "classes.txt": "".join(f"{r} {g} {b} {name}\n" for r, g, b, name in ROWS),
    "label_colors.txt": "".join(f"{r} {g} {b}\t\t{name}\n" for r, g, b, name in ROWS),
    "labelmap.txt": "# label:color_rgb:parts:actions\n" + "".join(f"{name}:{r},{g},{b}::\n" for r, g, b, name in ROWS),
    "class_dict.csv": "name,r,g,b\n" + "".join(f"{name},{r},{g},{b}\n" for r, g, b, name in ROWS),
}


@pytest.mark.parametrize("table", TABLES)
def test_colours_are_the_classes_of_the_table(tmp_path, table):
    for split in ("train", "val"):
        put(tmp_path / f"images/{split}/a.png", tmp_path / f"labels/{split}/a.png", coloured())
    (tmp_path / table).write_text(TABLES[table])
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["Animal", "Arch way"]
    assert splits.task_args["label_ids"] == [1, 2]
    assert splits.task_args["colours"] == [[64, 128, 64], [192, 0, 128]]
    np.testing.assert_array_equal(splits.train.read(0)[1] >= 0, IDS > 0)  # Void doesn't count
    np.testing.assert_array_equal(splits.train.read(0)[1][IDS > 0], IDS[IDS > 0] - 1)
    again = open_set(str(tmp_path), "val", ["Arch way", "Animal"], [2, 1])
    np.testing.assert_array_equal(again.read(0)[1][IDS > 0], 2 - IDS[IDS > 0])


def test_camvids_own_files(tmp_path):
    for name in ("0001TP_006690", "0001TP_006720", "Seq05VD_f00000"):
        put(tmp_path / f"701_StillsRaw_full/{name}.png", tmp_path / f"LabeledApproved_full/{name}_L.png", coloured())
    (tmp_path / "label_colors.txt").write_text(TABLES["label_colors.txt"])
    splits = open_splits(str(tmp_path), val_fraction=0.3)
    assert len(splits.train) + len(splits.val) == 3
    assert splits.train.name(0) == "701_StillsRaw_full/0001TP_006690.png"
    np.testing.assert_array_equal(splits.train.read(0)[1][IDS > 0], IDS[IDS > 0] - 1)


def test_roboflows_masks_beside_the_images(tmp_path):
    for split in ("train", "valid", "test"):
        put(tmp_path / f"{split}/x.jpg", tmp_path / f"{split}/x_mask.png", IDS)
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, road\n2, sky\n")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["background", "road", "sky"]
    assert [splits.train.name(0), splits.val.name(0), splits.test.name(0)] == [
        "train/x.jpg",
        "valid/x.jpg",
        "test/x.jpg",
    ]
    np.testing.assert_array_equal(splits.val.read(0)[1], IDS)


def test_colours_of_no_class_and_twice_are_said(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / f"images/{split}/a.png", tmp_path / f"labels/{split}/a.png", coloured())
    pixels = coloured()
    pixels[3, 4] = (1, 2, 3)
    put(tmp_path / "images/train/b.png", tmp_path / "labels/train/b.png", pixels)
    (tmp_path / "classes.txt").write_text(TABLES["classes.txt"])
    train = open_splits(str(tmp_path)).train
    with pytest.raises(BrokenImage, match="its label map: 1 pixels are of no class, such as the colour 1 2 3"):
        train.read(1)
    Image.fromarray(coloured().astype(np.uint8)).save(tmp_path / "labels/train/b.png", "JPEG")
    with pytest.raises(BrokenImage, match="must not be JPEG, which changes colours"):
        train.read(1)
    (tmp_path / "classes.txt").write_text("1 2 3 a\n1 2 3 b\n")
    with pytest.raises(UserError, match=r"has the colour 1 2 3 twice: 'a' and 'b'"):
        open_splits(str(tmp_path))


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=30, unique=True), st.integers(0, 100))
def test_ids_of_colours_are_those_of_a_dictionary(colours, seed):
    ids = np.random.default_rng(seed).integers(0, len(colours), (5, 7))
    np.testing.assert_array_equal(ColourTable(colours).ids(np.array(colours, np.uint8)[ids]), ids)


def test_strangers_tables_of_classes_end_in_one_line(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / f"images/{split}/a.png", tmp_path / f"labels/{split}/a.png", IDS)
    tables = {
        "_classes.csv": ["Pixel Value, Class\n" + "x" * 200_000, "Pixel Value, Class\n99999999, a\n", "a\n²,b\n"],
        "class_dict.csv": ["name,r,g,b\n" + '"' * 99_999, "name,r,g,b\na,999,0,0\n", "\0,\0\n\0,1,2,3\n"],
        "labelmap.txt": ["a:1,2,3::\n" * 2 + "b:1,2,3::\n", ":" * 10_000],
        "classes.txt": ["9" * 5000 + " a\n", "70000 a\n", "\n"],
    }
    for name, texts in tables.items():
        for text in texts:
            (tmp_path / name).write_text(text)
            said = ""
            try:
                open_splits(str(tmp_path))
            except UserError as error:
                said = str(error)
            assert len(said.splitlines()) <= 1
            assert len(said) < 2000
        (tmp_path / name).unlink()
