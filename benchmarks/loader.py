"""Packed shards against a folder, in images/s: results/loader.csv, in about a minute.

    python benchmarks/loader.py                     # 600 made-up photographs of 500x375, about 90 kB each
    python benchmarks/loader.py --data FOLDER       # your own: a folder of class folders

``read`` is the bytes alone, in the random order of training, cold (dropped from the system's cache before, as with data
larger than memory) and warm; ``batches`` is all that training does to an image. The rounds of folder and shards take
turns. ``need`` is what a network takes in training on this machine. Both count the CPU's time of one core, so
that other work on the machine matters less; ``read`` counts time on the clock.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from transcnn.commands.pack import pack
from transcnn.data.loading.loader import make_loader
from transcnn.data.sets.image_dataset import ImageDataset
from transcnn.data.sources.opening import open_source
from transcnn.data.transforms.classify import train_transform
from transcnn.plugging.build import build_model

ROOT = Path(__file__).resolve().parent.parent


def make_folder(folder: Path, count: int) -> None:
    """Photographs, as far as decoders can tell: detail on all scales, 90 kB each."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = np.zeros((375, 500, 3))
        for size in (4, 16, 64, 256):
            noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).resize((500, 375))
            image += np.asarray(noise) / 4
        path = folder / f"class_{i % 4}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image + rng.normal(0, 9, image.shape)).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def drop(folder: Path) -> None:
    """Have the system forget the contents of files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(source: Any) -> float:
    """Images/s, bytes only, in random order."""
    order = np.random.default_rng(1).permutation(len(source)).tolist()
    began = time.perf_counter()
    for i in order:
        source.raw(i)
    return len(order) / (time.perf_counter() - began)


def batches(source: Any, images: int) -> float:
    """Images/s, augmented as in the ImageNet recipe, to 224x224."""
    dataset = ImageDataset(source, transform=train_transform(224, policy="imagenet", aa="rand-m9-mstd0.5-inc1"))
    loader = iter(make_loader(dataset, 16, training=True, num_workers=0))
    next(loader)  # what happens once
    count, began = 0, time.process_time()
    for batch, _ in loader:
        count += len(batch)
        if count >= images:
            break
    return count / (time.process_time() - began)


def need(name: str) -> float:
    """Images/s of training steps at 224x224 and batch 16."""
    model = build_model(name, num_classes=1000).train()
    images = torch.randn(16, 3, 224, 224)
    took = []
    for _ in range(3):
        began = time.process_time()
        model(images).sum().backward()
        took.append(time.process_time() - began)
    return 16 / min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="transcnn_tiny")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "loader.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = options.data or Path(temporary) / "folder", Path(temporary) / "shards"
        if options.data is None:
            make_folder(folder, options.images)
        pack(str(folder), out=str(shards), quiet=True)
        kinds = {"folder": (folder, open_source(str(folder)).train), "shards": (shards, open_source(str(shards)).train)}
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for kind, (place, source) in kinds.items():
                drop(place)
                found.setdefault((kind, "read, cold"), []).append(read(source))
                found.setdefault((kind, "read, warm"), []).append(read(source))
                found.setdefault((kind, "batches, 1 core"), []).append(batches(source, options.images // 4))
    rows = [(kind, what, round(statistics.median(values), 1)) for (kind, what), values in found.items()]
    rows.append((options.model, "need: training steps, 1 core", round(need(options.model), 1)))
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("w", newline="") as file:
        csv.writer(file).writerows([("data", "what", "images_per_second"), *rows])
    for row in rows:
        print("{:16} {:30} {:10.1f}".format(*row))


if __name__ == "__main__":
    main()
