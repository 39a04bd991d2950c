"""Small networks on CIFAR-10 at equal training time: transcnn_nano beside CNNs and transformers of its size.

    python benchmarks/cifar10_peers.py CIFAR10 --tune
    python benchmarks/cifar10_peers.py CIFAR10 --seeds 0 1
    python benchmarks/cifar10_peers.py CIFAR10 --seeds 0 --networks convnext pvt_v2 swin

All have at most 1.5 M parameters, maps of about the sizes of ours, one recipe, and as many epochs as --minutes of
training hold at the speed that is measured first (images a CPU second of one thread; results/cifar10_peers_speed.csv
keeps it, so that all seeds get the same). ``--tune`` gives each network three rates with --tune_share of the epochs and
goes by images held back from training (results/cifar10_peers_tuning.csv); the other runs take the best. Writes
results/cifar10_peers_runs.csv (each run) and results/cifar10_peers.csv. Runs that a file holds are not repeated; one
that was cut off goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plug_cifar10 import ResNet20
from seeds import (
    beside,
    best_rate,
    mean_and_spread,
    read_runs,
    run_missing,
    train_or_resume,
    training_dtype,
    write_rows,
)
from timm.models import create_model, register_model
from torch import nn

from transcnn.compare.engines import prepare_training
from transcnn.plugging.cost import count
from transcnn.settings import Augment, Ema, Optim

IMAGES, BATCH = 48_000, 128  # what the held-back part leaves of 50,000
RUN_NUMBERS = ("epochs", "lr", "seed", "top1", "val_top1", "train_seconds")


def resnet(classes: int, chans: int) -> nn.Module:
    """The CIFAR kind (arXiv 1512.03385, section 4.2), wider instead of deeper."""
    return ResNet20(classes, chans, width=36)


def mobilenetv2(classes: int, chans: int) -> nn.Module:
    """Width 0.75; the first two halvings are left out, as is usual at 32x32."""
    model: Any = create_model("mobilenetv2_075", num_classes=classes, in_chans=chans)
    model.conv_stem.stride = model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


def convnext(classes: int, chans: int) -> nn.Module:
    args: dict[str, Any] = dict(patch_size=1, depths=(1, 2, 3, 3), dims=(24, 48, 96, 192))
    return create_model("convnext_atto", num_classes=classes, in_chans=chans, conv_mlp=True, **args)


def pvt_v2(classes: int, chans: int) -> nn.Module:
    """The first patches overlap by a stride of 2 instead of 4."""
    args: dict[str, Any] = dict(depths=(2, 2, 3, 1), embed_dims=(24, 48, 112, 160), num_heads=(1, 2, 4, 5))
    args |= dict(mlp_ratios=(4, 4, 4, 4))
    model: Any = create_model("pvt_v2_b0", num_classes=classes, in_chans=chans, **args)
    model.patch_embed.proj.stride = (2, 2)
    return model


def swin(classes: int, chans: int) -> nn.Module:
    args: dict[str, Any] = dict(img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(2, 4, 2))
    return create_model(
        "swin_tiny_patch4_window7_224", num_classes=classes, in_chans=chans, num_heads=(2, 4, 8), **args
    )


# By name: what makes it; the name of ours is timm's.
NETWORKS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "transcnn_nano": None,
    "resnet": resnet,
    "mobilenetv2": mobilenetv2,
    "convnext": convnext,
    "pvt_v2": pvt_v2,
    "swin": swin,
}


@register_model
def cifar10_peer(pretrained: bool = False, network: str = "resnet", **kwargs: Any) -> nn.Module:
    """One of ``NETWORKS`` for images of 32x32."""
    make, classes, chans = NETWORKS[network], kwargs.get("num_classes", 10), kwargs.get("in_chans", 3)
    if make is None:
        return create_model(network, num_classes=classes, in_chans=chans)
    model: Any = make(classes, chans)
    ours = create_model("transcnn_nano").pretrained_cfg  # size, mean and deviation
    model.pretrained_cfg = model.default_cfg = {k: ours[k] for k in ("input_size", "mean", "std")}
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--minutes", type=float, default=40, help="of training, at the speed measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tune", action="store_true", help="compare --lrs on held-back images, then stop")
    parser.add_argument("--tune_share", type=float, default=0.2, help="of the epochs, for each rate")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--limit_batches", type=int, help="only this many batches an epoch, for trying out")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_peers"))
    parser.add_argument("--out", type=Path, default=Path("results/cifar10_peers.csv"))
    options = parser.parse_args()
    speeds = measure(options)
    tuning = beside(options.out, "tuning")
    path = tuning if options.tune else beside(options.out, "runs")
    rates = {n: options.lrs if options.tune else [best_rate(tuning, n, "lr", "val_top1")] for n in options.networks}
    share = options.tune_share if options.tune else 1
    epochs = {name: max(1, round(share * 60 * options.minutes * speeds[name] / IMAGES)) for name in options.networks}
    keys = [
        {"network": name, "epochs": epochs[name], "lr": lr, "seed": seed}
        for seed in options.seeds
        for name in options.networks
        for lr in rates[name]
    ]
    rows = run_missing(path, RUN_NUMBERS, keys, partial(run, options))
    if not options.tune:
        write_rows(options.out, [row_of(name, speeds[name], rows) for name in options.networks])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Training images a CPU second of each network, in the type that training takes here, measured once and kept."""
    torch.set_num_threads(1)
    path = beside(options.out, "speed")
    rows = read_runs(path, ("images_per_s",))
    images = torch.randn(BATCH, 3, 32, 32)
    for name in options.networks:
        if not any(row["network"] == name for row in rows):
            step = prepare_training(create_model("cifar10_peer", network=name), dtype := training_dtype())
            times = []
            for _ in range(12):
                begun = time.process_time()
                step(images)
                times.append(time.process_time() - begun)
            rows.append({"network": name, "dtype": dtype, "images_per_s": round(BATCH / statistics.median(times), 1)})
            write_rows(path, rows)
    return {row["network"]: row["images_per_s"] for row in rows}


def run(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one network by the recipe, or go on with it."""
    metrics = train_or_resume(
        options.runs / "-".join(map(str, key.values())),
        options.data,
        model="cifar10_peer",
        model_args={"network": key["network"]},
        img_size=32,
        epochs=key["epochs"],
        batch_size=BATCH,
        lr=key["lr"],
        seed=key["seed"],
        val_fraction=0.04,
        optim=Optim(opt="muon", weight_decay=0.05, warmup_epochs=0.5, clip_grad=None),
        augment=Augment(policy="small", smoothing=0.1),
        ema=Ema(ema_decay=0.998),
        limit_batches=options.limit_batches,
    )
    return {name: metrics[name] for name in ("top1", "val_top1", "train_seconds")}


def row_of(name: str, speed: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a network costs, and its runs."""
    model = create_model("cifar10_peer", network=name).eval()
    counts = count(model, torch.zeros(1, 3, 32, 32))
    own = [r for r in runs if r["network"] == name]
    mean, spread = mean_and_spread([r["top1"] for r in own])
    cost = {"params": counts.params, "macs": counts.macs, "training_images_per_s": speed}
    result = {"epochs": own[0]["epochs"], "lr": own[0]["lr"], "seeds": len(own)}
    return {"network": name, **cost, **result, "top1_mean": mean, "top1_spread": spread}


if __name__ == "__main__":
    main()
