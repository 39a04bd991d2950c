"""A run that goes on notices what has changed in its data since it began, and keeps what was held back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transcnn.checkpoints.loading import load, read_info
from transcnn.commands.train import train
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sets.detect import open_set as detect_set
from transcnn.data.sets.detect import open_splits as open_detect
from transcnn.data.sets.segment import open_set as segment_set
from transcnn.data.sets.segment import open_splits as open_segment
from transcnn.errors import UserError
from transcnn.settings import Table
from transcnn.training.data_record import check_unchanged, keep_split, read_record, record_of, write_record

QUICK: dict[str, Any] = dict(model="transcnn_test", img_size=16, batch_size=4, precision="32", accelerator="cpu")
QUICK |= dict(num_workers=0, quiet=True, limit_batches=1)


@pytest.fixture
def began(make_class_folder) -> tuple[Path, dict[str, Any]]:
    """Two classes of ten images, and the record of a run on them that holds back a fifth."""
    folder = make_class_folder(classes=2, per_class=10)
    return folder, record_of(open_splits(str(folder), val_fraction=0.2))


def now(folder: Path) -> Any:
    return open_splits(str(folder), val_fraction=0.2)


def test_the_record_names_each_image_with_label_and_size(began, tmp_path):
    folder, record = began
    assert record["class_names"] == ["class_0", "class_1"]
    assert [record["splits"][split]["images"] for split in ("train", "val")] == [16, 4]
    files = [entry for split in record["splits"].values() for entry in split["files"]]
    sizes = {f"{path.parent.name}/{path.name}": path.stat().st_size for path in folder.glob("*/*.png")}
    assert {name: size for name, _, size in files} == sizes
    assert all(label == int(name[6]) for name, label, _ in files)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record == record_of(now(folder))
    (tmp_path / "data.json").write_text("{}")
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record["splits"].update(train=None),
        lambda record: record["splits"]["train"].pop("sha256"),
        lambda record: record["splits"]["val"].update(files=3),
        lambda record: record["splits"]["val"].update(files={"a": 1}),
        lambda record: record["splits"]["val"]["files"].append("x"),
        lambda record: record["splits"]["val"]["files"].append([]),
        lambda record: record["splits"]["val"]["files"].append([["x"], 1, 2]),
        lambda record: record.update(splits=[]),
    ],
)
def test_a_damaged_record_is_none(began, tmp_path, damage):
    _, record = began
    damage(record)
    (tmp_path / "data.json").write_text(json.dumps(record))
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("change", ["add", "remove", "replace", "relabel", "rename a class", "add a class"])
def test_every_change_is_named(began, change, class_image):
    folder, record = began
    image = folder / "class_1" / "003.png"
    told = "train (without|with other content of) 'class_1/003.png'"
    if change == "add":
        class_image(1, 99).save(folder / "class_1" / "new.png")
        told = "train with the new 'class_1/new.png'"
    elif change == "remove":
        image.unlink()
    elif change == "replace":
        class_image(1, 99, 48).save(image)
    elif change == "relabel":
        image.rename(folder / "class_0" / "moved.png")
        told = r"train without 'class_1/003.png'; train with the new 'class_0/moved.png'"
    elif change == "rename a class":
        (folder / "class_1").rename(folder / "apple")
        told = "they were 'class_0', 'class_1', now they are 'apple', 'class_0'"
    else:
        class_image(2, 0).save((folder / "class_2").with_suffix(".png"))
        (folder / "class_2").mkdir()
        class_image(2, 0).save(folder / "class_2" / "0.png")
        told = "now they are 'class_0', 'class_1', 'class_2'"
    splits = now(folder)
    keep_split(record, splits)
    with pytest.raises(UserError, match=told):
        check_unchanged(record, record_of(splits), accept=False)


def test_what_was_held_back_stays_so(began, class_image):
    folder, record = began
    for label in range(2):
        for i in range(100, 105):
            class_image(label, i).save(folder / f"class_{label}" / f"{i}.png")
    drawn, splits = now(folder), now(folder)
    held = {entry[0] for entry in record["splits"]["val"]["files"]}
    assert {drawn.val.name(i) for i in range(len(drawn.val))} != held  # drawn anew it is another
    assert keep_split(record, splits)
    assert {splits.val.name(i) for i in range(len(splits.val))} == held
    assert len(splits.train) == 26
    assert [splits.val.labels[i] == int(splits.val.name(i)[6]) for i in range(4)] == [True] * 4
    assert not splits.val.replace
    scored = open_set(str(folder), "val", val_fraction=0.2, class_names=["class_1", "class_0"], held=held)
    assert {scored.name(i) for i in range(len(scored))} == held
    assert [label == 1 - int(scored.name(i)[6]) for i, label in enumerate(scored.labels)] == [True] * 4
    assert len(open_set(str(folder), "train", val_fraction=0.2, held=held)) == 26
    assert len(open_set(str(folder), "val", val_fraction=0.4, held={"gone.png"})) == 12
    changes = check_unchanged(record, record_of(splits), accept=True)
    assert len(changes) == 1
    assert changes[0].startswith("train with the new 'class_0/100.png'")


def test_new_images_of_a_group_that_was_held_back_are_not_learnt_from(make_class_folder):
    folder = make_class_folder(classes=2, per_class=10)
    rows = [f"class_{i % 2}/{i // 2:03}.png,{i % 2},{i // 4}" for i in range(20)]
    table = folder / "labels.csv"

    def opened(count: int) -> Any:
        table.write_text("\n".join(["file,label,patient", *rows[:count]]))
        return open_splits(str(table), val_fraction=0.25, table=Table(group="patient"))

    record, splits = record_of(opened(18)), opened(20)  # the last patient had two images of four
    patient = {row.split(",")[0]: row.split(",")[2] for row in rows}
    assert keep_split(record, splits)
    train, val = ({patient[part.name(i)] for i in range(len(part))} for part in (splits.train, splits.val))
    assert not train & val
    assert val == {patient[name] for name, *_ in record["splits"]["val"]["files"]}
    record["splits"]["val"]["files"] = [[rows[16].split(",")[0], 0, 1]]  # one of the patient's four
    splits = opened(20)
    assert keep_split(record, splits)
    assert len(splits.val) == 4


def test_a_run_that_goes_on_refuses_changed_data_unless_told(make_class_folder, tmp_path, class_image, no_report):
    folder = make_class_folder(classes=2, per_class=6)
    run = train(str(folder), **QUICK, epochs=1, out=str(tmp_path / "run")).run_dir
    before = read_record(run)
    class_image(0, 50).save(folder / "class_0" / "new.png")
    with pytest.raises(UserError, match="has changed since the run began: train with the new 'class_0/new"):
        train(resume=str(run), epochs=2, quiet=True)
    train(resume=str(run), epochs=2, accept_changed_data=True, quiet=True)
    after = read_record(run)
    assert before is not None
    assert after is not None
    assert after["splits"]["val"] == before["splits"]["val"]
    assert after["splits"]["train"]["images"] == before["splits"]["train"]["images"] + 1
    assert "new.png" in (run / "faults.log").read_text()
    shutil.rmtree(folder / "class_1")
    with pytest.raises(UserError, match="images of one class only"):
        train(resume=str(run), epochs=3, quiet=True)


def test_a_run_that_goes_on_keeps_the_scale_of_its_numbers(tmp_path, class_image, no_report):
    lines = ["file,price"]
    for i in range(10):
        class_image(i % 2, i, 16).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i}")
    table = tmp_path / "prices.csv"
    table.write_text("\n".join(lines[:-1]))
    options: dict[str, Any] = {**QUICK, "task": "regress", "table": Table(target=["price"])}
    run = train(str(table), **options, epochs=1, out=str(tmp_path / "run")).run_dir
    scale = {name: load(run).info["task_args"][name] for name in ("mean", "std")}
    table.write_text("\n".join([*lines[:-1], "9.png,5000"]))
    train(resume=str(run), epochs=4, accept_changed_data=True, quiet=True)
    assert read_info(run / "last.ckpt")["task_args"].items() >= scale.items()  # else all answers were others at once


def test_boxes_and_label_maps_count_as_labels_and_are_held_back_too(tmp_path):
    for kind in ("images", "annotations", "labels"):
        (tmp_path / kind).mkdir()
    sheet: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}

    def add(i: int) -> None:
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 3).save(
            tmp_path / "labels" / f"{i}.png", compress_level=0
        )
        sheet["images"].append({"id": i, "file_name": f"{i}.png"})
        sheet["annotations"].append({"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 9, 9]})
        (tmp_path / "annotations" / "train.json").write_text(json.dumps(sheet))

    for i in range(10):
        add(i)
    detect, segment = record_of(open_detect(str(tmp_path))), record_of(open_segment(str(tmp_path)))
    assert check_unchanged(detect, record_of(open_detect(str(tmp_path))), accept=False) == []
    for i in range(10, 20):  # enough for another split
        add(i)
    for opened, record in ((open_detect(str(tmp_path)), detect), (open_segment(str(tmp_path)), segment)):
        assert keep_split(record, opened)
        held = {entry[0] for entry in record["splits"]["val"]["files"]}
        assert {opened.val.name(i) for i in range(len(opened.val))} == held
        assert len(opened.train) == 20 - len(held)
        assert opened.train.replace
        assert not opened.val.replace
        names, ids = opened.class_names, opened.task_args["label_ids"]
        known = {"class_names": names} if record is detect else {"class_names": names, "label_ids": ids}
        scored = (detect_set if record is detect else segment_set)(str(tmp_path), "val", **known, held=held)
        assert {scored.name(i) for i in range(len(scored))} == held
    sheet["annotations"][3]["bbox"] = [1, 2, 9, 8]
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(sheet))
    opened = open_detect(str(tmp_path))
    keep_split(detect, opened)
    with pytest.raises(UserError, match=r"with other labels of 'images/3\.png'"):
        check_unchanged(detect, record_of(opened), accept=False)
    label, size = tmp_path / "labels" / "2.png", (tmp_path / "labels" / "2.png").stat().st_size
    Image.fromarray(np.arange(1, 401).astype(np.uint8).reshape(20, 20) % 3).save(label, compress_level=0)
    assert label.stat().st_size == size  # its content alone says that it is another
    opened = open_segment(str(tmp_path))
    keep_split(segment, opened)
    with pytest.raises(UserError, match=r"with other labels of 'images/2\.png'"):
        check_unchanged(segment, record_of(opened), accept=False)
