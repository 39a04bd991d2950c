"""transcnn_micro beside other networks of its size on Tiny ImageNet: one recipe, one number of epochs.

    python benchmarks/weights_peers.py TINY_IMAGENET --epochs 30 --seeds 0

The recipe is recipes/tiny_imagenet.yaml but for the network, the size of images and the number of epochs. The others'
stems halve twice where ours halves once, so they get images twice as large (enlarged, as there are no others): maps of
the same resolution, and about as many multiply-adds. Writes results/weights_peers_runs.csv (each run) and
results/weights_peers.csv (mean and spread over the seeds, parameters, multiply-adds). Runs that the file of runs holds
are not repeated; one that was cut off goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from seeds import beside, mean_and_spread, run_missing, train_or_resume, write_rows
from timm.models import create_model

from transcnn.cli import parse
from transcnn.commands.train import train
from transcnn.plugging.cost import count

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny_imagenet.yaml"
# By name: timm's model, its arguments, and the factor that images are enlarged by.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "transcnn_micro": ("transcnn_micro", {}, 1),
    "resnet18, thinned": ("resnet18", {"channels": [36, 72, 144, 288]}, 2),
    "mobilenetv2_110d": ("mobilenetv2_110d", {}, 2),
    "convnext_atto": ("convnext_atto", {}, 2),
}
RUN_NUMBERS = ("epochs", "seed", "top1", "val_top1", "train_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit_batches", type=int, help="only this many batches an epoch, for trying out")
    parser.add_argument("--runs", type=Path, default=Path("runs/weights_peers"))
    parser.add_argument("--out", type=Path, default=Path("results/weights_peers.csv"))
    options = parser.parse_args()
    keys = [
        {"network": name, "epochs": options.epochs, "seed": seed} for seed in options.seeds for name in options.networks
    ]
    runs = run_missing(beside(options.out, "runs"), RUN_NUMBERS, keys, partial(run, options))
    write_rows(options.out, [row_of(name, options.epochs, runs) for name in options.networks])


def run(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one network by the recipe, or go on with it."""
    name, epochs, seed = key["network"], key["epochs"], key["seed"]
    model, args, factor = NETWORKS[name]
    recipe = parse("train", train, ["--config", str(RECIPE)])
    sizes = [size * factor for size in recipe["augment"].sizes]
    recipe |= {"model": model, "model_args": args or None, "img_size": recipe["img_size"] * factor, "seed": seed}
    recipe |= {"augment": replace(recipe["augment"], sizes=sizes, pad=recipe["augment"].pad * factor)}
    recipe |= {"epochs": epochs, "limit_batches": options.limit_batches}
    for name_ in ("data", "out", "resume", "quiet", "channels_last"):
        recipe.pop(name_, None)
    folder = options.runs / f"{name.split(',')[0]}-{epochs}-{seed}"
    metrics = train_or_resume(folder, options.data, **recipe)
    return {score: metrics[score] for score in ("top1", "val_top1", "train_seconds")}


def row_of(name: str, epochs: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a network costs, and its runs of so many epochs."""
    model, args, factor = NETWORKS[name]
    side = 64 * factor
    counts = count(create_model(model, num_classes=200, **args).eval(), torch.empty(1, 3, side, side, device="meta"))
    own = [r for r in runs if (r["network"], r["epochs"]) == (name, epochs)]
    mean, spread = mean_and_spread([r["top1"] for r in own])
    cost = {"img_size": side, "params": counts.params, "macs": counts.macs}
    seconds = round(sum(r["train_seconds"] for r in own) / len(own))
    result = {"epochs": epochs, "seeds": len(own), "top1_mean": mean, "top1_spread": spread, "train_seconds": seconds}
    return {"network": name, **cost, **result}


if __name__ == "__main__":
    main()
