"""Deletion and insertion scores of each kind of map against random ones, on real images.

    python benchmarks/explain_scores.py RUN_OR_CHECKPOINT DATA [--images 200] [--out results/explain_scores.csv]
    python benchmarks/explain_scores.py --redraw [--figure docs/images/explain_scores.png]

Writes a CSV file (a row a map) and a figure of it beside it (or at --figure), which the second form draws again. Random
maps come in two kinds, because single pixels taken out at random destroy an image faster than patches do; "centre" is a
bump in the middle, where photographers put things, and knows nothing of the image. Each image is scored for the class
that the network answers.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transcnn.checkpoints.loading import Loaded, load
from transcnn.data.sets.classify import open_set
from transcnn.explain import attention_rollout, deletion_insertion, grad_cam, gradient_attention
from transcnn.explain.geometry import carry
from transcnn.explain.record import record
from transcnn.report.plots import BLUE, GREY, new_figure, style
from transcnn.tasks import get_task

BASELINES = ("random pixels", "random patches", "centre")
REFERENCE = "random patches"


def maps_of_image(loaded: Loaded, x: Tensor, target: int, stages: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Every map of one image, (H, W) each."""
    model, size = loaded.model, (x.shape[2], x.shape[3])
    y, x_ = (np.linspace(-1, 1, n) for n in size)
    maps = {
        "random pixels": torch.from_numpy(rng.random(size)),
        "random patches": carry(torch.from_numpy(rng.random((8, 8))), size),
        "centre": torch.from_numpy(-(y[:, None] ** 2) - x_[None] ** 2),
        "attention rollout": attention_rollout(model, x),
        "gradient × attention, all stages": gradient_attention(model, x, target),
    }
    for stage in range(stages):
        maps[f"gradient × attention, stage {stage + 1}"] = gradient_attention(model, x, target, stage)
    for stage in range(stages):
        maps[f"Grad-CAM, stage {stage + 1}"] = grad_cam(model, x, target, stage)
    return maps


def measure(loaded: Loaded, data: str, images: int, steps: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """For each map the curves (images, 2, steps + 1) and areas (images, 2); and which answers are right."""
    part = open_set(data, "test", class_names=loaded.class_names)
    transform = get_task("classify").image_transform(loaded.preprocessing)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(part))[:images]
    curves: dict[str, list[Any]] = {}
    areas: dict[str, list[Any]] = {}
    right = []
    for number, i in enumerate(chosen.tolist()):
        image, label, _ = part.read(i)
        x = transform(image, 0)[None]
        logits, records = record(loaded.model, x)
        target, stages = int(logits.argmax()), 1 + max(r.stage for r in records)
        right.append(target == label)
        for name, values in maps_of_image(loaded, x, target, stages, rng).items():
            s = deletion_insertion(loaded.model, x, values, target, steps=steps, seed=seed, batch_size=256)
            curves.setdefault(name, []).append((s.deletion_curve, s.insertion_curve))
            areas.setdefault(name, []).append((s.deletion, s.insertion))
        if number % 20 == 19:
            print(f"{number + 1} of {len(chosen)} images", flush=True)
    return {name: (np.array(curves[name]), np.array(areas[name])) for name in curves}, np.array(right)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a map: mean areas with standard errors, and the paired differences to random patches."""
    reference = found[REFERENCE][1]
    rows = []
    for name, (_, areas) in found.items():
        row: dict[str, Any] = {"map": name}
        root = np.sqrt(len(areas))
        for column, kind in enumerate(("deletion", "insertion")):
            difference = areas[:, column] - reference[:, column]
            row |= {
                kind: round(areas[:, column].mean(), 4),
                f"{kind}_se": round(areas[:, column].std(ddof=1) / root, 4),
                f"{kind}_minus_random": round(difference.mean(), 4),
                f"{kind}_minus_random_se": round(difference.std(ddof=1) / root, 4),
            }
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]]) -> Any:
    """Dots with two standard errors for the areas of ``rows``, as the CSV file has them."""
    figure = new_figure(11, 0.3 * len(rows) + 1.8)
    axes = figure.subplots(1, 2)
    first = rows[0]
    right = f"{float(first['answers_right']):.0%} of their answers right"
    figure.suptitle(f"{first['model']}, {first['images']} test images, {right}", fontsize=11)
    kinds = (("deletion", "Deletion: lower is better"), ("insertion", "Insertion: higher is better"))
    places = np.arange(len(rows))
    for column, (own, (kind, words)) in enumerate(zip(axes, kinds, strict=True)):
        for place, row in zip(places, rows, strict=True):
            plain = row["map"] in BASELINES
            own.errorbar(float(row[kind]), place, xerr=2 * float(row[f"{kind}_se"]), fmt="s" if plain else "o",
                         capsize=2, color=GREY if plain else BLUE)  # fmt: skip
        reference = next(float(row[kind]) for row in rows if row["map"] == REFERENCE)
        own.axvline(reference, color=GREY, linestyle="--", lw=1)
        own.set_yticks(places, [row["map"] for row in rows] if column == 0 else [""] * len(rows))
        own.set(ylim=(len(rows) - 0.5, -0.5), title=words, xlabel="Area under the curve (bars: 2 standard errors)")
    return figure


def draw(table: Path, figure: Path) -> None:
    """The figure of a CSV file."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with style():
        plot(rows).savefig(figure, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--redraw", action="store_true", help="draw the figure of --out again")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/explain_scores.csv"))
    parser.add_argument("--figure", type=Path, help="the figure's file; without it, that of --out with .png")
    arguments = parser.parse_args()
    figure_file = arguments.figure or arguments.out.with_suffix(".png")
    if arguments.redraw:
        draw(arguments.out, figure_file)
        return
    began = time.monotonic()
    loaded = load(arguments.checkpoint)
    found, right = measure(loaded, arguments.data, arguments.images, arguments.steps, arguments.seed)
    rows = rows_of(found)
    name = loaded.info.get("model", type(loaded.model).__name__)
    common = {"model": name, "images": len(right), "answers_right": f"{right.mean():.3f}", "steps": arguments.steps,
              "seed": arguments.seed, "torch": torch.__version__, "machine": platform.machine()}  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    draw(arguments.out, figure_file)
    for row in rows:
        print(f"{row['map']:34} deletion {row['deletion']:.3f} ± {row['deletion_se']:.3f}  "
              f"insertion {row['insertion']:.3f} ± {row['insertion_se']:.3f}")  # fmt: skip
    print(f"written: {arguments.out}, {figure_file} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
