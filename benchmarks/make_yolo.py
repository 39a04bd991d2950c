"""A detection data set as a YOLO folder, such as BCCD from its tar of COCO's JSON.

    python benchmarks/make_yolo.py bccd.tar bccd_yolo

writes images/{train,val,test}, labels/{train,val,test} and data.yaml. Boxes are the same to rounding of the last bit;
what YOLO has no place for (crowds, sizes that annotations state, masks) is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from transcnn.data.images import BrokenImage
from transcnn.data.sets.detect import open_splits
from transcnn.data.sources.files import open_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out")
    args = parser.parse_args()
    write_yolo(args.data, Path(args.out))


def write_yolo(data: str, out: Path, parts: Sequence[str] = ("train", "val", "test")) -> None:
    """Write the data set's images, byte for byte, with their boxes as text."""
    splits, files = open_splits(data), open_files(data)
    used = []
    for split in parts:
        images = getattr(splits, split)
        for i in range(0 if images is None else len(images)):
            try:
                image, truth = images.read(i)
            except BrokenImage:
                continue
            name = Path(images.name(i))
            for kind in ("images", "labels"):
                (out / kind / split).mkdir(parents=True, exist_ok=True)
            (out / "images" / split / name.name).write_bytes(files.read(images.name(i)))
            lines = []
            for (x1, y1, x2, y2), label in zip(truth["boxes"].astype(float).tolist(), truth["labels"], strict=True):
                centre = ((x1 + x2) / 2 / image.width, (y1 + y2) / 2 / image.height)
                size = ((x2 - x1) / image.width, (y2 - y1) / image.height)
                lines.append(" ".join([str(int(label)), *map(repr, (*centre, *size))]))
            (out / "labels" / split / f"{name.stem}.txt").write_text("".join(f"{line}\n" for line in lines))
            used.append(split)
    content = {split: f"images/{split}" for split in dict.fromkeys(used)}
    text = yaml.safe_dump(
        {**content, "names": dict(enumerate(splits.class_names))}, sort_keys=False, allow_unicode=True
    )
    (out / "data.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
