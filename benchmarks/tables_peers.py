"""Several labels and numbers an image, by a recipe: our network beside ResNet-18, with several seeds.

    python benchmarks/tables_peers.py streets/labels.csv --config recipes/multilabel.yaml --seeds 0 1 2
    python benchmarks/tables_peers.py cells/labels.csv --config recipes/regression.yaml --seeds 0 1 2

The tables are those of benchmarks/make_tables.py. Both networks learn from scratch by the same recipe, which differs in
the network alone. Writes results/tables/TASK.csv: parameters and figures of the test split, mean and spread over seeds;
of numbers also the error of always answering the training images' mean. A run that was cut off goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from seeds import mean_and_spread, write_rows

from transcnn import cli
from transcnn.commands.train import train
from transcnn.settings import TrainSettings

FIGURES = {"multilabel": ("map", "macro_f1", "micro_f1", "exact_match"), "regress": ("mae", "rmse", "r2", "spearman")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data")
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", help="columns of the table, where the recipe doesn't name them")
    parser.add_argument(
        "--models", nargs="+", default=["", "resnet18"], help="an empty name is the recipe's own network"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit_batches", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    args = parser.parse_args()
    flags = ["--config", args.config, *(["--target", args.target] if args.target else [])]
    settings = TrainSettings(**cli.parse("train", train, [args.data, *flags]))
    rows = []
    for name in args.models:
        chosen = settings if not name else replace(settings, model=name, model_args=None)
        found = [run(args, chosen, seed) for seed in args.seeds]
        row: dict[str, Any] = {
            "model": name or settings.model,
            "params": parameters(chosen),
            "epochs": found[0]["epochs"],
        }
        row["seeds"] = len(found)
        for figure in FIGURES[settings.task]:
            row[figure], row[f"{figure}_spread"] = mean_and_spread([metrics[figure] for metrics in found])
        if settings.task == "regress":
            row["of_the_mean"] = next(iter(found[0]["columns"].values()))["of_the_mean"]
        rows.append(row)
        write_rows(args.out / f"{settings.task}.csv", rows)
        print(row, flush=True)


def run(args: argparse.Namespace, settings: TrainSettings, seed: int) -> dict[str, Any]:
    """The metrics of one run: trained now, or gone on with where it was cut off."""
    folder = args.runs / settings.task / f"{settings.model}-{seed}"
    started = (folder / "last.ckpt").is_file()
    place = {"resume": str(folder)} if started else {"out": str(folder)}
    given = {"limit_batches": args.limit_batches, "epochs": args.epochs or settings.epochs, "seed": seed, "quiet": True}
    asked = {item: getattr(settings, item) for item in settings.__dataclass_fields__ if item != "origins"}
    if started:
        return train(args.data, resume=str(folder), quiet=True, epochs=given["epochs"]).metrics
    return train(**{**asked, **given, **place}).metrics


def parameters(settings: TrainSettings) -> int:
    """Parameters of the network with 11 outputs."""
    model = timm.create_model(settings.model, num_classes=11, **(settings.model_args or {}))
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
