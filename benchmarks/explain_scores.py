"""Deletion and insertion scores of each kind of map against random ones, on real images.

    python benchmarks/explain_scores.py RUN_OR_CHECKPOINT DATA [--images 200] [--out results/explain_scores.csv]

Writes a CSV file (a row a map) and a figure beside it (or at --figure). Random maps come in two kinds, because single
pixels taken out at random destroy an image faster than patches do; "centre" is a bump in the middle, where
photographers put things, and knows nothing of the image. Each image is scored for the class that the network answers.
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

from transcnn.data.classify import open_set
from transcnn.explain import attention_rollout, deletion_insertion, grad_cam, gradient_attention
from transcnn.explain.geometry import carry
from transcnn.explain.record import record
from transcnn.plots import BLUE, GREY, ORANGE, new_figure, style
from transcnn.runs import Loaded, load
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


def plot(found: dict[str, Any], rows: list[dict[str, Any]], title: str) -> Any:
    """Dots with two standard errors for the areas, and the curves of the best of each kind."""
    figure = new_figure(11, 0.3 * len(rows) + 5.2)
    grid = figure.add_gridspec(2, 2, height_ratios=(0.3 * len(rows) + 0.6, 3.6))
    figure.suptitle(title, fontsize=11)
    kinds = (("deletion", "Deletion: lower is better"), ("insertion", "Insertion: higher is better"))
    places = np.arange(len(rows))
    shown = [REFERENCE, "attention rollout"]
    for start in ("gradient × attention", "Grad-CAM"):
        group = [row for row in rows if row["map"].startswith(start)]
        shown.append(max(group, key=lambda row: row["insertion"] - row["deletion"])["map"])
    looks = dict(zip(shown, ((GREY, "--"), (BLUE, ":"), (BLUE, "-"), (ORANGE, "-")), strict=True))
    for column, (kind, words) in enumerate(kinds):
        axes = figure.add_subplot(grid[0, column])
        for place, row in zip(places, rows, strict=True):
            plain = row["map"] in BASELINES
            axes.errorbar(row[kind], place, xerr=2 * row[f"{kind}_se"], fmt="s" if plain else "o", capsize=2,
                          color=GREY if plain else BLUE)  # fmt: skip
        axes.axvline(next(row[kind] for row in rows if row["map"] == REFERENCE), color=GREY, linestyle="--", lw=1)
        axes.set_yticks(places, [row["map"] for row in rows] if column == 0 else [""] * len(rows))
        axes.set(ylim=(len(rows) - 0.5, -0.5), title=words, xlabel="Area under the curve (bars: 2 standard errors)")
        axes = figure.add_subplot(grid[1, column])
        for name, (colour, line) in looks.items():
            mean = found[name][0][:, column].mean(0)
            axes.plot(np.linspace(0, 1, len(mean)), mean, line, color=colour, label=name, linewidth=1.8)
        verb = ("taken away", "put in")[column]
        axes.set(
            xlabel=f"Share of the pixels {verb}, what the map calls most important first",
            ylabel="Probability of the class",
        )
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/explain_scores.csv"))
    parser.add_argument("--figure", type=Path, help="the figure's file; without it, that of --out with .png")
    arguments = parser.parse_args()
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
    figure_file = arguments.figure or arguments.out.with_suffix(".png")
    with style():
        title = f"{name}, {len(right)} test images of {Path(arguments.data).name}, {right.mean():.1%} answered right"
        plot(found, rows, title).savefig(figure_file, dpi=130)
    for row in rows:
        print(f"{row['map']:34} deletion {row['deletion']:.3f} ± {row['deletion_se']:.3f}  "
              f"insertion {row['insertion']:.3f} ± {row['insertion_se']:.3f}")  # fmt: skip
    print(f"written: {arguments.out}, {figure_file} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
