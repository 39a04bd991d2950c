"""What weights to start from are worth: few images of CIFAR-10, CamVid and BCCD, from scratch and from given weights.

    python benchmarks/transfer.py --weights transcnn_micro.tiny_imagenet --cifar10 CIFAR10 --tune
    python benchmarks/transfer.py --weights transcnn_micro.tiny_imagenet --cifar10 CIFAR10 --seeds 0 1 2
    python benchmarks/transfer.py --weights transcnn_micro.tiny_imagenet --camvid camvid.tar --bccd bccd.tar --seeds 0
    python benchmarks/transfer.py --weights transcnn_nano.cifar10 --camvid camvid.tar --bccd bccd.tar --seeds 0

--weights is a name of weights that come with the package, a run's directory or a file. CIFAR10 is a folder of Parquet
files, with splits train and test. Each seed draws its own --per_class images of each class; scores are those of the
whole test split, at --img_size pixels. Three ways: ``scratch`` (random weights), ``finetune`` (all
weights learn on), ``probe`` (frozen: logistic regression on the pooled features, its strength chosen on held-back
images). CamVid and BCCD go by their recipes, but for the network; there is no probe of them.

``--tune`` tries each of --lrs for scratch and finetune with 100 images a class and goes by images held back from those.
Writes results/transfer_runs.csv (each run) and results/transfer.csv (mean and spread over the seeds), anew after each
run, in the end a plot; of ``--tune`` results/transfer_tuning.csv. Runs that the file of runs holds are not repeated.

Weights that were learnt from CIFAR-10 are no start for CIFAR-10: they have seen its images.
"""

from __future__ import annotations

import argparse
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from seeds import beside, mean_and_spread, run_missing, train_or_resume, write_rows
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models import get_pretrained_cfg

from transcnn.checkpoints.loading import load
from transcnn.cli import parse
from transcnn.commands.train import train
from transcnn.data.sets.classify import open_set
from transcnn.report.plots import BLUE, GREY, new_figure, style
from transcnn.settings import Augment, Ema, Optim
from transcnn.tasks.classify import Classify

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KEY = ("data", "per_class", "weights", "start", "lr", "seed")
RUN_NUMBERS = ("per_class", "lr", "seed", "score", "val_score")
STARTS = ("scratch", "finetune", "probe")
# A recipe's name, what it is scored by, and what its epoch is chosen by.
DENSE = {"camvid": ("miou", "val_miou"), "bccd": ("map50", "val_map")}
SCORES = {"camvid": "CamVid, mIoU", "bccd": "BCCD, mAP50"}  # in the plot
HELD_BACK = 0.2  # share of the few images that chooses: the epoch, the rate, the probe's strength


def main() -> None:
    options = arguments()
    if options.tune:
        tune(options)
        return
    told = partial(run, options), partial(write_table, options.out)
    runs = run_missing(beside(options.out, "runs"), RUN_NUMBERS, plan(options), *told)
    table = write_table(options.out, runs)
    with style():
        draw(options.out.with_suffix(".png"), table)
    for row in table:
        print(f"{row['data']} {row['per_class'] or ''} {row['start']}: {row['score_mean']} ± {row['score_spread']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="transcnn_micro.tiny_imagenet")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--camvid")
    parser.add_argument("--bccd")
    parser.add_argument("--per_class", type=int, nargs="+", default=[25, 100, 500])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--img_size", type=int, default=64)
    parser.add_argument("--updates", type=int, default=1500, help="of each run with few images, whatever their number")
    parser.add_argument("--lr_scratch", type=float, default=1e-2, help="what --tune says")
    parser.add_argument("--lr_finetune", type=float, default=2e-3, help="what --tune says")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 2e-3, 1e-2])
    parser.add_argument("--limit_batches", type=int, help="only this many batches an epoch, for trying out")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--out", type=Path, default=Path("results/transfer.csv"))
    options = parser.parse_args()
    if not (options.cifar10 or options.camvid or options.bccd):
        parser.error("give --cifar10, --camvid or --bccd")
    if options.tune and not options.cifar10:
        parser.error("--tune needs --cifar10")
    if options.cifar10 and options.weights.endswith(".cifar10"):
        parser.error(f"{options.weights} has seen CIFAR-10's images")
    return options


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What tells each run from the others, in the order in which they are done."""
    rates = {"scratch": options.lr_scratch, "finetune": options.lr_finetune, "probe": 0.0}
    keys = []
    for seed in options.seeds:
        places = [("cifar10", n, start) for n in options.per_class for start in options.starts if options.cifar10]
        for name in DENSE:
            if getattr(options, name):
                places += [(name, 0, start) for start in options.starts if start != "probe"]
        for data, n, start in places:
            lr = rates[start] if data == "cifar10" else 0.0  # a recipe has its own
            keys.append(dict(zip(KEY, (data, n, options.weights, start, lr, seed), strict=True)))
    return keys


def run(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    if key["data"] in DENSE:
        return dense(options, key)
    data = few_images(options, key["per_class"], key["seed"])
    return probe(options, data, key["seed"]) if key["start"] == "probe" else learn(options, key, data)


def weights_file(name: str) -> str:
    """Where the weights lie that a name of the package's stands for; other names are paths already."""
    cfg = None if Path(name).exists() else get_pretrained_cfg(name)
    return str(getattr(cfg, "file", None) or name)


def run_folder(options: argparse.Namespace, key: dict[str, Any]) -> Path:
    """Where a run lies; of weights in a run's directory its name counts."""
    path = Path(key["weights"])
    weights = path.parent.name if path.is_file() else path.name
    return options.runs / "-".join(str(value) for value in {**key, "weights": weights}.values())


# --- few images ---------------------------------------------------------------------------------------------------


def few_images(options: argparse.Namespace, per_class: int, seed: int) -> Path:
    """A folder with ``per_class`` training images of each class, drawn by ``seed``, and the whole test split."""
    folder = options.runs / "data" / f"cifar10-{per_class}-{seed}"
    if not (folder / "classes.txt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        table = parquet.read_table(next(iter(sorted(options.cifar10.glob("train*.parquet")))))
        labels = np.asarray(table["label"])
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
        parquet.write_table(table.take(np.concatenate(drawn)), folder / "train.parquet")
        shutil.copy(options.cifar10 / "test.parquet", folder / "test.parquet")
        shutil.copy(options.cifar10 / "classes.txt", folder / "classes.txt")  # last: the folder is whole with it
    return folder


def learn(options: argparse.Namespace, key: dict[str, Any], data: Path) -> dict[str, Any]:
    """Train the weights' network on few images, from its weights or from random ones."""
    source = load(weights_file(options.weights))
    classes = len((data / "classes.txt").read_text().splitlines())
    images = int(key["per_class"] * classes * (1 - HELD_BACK))
    batch = min(64, images)
    metrics = train_or_resume(
        run_folder(options, key),
        str(data),
        model=source.info["model"].split(".")[0],
        model_args=source.info.get("model_args"),
        init_from=weights_file(options.weights) if key["start"] == "finetune" else None,
        img_size=options.img_size,
        epochs=max(1, math.ceil(options.updates / (images // batch))),
        batch_size=batch,
        lr=key["lr"],
        seed=key["seed"],
        val_fraction=HELD_BACK,
        optim=Optim(opt="muon", weight_decay=0.05, warmup_epochs=1, clip_grad=1.0),
        augment=Augment(policy="small", zoom=0.2, reprob=0.25, remode="const", smoothing=0.1),
        ema=Ema(ema_decay=0.99),
        limit_batches=options.limit_batches,
    )
    return {"score": metrics["top1"], "val_score": metrics["val_top1"]}


def probe(options: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    """Logistic regression on the frozen network's pooled features."""
    source = load(weights_file(options.weights))
    source.preprocessing["input_size"] = [3, options.img_size, options.img_size]
    sets = {split: features(source, data, split, seed) for split in ("train", "val", "test")}
    best, score = None, -1.0
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        reached = regression(strength).fit(*sets["train"]).score(*sets["val"])
        best, score = (strength, reached) if reached > score else (best, score)
    both = [np.concatenate(pair) for pair in zip(sets["train"], sets["val"], strict=True)]
    final = regression(best or 1.0).fit(*both).score(*sets["test"])
    return {"score": round(100 * final, 2), "val_score": round(100 * score, 2)}


def regression(strength: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def features(source: Any, data: Path, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pooled features (N, C) of a split, and its labels."""
    part = open_set(str(data), split, val_fraction=HELD_BACK, seed=seed)
    found, labels = [], []
    with torch.inference_mode():
        for images, classes in Classify.split_loader(part, source.preprocessing, {}, batch_size=250, num_workers=0):
            found.append(source.model.forward_head(source.model.forward_features(images), pre_logits=True))
            labels.append(classes)
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


# --- dense tasks --------------------------------------------------------------------------------------------------


def dense(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it stands, with the weights' network for a backbone."""
    source = load(weights_file(options.weights))
    recipe = parse("train", train, ["--config", str(RECIPES / f"{key['data']}.yaml")])
    recipe |= {"model": source.info["model"].split(".")[0], "model_args": source.info.get("model_args")}
    recipe |= {"init_from": weights_file(options.weights) if key["start"] == "finetune" else None, "seed": key["seed"]}
    if options.limit_batches:
        recipe |= {"limit_batches": options.limit_batches, "epochs": 1}
    for name in ("data", "out", "resume", "quiet", "channels_last"):
        recipe.pop(name, None)
    metrics = train_or_resume(run_folder(options, key), getattr(options, key["data"]), **recipe)
    score, val_score = DENSE[key["data"]]
    return {"score": metrics[score], "val_score": metrics[val_score]}


# --- the rate, the table ------------------------------------------------------------------------------------------


def tune(options: argparse.Namespace) -> None:
    """The rate of both ways to learn, by images held back from 100 a class."""
    rows = []
    for start in ("scratch", "finetune"):
        for lr in options.lrs:
            key: dict[str, Any] = dict(
                zip(KEY, ("cifar10", 100, options.weights, start, lr, options.seeds[0]), strict=True)
            )
            score = learn(options, key, few_images(options, 100, options.seeds[0]))["val_score"]
            rows.append({**key, "val_score": score})
            print(f"{start} at {lr:g}: {score:.2f} % of held-back images", flush=True)
            write_rows(beside(options.out, "tuning"), rows)


def write_table(path: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for all seeds of the same."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in runs:
        groups.setdefault(tuple(row[name] for name in KEY if name != "seed"), []).append(row["score"])
    table = []
    for group, scores in groups.items():
        mean, spread = mean_and_spread(scores)
        what = dict(zip((name for name in KEY if name != "seed"), group, strict=True))
        table.append({**what, "seeds": len(scores), "score_mean": mean, "score_spread": spread})
    write_rows(path, table)
    return table


def draw(path: Path, table: list[dict[str, Any]]) -> None:
    """Few images: accuracy over their number. Dense tasks: a pair of bars each. What was not measured has no panel."""
    few = [row for row in table if row["data"] == "cifar10"]
    others = [row for row in table if row["data"] != "cifar10"]
    panels = [(fill, rows) for fill, rows in ((_few, few), (_dense, others)) if rows]
    figure = new_figure(4 * len(panels), 3.5)
    for axes, (fill, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        fill(axes, rows)
    figure.savefig(path)


def _few(axes: Any, table: list[dict[str, Any]]) -> None:
    for start, colour, line in (("finetune", BLUE, "-"), ("probe", BLUE, ":"), ("scratch", GREY, "-")):
        rows = sorted((row for row in table if row["start"] == start), key=lambda row: row["per_class"])
        if rows:
            x, y, spread = ([row[name] for row in rows] for name in ("per_class", "score_mean", "score_spread"))
            axes.errorbar(x, y, spread, fmt=f"o{line}", capsize=3, color=colour, label=start)
    axes.set(xlabel="training images of each class", ylabel="top-1 (%)", title="CIFAR-10, few images", xscale="log")
    axes.legend()
    numbers = sorted({row["per_class"] for row in table})
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()


def _dense(axes: Any, table: list[dict[str, Any]]) -> None:
    groups = list(dict.fromkeys((row["data"], row["weights"]) for row in table))
    for start, left, colour in (("scratch", -0.2, GREY), ("finetune", 0.2, BLUE)):
        rows = [row for row in table if row["start"] == start]
        places = [groups.index((row["data"], row["weights"])) + left for row in rows]
        bars = axes.bar(places, [row["score_mean"] for row in rows], 0.38, color=colour, label=start)
        axes.bar_label(bars, fmt="%.1f")
    labels = [f"{SCORES[data]}\n{Path(weights).name.split('.')[0]}" for data, weights in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set(ylabel="mIoU or mAP50 (%)", ylim=(0, 115), title="dense tasks, by their recipes")
    axes.legend(loc="upper left", ncols=2)


if __name__ == "__main__":
    main()
