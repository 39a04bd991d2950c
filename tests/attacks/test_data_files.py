"""Data from strangers: files that promise too much, lead in circles or hold anything end in a result or in one line."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fuzz
from timing import allowed
from transcnn.data.images import BrokenImage, read_image
from transcnn.data.listing import list_images
from transcnn.data.names import distinct_names, match_names
from transcnn.data.sets.classify import open_set
from transcnn.data.sets.detect import open_splits as open_detect
from transcnn.data.sets.segment import open_splits as open_segment
from transcnn.data.sources.files import open_files
from transcnn.data.sources.opening import open_source
from transcnn.data.sources.table import read_table
from transcnn.errors import UserError
from transcnn.vectors.file import read_vectors

SECONDS = 20.0  # that nothing here may take
MEMORY = 1 << 28  # bytes of Python's and numpy's that no small file may need


@contextmanager
def bounded() -> Iterator[None]:
    """What happens inside takes little time and memory."""
    began = time.process_time()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    assert time.process_time() - began < allowed(SECONDS)


def png(grey: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return buffer.getvalue()


def refused(action: Callable[[], Any], match: str | None = None) -> None:
    """One line, and little of it."""
    with bounded(), pytest.raises((UserError, BrokenImage), match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_data_folder_with_links_to_itself_is_listed_once(tmp_path: Path) -> None:
    """Every folder links to every other, to the whole and to itself: without care there are a billion paths."""
    names = [f"class_{i}" for i in range(9)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
    for name in names:
        for other in [*names, "."]:
            (tmp_path / name / f"to_{other.strip('.') or 'all'}").symlink_to(tmp_path / other, target_is_directory=True)
    (tmp_path / "here").symlink_to(".", target_is_directory=True)
    (tmp_path / "up").symlink_to("..", target_is_directory=True)
    with bounded():
        dataset = open_set(str(tmp_path))
        assert (dataset.class_names, len(dataset)) == (names, 9)
        assert len(list(list_images(tmp_path))) == 9
        assert len(open_files(tmp_path).names()) <= 10
    assert all("to_" not in dataset.name(i) for i in range(9))


def test_links_between_the_files_of_a_dense_data_set(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").write_bytes(png(0))
        for i in range(8):
            (tmp_path / kind / f"loop{i}").symlink_to(tmp_path, target_is_directory=True)
    refused(lambda: open_segment(str(tmp_path)))
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "deep").symlink_to(deep, target_is_directory=True)
    with bounded():
        assert open_files(deep).names() == []


# --- names of many files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "wds/x-{000000000..020000000}.tar",
        "wds/{0..9999}/{0..9999}/{0..9999}.tar",
        "wds/x-{0..99999999999999999999999999999}.tar",
        "wds/" + "{a,b,c,d,e,f,g,h,i,j}" * 12 + ".tar",
        "wds/" + "{" * 2000 + "1..2" + "}" * 2000 + ".tar",
        "wds/x-{" + "9" * 5000 + "..1}.tar",
    ],
)
def test_patterns_that_stand_for_millions_of_files(pattern: str) -> None:
    refused(lambda: open_source(pattern), "more than 100,000 files")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_of_repetitions(tmp_path: Path) -> None:
    count = 1 << 21
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([png()]))
    table = pa.table({"image": images, "label": np.zeros(count, np.int64)})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", row_group_size=count)
    refused(lambda: open_source(str(tmp_path / "x.parquet")), "2,097,152 rows")


def test_a_table_of_bytes_that_unpack_to_a_thousand_times_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcnn.data.sources.parquet.MIN_BOMB_BYTES", 1 << 20)
    pq.write_table(pa.table({"image": [bytes(1 << 23)], "label": [0]}), tmp_path / "x.parquet", compression="zstd")
    refused(lambda: open_source(str(tmp_path / "x.parquet")), "bytes unpacked from")


@pytest.mark.parametrize("form", ["images", "structs", "table", "vectors"])
def test_one_value_for_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A dictionary's value takes its bytes once in the file, and once for each row in memory."""
    monkeypatch.setattr("transcnn.data.sources.parquet.IN_MEMORY", 1 << 20)
    rows, large = 1000, os.urandom(1 << 15)
    if form in ("images", "structs"):
        images = [large] * rows if form == "images" else [{"bytes": large, "path": None}] * rows
        table = pa.table({"image": images, "label": [0, 1] * (rows // 2)})
    elif form == "table":
        table = pa.table({"file": ["a.png"] * rows, "label": [large.hex()] * rows})
    else:
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1000 * rows, np.float32)), 1000)
        names = [""] * rows
        table = pa.table({"file": names, "label": names, "split": names, "vector": values})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="none", dictionary_pagesize_limit=1 << 24)
    assert path.stat().st_size < 100_000
    read = {"table": read_table, "vectors": read_vectors}.get(form, open_source)
    with bounded():
        refused(lambda: read(path if form in ("table", "vectors") else str(path)), "repeats its values")


def test_labels_of_shards_of_a_wide_range(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(4):
            for kind, content in (("png", png(i)), ("cls", str(2**62 + i % 2).encode())):
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with bounded():
        source = open_source(str(tmp_path / "train.tar")).train
    assert source is not None
    assert source.class_names == [str(2**62), str(2**62 + 1)]
    assert source.labels.tolist() == [0, 1, 0, 1]


# --- annotations ------------------------------------------------------------------------------------------------------


def detection(folder: Path, name: str, content: bytes) -> str:
    for path in (folder / "images", (folder / name).parent):
        path.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b', "categories": [], "annotations": []}',
        b"9" * 100_000,
        b'{"images": [{"id": 1e999, "file_name": "0.png"}], "categories": [{"id": 1, "name": "x"}]}',
        b"\xff\xfe{}",
        b"",
    ],
)
def test_deep_and_odd_json(tmp_path: Path, content: bytes) -> None:
    folder = detection(tmp_path, "annotations/train.json", content)
    refused(lambda: open_detect(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>",
        b'<!DOCTYPE a [<!ENTITY b0 "lol">'
        + b"".join(b'<!ENTITY b%d "%s">' % (i, b"&b%d;" % (i - 1) * 10) for i in range(1, 10))
        + b"]><annotation>&b9;</annotation>",
        b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object></annotation>',
        b"<annotation><object><name>x</name><bndbox><xmin>"
        + b"9" * 100_000
        + b"</xmin></bndbox></object></annotation>",
    ],
)
def test_deep_and_odd_xml(tmp_path: Path, content: bytes) -> None:
    folder = detection(tmp_path, "Annotations/0.xml", content)
    refused(lambda: open_detect(folder))


def test_a_polygon_of_any_size_is_rasterised_in_no_time(tmp_path: Path) -> None:
    far = [[-1e12, -1e12, 1e12, 1e12, 1e300, 0.5], [1e15] * 6, [0, 0, 1e9, 0, 1e9, 1e9]]
    sheet = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(4)],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": far} for i in range(4)
        ],
    }
    splits = open_detect(detection(tmp_path, "annotations/train.json", json.dumps(sheet).encode()))
    with bounded():
        assert splits.train.read(0)[1]["masks"][0]().shape == (8, 8)


# --- archives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.tar.xz"])
def test_compressed_archives_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4" + bytes(1000))
    refused(lambda: open_files(tmp_path / name), "unpack it first")
    refused(lambda: open_source(str(tmp_path / name)))


def odd_tars() -> list[bytes]:
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 40
    huge = header.tobuf(tarfile.GNU_FORMAT)
    header.name, header.size = "x" * 300, 0
    long_name = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    long_name[124:136] = b"77777777777\0"  # the long name would have 8 GiB
    header.name = "../../../../tmp/evil.png"
    outside = header.tobuf() + bytes(1024)
    return [huge, bytes(long_name), outside, huge[:100], bytes(10_240), b"\0" * 512 + huge]


@pytest.mark.parametrize("content", odd_tars())
def test_tars_that_lie_about_sizes_and_places(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    before = sorted(tmp_path.parent.rglob("*"))
    refused(lambda: open_source(str(tmp_path / "x.tar")))
    with bounded():
        try:
            files = open_files(tmp_path / "x.tar")
        except UserError:
            return
        for name in files.names():
            with pytest.raises(BrokenImage):
                read_image(files.read(name))
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_a_table_of_many_names_and_many_short_lines(tmp_path: Path, name: str) -> None:
    """A megabyte of which nearly all cells are empty: 24 GB of them."""
    names = [f"n{i}" for i in range(9000)]
    head, line = (json.dumps(dict.fromkeys(names, 1)), "{}") if name == "x.jsonl" else (",".join(names), "a")
    (tmp_path / name).write_text("\n".join([head, *[line] * 300_000]))
    began = time.process_time()
    with pytest.raises(UserError, match="far more cells than text"):
        read_table(tmp_path / name)
    assert time.process_time() - began < allowed(5)
    (tmp_path / name).write_text("\n".join([head, *[line] * 9]))
    assert len(read_table(tmp_path / name)) == (10 if name == "x.jsonl" else 9)


# --- anything ---------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e300, 1e-300),
    *(float("nan"), float("inf"), -float("inf"), "", "0", "1", "1.png", "../x", "a\0b", "\ud800", "é", "e\u0301"),
    *("=1+1", "[/b]", "x" * 5000, "🙂", b"", b"\xff", [], [1], [[1, 2]], [None], {}, {"id": 1}, {"size": [8, 8]}),
]


def fuzz_table(draw: random.Random) -> Callable[[Path], Any]:
    """A Parquet file of odd columns."""
    count = draw.choice([0, 1, 2, 5])
    images: list[Any] = [draw.choice([png(), b"", b"no image", None]) for _ in range(count)]
    if draw.random() < 0.3:
        images = [
            {"bytes": value, "path": draw.choice(["a.png", "../../etc/passwd", "", None, "/dev/zero"])}
            for value in images
        ]
    kind = draw.choice([pa.int8(), pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.bool_(), pa.binary()])
    pool = [value for value in ODD if _fits(value, kind)]
    columns: dict[str, Any] = {draw.choice(["image", "img", "picture"]): pa.array(images)}
    columns[draw.choice(["label", "cls", "id"])] = pa.array([draw.choice(pool) for _ in range(count)], kind)
    table = pa.table(columns)
    names = draw.choice([None, ["a", "b"], ["a", "a"], [], "ab", {"x": 1}, [None, 3], ODD[:3]])
    features = {"label": {"names": names}} if draw.random() < 0.8 else names
    if draw.random() < 0.4:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})

    def attempt(folder: Path) -> None:
        pq.write_table(table, folder / "x.parquet")
        dataset = open_set(str(folder / "x.parquet"))
        for i in range(len(dataset)):
            try:
                dataset.read(i)
            except BrokenImage:  # noqa: PERF203
                continue

    return attempt


def _fits(value: Any, kind: Any) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


def fuzz_annotations(draw: random.Random) -> Callable[[Path], Any]:
    """COCO's JSON with odd values in odd places."""
    sheet: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(4)],
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "x"}],
        "annotations": [
            {"id": i, "image_id": i % 4, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 0, "area": 25,
             "segmentation": draw.choice([[[1, 1, 6, 1, 6, 6]], {"size": [8, 8], "counts": [20, 4, 40]}])}
            for i in range(5)
        ],
    }  # fmt: skip
    values = [value for value in ODD if not isinstance(value, bytes)]
    for _ in range(draw.randint(1, 4)):
        node: Any = sheet
        while True:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.1:
                break
            node = node[key]
        if draw.random() < 0.15 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = draw.choice(values)
        if not sheet:
            break

    def attempt(folder: Path) -> None:
        splits = open_detect(detection(folder, "annotations/train.json", json.dumps(sheet).encode()))
        for part in (splits.train, splits.val):
            for i in range(len(part)):
                try:
                    masks = part.read(i)[1]["masks"]
                except BrokenImage:
                    continue
                for mask in masks:
                    try:
                        assert mask().shape == (8, 8)
                    except BrokenImage:  # noqa: PERF203
                        continue

    return attempt


def fuzz_names(draw: random.Random) -> Callable[[Path], Any]:
    """Folders, files and classes.txt of odd names."""
    pieces = [*[value for value in ODD if isinstance(value, str)], *"ab01{}.,:-\n\t \\%", "{0..9}", "train", "val"]

    def name() -> str:
        text = "".join(draw.choices(pieces, k=draw.randint(1, 4))).replace("/", "").replace("\0", "")[:60]
        return os.fsdecode(text.encode("utf-8", "surrogatepass")).strip(".") or "x"

    labels = list(dict.fromkeys(name() for _ in range(draw.randint(1, 4))))
    lines = "\n".join(name() for _ in range(4))

    def attempt(folder: Path) -> None:
        for label in labels:
            (folder / "d" / label).mkdir(parents=True, exist_ok=True)
            (folder / "d" / label / f"{labels[0]}.png").write_bytes(png())
        dataset = open_set(str(folder / "d"))
        assert len(set(dataset.class_names)) == len(dataset.class_names)
        order, unknown = match_names(dataset.class_names, dataset.class_names)
        assert (order, unknown) == (list(range(len(order))), [])
        assert len(set(distinct_names(labels * 2))) == 2 * len(labels)
        for kind in ("images", "labels"):
            (folder / "s" / kind).mkdir(parents=True)
            for i in range(3):
                (folder / "s" / kind / f"{i}.png").write_bytes(png(i % 2))
        (folder / "s" / "classes.txt").write_bytes(lines.encode("utf-8", "surrogateescape"))
        splits = open_segment(str(folder / "s"))
        assert len(set(splits.class_names)) == len(splits.class_names)

    return attempt


@pytest.mark.parametrize(("make", "count"), [(fuzz_table, 400), (fuzz_annotations, 400), (fuzz_names, 200)])
def test_anything_ends_in_a_result_or_in_one_line(make: Callable[..., Any], count: int, tmp_path: Path) -> None:
    lines: list[str] = []
    count = count * fuzz.CASES // 1000
    for case in range(count):
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        attempt = make(random.Random(case))
        try:
            attempt(folder)
        except UserError as error:
            lines.append(str(error))
        except Exception as error:  # the case's number, to find it again
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
    assert not [line for line in lines if "\n" in line or len(line) > 3000]
    assert count // 20 < len(lines) < count - count // 20  # both happen, else nothing is tried
