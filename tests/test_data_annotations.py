"""Boxes and masks from annotation files as tools write them: on the object, or left out with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transcnn.data.images import BrokenImage
from transcnn.data.names import distinct_names
from transcnn.data.sets.detect import open_set, open_splits
from transcnn.data.sources.masks import check_segmentation
from transcnn.errors import UserError

WIDTH, HEIGHT = 48, 32
BOX = (10, 4, 20, 12)  # x, y, width, height of the one bright object in each image


def bright(size: tuple[int, int] = (WIDTH, HEIGHT), box: tuple[int, ...] = BOX) -> Image.Image:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w] = 255
    return Image.fromarray(pixels)


def entry(image: Any, box: Any = BOX, number: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "bbox": list(box), "iscrowd": 0, **more}


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Path]:
    """Writes a COCO data set of four images, each with one object; ``edit`` changes the annotation file."""

    def make(edit: Callable[[dict[str, Any]], Any] = lambda sheet: None) -> Path:
        (tmp_path / "images").mkdir()
        (tmp_path / "annotations").mkdir()
        images, annotations = [], []
        for i in range(4):
            bright().save(tmp_path / "images" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
            annotations.append(entry(i, number=i + 1))
        sheet = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        edit(sheet)
        (tmp_path / "annotations" / "train.json").write_text(json.dumps(sheet))
        return tmp_path

    return make


def all_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What is read of each image, by its file's name."""
    splits = open_splits(str(folder))
    sets = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    return {part.name(i).rpartition("/")[2]: dict(zip(("image", "truth"), part.read(i), strict=True))
            for part in sets for i in range(len(part))}  # fmt: skip


def reasons(folder: Path) -> str:
    return "\n".join(f"{name}: {reason}" for name, reason in open_splits(str(folder)).broken)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_distinct_names() -> None:
    assert distinct_names(["c1", "c1", "c2"]) == ["c1 (0)", "c1 (1)", "c2"]
    assert distinct_names(["a", "b"]) == ["a", "b"]
    assert distinct_names(["e\u0301", "\xe9"]) == ["\xe9 (0)", "\xe9 (1)"]  # the same letter in two spellings
    odd = distinct_names(["x", "x", "x (0)", "x (1)"])
    assert len(set(odd)) == 4
    assert odd[2:] == ["x (0)", "x (1)"]


def test_two_categories_of_one_name_stay_two_classes(coco: Callable[..., Path]) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        sheet["categories"] = [{"id": i, "name": name} for i, name in enumerate(("c1", "c1", "c2"))]
        for i, one in enumerate(sheet["annotations"]):
            one["category_id"] = i % 3

    folder = coco(edit)
    splits = open_splits(str(folder))
    assert splits.class_names == ["c1 (0)", "c1 (1)", "c2"]
    for names in (splits.class_names, ["c1", "c1", "c2"]):  # what a run keeps, and what one of before kept
        part = open_set(str(folder), "train", names)
        labels = {part.name(i): part.read(i)[1]["labels"].tolist() for i in range(len(part))}
        assert all(label == [int(name[-5]) % 3] for name, label in labels.items())


# --- COCO's JSON as tools write it ------------------------------------------------------------------------------------


def test_an_image_id_of_two_images_is_refused(coco: Callable[..., Path]) -> None:
    folder = coco(lambda sheet: sheet["images"][1].update(id=0))
    with pytest.raises(UserError, match=r"two images of the id 0: '0.png', '1.png'"):
        open_splits(str(folder))


def test_an_image_listed_twice_is_one_with_the_boxes_of_both(coco: Callable[..., Path]) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        sheet["images"].append({**sheet["images"][0], "id": 77})
        sheet["annotations"] += [entry(77, (1, 1, 5, 5), 50), entry(77, BOX, 51)]

    folder = coco(edit)
    found = all_of(folder)
    assert len(found) == 4
    x, y, w, h = BOX
    assert found["0.png"]["truth"]["boxes"].tolist() == [[x, y, x + w, y + h], [1, 1, 6, 6]]
    assert "listed as image 0 and 77" in reasons(folder)


def test_files_of_one_split_are_put_together(coco: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = coco()
    sheet = json.loads((folder / "annotations" / "train.json").read_text())
    more = {**sheet, "annotations": [entry(0), {**entry(1, number=2), "category_id": 2}]}
    more["categories"] = [*sheet["categories"], {"id": 2, "name": "part"}]
    sky = {**sheet, "categories": [{"id": 9, "name": "sky"}], "annotations": [{**entry(0), "category_id": 9}]}
    segments = {**sheet, "annotations": [{"image_id": 0, "file_name": "0.png", "segments_info": []}]}
    unlabelled = {name: sheet[name] for name in ("images", "categories")}
    for name, content in {
        "train_parts": more,
        "stuff_train2017": sky,
        "panoptic_train2017": segments,
        "image_info_test2017": unlabelled,
    }.items():
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
    splits = open_splits(str(folder))
    assert splits.class_names == ["thing", "part"]
    assert splits.test is None
    assert {name: found["truth"]["labels"].tolist() for name, found in all_of(folder).items()} == {
        **{f"{i}.png": [0] for i in range(4)},
        "1.png": [0, 1],  # one box of each class; the box that both files have of 0.png counts once
    }
    assert len(splits.train) + len(splits.val) == 4
    assert not splits.broken
    assert "image_info_test2017.json has no annotations: its images are left out" in caplog.text


def test_images_in_two_splits_are_told(coco: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    sheets = coco() / "annotations"
    content = json.loads((sheets / "train.json").read_text())
    (sheets / "val.json").write_text(json.dumps({**content, "images": content["images"][:2]}))
    open_splits(str(sheets.parent))
    assert "2 images are in more than one split: 'images/0.png', 'images/1.png'" in caplog.text


def test_boxes_that_are_no_pixels_are_refused(coco: Callable[..., Path]) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        for one in sheet["annotations"]:
            one["bbox"] = [0.2, 0.1, 0.4, 0.4]

    with pytest.raises(UserError, match="all boxes lie within the first pixel, as parts of the image's width"):
        open_splits(str(coco(edit)))


def test_boxes_that_are_corners_are_told(coco: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        corners = [(10, 4, 40, 30), (5, 2, 30, 20), (20, 12, 47, 31)]
        sheet["annotations"] = [entry(i, box, i) for i in range(4) for box in corners]

    open_splits(str(coco(edit)))
    assert "none would if bbox were x1, y1, x2, y2" in caplog.text


@pytest.mark.parametrize(
    ("value", "crowd"),
    [(0, False), (1, True), ("0", False), ("1", True), (False, False), (None, False), ("true", True)],
)
def test_iscrowd_as_tools_write_it(coco: Callable[..., Path], value: Any, crowd: bool) -> None:
    folder = coco(lambda sheet: [one.update(iscrowd=value) for one in sheet["annotations"]])
    assert {one["truth"]["crowd"].item() for one in all_of(folder).values()} == {crowd}


def test_an_iscrowd_that_is_none_is_listed(coco: Callable[..., Path]) -> None:
    folder = coco(lambda sheet: sheet["annotations"][0].update(iscrowd="maybe"))
    assert "annotation 1: iscrowd must be 0 or 1, got 'maybe'" in reasons(folder)


def test_ids_as_numbers_and_as_text(coco: Callable[..., Path]) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        sheet["categories"][0]["id"] = "1"
        for i, one in enumerate(sheet["annotations"]):
            one["image_id"] = [str(i), float(i), i, i][i]

    assert [len(one["truth"]["boxes"]) for one in all_of(coco(edit)).values()] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["images\\0.png", "C:\\data\\images\\0.png", "a%20b.png", "sub\\..\\a b.png"])
def test_names_with_backslashes_and_escapes(coco: Callable[..., Path], name: str) -> None:
    folder = coco(lambda sheet: sheet["images"][0].update(file_name=name))
    if "a" in name.rpartition("\\")[2]:
        (folder / "images" / "0.png").rename(folder / "images" / "a b.png")
    assert len(all_of(folder)) == 4


def test_where_all_is_left_out_the_first_reasons_are_named(coco: Callable[..., Path]) -> None:
    folder = coco(lambda sheet: [image.update(file_name=f"gone{image['id']}.png") for image in sheet["images"]])
    with pytest.raises(UserError, match=r"4 left out: 'gone0.png': an annotation names it, but there is no such image"):
        open_splits(str(folder))


# --- outlines ---------------------------------------------------------------------------------------------------------


def masks(folder: Path) -> list[np.ndarray]:
    return [one["truth"]["masks"][0]() for _, one in sorted(all_of(folder).items())]


def test_polygons_are_rasterised_as_coco_does(coco: Callable[..., Path]) -> None:
    x, y, w, h = BOX
    square = [x, y, x + w, y, x + w, y + h, x, y + h]
    triangle = [[2.0, 2.0, 30.5, 4.0, 9.0, 29.0]]

    def edit(sheet: dict[str, Any]) -> None:
        for one in sheet["annotations"]:
            one["segmentation"] = [square]
        sheet["annotations"][1]["segmentation"] = triangle
        sheet["annotations"][2]["segmentation"] = [square, [0, 0, 4, 0, 4, 4, 0, 4]]
        sheet["annotations"][3]["segmentation"] = [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]]

    found = masks(coco(edit))
    exact = np.asarray(bright())[:, :, 0] > 0
    assert found[0].sum() == w * h
    np.testing.assert_array_equal(found[0], exact)
    from faster_coco_eval.core import mask as library

    np.testing.assert_array_equal(found[1], library.decode(library.frPyObjects(triangle, HEIGHT, WIDTH))[:, :, 0] > 0)
    assert found[2].sum() == w * h + 16
    assert found[3].all()  # corners far outside take no memory


@pytest.mark.parametrize(
    ("outline", "listed"),
    [
        ([[]], "6 or more numbers: the box"),
        ([[1, 2, 3, 4]], "6 or more numbers: the box"),
        ([[[1, 2], [3, 4], [5, 6]]], "6 or more numbers: the box"),
        ("polygon", "a str, not a list: the box"),
        ([["a", 1, 2, 3, 4, 5]], "6 or more numbers: the box"),
        ([[float("nan")] * 6], "6 or more numbers: the box"),
        ([[5, 5, 5, 5, 5, 5]], ""),  # covers no pixel
        ([], ""),
        (None, ""),
        ({"size": [1, 2]}, "run lengths that can't be read"),
        ({"size": ["a", 2], "counts": [2]}, "run lengths that can't be read"),
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "don't fill the image"),
    ],
)
def test_an_outline_that_draws_nothing_is_the_box(coco: Callable[..., Path], outline: Any, listed: str) -> None:
    folder = coco(lambda sheet: sheet["annotations"][0].update(segmentation=outline))
    np.testing.assert_array_equal(masks(folder)[0], np.asarray(bright())[:, :, 0] > 0)
    assert listed in reasons(folder)
    assert bool(listed) == bool(reasons(folder))


def test_of_several_outlines_the_good_ones_are_taken() -> None:
    good = [0, 0, 4, 0, 4, 4]
    assert check_segmentation([good, [1, 2]]) == (
        [good],
        "an outline that is no list of 6 or more numbers: the others are taken",
    )


def test_run_lengths_with_float_sizes(coco: Callable[..., Path]) -> None:
    exact = np.asarray(bright())[:, :, 0] > 0
    flat = exact.T.ravel()
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int), [0]]))).tolist()
    lengths = np.diff([0, *ends, flat.size]).astype(float).tolist()

    def edit(sheet: dict[str, Any]) -> None:
        sheet["annotations"][0]["segmentation"] = {"size": [float(HEIGHT), float(WIDTH)], "counts": lengths}

    folder = coco(edit)
    np.testing.assert_array_equal(masks(folder)[0], exact)
    assert reasons(folder) == ""


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_annotations_for_a_larger_image_are_scaled(coco: Callable[..., Path]) -> None:
    def edit(sheet: dict[str, Any]) -> None:
        x, y, w, h = (2 * value for value in BOX)
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        for image, one in zip(sheet["images"], sheet["annotations"], strict=True):
            image.update(width=2 * WIDTH, height=2 * HEIGHT)
            one.update(bbox=[x, y, w, h], segmentation=outline, area=w * h)

    folder = coco(edit)
    for one in all_of(folder).values():
        x, y, w, h = BOX
        assert one["truth"]["boxes"].tolist() == [[x, y, x + w, y + h]]
        assert one["truth"]["area"].tolist() == [w * h]
        np.testing.assert_array_equal(one["truth"]["masks"][0](), np.asarray(bright())[:, :, 0] > 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("lengths", [False, True], ids=["polygon", "run lengths"])
def test_boxes_of_stored_pixels_follow_the_exif_orientation(
    coco: Callable[..., Path], orientation: int, lengths: bool
) -> None:
    """Files as a camera stores them, annotated by a tool that doesn't look at EXIF."""
    exact = np.asarray(bright())[:, :, 0] > 0
    flat = exact.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]]))).tolist()
    x, y, w, h = BOX
    outline: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if lengths:
        outline = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, flat.size]).tolist()}
    folder = coco(lambda sheet: [one.update(segmentation=outline) for one in sheet["annotations"]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(4):
        bright().save(folder / "images" / f"{i}.png", exif=exif)
    for one in all_of(folder).values():
        shown = np.asarray(one["image"])[:, :, 0] > 0
        if orientation >= 5:  # the sides are swapped, which tells that the boxes are for the stored pixels
            assert shown.shape == (WIDTH, HEIGHT)
            x1, y1, x2, y2 = one["truth"]["boxes"][0].astype(int)
            assert shown[y1:y2, x1:x2].all()
            assert shown.sum() == (y2 - y1) * (x2 - x1)
            np.testing.assert_array_equal(one["truth"]["masks"][0](), shown)


@pytest.mark.parametrize("exif_orientation", [1, 6])
def test_swapped_sizes_with_upright_boxes_are_seen_by_the_boxes(
    coco: Callable[..., Path], exif_orientation: int
) -> None:
    box = (30, 4, 16, 20)  # reaches beyond an image whose sides are swapped

    def edit(sheet: dict[str, Any]) -> None:
        for image, one in zip(sheet["images"], sheet["annotations"], strict=True):
            image.update(width=HEIGHT, height=WIDTH)
            one.update(bbox=list(box))

    folder = coco(edit)
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    stored = bright(box=box)
    if exif_orientation == 6:
        stored = stored.transpose(Image.Transpose.ROTATE_90)
    for i in range(4):
        stored.save(folder / "images" / f"{i}.png", exif=exif)
    for one in all_of(folder).values():
        shown = np.asarray(one["image"])[:, :, 0] > 0
        x1, y1, x2, y2 = one["truth"]["boxes"][0].astype(int)
        assert shown[y1:y2, x1:x2].all()
        assert shown.sum() == (y2 - y1) * (x2 - x1)


def test_annotations_for_another_image_are_left_out_and_listed(coco: Callable[..., Path]) -> None:
    folder = coco(lambda sheet: [image.update(width=100, height=100) for image in sheet["images"]])
    part = open_set(str(folder), "train", ["thing"])
    with pytest.raises(BrokenImage, match="for an image of 100x100 pixels, it has 48x32"):
        part.read(0)


# --- Pascal VOC -------------------------------------------------------------------------------------------------------

XML = """<annotation><object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>
</bndbox></object></annotation>"""


def voc(path: Path, label: str, box: tuple[int, ...] = BOX) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y, w, h = box
    path.write_text(XML.format(label, x + 1, y + 1, x + w, y + h))


def test_images_of_one_name_in_two_splits_stay_apart(tmp_path: Path) -> None:
    for split, box in (("train", BOX), ("val", (20, 10, 8, 8))):
        for i in range(2):
            (tmp_path / split / "images").mkdir(parents=True, exist_ok=True)
            bright(box=box).save(tmp_path / split / "images" / f"{i}.png")
            voc(tmp_path / split / "annotations" / f"{i}.xml", "thing", box)
    splits = open_splits(str(tmp_path))
    for part, split in ((splits.train, "train"), (splits.val, "val")):
        assert len(part) == 2
        for i in range(2):
            image, truth = part.read(i)
            assert part.name(i) == f"{split}/images/{i}.png"
            x1, y1, x2, y2 = truth["boxes"][0].astype(int)
            assert (np.asarray(image)[y1:y2, x1:x2] == 255).all()


def test_an_annotation_that_fits_two_images_is_listed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "JPEGImages" / folder).mkdir(parents=True)
        bright().save(tmp_path / "JPEGImages" / folder / "0.png")
    voc(tmp_path / "Annotations" / "0.xml", "thing")
    with pytest.raises(UserError, match=r"several images could be meant: 'JPEGImages/a/0\.png', 'JPEGImages/b/0.png'"):
        open_splits(str(tmp_path))


def test_lists_with_spaces_endings_and_numbers(tmp_path: Path) -> None:
    names = ["my photo 1", "plain", "ends.with", "number"]
    (tmp_path / "JPEGImages").mkdir()
    for name in [*names, "unlisted"]:
        bright().save(tmp_path / "JPEGImages" / f"{name}.png")
        voc(tmp_path / "Annotations" / f"{name}.XML", "thing")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("my photo 1\nplain.png\ngone for good\n")
    (lists / "val.txt").write_text("ends.with\nnumber  1\n")
    splits = open_splits(str(tmp_path))
    stems = [{Path(part.name(i)).stem for i in range(len(part))} for part in (splits.train, splits.val)]
    assert stems == [{"my photo 1", "plain"}, {"ends.with", "number"}]
    assert splits.broken == [("gone for good", "a list names it, but there is no annotation")]
