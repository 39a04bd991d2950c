"""What exported files answer and how fast: a row for each network, format and shape of images.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/exports.py PHOTO [PHOTO ...] [--networks NAME ...] [--out FILE.csv]

Rows of networks that are measured anew take the place of those in the file. Differences are the largest over all
outputs, relative to the largest output, for a detector's boxes as shares of the image's side; milliseconds are for
one image, the median of five runs in turn. All but the packaged network have made-up weights with which every layer
matters.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transcnn.checkpoints.loading import Loaded, data_config_of, load
from transcnn.compare.engines import build, randomise
from transcnn.dense.build import build_network
from transcnn.export import exporting

# The networks of recipes/camvid.yaml and recipes/bccd.yaml: 2 M parameters.
SMALL = {"dims": [32, 64, 128, 192], "depths": [1, 2, 3, 2], "expansions": [3, 3, 3, 3], "head_dim": 32}
FPN = {"decoder": "fpn", "decoder_channels": 64, "label_ids": list(range(11))}
RETINANET = {
    "detector": "retinanet",
    "fpn_channels": 64,
    "short_side": 256,
    "long_side": 384,
    "side_range": (1.0, 1.0),
    "min_score": 0.3,
    "max_found": 50,
}
NETWORKS = {
    "transcnn_nano.cifar10": ("classify", {}),
    "transcnn_tiny": ("classify", {}),
    "small FPN": ("segment", FPN),
    "small RetinaNet": ("detect", RETINANET),
}


def network(name: str) -> Loaded:
    """Packaged weights by a name with a tag, else a fresh network."""
    torch.manual_seed(0)
    task, args = NETWORKS[name]
    if "." in name:
        return load(name)
    if task == "classify":
        model = build(name, 256)
        classes = [str(i) for i in range(1000)]
        return Loaded(model, task, classes, data_config_of(model, 3), name, {"model": name})
    model = build_network(task, "transcnn_tiny", args, num_classes=11, **SMALL)
    randomise(model)
    if task == "detect":
        nn.init.zeros_(model.net.head.classification_head.cls_logits.bias)  # pyright: ignore
    config = {**data_config_of(model, 3), "input_size": [3, 224, 224]}
    names = [str(i) for i in range(11)]
    return Loaded(model.eval(), task, names, config, name, {"model": "transcnn_tiny", "task_args": args})


def measure(name: str, photos: list[str], folder: Path) -> list[dict[str, Any]]:
    """The rows of one network: written and compared in each format."""
    loaded = network(name)
    model, info = exporting._graph_of(loaded), exporting._describe(loaded, None)
    side = loaded.info["task_args"]["short_side"] if loaded.task == "detect" else None
    least = exporting.LEAST if side else (0, 0)
    rows = []
    for format, kind in exporting.FORMATS.items():
        file = folder / f"{len(rows)}{kind.suffix}"
        with exporting._quiet():  # a graph for each: translating a detector's to ONNX uses it up
            program = exporting._capture(model, info["data_config"]["input_size"], None, least)
            kind.write(program, file, info)
        size = sum(part.stat().st_size for part in (file, file.with_suffix(".bin")) if part.exists())
        for row in exporting._compare(loaded, model, kind, file, info, None, photos, None):
            values = {key: value for key, value in dataclasses.asdict(row).items() if value is not None}
            rounded = {key: f"{value:.3g}" for key, value in values.items()}
            rows.append({"model": name, "task": loaded.task, "format": format, **rounded, "mb": f"{size / 1e6:.1f}"})
            print(*rows[-1].values(), flush=True)
    for row in rows:
        row["threads"] = torch.get_num_threads()
        row["processor"] = torch.cpu.get_capabilities().get("cpu_name", "")
        row["note"] = "runs in turn, on a machine with other work"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("results/exports.csv"))
    options = parser.parse_args()
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            rows: list[dict[str, Any]] = measure(name, options.photos, Path(folder))
        kept = []
        if options.out.exists():
            with options.out.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if row["model"] != name]
        rows = sorted([*kept, *rows], key=lambda row: list(NETWORKS).index(row["model"]))
        columns = [
            "model",
            "task",
            "format",
            "batch",
            "height",
            "width",
            "difference",
            "relative",
            "torch_ms",
            "file_ms",
        ]
        columns += ["detections", "mb", "threads", "processor", "note"]
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
