"""Several labels and numbers an image, by a recipe: our network, from weights and from scratch, beside ResNet-18.

    python benchmarks/tables_peers.py streets/labels.csv --config recipes/multilabel.yaml --seeds 0 1 2
    python benchmarks/tables_peers.py cells/labels.csv --config recipes/regression.yaml --seeds 0 1 2

The tables are those of benchmarks/make_tables.py. All learn by the same recipe, which differs in network and start
alone, and in the learning rate: each is trained at all of --lrs with the first seed, and the one that is best on the
validation images goes on. Writes results/tables/TASK_runs.csv, a line a run, with figures of the test split, and
results/tables/TASK.csv, mean and spread over the seeds; of numbers also the error of always answering the training
images' mean. Runs that the first file holds are not repeated; one that was cut off goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from seeds import beside, mean_and_spread, read_runs, train_or_resume, write_rows

from transcnn import cli
from transcnn.commands.train import train
from transcnn.settings import TrainSettings

FIGURES = {"multilabel": ("map", "macro_f1", "micro_f1", "exact_match"), "regress": ("mae", "rmse", "r2", "spearman")}
CHOSEN_BY = {"multilabel": ("val_map", max), "regress": ("val_mae", min)}
KEY = ("model", "start", "epochs", "lr", "seed")
PEER = "resnet18"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", help="columns of the table, where the recipe doesn't name them")
    parser.add_argument("--lrs", nargs="+", type=float, default=[2e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit_batches", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"))
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    args = parser.parse_args()
    flags = ["--config", args.config, *(["--target", args.target] if args.target else [])]
    settings = TrainSettings(**cli.parse("train", train, [args.data, *flags]))
    settings = replace(settings, epochs=args.epochs or settings.epochs, limit_batches=args.limit_batches)
    task = settings.task
    path = args.out / f"{task}.csv"
    score, better = CHOSEN_BY[task]
    runs = read_runs(beside(path, "runs"), ("epochs", "lr", "seed", score, "of_the_mean", "params", *FIGURES[task]))

    def found(chosen: TrainSettings, lr: float, seed: int) -> dict[str, Any]:
        """A row of the file of runs, which is written anew if it isn't there yet."""
        key = dict(zip(KEY, (chosen.model, start_of(chosen), chosen.epochs, lr, seed), strict=True))
        for row in runs:
            if all(row[name] == value for name, value in key.items()):
                return row
        runs.append({**key, **run(args, replace(chosen, lr=lr, seed=seed), score)})
        print(runs[-1], flush=True)
        write_rows(beside(path, "runs"), runs)
        return runs[-1]

    table = []
    for chosen in contenders(settings):
        tried = [found(chosen, lr, args.seeds[0]) for lr in args.lrs]
        lr = better(tried, key=lambda row: row[score])["lr"]
        rows = [found(chosen, lr, seed) for seed in args.seeds]
        row = {name: rows[0][name] for name in ("model", "start", "params", "epochs", "lr")} | {"seeds": len(rows)}
        for figure in FIGURES[task]:
            row[figure], row[f"{figure}_spread"] = mean_and_spread([one[figure] for one in rows])
        if task == "regress":
            row["of_the_mean"] = rows[0]["of_the_mean"]
        table.append(row)
        write_rows(path, table)
        print(row, flush=True)


def contenders(settings: TrainSettings) -> list[TrainSettings]:
    """The recipe as it is, without weights to start from, and with ResNet-18."""
    scratch = replace(settings, pretrained=False)
    return [settings] * settings.pretrained + [scratch, replace(scratch, model=PEER, model_args=None)]


def start_of(settings: TrainSettings) -> str:
    return "weights" if settings.pretrained else "scratch"


def run(args: argparse.Namespace, settings: TrainSettings, score: str) -> dict[str, Any]:
    """The figures of one run: trained now, or gone on with where it was cut off."""
    name = f"{settings.model}-{start_of(settings)}-{settings.epochs}-{settings.lr:g}-{settings.seed}"
    left_out = ("origins", "data", "out", "resume", "quiet", "channels_last")
    asked = {item: getattr(settings, item) for item in settings.__dataclass_fields__ if item not in left_out}
    metrics = train_or_resume(args.runs / settings.task / name, args.data, **asked)
    row: dict[str, Any] = {"params": parameters(settings), score: round(metrics[score], 4)}
    if settings.task == "regress":
        row["of_the_mean"] = next(iter(metrics["columns"].values()))["of_the_mean"]
    return row | {figure: metrics[figure] for figure in FIGURES[settings.task]}


def parameters(settings: TrainSettings) -> int:
    """Parameters of the network with 11 outputs."""
    model = timm.create_model(settings.model, num_classes=11, **(settings.model_args or {}))
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
