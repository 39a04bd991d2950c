"""Does hierarchical attention pay? The same network, only its attention exchanged, with several seeds.

    python benchmarks/attention.py CIFAR10 --tune                       # the learning rate
    python benchmarks/attention.py CIFAR10 --epochs 10 --seeds 0 1 2    # the table
    python benchmarks/attention.py CIFAR10 --sizes 512 2048 --cost      # one large image's time and memory
    python benchmarks/attention.py TINY_IMAGENET --host transcnn_micro --img_size 64 --variants none hmhsa2 hmhsa3

What is compared stands in attention_variants.py. All variants get the same epochs, recipe, data order and seeds. Writes
results/attention_runs.csv (each run), results/attention_cost.csv (parameters, multiply-adds, speed, large images),
results/attention.csv (both together: mean and spread over the seeds) and a plot beside it, anew after each run. Runs
that the file of runs holds are not repeated; one that was cut off goes on. Speed and memory want a machine that does
nothing else: ``--cost`` measures them and trains nothing.

``--tune`` trains the network with none and that with two levels at each of ``--lrs`` and goes by images held back from
training, not by the test split: take the rate with the best mean of both (results/attention_tuning.csv).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_variants import VARIANTS
from cost_plot import plot_accuracy
from seeds import beside, mean_and_spread, read_runs, run_missing, train_or_resume, training_dtype, write_rows
from timm.models import create_model

from transcnn.commands.compare import compare
from transcnn.compare.engines import prepare, prepare_training
from transcnn.plugging.cost import count, seconds_per_call
from transcnn.settings import Augment, Ema, Optim

HERE = Path(__file__).resolve().parent
KEY = ("variant", "host", "img_size", "epochs", "lr", "seed")
SCORES = ("top1", "loss", "val_top1", "train_seconds")  # loss is the test split's cross-entropy
RUN_NUMBERS = ("img_size", "epochs", "lr", "seed", *SCORES)


def main() -> None:
    options = arguments()
    if options.tune:
        tune(options)
        return
    measure(options)
    if not options.cost:
        run_missing(
            beside(options.out, "runs"),
            RUN_NUMBERS,
            [wanted(options, variant, options.lr, seed) for seed in options.seeds for variant in options.variants],
            partial(run, options),
            partial(write_table, options),
        )
    for row in write_table(options, read_runs(beside(options.out, "runs"), RUN_NUMBERS)):
        print(
            f"{row['variant']:8s} {row['top1_mean']:6.2f} ± {row['top1_spread']:.2f} %, "
            f"loss {row['loss_mean']:.3f} ± {row['loss_spread']:.3f}, {row['params']} parameters"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--host", default="transcnn_nano")
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-2, help="what --tune says")
    parser.add_argument("--tune", action="store_true", help="compare --lrs on held-back images, then stop")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--cost", action="store_true", help="measure cost alone, train nothing")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[], help="sides to measure time and memory of one image at"
    )
    parser.add_argument(
        "--most_macs", type=float, default=1e13, help="images that take more multiply-adds are left out"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at a time when speed is measured")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a round of those measurements")
    parser.add_argument("--limit_batches", type=int, help="only this many batches an epoch, for trying out")
    parser.add_argument("--runs", type=Path, default=Path("runs/attention"))
    parser.add_argument("--out", type=Path, default=Path("results/attention.csv"))
    options = parser.parse_args()
    if options.sizes and options.host != "transcnn_nano":
        parser.error("--sizes measures transcnn_nano alone")
    return options


def wanted(options: argparse.Namespace, variant: str, lr: float, seed: int) -> dict[str, Any]:
    """What tells one run from another."""
    return dict(zip(KEY, (variant, options.host, options.img_size, options.epochs, lr, seed), strict=True))


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


# --- accuracy -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one variant with one seed, or go on with it."""
    metrics = train_or_resume(
        options.runs / "-".join(map(str, key.values())),
        options.data,
        model="attention_host",
        model_args={"variant": key["variant"], "host": options.host, "side": options.img_size},
        img_size=options.img_size,
        epochs=options.epochs,
        batch_size=128,
        lr=key["lr"],
        seed=key["seed"],
        val_fraction=0.04,
        optim=Optim(opt="muon", weight_decay=0.05, warmup_epochs=0.5, clip_grad=None),
        augment=Augment(policy="small", smoothing=0.1),
        ema=Ema(ema_decay=0.998),
        limit_batches=options.limit_batches,
    )
    return {name: metrics[name] for name in SCORES}


def tune(options: argparse.Namespace) -> None:
    """The rate for all: none and two levels with each of ``--lrs``, by images held back from training."""
    rows = []
    for lr in options.lrs:
        for variant in ("none", "hmhsa2"):
            key = wanted(options, variant, lr, options.seeds[0])
            rows.append({**key, "val_top1": run(options, key)["val_top1"]})
            write_rows(beside(options.out, "tuning"), rows)
    for lr in options.lrs:
        scores = [row["val_top1"] for row in rows if row["lr"] == lr]
        print(f"rate {lr:g}: {statistics.mean(scores):.2f} % of held-back images on average, {scores}")


# --- cost ---------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Parameters, multiply-adds, images/s, and one large image's time and memory, for variants that lack them."""
    path = beside(options.out, "cost")
    rows = read_runs(path, ())
    for variant in options.variants:
        key = {"variant": variant, "host": options.host, "img_size": str(options.img_size)}
        row = next((r for r in rows if same(r, key)), None)
        if row is None:
            row = {**key, **speed(options, variant)}
            rows.append(row)
        for side in options.sizes:
            if not row.get(f"seconds_{side}"):
                row |= large(options, variant, side)
        columns = list(dict.fromkeys(name for r in rows for name in r))
        write_rows(path, rows, columns)


def network(options: argparse.Namespace, variant: str) -> torch.nn.Module:
    return create_model("attention_host", variant=variant, host=options.host, side=options.img_size).eval()


def speed(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Of a network as ``transcnn train`` and an eager, channels-last forward pass run it here."""
    model, dtype = network(options, variant), training_dtype()
    images = torch.randn(options.batch, 3, options.img_size, options.img_size)
    counts = count(model, torch.empty(1, 3, options.img_size, options.img_size, device="meta"))
    times = {
        "training": seconds_per_call(prepare_training(model, dtype), images, options.seconds),
        "inference": seconds_per_call(prepare("channels_last", model, dtype, images), images, options.seconds),
    }
    rates = {f"{name}_images_per_s": round(options.batch / value, 1) for name, value in times.items()}
    return {"params": counts.params, "macs": counts.macs, "dtype": dtype, **rates}


def large(options: argparse.Namespace, variant: str, side: int) -> dict[str, Any]:
    """Seconds and peak memory of one image of ``side`` pixels, in eager fp32; empty where that would take too long."""
    if count(network(options, variant), torch.empty(1, 3, side, side, device="meta")).macs > options.most_macs:
        return {f"seconds_{side}": "", f"above_mb_{side}": ""}
    reference = f"{HERE / 'attention_variants.py'}:make_{variant}"
    (case,) = compare([], sizes=[side], batch=1, engine="channels_last", reference=reference, rounds=1, seconds=0.0)
    return {f"seconds_{side}": round(1 / case["images_per_s"], 4), f"above_mb_{side}": round(case["above_mb"])}


# --- the table ----------------------------------------------------------------------------------------------------


def write_table(options: argparse.Namespace, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a variant, of the runs with the host, size, epochs and rate asked for, and what it costs; the plot."""
    costs = {(r["variant"], r["host"], r["img_size"]): r for r in read_runs(beside(options.out, "cost"), ())}
    table = []
    for variant in VARIANTS:
        key = {name: value for name, value in wanted(options, variant, options.lr, 0).items() if name != "seed"}
        own = [r for r in runs if same(r, key)]
        cost = costs.get((variant, options.host, str(options.img_size)))
        if own and cost:
            result: dict[str, Any] = {"seeds": len(own)}
            for score in ("top1", "loss"):
                result[f"{score}_mean"], result[f"{score}_spread"] = mean_and_spread([r[score] for r in own])
            table.append({"variant": variant, "what": VARIANTS[variant], **result, **cost, **key})
    if table:
        columns = list(dict.fromkeys(name for row in table for name in row))
        write_rows(options.out, table, columns)
        plot_accuracy(options.out.with_suffix(".png"), table, f"{options.host}, only attention exchanged", "top-1 (%)")
    return table


if __name__ == "__main__":
    main()
