"""Whether a network answers alike however it is run: plain, optimized, by ONNX Runtime, by OpenVINO.

    python benchmarks/answers.py                                # a table on the screen, and results/answers.csv
    python benchmarks/answers.py --photos DIR [DIR ...]         # half of the images made of real ones

One network of each task looks at 100 odd images: of 1x1 and of 3000x10 pixels, turned by EXIF, grey, with a palette or
alpha, of 16 bits, CMYK, of sizes that nothing divides. The classifier is the packaged one; a segmenter and a detector
learn shapes first. Eight minutes of one core in all.

Answers are what ``transcnn predict`` tells: the likeliest class of an image, or of each pixel, or labels and boxes. One
that differs is explained where rounding decided: two classes whose logits are closer than twice the largest difference,
or a detection whose score is that of the least one that is kept.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_shapes import NAMES, make_shapes, picture
from PIL import Image
from torchvision.ops import box_iou

from transcnn.checkpoints.loading import Loaded, load
from transcnn.commands.train import train
from transcnn.data.images import read_image
from transcnn.data.listing import list_images
from transcnn.export import export_model
from transcnn.export.exporting import FORMATS
from transcnn.fast import optimize
from transcnn.onnx.dense import class_map, detections
from transcnn.onnx.predict import to_input
from transcnn.settings import Detect, Optim, Segment
from transcnn.tasks import get_task

ENGINES = ("optimized", "ONNX Runtime", "OpenVINO")
SMALL = {"dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "expansions": [3, 3, 3, 3], "head_dim": 16}
BOX_NOISE = 1e-3  # how close scores must be for rounding to decide
SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 31), (33, 1), (3000, 10), (10, 3000), (7, 5), (17, 16), (31, 33), (64, 64)]
SIZES += [(65, 63), (96, 97), (128, 128), (127, 255), (200, 50), (49, 201), (301, 299), (640, 427), (500, 375)]
KINDS = ("plain", "grey", "palette", "alpha", "16 bits", "CMYK", "turned", "palette with alpha", "grey with alpha")
KINDS += ("JPEG", "progressive", "one bit")


@dataclass
class Answer:
    """What one way says of one image: numbers as they come from the network, and what is told of them.

    ``told`` is (N, 6) for a detector: box, label, score; a class or a map of classes otherwise.
    """

    numbers: np.ndarray
    told: np.ndarray


# --- images -----------------------------------------------------------------------------------------------------------


def odd_photos(folder: Path, count: int = 100, photos: list[Path] | None = None, seed: int = 0) -> list[Path]:
    """Write ``count`` odd images; every other one is made of one of ``photos``, if there are any, else of shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)] if i < 2 * len(SIZES) else (int(n) for n in rng.integers(20, 400, 2))
        kind = KINDS[i % len(KINDS)]
        if photos and i % 2:
            image = read_image(photos[i // 2 % len(photos)]).convert("RGB")
        else:
            image = picture(rng, 128)[0]
        files.append(write_as(kind, image.resize((width, height)), folder / f"{i:03}", rng))
    return files


def write_as(kind: str, image: Image.Image, stem: Path, rng: np.random.Generator) -> Path:
    """Write an RGB image as a file of some kind; returns the file."""
    alpha = Image.fromarray(rng.integers(0, 256, (image.height, image.width)).astype(np.uint8))
    options: dict[str, Any] = {}
    ending = ".png"
    if kind in ("grey", "one bit"):
        image = image.convert("L" if kind == "grey" else "1")
    elif kind == "palette":
        image = image.quantize(16)
    elif kind == "palette with alpha":
        image, options = image.quantize(16), {"transparency": bytes(range(0, 256, 16))}
    elif kind == "alpha":
        image.putalpha(alpha)
    elif kind == "grey with alpha":
        image = image.convert("L")
        image.putalpha(alpha)
    elif kind == "16 bits":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif kind in ("CMYK", "turned", "JPEG", "progressive"):
        ending = ".jpg"
        image = image.convert("CMYK") if kind == "CMYK" else image
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options = {"turned": {"exif": exif}, "progressive": {"progressive": True, "quality": 40}}.get(kind, {})
    file = stem.with_suffix(ending)
    image.save(file, **options)
    return file


# --- networks ---------------------------------------------------------------------------------------------------------


def networks(folder: Path, epochs: int = 6, images: int = 240) -> dict[str, Loaded]:
    """The packaged classifier, and a small segmenter and detector that have learnt shapes."""
    common: dict[str, Any] = {
        "model": "transcnn_tiny",
        "model_args": SMALL,
        "img_size": None,
        "epochs": epochs,
        "batch_size": 8,
        "lr": 5e-3,
        "num_workers": 0,
        "precision": "32",
        "quiet": True,
        "accelerator": "cpu",
        "optim": Optim(opt="muon", warmup_epochs=1, clip_grad=1.0),
    }
    maps, boxes = folder / "maps", folder / "boxes"
    write_label_maps(maps, {"train": images, "val": 16})
    make_shapes(boxes, {"train": images, "val": 16}, size=64, seed=1)
    fpn = Segment(decoder="fpn", decoder_channels=64, scale_range=(1.0, 1.0))
    retinanet = Detect(detector="retinanet", fpn_channels=32, short_side=128, long_side=192, anchor_size=16)
    common["img_size"] = 64
    train(str(maps), **{**common, "task": "segment", "segment": fpn, "out": str(folder / "segmenter")})
    common["img_size"] = None
    train(str(boxes), **{**common, "task": "detect", "detect": retinanet, "out": str(folder / "detector")})
    return {
        "classifier": load("transcnn_nano.cifar10"),
        "segmenter": load(str(folder / "segmenter")),
        "detector": load(str(folder / "detector")),
    }


def write_label_maps(folder: Path, parts: dict[str, int], size: int = 64) -> None:
    """Images of shapes with label maps, as ``transcnn train --task segment`` reads them."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for kind in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            image, shapes = picture(rng, size)
            labels = np.zeros((size, size), np.uint8)
            for kind, mask in shapes:
                labels[mask] = kind + 1
            image.save(folder / part / "images" / f"{i:04}.png")
            Image.fromarray(labels).save(folder / part / "labels" / f"{i:04}.png")
    (folder / "classes.txt").write_text("\n".join(f"{i}: {name}" for i, name in enumerate(("ground", *NAMES))))


# --- answers ----------------------------------------------------------------------------------------------------------


def by_torch(loaded: Loaded, model: torch.nn.Module) -> Callable[[Image.Image], Answer]:
    """As ``transcnn predict`` asks a checkpoint."""
    task, args = get_task(loaded.task), loaded.info.get("task_args") or {}
    transform = task.image_transform(loaded.preprocessing, args)
    learner = task(model, loaded.class_names, loaded.preprocessing, task_args=args)

    def answer(image: Image.Image) -> Answer:
        with torch.inference_mode():
            if loaded.task == "classify":
                logits = model(transform(image, 0)[None])[0].numpy()
                return Answer(logits, logits.argmax())
            pixels = transform(image)[0]
            if loaded.task == "detect":
                return as_answer({name: value.numpy() for name, value in model([pixels])[0].items()})
            logits = learner.predict_logits(pixels[None], (image.height, image.width))[0].numpy()  # pyright: ignore
            return Answer(logits, logits.argmax(0))

    return answer


def by_file(loaded: Loaded, file: Path, info: dict[str, Any]) -> Callable[[Image.Image], Answer]:
    """As ``transcnn predict FILE.onnx`` does it; OpenVINO takes ONNX Runtime's place for its own files."""
    run = next(kind for kind in FORMATS.values() if kind.suffix == file.suffix).open(file)
    names = [output["name"] for output in info.get("outputs", ())] or ["logits"]

    def network(pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = run(pixels)
        return dict(zip(names, found if isinstance(found, list) else [found], strict=True))

    def answer(image: Image.Image) -> Answer:
        if loaded.task == "classify":
            logits = network(to_input(image, info["data_config"])[None])["logits"][0]
            return Answer(logits, logits.argmax())
        if loaded.task == "detect":
            return as_answer(detections(network, image, info))
        seen: list[np.ndarray] = []

        def listening(pixels: np.ndarray) -> dict[str, np.ndarray]:
            seen.append(network(pixels)["logits"])
            return {"logits": seen[-1]}

        told = class_map(listening, image, info)
        return Answer(seen[-1][0], told)

    return answer


def as_answer(found: dict[str, np.ndarray]) -> Answer:
    """Detections as one array, most confident first."""
    told = np.concatenate([found["boxes"], found["labels"][:, None], found["scores"][:, None]], 1)
    return Answer(found["scores"], told[np.argsort(-told[:, 5], kind="stable")])


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(task: str, plain: Answer, other: Answer, args: dict[str, Any]) -> dict[str, float]:
    """``difference`` of the numbers, whether the answer ``differs``, and whether that is ``unexplained``."""
    if task == "detect":
        return compare_boxes(plain.told, other.told, args)
    difference = float(abs(plain.numbers - other.numbers).max())
    differs = plain.told != other.told
    best = np.sort(plain.numbers, axis=0)
    margin = best[-1] - best[-2]  # () or (H, W)
    found = {"difference": difference, "relative": difference / float(abs(plain.numbers).max())}
    unexplained = bool((differs & (margin > 2 * difference)).any())
    return {**found, "differs": bool(differs.any()), "places": int(differs.sum()), "unexplained": unexplained}


def compare_boxes(plain: np.ndarray, other: np.ndarray, args: dict[str, Any]) -> dict[str, float]:
    """Boxes are the same that have the label and overlap by nine tenths, each taken once."""
    overlap = box_iou(*(torch.from_numpy(found[:, :4]).float() for found in (plain, other))).numpy()
    overlap = overlap * (plain[:, None, 4] == other[None, :, 4])
    pairs: list[tuple[int, int]] = []
    for i in range(len(plain)):
        if overlap.shape[1] and overlap[i].max() > 0.9:
            pairs.append((i, int(overlap[i].argmax())))
            overlap[:, pairs[-1][1]] = 0
    first, second = (np.array(side, int) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    scores = abs(plain[first, 5] - other[second, 5]).max(initial=0)
    corners = abs(plain[first, :4] - other[second, :4]).max(initial=0)
    alone = [np.delete(plain, first, 0), np.delete(other, second, 0)]
    extra = np.concatenate(alone)
    unexplained = not all(rounding_decides(row, np.concatenate([plain, other]), args) for row in extra)
    found = {"difference": float(scores), "relative": float(scores), "pixels": float(corners)}
    return {**found, "differs": bool(len(extra)), "places": len(extra), "unexplained": unexplained}


def rounding_decides(row: np.ndarray, all_found: np.ndarray, args: dict[str, Any]) -> bool:
    """Whether a detection that one way alone has is as close to the least score, or to the last one that fits."""
    scores = np.sort(all_found[:, 5])
    close = abs(row[5] - args["min_score"]) < BOX_NOISE
    return bool(close or (len(all_found) >= args["max_found"] and abs(row[5] - scores[0]) < BOX_NOISE))


def table(loaded: dict[str, Loaded], files: list[Path], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each network and way."""
    images = [read_image(file) for file in files]
    for name, network in loaded.items():
        args = network.info.get("task_args") or {}
        plain = [by_torch(network, network.model)(image) for image in images]
        ways: dict[str, Callable[[Image.Image], Answer]] = {"optimized": by_torch(network, optimize(network.model))}
        for engine, format in (("ONNX Runtime", "onnx"), ("OpenVINO", "openvino")):
            file = folder / f"{name}{FORMATS[format].suffix}"
            ways[engine] = by_file(network, file, export_model(network, file, format=format).info)
        for engine in ENGINES:
            found = []
            for file, image, wanted in zip(files, images, plain, strict=True):
                found.append(compare(network.task, wanted, ways[engine](image), args))
                if found[-1]["differs"]:
                    print(f"{name}, {engine}, {file.name} {image.size}: {found[-1]}")
            places = sum(answer.told.size // (6 if network.task == "detect" else 1) for answer in plain)
            yield {
                "network": name,
                "way": engine,
                "images": len(files),
                "answers": len({answer.told.tobytes() for answer in plain}),
                "places": places,
                "difference": f"{max(row['difference'] for row in found):.2g}",
                "relative": f"{max(row['relative'] for row in found):.2g}",
                "box pixels": f"{max(row.get('pixels', 0) for row in found):.2g}" if network.task == "detect" else "",
                "images that differ": sum(row["differs"] for row in found),
                "places that differ": sum(row["places"] for row in found),
                "unexplained": sum(row["unexplained"] for row in found),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, nargs="+", default=[])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("results/answers.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = [Path(file) for part in options.photos for file in list_images(part)]
        files = odd_photos(folder / "photos", options.count, photos)
        rows = list(table(networks(folder, options.epochs), files, folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
