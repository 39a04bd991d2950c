"""Detections as a data set that annotation tools take in: COCO, Pascal VOC or YOLO, with the images beside them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import yaml

from ..checkpoints.files import atomic_write, make_folder
from ..errors import UserError
from ..text import printable
from .answers import Box, Detections
from .output_folder import shortened

__all__ = ["FORMATS", "DatasetWriter"]

FORMATS = ("coco", "voc", "yolo")


class DatasetWriter:
    """Writes predictions and copies of their images into an empty folder, to be corrected and learnt from.

    Boxes are as they were predicted, to 0.01 pixel; masks go into COCO alone. Scores are kept where the format has a
    place for them (COCO).

    Args:
        folder: Where to; must be empty or not there yet.
        kind: ``coco``, ``voc`` or ``yolo``.
        class_names: All that the network knows.
        label_ids: What the data's annotations call them.

    Raises:
        UserError: The folder holds something, or can't be written.
    """

    def __init__(
        self, folder: Path, kind: Literal["coco", "voc", "yolo"], class_names: Sequence[str], label_ids: Sequence[int]
    ) -> None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: give another folder as --out")
        make_folder(folder, ".probe")
        self.folder, self.kind = folder, kind
        self.class_names, self.label_ids = list(class_names), [int(value) for value in label_ids]
        self.taken: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.image_folder = folder / ("JPEGImages" if kind == "voc" else "images")
        self.image_folder.mkdir(parents=True, exist_ok=True)
        for name in {"voc": ("Annotations",), "yolo": ("labels",), "coco": ("annotations",)}[kind]:
            (folder / name).mkdir(exist_ok=True)

    def add(self, prediction: Detections) -> None:
        """Take in an image and its boxes; the prediction must still hold its image."""
        image = prediction.image
        if image is None:
            raise UserError(f"{prediction.file} isn't in memory any more")
        file = self._copy_image(prediction)
        stem, (width, height) = os.path.splitext(file)[0], image.size
        if self.kind == "yolo":
            lines = [self._yolo_line(box, width, height) for box in prediction.boxes]
            self._write(self.folder / "labels" / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
        elif self.kind == "voc":
            root = _voc_tree(file, width, height, prediction.boxes)
            self._write(self.folder / "Annotations" / f"{stem}.xml", ElementTree.tostring(root, encoding="unicode"))
        else:
            self._add_coco(file, width, height, prediction.boxes)

    def finish(self) -> None:
        """Write what is about all images: names of classes, and COCO's one file."""
        if self.kind == "yolo":
            content = {"train": "images", "val": "images", "names": dict(enumerate(self.class_names))}
            text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
            self._write(self.folder / "data.yaml", text)
        elif self.kind == "coco":
            pairs = sorted(zip(self.label_ids, self.class_names, strict=True))
            categories = [{"id": value, "name": name} for value, name in pairs]
            content = {"images": self.images, "annotations": self.annotations, "categories": categories}
            text = json.dumps(content, indent=1)
            self._write(self.folder / "annotations" / "train.json", text)

    def _copy_image(self, prediction: Detections) -> str:
        """Copy an image under a name of its own, byte for byte where it is a file; the name."""
        source = Path(prediction.file)
        is_file = "\0" not in prediction.file and source.is_file()
        stem = shortened(printable(source.stem).replace("/", "-") or "image")
        suffix = source.suffix if is_file and re.fullmatch(r"\.\w{1,16}", source.suffix) else ".png"
        free, number = stem, self.numbers.get(stem.casefold(), 1)
        while free.casefold() in self.taken:  # one text belongs to one stem
            number += 1
            free = f"{stem}-{number}"
        self.numbers[stem.casefold()] = number  # of thousands of one name, none is tried twice
        self.taken.add(free.casefold())
        target = self.image_folder / f"{free}{suffix}"
        if is_file:
            atomic_write(target, lambda temporary: shutil.copyfile(source, temporary))
        else:
            image: Any = prediction.image
            atomic_write(target, lambda temporary: image.save(temporary, format="PNG"))
        return target.name

    def _yolo_line(self, box: Box, width: int, height: int) -> str:
        x1, y1, x2, y2 = box.box
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        return " ".join([str(self.class_names.index(box.label)), *(f"{value:.10g}" for value in values)])

    def _add_coco(self, file: str, width: int, height: int, boxes: Sequence[Box]) -> None:
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file, "width": width, "height": height})
        for box in boxes:
            x1, y1, x2, y2 = box.box
            row: dict[str, Any] = {
                "id": len(self.annotations) + 1,
                "image_id": number,
                "category_id": self.label_ids[self.class_names.index(box.label)],
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "area": round((x2 - x1) * (y2 - y1), 2),
                "iscrowd": 0,
                "score": box.score,
            }
            self.annotations.append(row if box.lengths is None else {**row, "segmentation": box.lengths})

    @staticmethod
    def _write(path: Path, text: str) -> None:
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _voc_tree(file: str, width: int, height: int, boxes: Sequence[Box]) -> ElementTree.Element:
    """Pascal VOC counts pixels from 1 and both ends are inside."""
    root = ElementTree.Element("annotation")

    def put(parent: ElementTree.Element, tag: str, value: Any = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag)
        element.text = None if value is None else printable(value)
        return element

    put(root, "filename", file)
    size = put(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        put(size, tag, value)
    for box in boxes:
        thing = put(root, "object")
        put(thing, "name", box.label)
        put(thing, "difficult", 0)
        corners = put(thing, "bndbox")
        x1, y1, x2, y2 = box.box
        for tag, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            put(corners, tag, f"{value:.2f}")
    return root
