"""The files that ``predict`` writes of its predictions: label maps, overlays, and detections in COCO's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..checkpoints.files import atomic_write, make_folder
from ..text import json_text
from .answers import Detections, Prediction, Segmentation
from .overlay import label_png

__all__ = ["OutputFolder", "image_ids", "shortened"]

SOFTWARE = "transcnn"  # the Software entry of images that were written here


class OutputFolder:
    """Where masks and overlays go: a.png, then a-2.png for another folder's a.jpg.

    No input is written over, and of other images only what an earlier call wrote (their ``Software`` entry says so).

    Args:
        folder: Made when something is written.
        inputs: The files that are predicted. Where one of them lies in ``folder``, an existing predictions.json stays.
        coco: Write detections in COCO's format, too.
    """

    def __init__(self, folder: Path, inputs: Sequence[str] = (), *, coco: bool = False) -> None:
        self.folder = folder
        self.inputs = {os.path.realpath(file) for file in inputs}
        self.replace = os.path.realpath(folder) not in {os.path.dirname(file) for file in self.inputs}
        self.taken: set[str] = set()
        self.numbers: dict[tuple[str, ...], int] = {}
        self.coco = coco
        self.detections: dict[str, list[dict[str, Any]]] = {}  # of each image, in the order of the images

    def stem_for(self, file: str) -> Path:
        """The path, without ending, for what belongs to ``file``."""
        return self._free(shortened(Path(file).stem or "image"), (".png", "_overlay.png"))

    def prepare(self) -> None:
        """Make the folder and see that files can be written there, before any work is done.

        Raises:
            UserError: They can't.
        """
        make_folder(self.folder, ".probe")

    def save(self, image: Image.Image, path: str) -> None:
        """Write an image as PNG, whole or not at all."""
        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        atomic_write(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=mark))

    def add(self, prediction: Prediction) -> dict[str, str]:
        """Write what belongs to a prediction; the paths as ``mask`` and ``overlay``, none where there is nothing to.

        The prediction must still hold its image.
        """
        if not isinstance(prediction, Segmentation | Detections):
            return {}
        stem = self.stem_for(prediction.file)
        written = {"overlay": f"{stem}_overlay.png"}
        if isinstance(prediction, Segmentation):
            written = {"mask": f"{stem}.png", **written}
            self.save(label_png(prediction.mask, prediction.label_ids, prediction.colours), written["mask"])
        else:
            self._add_coco(prediction)
        self.save(prediction.plot(), written["overlay"])
        return written

    def _add_coco(self, prediction: Detections) -> None:
        """Take in an image's detections, once where a table names it twice."""
        ids = dict(zip(prediction.class_names, prediction.label_ids, strict=True))
        rows = self.detections[prediction.file] = []
        for box in prediction.boxes:
            x1, y1, x2, y2 = box.box
            row: dict[str, Any] = {
                "file_name": prediction.file,
                "category_id": int(ids[box.label]),
                "score": box.score,
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            }
            if box.lengths is not None:
                row["segmentation"] = box.lengths
            rows.append(row)

    def finish(self) -> None:
        """Write ``predictions.json``, where detections were asked for; without any it is an empty list."""
        if not self.coco:
            return
        ids = image_ids(list(self.detections))
        rows = [{"image_id": ids[file], **row} for file, found in self.detections.items() for row in found]
        text = json_text(rows, indent=1) + "\n"
        path = self._free("predictions", (".json",)).with_suffix(".json")
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _free(self, stem: str, endings: Sequence[str]) -> Path:
        """A path without ending that is no input's and no other output's with any of the endings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kind = (stem.casefold(), *endings)
        number = self.numbers.get(kind, 1)
        while not self._is_free(stem if number == 1 else f"{stem}-{number}", endings):
            number += 1
        self.numbers[kind] = number  # of thousands of one name, none is tried twice
        name = stem if number == 1 else f"{stem}-{number}"
        self.taken |= {f"{name}{ending}".casefold() for ending in endings}
        return self.folder / name

    def _is_free(self, name: str, endings: Sequence[str]) -> bool:
        for ending in endings:
            path = self.folder / f"{name}{ending}"
            if path.name.casefold() in self.taken or os.path.realpath(path) in self.inputs:
                return False
            if os.path.lexists(path) and not (_is_ours(path) if ending.endswith(".png") else self.replace):
                return False
        return True


def _is_ours(path: Path) -> bool:
    """Whether an image was written by an earlier call."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE and not path.is_symlink()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def shortened(stem: str) -> str:
    """At most 200 bytes of a name, so that endings and a temporary name still fit."""
    return os.fsencode(stem)[:200].decode("utf-8", "ignore") if len(os.fsencode(stem)) > 200 else stem


def image_ids(files: Sequence[str]) -> dict[str, int | str]:
    """Of each file the id that COCO's results have: its name where that is a number, as COCO's are, else the name.

    Where two files would have the same one, they are numbered from 1.
    """
    stems = [Path(file).stem for file in files]
    numbers = all(stem.isdecimal() and stem.isascii() for stem in stems)
    ids: list[int | str] = [int(stem) for stem in stems] if numbers else list(stems)
    if len(set(ids)) < len(ids):
        ids = list(range(1, len(files) + 1))
    return dict(zip(files, ids, strict=True))
