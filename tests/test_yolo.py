"""Boxes as tools write them: YOLO's folders, and exports of Roboflow, CVAT and Label Studio."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fuzz
from transcnn.commands.predict import predict
from transcnn.data.images import read_image
from transcnn.data.sets.detect import open_set, open_splits
from transcnn.data.sources.files import dense_layout
from transcnn.data.sources.yolo import _read_line
from transcnn.errors import UserError
from transcnn.report.answers import Box, Detections
from transcnn.report.dataset_writer import DatasetWriter

WIDTH, HEIGHT = 48, 32
LINE = "0 0.5 0.25 0.25 0.25"  # of these 18 to 30, 4 to 12
BOX = [18, 4, 30, 12]


def put(root: Path, *names: str, text: str | None = LINE) -> None:
    """Images, and a text for each in ``labels`` where ``images`` stands, or beside it."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        if text is not None:
            label = root / Path(name.replace("images/", "labels/")).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)


def boxes_of(data: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Boxes by split and file."""
    found = open_splits(str(data), val_fraction=0.3)
    return {
        split: {part.name(i): part.read(i)[1]["boxes"].tolist() for i in range(len(part))}
        for split in ("train", "val", "test")
        if (part := getattr(found, split)) is not None
    }


LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "folders": ("train: images/train\nval: images/val\n", ["images/train/a.png", "images/val/b.png"]),
    "path": ("path: ../sets/cells\ntrain: images/train\nval: images/val", ["images/train/a.png", "images/val/b.png"]),
    "roboflow": ("train: ../train/images\nval: ../valid/images\n", ["train/images/a.png", "valid/images/b.png"]),
    "absolute": ("train: /a/b/images/train\nval: 'C:\\b\\images\\val'", ["images/train/a.png", "images/val/b.png"]),
    "several": (
        "train: [images/one, images/two]\nval: images/val",
        ["images/one/a.png", "images/two/c.png", "images/val/b.png"],
    ),
    "one folder": ("train: images\nval: images/val", ["images/a.png", "images/val/b.png"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_wherever_the_yaml_says(tmp_path, layout):
    text, files = LAYOUTS[layout]
    (tmp_path / "data.yaml").write_text(text + "\nnc: 2\nnames: [cell, platelet]\n")
    put(tmp_path, *files)
    found = boxes_of(tmp_path)
    assert found["val"] == {files[-1]: [BOX]}
    assert dict.fromkeys(found["train"], BOX) == {name: boxes[0] for name, boxes in found["train"].items()}
    assert set(found["train"]) >= set(files[:-1])
    assert dense_layout(str(tmp_path)) == "detect"


def test_lists_of_files_and_maps_of_names(tmp_path):
    put(tmp_path, "images/a.png", "images/b.png", "images/c.png")
    (tmp_path / "train.txt").write_text("./images/a.png\n/home/me/set/images/b.png\nimages/none.png\n")
    (tmp_path / "val.txt").write_text("images\\c.png\n")
    names = "names:\n  0: cell\n  7: platelet\n"
    (tmp_path / "cells.yaml").write_text(f"train: train.txt\nval: [val.txt]\n{names}")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["cell", "platelet"]
    assert splits.task_args["label_ids"] == [0, 7]
    assert [splits.train.name(i) for i in range(2)] == ["images/a.png", "images/b.png"]
    assert [splits.val.name(i) for i in range(len(splits.val))] == ["images/c.png"]
    assert ("images/none.png", "a list names it, but there is none") in splits.train.listed
    (tmp_path / "cells.yaml").write_text("train: train.txt\nval: val.txt\nnc: 3\n")
    assert open_splits(str(tmp_path)).class_names == ["0", "1", "2"]


def test_images_without_a_text_have_no_objects(tmp_path):
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell]\n")
    put(tmp_path, "images/train/a.png", "images/val/b.png")
    put(tmp_path, "images/train/none.png", text=None)
    put(tmp_path, "images/train/empty.png", text="\n")
    found = boxes_of(tmp_path)["train"]
    assert found == {"images/train/a.png": [BOX], "images/train/none.png": [], "images/train/empty.png": []}


def test_polygons_are_masks_and_their_boxes(tmp_path):
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell]\n")
    put(tmp_path, "images/train/a.png", text="0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n" + LINE)
    put(tmp_path, "images/val/b.png")
    truth = open_splits(str(tmp_path)).train.read(0)[1]
    assert truth["boxes"].tolist() == [[12, 8, 36, 24], BOX]
    masks = [mask() for mask in truth["masks"]]
    assert [int(mask.sum()) for mask in masks] == [24 * 16, 12 * 8]
    assert masks[0][8:24, 12:36].all()


def test_names_are_read_as_they_are_written(tmp_path):
    put(tmp_path, "images/train/1.png", "images/val/2.png")
    for names in ("[no, 007, 1.50, null]", "{0: no, 1: 007, 2: 1.50, 3: null}"):  # of YAML, False, 7, 1.5 and nothing
        (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
        assert open_splits(str(tmp_path)).class_names == ["no", "007", "1.50", "null"]


def test_classes_that_differ_in_case_alone_are_told(tmp_path, caplog):
    put(tmp_path, "images/train/1.png", "images/val/2.png")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell, Cell]\n")
    open_splits(str(tmp_path))
    assert "classes 'cell', 'Cell' differ only in case and are kept apart" in caplog.text


def test_a_split_without_any_box_is_not_scored(tmp_path, caplog):
    put(tmp_path, "images/train/1.png", "images/train/2.png")
    put(tmp_path, "images/val/3.png", "images/test/4.png", text=None)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\ntest: images/test\nnames: [cell]\n")
    splits = open_splits(str(tmp_path))
    assert splits.test is None
    assert [len(part) for part in (splits.train, splits.val)] == [1, 1]
    assert "no image of the test split has a box, so it is left out" in caplog.text
    with pytest.raises(UserError, match="has no test split"):
        open_set(str(tmp_path), "test", ["cell"])
    assert len(open_set(str(tmp_path), "val", ["cell"])) == 1


@pytest.mark.parametrize("shape", [[4, 3], [4, 2]])
def test_keypoints_are_no_polygon(tmp_path, shape):
    points = " ".join(["0.4 0.4 2"[: 9 if shape[1] == 3 else 7]] * shape[0])
    put(tmp_path, "images/train/1.png", "images/val/2.png", text=f"0 0.5 0.5 0.25 0.5 {points}\n")
    yaml_text = f"train: images/train\nval: images/val\nnames: [person]\nkpt_shape: {shape}\n"
    (tmp_path / "data.yaml").write_text(yaml_text)
    splits = open_splits(str(tmp_path))
    width, height = splits.train.read(0)[0].size
    expected = [[0.375 * width, 0.25 * height, 0.625 * width, 0.75 * height]]
    assert splits.train.read(0)[1]["boxes"].tolist() == expected


def test_what_cannot_be_meant_is_left_out_and_listed(tmp_path):
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell]\n")
    lines = ["3 .5 .5 .2 .2", "0 .5 .5 0 .2", "x .5 .5 .2 .2", "0 nan .5 .2 .2", "0 .5 .5"]
    lines += ["0 1.5 1.5 .2 .2", "0.5 .5 .5 .2 .2"]
    put(tmp_path, "images/train/a.png", text="\n".join([*lines, LINE + " 0.9", "0 .1 .1 .2 .1 .2 .3 .4"]))
    put(tmp_path, "images/val/b.png")
    train = open_splits(str(tmp_path)).train
    assert train.read(0)[1]["boxes"].tolist() == [BOX]  # the one with a score
    reasons = "\n".join(reason for _, reason in train.listed)
    for reason in ("class 3 is none of '0'", "a box of 0x0.2 of the image", "could not convert", "not a number",
                   "expected a class and a box", "outside of the image", "needs pairs"):  # fmt: skip
        assert reason in reasons
    assert len(train.listed) == 8


@pytest.mark.parametrize(
    "text",
    [
        "train: images\nval: images\nnames: !!python/object/apply:os.system ['touch hacked']\n",
        "train: images\nval: images\nnames: &a [*a, *a]\n",
        "train: images\nval: images\nnames: 3\n",
        "train: images\nval: images\nnames: {a: b}\n",
        "train: images\nval: images\nnc: 99999999\n",
        "train: ../../../../etc\nval: /etc\nnames: [cell]\n",
        "train: [[[[images]]]]\nval: {a: 1}\nnames: [cell]\n",
        "[" * 5000,
    ],
)
def test_strangers_yaml_ends_in_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "images/a.png", "images/b.png", text=None)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        open_splits(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@settings(max_examples=200)
@given(st.text(alphabet="0123456789.-e nax", max_size=60))
def test_any_line_is_a_box_or_an_error(line):
    try:
        label, box, mask = _read_line(line)
    except (ValueError, OverflowError):
        return
    assert isinstance(label, int)
    assert len(box) == 4
    assert mask is None or len(mask[0]) >= 6


# --- what tools export ------------------------------------------------------------------------------------------------


def sheet(*files: str) -> dict[str, Any]:
    images = [{"id": i, "file_name": file, "width": WIDTH, "height": HEIGHT} for i, file in enumerate(files)]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [18, 4, 12, 8], "iscrowd": 0} for i in range(len(files))
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell", "supercategory": "cells"}]}


def roboflow_coco(root: Path) -> None:
    for split in ("train", "valid", "test"):
        put(root, f"{split}/{split}.png", text=None)
        content = sheet(f"{split}.png")
        content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))


def roboflow_voc(root: Path) -> None:
    for split in ("train", "valid", "test"):
        put(root, f"{split}/{split}.png", text=None)
        (root / split / f"{split}.xml").write_text(voc_xml(f"{split}.png"))


def voc_xml(file: str) -> str:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    box = "<bndbox><xmin>19</xmin><ymin>5</ymin><xmax>30</xmax><ymax>12</ymax></bndbox>"
    return f"<annotation><filename>{file}</filename>{size}<object><name>cell</name>{box}</object></annotation>"


def roboflow_yolo(root: Path) -> None:
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['cell']"
    )
    for split in ("train", "valid", "test"):
        put(root, f"{split}/images/{split}.png")


def cvat_coco(root: Path) -> None:
    put(root, "images/a.png", "images/b.png", "images/c.png", text=None)
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(sheet("a.png", "b.png", "c.png")))


def cvat_voc(root: Path) -> None:
    put(root, "JPEGImages/a.png", "JPEGImages/b.png", "JPEGImages/c.png", text=None)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "default.txt").write_text("a\nb\nc\n")
    (root / "Annotations").mkdir()
    for stem in "abc":
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(f"{stem}.png"))


def cvat_yolo(root: Path) -> None:
    put(root, "obj_train_data/a.png", "obj_train_data/b.png", "obj_train_data/c.png")
    (root / "obj.names").write_text("cell\n")
    (root / "obj.data").write_text("classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    (root / "train.txt").write_text("".join(f"data/obj_train_data/{stem}.png\n" for stem in "abc"))


def label_studio_coco(root: Path) -> None:
    put(root, "images/a.png", "images/b.png", "images/c.png", text=None)
    (root / "result.json").write_text(json.dumps(sheet("images\\a.png", "images/b.png", "images/c.png")))


def label_studio_yolo(root: Path) -> None:
    put(root, "images/a.png", "images/b.png", "images/c.png")
    (root / "classes.txt").write_text("cell\n")
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cell"}], "info": {}}')


EXPORTS = [
    roboflow_coco,
    roboflow_voc,
    roboflow_yolo,
    cvat_coco,
    cvat_voc,
    cvat_yolo,
    label_studio_coco,
    label_studio_yolo,
]


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
def test_exports_of_tools(tmp_path, export: Callable[[Path], None]):
    export(tmp_path)
    splits = open_splits(str(tmp_path), val_fraction=0.3)
    assert splits.class_names == ["cell"]
    assert splits.broken == []
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    assert sum(map(len, parts)) == 3
    for part in parts:
        for i in range(len(part)):
            np.testing.assert_allclose(part.read(i)[1]["boxes"], [BOX], atol=1e-4)
    if "roboflow" in export.__name__:
        assert [splits.val.name(0).partition("/")[0], splits.test.name(0).partition("/")[0]] == ["valid", "test"]
        assert len(open_set(str(tmp_path), "test", ["cell"])) == 1


# --- what predict writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_what_is_written_reads_back_as_it_was(tmp_path, kind):
    """Boxes, names and images; two images of one name, one of them sideways by its EXIF orientation."""
    rng = np.random.default_rng(1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a" / "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "b" / "x.jpg", exif=exif)
    names = ["cell & co", "plättchen", "wbc"]
    writer = DatasetWriter(tmp_path / "out" / kind, kind, names, [3, 1, 7])
    wanted: dict[tuple[float, ...], str] = {}
    for file in (tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg"):
        corners = rng.uniform(0, 0.5, (5, 2)) * [WIDTH, HEIGHT]
        boxes = np.concatenate([corners, corners + rng.uniform(1, 10, (5, 2))], 1).round(2)
        labels = [names[i] for i in rng.integers(0, 3, 5)]
        made = tuple(Box(label, 0.9, tuple(map(float, box))) for label, box in zip(labels, boxes, strict=True))  # pyright: ignore
        image = read_image(file)
        writer.add(Detections(file=str(file), image=image, boxes=made, class_names=names, label_ids=[3, 1, 7]))
        wanted |= {box.box: box.label for box in made}
    writer.finish()
    read = open_splits(str(tmp_path / "out" / kind), val_fraction=0.5)
    parts = [read.train] if kind == "yolo" else [read.train, read.val]
    found = {}
    for part in parts:
        assert part.broken == []
        for i in range(len(part)):
            image, truth = part.read(i)
            assert image.size == (WIDTH, HEIGHT)
            for box, label in zip(truth["boxes"], truth["labels"], strict=True):
                found[tuple(round(float(value), 2) for value in box)] = read.class_names[label]
    assert found == wanted
    with pytest.raises(UserError, match="is not empty"):
        DatasetWriter(tmp_path / "out" / kind, kind, names, [3, 1, 7])


def test_a_data_set_of_images_of_one_name(tmp_path):
    """None of the names is tried twice, and what an image is called on the disk isn't taken over with escapes."""

    class Counted(set):
        asked = 0

        def __contains__(self, name: object) -> bool:
            self.asked += 1
            return super().__contains__(name)

    image = Image.new("RGB", (8, 8))
    odd = tmp_path / "x.p\x1b[31mng"
    image.save(odd, format="PNG")
    writer = DatasetWriter(tmp_path / "out", "coco", ["a"], [1])
    writer.taken = Counted()
    for file in (str(odd), *(f"{i}/x.png" for i in range(99))):
        writer.add(Detections(file=file, image=image, boxes=(), class_names=["a"], label_ids=[1]))
    assert [row["file_name"] for row in writer.images] == ["x.png", *(f"x-{i}.png" for i in range(2, 101))]
    assert writer.taken.asked < 300


def test_predict_writes_a_data_set(tmp_path):
    put(tmp_path, "photos/a.png", "photos/b.png", text=None)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    rows = predict_by(fuzz.onnx_seeds()[2], tmp_path, format="yolo")
    texts = {file.stem: file.read_text() for file in (tmp_path / "out" / "yolo" / "labels").iterdir()}
    assert set(texts) == {"a", "b"}
    assert [len(row.get("boxes", ())) for row in rows] == [len(texts[stem].splitlines()) for stem in "ab"] + [0]
    assert len(list((tmp_path / "out" / "yolo" / "images").iterdir())) == 2
    with pytest.raises(UserError, match="format is for detectors; this network is for the task classify"):
        predict_by(fuzz.onnx_seeds()[0], tmp_path, format="coco")


def predict_by(content: bytes, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    pytest.importorskip("onnxruntime")
    (folder / "x.onnx").write_bytes(content)
    return predict(folder / "x.onnx", folder / "photos", out=folder / "out", accelerator="cpu", quiet=True, **settings)


@pytest.mark.parametrize("parts", [["val"], pytest.param(["train", "val", "test"], marks=pytest.mark.slow)])
def test_bccd_as_yolo_gives_the_boxes_of_its_coco_form(shared, root, tmp_path, monkeypatch, parts):
    """Box for box; the slow form looks at all of it."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from make_yolo import write_yolo  # pyright: ignore

    bccd = str(shared / "data" / "bccd" / "bccd.tar")
    write_yolo(bccd, tmp_path / "yolo", parts)
    names = open_splits(bccd).class_names
    for split in parts:
        one, other = open_set(bccd, split, names), open_set(str(tmp_path / "yolo"), split, names)
        assert len(one) == len(other) > 0
        for i in range(len(one)):
            assert Path(one.name(i)).name == Path(other.name(i)).name
            (image, truth), (copy, read) = one.read(i), other.read(i)
            assert image.size == copy.size
            np.testing.assert_array_equal(truth["labels"], read["labels"])
            np.testing.assert_allclose(truth["boxes"], read["boxes"], atol=1e-4)
