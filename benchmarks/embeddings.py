"""What vectors of the packaged network are good for: nearest neighbours on CIFAR-10, and duplicates that were planted.

    python benchmarks/embeddings.py CIFAR10 --out results/embeddings.csv

CIFAR10 is a folder with train.parquet and test.parquet. The first rows score test images by their nearest training
images. Then copies of 100 test images, altered as images are on their way through the web, are put among the first test
images; a pair that is found and wasn't planted is a false alarm (some of CIFAR-10's own images are near-duplicates).
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from transcnn.commands.embed import embed
from transcnn.data.images import read_image
from transcnn.vectors.file import read_vectors
from transcnn.vectors.items import find_items
from transcnn.vectors.neighbours import knn_accuracy
from transcnn.weights import PACKAGED

PLANTED, AMONG = 100, 5000
COLUMNS = ["what", "setting", "value", "count", "of", "false_alarms"]


def altered(image: Image.Image, kind: str) -> Image.Image:
    """A copy as it may come back: the same bytes, compressed again, larger and smaller again, or a little brighter."""
    if kind == "jpeg 75":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        return read_image(buffer.getvalue())
    if kind == "resized":
        return image.resize((48, 48), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    if kind == "brighter":
        return image.point(lambda value: min(255, round(1.05 * value)))
    return image


def write_planted(data: str, folder: Path, kind: str) -> None:
    """The first test images, and altered copies of some, as files."""
    items = [item for item in find_items([data], labelled=True) if item.split == "test"][:AMONG]
    for i, item in enumerate(items):
        image = read_image(item.image.read())
        image.save(folder / f"{i:05}.png")
        if i % (AMONG // PLANTED) == 0:
            altered(image, kind).save(folder / f"{i:05}-copy.png")


def found_among(vectors: Path, threshold: float) -> tuple[int, int]:
    """How many planted pairs are found, and how many others."""
    pairs = embed(vectors, duplicates=threshold, quiet=True)["duplicates"]
    stems = [sorted(Path(name).stem for name in row["files"]) for row in pairs]
    planted = sum(second == f"{first}-copy" for first, second in stems)
    return planted, len(stems) - planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="CIFAR10")
    parser.add_argument("--out", default="results/embeddings.csv")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.95, 0.98, 0.99, 0.995])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embed(PACKAGED, args.data, out=folder / "all.parquet", batch_size=128, accelerator="cpu", quiet=True)
        vectors = read_vectors(folder / "all.parquet")
        for k in args.neighbours:
            score = knn_accuracy(vectors.values, vectors.labels, vectors.splits, k)
            right = round(score["images"] * score["top1"] / 100)
            rows.append(dict(zip(COLUMNS, ("knn top1", k, score["top1"], right, score["images"], ""), strict=True)))
            print(rows[-1], flush=True)
        for kind in ("same", "jpeg 75", "resized", "brighter"):
            (planted := folder / kind).mkdir()
            write_planted(args.data, planted, kind)
            embed(PACKAGED, planted, out=folder / f"{kind}.parquet", batch_size=128, accelerator="cpu", quiet=True)
            for threshold in args.thresholds:
                found, false = found_among(folder / f"{kind}.parquet", threshold)
                cells = (f"planted, {kind}", threshold, round(100 * found / PLANTED, 2), found, PLANTED, false)
                rows.append(dict(zip(COLUMNS, cells, strict=True)))
                print(rows[-1], flush=True)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
