"""Runs of segmentation or detection side by side: a CSV row for each run's directory, as it was trained and scored.

    transcnn train camvid.tar --config recipes/camvid.yaml --out runs/camvid
    transcnn train camvid.tar --config recipes/camvid.yaml --model resnet18 --model_args null --out runs/camvid-resnet18
    python benchmarks/dense_peers.py runs/camvid runs/camvid-resnet18 --size 360 480 --out results/camvid_peers.csv

Multiply-adds are those of one image of --size (height, width) after the run's own resizing, all of the network with its
decoder or detector; of a two-stage detector they depend on what it finds and are left empty. Scores are those that
training wrote, of the epoch that did best on the validation split.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from transcnn.checkpoints.loading import Loaded, load
from transcnn.plugging.cost import count

SCORES = ("miou", "pixel_accuracy", "mean_accuracy", "map", "map50", "mask_map", "mask_map50")


def multiply_adds(loaded: Loaded, height: int, width: int) -> float | None:
    """Of one image, in units."""
    args = loaded.info["task_args"]
    if args.get("detector", "retinanet") != "retinanet":
        return None
    short = args.get("short_side") or args.get("resize") or min(height, width)
    factor = min(short / min(height, width), args.get("long_side", float("inf")) / max(height, width))
    channels = loaded.preprocessing["input_size"][0]
    image = torch.zeros(channels, round(height * factor), round(width * factor))
    return count(loaded.model, [image] if loaded.task == "detect" else image[None]).macs


def row_of(run: Path, height: int, width: int) -> dict[str, Any]:
    """What a run's files say."""
    loaded = load(run)
    metrics = json.loads((run / "metrics.json").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    work = multiply_adds(loaded, height, width)
    each = metrics.get("class_iou") or metrics.get("class_ap") or {}
    return {
        "run": run.name,
        "model": settings["model"],
        "parameters_m": round(sum(p.numel() for p in loaded.model.parameters()) / 1e6, 3),
        "backbone_parameters_m": round(sum(p.numel() for p in loaded.model.body.parameters()) / 1e6, 3),  # pyright: ignore
        "multiply_adds_g": "" if work is None else round(work / 1e9, 3),
        **{name: round(metrics[name], 2) for name in SCORES if name in metrics},
        "split": metrics["split"],
        "best_epoch": metrics.get("best_epoch", ""),
        "epochs": metrics.get("epochs", ""),
        "train_seconds": metrics.get("train_seconds", ""),
        **{name: "" if value is None else round(value, 2) for name, value in each.items()},
        "device": metrics["versions"]["device"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--size", nargs=2, type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = [row_of(run, *a.size) for run in a.runs]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with a.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in list(row.items())[1:8]))


if __name__ == "__main__":
    main()
