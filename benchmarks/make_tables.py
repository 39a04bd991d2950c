"""Makes tables of files and labels of data sets that have more: what occurs in CamVid's images, cells that BCCD's show.

    python benchmarks/make_tables.py camvid.tar streets
    python benchmarks/make_tables.py bccd.tar cells

A folder or tar to segment becomes images and ``labels.csv`` with a column of 0 and 1 for each class: whether any pixel
is of it. One to detect becomes a table with the number of boxes of each kind, its splits as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from transcnn.data.images import read_ids
from transcnn.data.sources.files import Files, dense_layout, open_files

SPLITS = ("train", "val", "test")
IGNORED = ("void", "unlabelled", "ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    files = open_files(args.data)
    rows = boxes_by_image(files) if dense_layout(str(args.data)) == "detect" else classes_by_image(files)
    for row in rows:
        target = args.out / row["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.read(row.pop("source")))
    with (args.out / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out / 'labels.csv'}: {len(rows)} images, columns {', '.join(rows[0])}")


def classes_by_image(files: Files) -> list[dict[str, Any]]:
    """Of each image with a label map: which classes have a pixel in it.

    Images of the validation split become training images, of which training holds some back: CamVid's show all classes
    each, and from such labels no threshold and no epoch can be chosen. ``group`` names ten frames in a row, which are
    much alike and stay together.
    """
    names = files.read("classes.txt").decode().split("\n")
    known = {i: name for i, name in enumerate(names) if name.strip() and name.strip().lower() not in IGNORED}
    maps = {Path(name).stem: name for name in files.names("labels")}
    rows = []
    for split in SPLITS:
        for i, name in enumerate(sorted(files.names(f"images/{split}"))):
            there = set(np.unique(read_ids(files.read(maps[Path(name).stem]))[0]).tolist())
            group = f"{split}-{i // 10}"
            row = {"source": name, "file": name, "split": "test" if split == "test" else "train", "group": group}
            rows.append(row | {known[k]: int(k in there) for k in known})
    return rows


def boxes_by_image(files: Files) -> list[dict[str, Any]]:
    """Of each image how many boxes there are of each kind."""
    rows = []
    for split in SPLITS:
        sheet = json.loads(files.read(f"annotations/{split}.json"))
        kinds = {kind["id"]: kind["name"] for kind in sheet["categories"]}
        for image in sheet["images"]:
            found = [box["category_id"] for box in sheet["annotations"] if box["image_id"] == image["id"]]
            name = f"images/{image['file_name']}"
            row = {"source": name, "file": name, "split": split}
            rows.append(row | {kinds[kind]: found.count(kind) for kind in kinds})
    return rows


if __name__ == "__main__":
    main()
