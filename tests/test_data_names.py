"""Classes by name: whatever the names are, a label stays with its class."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image

from transcnn.checkpoints.loading import data_config_of, load, save_weights
from transcnn.data.loading.loader import make_loader
from transcnn.data.names import imagenet_names, match_names
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sources.class_files import read_class_file
from transcnn.data.sources.files import open_files
from transcnn.data.sources.source import read_class_names
from transcnn.data.transforms.classify import eval_transform
from transcnn.errors import UserError


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return buffer.getvalue()


def named_folder(root: Path, *names: str) -> str:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (40 * label, 9, i)).save(root / name / f"{i}.png")
    return str(root)


def test_a_name_that_the_model_does_not_know_is_never_matched_by_position(tmp_path: Path) -> None:
    folder = named_folder(tmp_path / "a", "0", "1")
    with pytest.raises(UserError, match="does not know '0'; it knows 5: '1', '2'"):
        open_set(folder, class_names=["1", "2", "3", "4", "5"])
    assert open_set(folder, class_names=["1", "0"]).labels.tolist() == [1, 1, 0, 0]
    far = named_folder(tmp_path / "b", "7", "2")
    animals = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
    assert open_set(far, class_names=animals).labels.tolist() == [2, 2, 7, 7]  # numbers of classes
    with pytest.raises(UserError, match="does not know '7'"):
        open_set(far, class_names=animals[:4])
    mixed = named_folder(tmp_path / "c", "1", "bee")
    with pytest.raises(UserError, match="does not know '1'"):
        open_set(mixed, class_names=animals)


def test_names_in_another_unicode_form_are_the_same(tmp_path: Path) -> None:
    composed, decomposed = "caf\xe9", "cafe\u0301"
    named_folder(tmp_path / "d" / "train", composed, "x")
    named_folder(tmp_path / "d" / "val", decomposed, "x")
    splits = open_splits(str(tmp_path / "d"))
    assert splits.class_names == [composed, "x"]
    assert splits.val.labels.tolist() == [0, 0, 1, 1]
    again = open_set(str(tmp_path / "d"), "val", class_names=["x", decomposed])
    assert (again.class_names, again.labels.tolist()) == (["x", composed], [1, 1, 0, 0])


def test_imagenets_folders_go_by_wordnet_id(tmp_path: Path) -> None:
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert [name for name in names if name.startswith("crane")] == ["crane (134)", "crane (517)"]
    folder = named_folder(tmp_path / "d", "n01440764", "n02012849", "n03126707", "n15075141")
    dataset = open_set(folder, class_names=names)
    assert dataset.labels[::2].tolist() == [0, 134, 517, 999]
    assert dataset.class_names == names
    with pytest.raises(UserError, match="does not know 'n01440764'"):
        open_set(folder, class_names=[f"class {i}" for i in range(1000)])
    strange = named_folder(tmp_path / "e", "n01440764", "n99999999")
    with pytest.raises(UserError, match="does not know 'n99999999'"):
        open_set(strange, class_names=names)


def test_two_classes_of_one_name_in_a_table(tmp_path: Path) -> None:
    metadata = {"info": {"features": {"label": {"names": ["c1", "c1", "c2"]}}}}
    table = pa.table({"image": [png(i) for i in range(6)], "label": [0, 1, 2, 0, 1, 2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "x.parquet")
    dataset = open_set(str(tmp_path / "x.parquet"), class_names=["c1", "c1", "c2"])
    assert dataset.class_names == ["c1 (0)", "c1 (1)", "c2"]
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("high", [2**31, 2**62, 2**64 - 1])
def test_labels_of_a_wide_range_become_classes_by_value(tmp_path: Path, high: int) -> None:
    """Hashed ids, for instance: a class for each value that occurs, and not one for each number below the largest."""
    labels = pa.array([high, 5, high, 5, 5, high], pa.uint64())
    pq.write_table(pa.table({"image": [png(i) for i in range(6)], "label": labels}), tmp_path / "x.parquet")
    dataset = open_set(str(tmp_path / "x.parquet"))
    assert dataset.class_names == ["5", str(high)]
    assert dataset.labels.tolist() == [1, 0, 1, 0, 0, 1]


def test_more_classes_than_can_be_learnt_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcnn.data.sources.source.MAX_CLASSES", 4)
    table = pa.table({"image": [png(i) for i in range(6)], "label": [10**9 + i for i in range(6)]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has 6 distinct labels; at most 4 classes"):
        open_set(str(tmp_path / "x.parquet"))


def test_files_that_are_left_out_for_their_names_are_listed(class_folder: Path) -> None:
    good = (class_folder / "class_0" / "000.png").read_bytes()
    for name in ("a.heic", "b.jxl", "c.jpg~", "noending", "d.cr2"):
        (class_folder / "class_1" / name).write_bytes(good if name == "noending" else b"\0\0\0\x18ftypheic0000")
    for name in ("notes.txt", "Thumbs.db", ".hidden", "labels.json"):
        (class_folder / "class_1" / name).write_bytes(b"x")
    dataset = open_set(str(class_folder))
    dataset.transform = eval_transform(32)
    for _ in make_loader(dataset, 8):
        pass
    broken = dict(dataset.broken)
    assert set(broken) == {f"class_1/{name}" for name in ("a.heic", "b.jxl", "c.jpg~", "noending", "d.cr2")}
    assert broken["class_1/noending"] == "not an image by its name"
    if not importlib.util.find_spec("pillow_heif"):
        assert "pip install pillow-heif" in broken["class_1/a.heic"]


def test_a_run_of_before_whose_classes_share_a_name(tmp_path: Path) -> None:
    model = timm.create_model("transcnn_test", num_classes=3)
    info = {"model": "transcnn_test", "model_args": {}, "class_names": ["c1", "c1", "c2"], "task": "classify"}
    save_weights(tmp_path / "x.safetensors", model, {**info, "data_config": data_config_of(model, 3)})
    assert load(tmp_path / "x.safetensors").class_names == ["c1 (0)", "c1 (1)", "c2"]


def test_numbers_for_classes_with_names_are_told(caplog):
    assert match_names(["0", "2"], ["cat", "dog", "owl"]) == ([0, 2], [])
    assert "the data's classes are numbers, and are taken for the model's in order: 0 is 'cat'" in caplog.text


def test_blank_lines_between_names_are_told(tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("\ncat\ndog\n\n")
    assert read_class_names(tmp_path) == ["cat", "dog"]
    assert read_class_file(open_files(tmp_path), tmp_path)[0] == {0: "cat", 1: "dog"}
    assert not caplog.text
    (tmp_path / "classes.txt").write_text("# animals\ncat\n\ndog\n")
    assert read_class_file(open_files(tmp_path), tmp_path)[0] == {0: "cat", 1: "dog"}
    assert "classes.txt of " in caplog.text
    assert "has blank lines between names" in caplog.text
    caplog.clear()
    (tmp_path / "classes.txt").write_text("0 cat\n\n1 dog\n")  # numbers say it
    assert read_class_file(open_files(tmp_path), tmp_path)[0] == {0: "cat", 1: "dog"}
    assert not caplog.text
