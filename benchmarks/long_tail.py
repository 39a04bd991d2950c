"""Rare classes: long-tailed CIFAR-10, and what each remedy is worth in balanced accuracy.

    python benchmarks/long_tail.py CIFAR10 --epochs 16 --seeds 0 1 2

CIFAR10 is a folder of Parquet files with splits train and test. Of the training images the classes keep 5000, 2997,
1796, ... 50 (factor 100, exponential: the field's CIFAR-10-LT, Cui et al., arXiv 1901.05555), the test split stays
whole. All variants get the same network, epochs, recipe and images. Writes results/long_tail.csv: top-1, balanced
accuracy, macro F1 and the accuracy of the three rarest classes on the test split, mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from seeds import mean_and_spread, train_or_resume, write_rows

from transcnn.data.sources.opening import open_source
from transcnn.settings import Augment, Classify, Ema, Optim

VARIANTS: dict[str, Classify] = {
    "none": Classify(),
    "sqrt": Classify(class_weights="sqrt"),
    "balanced": Classify(class_weights="balanced"),
    "sampler": Classify(sampler="balanced"),
    "focal": Classify(loss="focal"),
    "logit_adjustment": Classify(logit_adjustment=1.0),
}
FIGURES = ("top1", "balanced_accuracy", "macro_f1", "rarest3")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="transcnn_nano")
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--largest", type=int, default=5000)
    parser.add_argument("--limit_batches", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/long_tail"))
    parser.add_argument("--out", type=Path, default=Path("results/long_tail.csv"))
    args = parser.parse_args()
    thinned = make_long_tailed(args.data, args.runs / "data", args.largest, args.factor)
    rows = []
    for variant in args.variants:
        found = [measure(args, thinned, variant, seed) for seed in args.seeds]
        row: dict[str, Any] = {"variant": variant, "epochs": args.epochs, "seeds": len(found)}
        for figure in FIGURES:
            row[figure], row[f"{figure}_spread"] = mean_and_spread([metrics[figure] for metrics in found])
        rows.append(row)
        write_rows(args.out, rows)
        print(row, flush=True)


def make_long_tailed(data: Path, out: Path, largest: int, factor: float) -> Path:
    """The data with thinned training classes, the first images of each, as Parquet files in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    splits = open_source(str(data))
    for split, source in (("train", splits.train), ("test", splits.test)):
        assert source is not None
        assert source.raw is not None
        kept = np.arange(len(source)) if split == "test" else thin(source.labels, largest, factor)
        rows = [{"image": {"bytes": source.raw(int(i)), "path": None}, "label": int(source.labels[i])} for i in kept]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / f"{split}.parquet")
    names = splits.train.class_names  # pyright: ignore
    (out / "classes.txt").write_text("\n".join(names) + "\n")
    return out


def thin(labels: np.ndarray, largest: int, factor: float) -> np.ndarray:
    """Indices of the images that stay: of class c of C, largest / factor ** (c / (C - 1)) of them."""
    classes = int(labels.max()) + 1
    kept = []
    for c in range(classes):
        members = np.flatnonzero(labels == c)
        kept.append(members[: int(largest * factor ** (-c / (classes - 1)))])
    return np.sort(np.concatenate(kept))


def measure(args: argparse.Namespace, data: Path, variant: str, seed: int) -> dict[str, Any]:
    """The test split's figures of one run; the epoch is chosen by balanced accuracy in all of them."""
    metrics = train_or_resume(
        args.runs / f"{variant}-{seed}",
        str(data),
        model=args.model,
        img_size=args.img_size,
        epochs=args.epochs,
        seed=seed,
        lr=1e-2,
        batch_size=128,
        eval_metric="balanced_accuracy",
        limit_batches=args.limit_batches,
        classify=VARIANTS[variant],
        optim=Optim(opt="muon", weight_decay=0.05, warmup_epochs=min(1, args.epochs / 4), clip_grad=None),
        augment=Augment(policy="small", smoothing=0.0),
        ema=Ema(ema_decay=0.99),
    )
    accuracies = list(metrics["class_accuracy"].values())
    return {**metrics, "rarest3": float(np.mean(accuracies[-3:]))}


if __name__ == "__main__":
    main()
