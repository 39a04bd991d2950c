"""Tables of files and labels: whatever people's tools write is read, and what can't be used is listed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transcnn.checkpoints.loading import Loaded
from transcnn.commands.evaluate import _set_table
from transcnn.commands.predict import predict
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sources.opening import open_source
from transcnn.data.sources.table import FileFinder, read_table
from transcnn.errors import UserError
from transcnn.report.predictions import write_csv
from transcnn.settings import Table
from transcnn.training.data_record import record_of


@pytest.fixture
def photos(tmp_path: Path, class_image: Callable[..., Any]) -> Path:
    """Twelve images in ``photos/``: 0.png to 11.png, of two classes by turns."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        class_image(i % 2, i, 16).save(folder / f"{i}.png")
    return folder


ROWS = [(f"{i}.png", "cat" if i % 2 else "dog") for i in range(12)]


def write(path: Path, rows: Any = ROWS, header: str = "file,label", mark: str = ",") -> Path:
    lines = [header.replace(",", mark), *(mark.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def labels_of(data: Path | str, table: Table | None = None) -> dict[str, str]:
    """Class by file name, of everything there is."""
    splits = open_source(str(data), table)
    found = {}
    for source in (splits.train, splits.val, splits.test):
        if source is not None:
            found |= {source.name_of(i): source.class_names[label] for i, label in enumerate(source.labels)}
    return found


@pytest.mark.parametrize("kind", ["comma", "semicolon", "tab", "bar", "bom", "utf-16", "quotes", "jsonl", "parquet"])
def test_every_way_of_writing_a_table_says_the_same(photos, kind):
    marks = {"semicolon": ";", "bar": "|", "tab": "\t"}
    path = write(photos / ("labels.tsv" if kind == "tab" else "labels.csv"), mark=marks.get(kind, ","))
    if kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    elif kind == "utf-16":
        path.write_text(path.read_text(), encoding="utf-16")
    elif kind == "quotes":
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows([("File", " Label "), (), *ROWS])
    elif kind == "jsonl":
        path = photos / "labels.jsonl"
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in ROWS]
        path.write_text("\n\n".join(lines))
    elif kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        names, labels = zip(*ROWS, strict=True)
        path = photos / "labels.parquet"
        parquet.write_table(arrow.table({"path": names, "label": labels}), path)
    assert labels_of(path) == dict(ROWS)


def test_a_table_may_lie_elsewhere_and_name_files_by_whole_or_foreign_paths(photos, tmp_path):
    rows = [(photos / name, label) for name, label in ROWS[:4]]
    rows += [("D:\\work\\data\\" + name, label) for name, label in ROWS[4:8]]
    rows += [(f"/home/anna/data/{name}", label) for name, label in ROWS[8:]]
    table = write(tmp_path / "labels.csv", rows)
    found = labels_of(table, Table(images=str(photos)))
    assert list(found.values()) == [label for _, label in ROWS]
    sub = write(tmp_path / "labels.csv", [(f"photos\\{name}", label) for name, label in ROWS])
    assert len(labels_of(sub)) == 12
    finder = FileFinder(tmp_path / "photos")
    assert finder.path("../labels.csv") is None  # of a stranger's table no file outside is looked at
    assert finder.path("a/../0.png") == str(photos / "0.png")


def test_rows_that_cannot_be_used_are_left_out_and_listed(photos):
    rows = [*ROWS, ("gone.png", "cat"), ("0.png", "dog"), ("1.png", "dog"), ("3.png", ""), ("", "cat"), ("a", "b", "c")]
    rows += [("../x.png", "cat")]
    source = open_source(str(write(photos / "labels.csv", rows))).train
    assert source is not None
    assert len(source) == 11  # 1.png has two labels; 0.png twice the same
    reasons = dict(source.broken)
    assert set(reasons) == {"gone.png", "1.png", "3.png", "labels/18", "line 19", "../x.png"}
    assert "no such file (row 14)" in reasons["gone.png"]
    assert "contradict" in reasons["1.png"]
    assert "row 3, row 16" in reasons["1.png"]
    assert "no label" in reasons["3.png"]
    assert "leads out of" in reasons["../x.png"]


def test_a_split_column_is_followed_and_a_split_without_labels_is_none(photos, caplog):
    parts = ["train"] * 6 + ["Valid"] * 3 + ["test"] * 3
    rows = [(*row, part) for row, part in zip(ROWS, parts, strict=True)]
    table = write(photos / "labels.csv", [*rows, ("0.png", "dog", "test")], "file,label,split")
    splits = open_splits(str(table))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 3, 4]
    assert "1 images are in more than one split: '0.png'" in caplog.text
    assert len(open_set(str(table), "val", class_names=["cat", "dog"])) == 3
    blank = [(name, "" if part == "test" else label, part) for name, label, part in rows]
    splits = open_splits(str(write(table, blank, "file,label,split")))
    assert splits.test is None
    assert not splits.broken
    write(table, [*rows[1:], ("0.png", "dog", "fold 3")], "file,label,split")
    with pytest.raises(UserError, match=r"'split' has 'fold 3'; allowed: train, val, test"):
        open_splits(str(table))


def test_groups_in_more_than_one_split_are_told(photos, caplog):
    rows = [(name, label, f"p{i // 3}", "test" if i > 6 else "train") for i, (name, label) in enumerate(ROWS)]
    table = str(write(photos / "labels.csv", rows, "file,label,patient,split"))
    open_source(table, Table(group="patient"))
    assert "1 groups are in more than one split: 'p2'" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_held_back_whole(photos, seed):
    rows = [(name, label, f"patient {i // 3}") for i, (name, label) in enumerate(ROWS)]
    table = str(write(photos / "labels.csv", rows, "file,label,patient"))
    splits = open_splits(table, table=Table(group="patient"), val_fraction=0.25, seed=seed)
    group = {name: who for name, _, who in rows}
    train, val = ({group[part.name(i)] for i in range(len(part))} for part in (splits.train, splits.val))
    assert len(splits.val) == 3
    assert splits.class_names == ["cat", "dog"]
    assert not train & val
    again = open_splits(table, table=Table(group="patient"), val_fraction=0.25, seed=seed)
    assert record_of(again) == record_of(splits)
    assert open_set(table, "val", val_fraction=0.25, seed=seed, table=Table(group="patient")).name(0) in group


@pytest.mark.parametrize("nothing", ["", "nan", None])
def test_images_without_a_group_are_no_group(photos, nothing, caplog):
    rows = [(name, label, "p" if i < 4 else nothing) for i, (name, label) in enumerate(ROWS)]
    table = photos / "labels.jsonl"
    table.write_text("\n".join(json.dumps(dict(zip(("file", "label", "patient"), row, strict=True))) for row in rows))
    splits = open_splits(str(table), table=Table(group="patient"), val_fraction=0.25)
    train, val = ([int(Path(part.name(i)).stem) for i in range(len(part))] for part in (splits.train, splits.val))
    assert {*range(4)} <= {*train} or {*range(4)} <= {*val}  # those of p stay together
    assert {*range(4, 12)} & {*train}  # the others are no group
    assert {*range(4, 12)} & {*val}
    assert "in more than one split" not in caplog.text


def test_a_folder_with_metadata_is_a_table(photos):
    write(photos / "metadata.csv", header="file_name,label")
    assert labels_of(photos) == dict(ROWS)
    (photos / "metadata.csv").write_text("file_name,colour\n0.png,red\n")
    with pytest.raises(UserError, match="no images in"):  # not about labels: class folders count, as ever
        open_source(str(photos))
    assert labels_of(photos, Table(target=["colour"])) == {"0.png": "red"}


def test_parquet_with_images_inside_takes_any_column(photos):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = [{"bytes": (photos / name).read_bytes(), "path": name} for name, _ in ROWS]
    kinds = [label for _, label in ROWS]
    table = arrow.table({"image": content, "label": [0] * 12, "kind": kinds})
    parquet.write_table(table, photos / "data.parquet")
    source = open_source(str(photos / "data.parquet"), Table(target=["kind"])).train
    assert source is not None
    assert [source.class_names[i] for i in source.labels] == kinds
    assert source.load(0).size == (16, 16)


@pytest.mark.parametrize(
    ("text", "table", "message"),
    [
        ("", {}, "has no rows"),
        ("file,label\n", {}, "has no rows"),
        ("what,label\n0.png,a\n", {}, "no column of files.*'what', 'label'"),
        ("file,kind\n0.png,a\n", {}, r"no column 'label'; give --target NAME, one of 'file', 'kind'"),
        ("file,label\n0.png,a\n", {"target": ["kind"]}, "no column 'kind'; its columns are 'file', 'label'"),
        ("file,label\n0.png,a\n", {"group": "who"}, "no column 'who'"),
        ("file,a,b\n0.png,0,1\n", {"target": ["a,b"]}, "several labels an image: --task multilabel"),
        ("file,label,label\n0.png,a,b\n", {}, "several columns named 'label'"),
        ('file,label\n0.png,"a\n', {}, "can't read .*labels.csv as CSV: line"),
        ("file,label\nx.png,a\ny.png,b\n", {}, r"none of the 2 images .*'x.png': no such file.*--images DIR"),
        ("file,label\n0.png,\n1.png,nan\n", {}, "no row of .* has a label in 'label'"),
        ("file,label\n0.png,\xff\xfe", {}, "is no text in UTF-8"),
        ("file,label\n0.png,a\n1.png,a\n", {}, "images of one class only"),
    ],
)
def test_what_cannot_be_meant_is_one_line(photos, text, table, message):
    path = photos / "labels.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        open_splits(str(path), table=Table(**table))
    assert "\n" not in str(caught.value)


def test_numbers_as_labels_are_told_from_classes(photos, class_image):
    for i in range(12, 44):
        class_image(0, i, 16).save(photos / f"{i}.png")
    table = write(photos / "labels.csv", [(f"{i}.png", 1.5 * i) for i in range(44)])
    with pytest.raises(UserError, match=r"44 distinct numbers .* --task regress"):
        open_splits(str(table))


def test_options_of_tables_are_for_tables(photos, class_folder):
    with pytest.raises(UserError, match="target is for a table of files"):
        open_splits(str(class_folder), table=Table(target=["kind"]))
    with pytest.raises(UserError, match="images is for a table of files"):
        open_splits(None, table=Table(images="x"))


def test_columns_that_a_run_learnt_from_are_for_tables_alone(photos, class_folder):
    """A run of a table is scored on class folders, too."""
    table = write(photos / "labels.csv", [(f"{i}.png", i % 2) for i in range(12)])
    for columns, data, kept in (
        ({"target": ["label"], "separator": "/"}, table, True),
        ({"target": ["label"], "separator": "/", "file_column": "file"}, class_folder, False),
        ({"target": ["folder"]}, class_folder, True),
        ({"target": ["label"]}, None, False),
    ):
        info = {"task_args": {"table": columns}, "settings": {"data": "of a table.csv"}}
        loaded = Loaded(torch.nn.Identity(), "classify", ["a", "b"], {}, "run", info)
        _set_table(loaded, None if data is None else str(data), None, None)
        assert ("table" in loaded.info["task_args"]) == kept
    with pytest.raises(UserError, match="separator is for a table of files"):
        open_splits(str(class_folder), table=Table(separator="/"))


def test_ragged_rows_are_read(tmp_path):
    (tmp_path / "t.csv").write_text("file;label;\na.png;x\nb.png;y;;\n")
    table = read_table(tmp_path / "t.csv")
    assert table.columns == {"file": ["a.png", "b.png"], "label": ["x", "y"]}
    assert table.rows == [2, 3]
    assert np.array_equal(list(table.columns), ["file", "label"])


def test_predict_answers_each_row_and_keeps_its_columns(photos, tmp_path):
    rows = [("photos/0.png", "=1+2"), ("photos/0.png", 'a "b"'), ("gone.png", ""), ("../x.png", "y")]
    table = tmp_path / "test.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("id", "file", "note"), *((i, *row) for i, row in enumerate(rows))])
    found = predict("transcnn_nano.cifar10", [str(table)], csv=str(tmp_path / "out.csv"), top_k=2, quiet=True)
    assert len(found) == 4
    assert found[0]["top"] == found[1]["top"]
    assert "no such file" in found[2]["error"]
    assert "no such file" in found[3]["error"]
    with (tmp_path / "out.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == ["id", "file", "note", "error", "label_1", "score_1", "label_2", "score_2"]
    assert [(row["file"], row["note"]) for row in written] == [("photos/0.png", "'=1+2"), *rows[1:]]
    assert [row["label_1"] for row in written] == [*(found[0]["top"][0]["label"],) * 2, "", ""]
    table.write_text("file\n0.png\n")
    assert "error" not in predict("transcnn_nano.cifar10", [str(table)], image_dir=str(photos), quiet=True)[0]
    with pytest.raises(UserError, match="one table of files is read at a time"):
        predict("transcnn_nano.cifar10", [str(table), str(photos)])
    with pytest.raises(UserError, match="image_dir and file_column are for a table"):
        predict("transcnn_nano.cifar10", [str(photos)], image_dir="x")
    with pytest.raises(UserError, match=r"test\.csv"):
        predict("transcnn_nano.cifar10", [str(table)], csv=str(table), image_dir=str(photos))


def test_answers_of_every_kind_have_columns_of_their_own(tmp_path):
    path = tmp_path / "out.csv"
    write_csv(path, [{"file": "a", "values": {"price": 1.25}}, {"file": "b", "error": "x"}], 5, {"price": [3, None]})
    assert path.read_text().splitlines() == ["price,error,predicted_price", "3,,1.25", ",x,"]
    top = [{"label": "sea", "score": 0.5}]
    write_csv(path, [{"file": "a", "labels": ["sea", "sky"], "top": top}], 1, {"tags": [["x", "y"]]})
    assert path.read_text().splitlines() == ["tags,error,labels,label_1,score_1", "x;y,,sea;sky,sea,0.500000"]
