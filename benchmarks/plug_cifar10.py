"""Does H-MHSA help a small CNN? ResNet-20 on CIFAR-10 with nothing, with others' attention, and with H-MHSA.

    python benchmarks/plug_cifar10.py DATA --epochs 30 --seeds 0 1 2

DATA is whatever ``transcnn train`` takes. All variants get the same epochs, recipe, data order and seeds. Writes
results/plug_cifar10.csv (parameters, multiply-adds, images/s, accuracy: mean and spread over the seeds),
results/plug_cifar10_runs.csv (each run) and a plot (``--figure``, or beside the table), all three anew after each run.
Runs of that many epochs that the file of runs holds are not repeated, and one that was cut off goes on.

The network is ResNet-20 of He et al., arXiv 1512.03385, section 4.2, with 1x1 convolutions in the two widening
shortcuts. Attention inside each block (se, cbam, eca) sits before the addition, as in their papers; non-local blocks
and H-MHSA follow whole stages. What ends in ``_late`` is placed alike, after stages 2 and 3, by ``plug(layer=...)``.
None of it sees other data or more epochs than the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_layers import BAM, SCA, botnet_attention
from cost_plot import plot_accuracy
from seeds import beside, mean_and_spread, run_missing, train_or_resume, write_rows
from timm.layers import create_attn
from timm.models import create_model, register_model
from torch import Tensor, nn

from transcnn.commands.plug import cost
from transcnn.plugging.plug import plug, plugged
from transcnn.settings import Augment, Ema, Optim

STAGES = ("layer1", "layer2", "layer3")  # maps of 32x32, 16x16, 8x8
VARIANTS: dict[str, str] = {
    "none": "ResNet-20 as it is",
    "se": "squeeze-and-excitation in each block",
    "cbam": "CBAM in each block",
    "eca": "efficient channel attention in each block",
    "nonlocal": "non-local blocks after stages 2 and 3",
    "se_late": "squeeze-and-excitation after stages 2 and 3",
    "eca_late": "efficient channel attention after stages 2 and 3",
    "cbam_late": "CBAM after stages 2 and 3",
    "nonlocal_late": "non-local blocks after stages 2 and 3, plugged",
    "botnet_late": "BoTNet's attention after stages 2 and 3",
    "bam_late": "BAM after stages 2 and 3",
    "sca_late": "SCA after stages 2 and 3",
    "hmhsa2": "H-MHSA of two levels after each stage",
    "hmhsa2_late": "H-MHSA of two levels after stages 2 and 3",
    "hmhsa2_inside": "H-MHSA of two levels after the first block of stages 2 and 3",
    "hmhsa2_open": "H-MHSA of two levels after stages 2 and 3, its scale 0.1 at first",
    "hmhsa3": "H-MHSA of three levels after each stage",
}
# Placed as H-MHSA is, by plug(layer=...): x + scale·layer(x), the scale 0 at first.
LAYERS: dict[str, str | Callable[[int], nn.Module]] = {
    "se_late": "se",
    "eca_late": "eca",
    "cbam_late": "cbam",
    "nonlocal_late": "nl",
    "botnet_late": lambda dim: botnet_attention(dim, {32: 16, 64: 8}[dim]),
    "bam_late": BAM,
    "sca_late": SCA,
}
COLUMNS = ["variant", "what", "params", "macs", "images_per_s", "epochs", "seeds", "top1_mean", "top1_spread"]


class Block(nn.Module):
    """Two 3x3 convolutions, attention if any, and the shortcut."""

    def __init__(self, before: int, after: int, stride: int, attention: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.act = nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.attn = create_attn(attention, after) or nn.Identity()
        self.shortcut = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return torch.relu(self.attn(self.bn2(self.conv2(y))) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks of ``width`` channels, twice and four times as many."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, attention: str | None = None, width: int = 16) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        before = width
        for name, after in zip(STAGES, (width, 2 * width, 4 * width), strict=True):
            first = Block(before, after, 1 if before == after else 2, attention)
            self.add_module(name, nn.Sequential(first, *(Block(after, after, 1, attention) for _ in range(2))))
            before = after
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


@register_model
def resnet20_attention(pretrained: bool = False, variant: str = "none", **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32x32 images with one of ``VARIANTS``."""
    model = ResNet20(
        kwargs.get("num_classes", 10), kwargs.get("in_chans", 3), variant if variant in ("se", "cbam", "eca") else None
    )
    size = (model.in_chans, 32, 32)
    model.pretrained_cfg = {"input_size": size, "mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)}  # pyright: ignore
    if variant == "nonlocal":
        for name, channels in (("layer2", 32), ("layer3", 64)):
            getattr(model, name).append(create_attn("nl", channels))
    example = torch.zeros(1, *size)
    if variant in LAYERS:
        plug(model, STAGES[1:], layer=LAYERS[variant], example=example)
    if variant == "hmhsa2":  # by the default rule: grids of 8 and ratios 4, 2; stage 3 has 8x8 positions
        plug(model, STAGES, example=example)
    if variant == "hmhsa2_late":
        plug(model, STAGES[1:], example=example)
    if variant == "hmhsa2_inside":  # so that convolutions of the same stage work on what it gives
        plug(model, [f"{name}.0" for name in STAGES[1:]], example=example)
    if variant == "hmhsa2_open":
        for _, branch in plugged(plug(model, STAGES[1:], example=example)):
            nn.init.constant_(branch.scale, 0.1)
    if variant == "hmhsa3":
        for name, grids in zip(STAGES, ((8, 8), (8, 4), (4, 2)), strict=True):
            plug(model, name, grid_sizes=grids, pool_ratios=(2, 2), example=example)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-2, help="chosen for the network without attention")
    parser.add_argument("--limit_batches", type=int, help="only this many batches an epoch, for trying out")
    parser.add_argument("--runs", type=Path, default=Path("runs/plug_cifar10"))
    parser.add_argument("--out", type=Path, default=Path("results/plug_cifar10.csv"))
    parser.add_argument("--figure", type=Path, help="where the plot goes [beside the table]")
    options = parser.parse_args()
    keys = [
        {"variant": variant, "seed": seed, "epochs": options.epochs}
        for seed in options.seeds
        for variant in options.variants
    ]
    told = partial(run, options), partial(write_table, options)
    runs = run_missing(beside(options.out, "runs"), ("seed", "epochs", "top1"), keys, *told)
    for row in write_table(options, runs):
        print(
            f"{row['variant']:12s} {row['top1_mean']:6.2f} ± {row['top1_spread']:.2f} %  {row['params']:8d} parameters"
        )


def run(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train one variant with one seed, or go on with it."""
    folder = options.runs / f"{key['variant']}-e{key['epochs']}-s{key['seed']}"
    metrics = train_or_resume(
        folder,
        options.data,
        model="resnet20_attention",
        model_args={"variant": key["variant"]},
        epochs=key["epochs"],
        batch_size=128,
        lr=options.lr,
        seed=key["seed"],
        optim=Optim(opt="muon", weight_decay=0.05, warmup_epochs=0.5, clip_grad=None),
        augment=Augment(policy="small"),
        ema=Ema(ema=False),
        limit_batches=options.limit_batches,
    )
    return {"top1": metrics["top1"]}


def write_table(options: argparse.Namespace, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a variant, of the runs with the epochs asked for; the CSV and the plot."""
    runs = [r for r in runs if r["epochs"] == options.epochs]
    variants = [v for v in VARIANTS if any(r["variant"] == v for r in runs)]
    table = [summary(variant, [r for r in runs if r["variant"] == variant]) for variant in variants]
    write_rows(options.out, table, COLUMNS)
    figure = options.figure or options.out.with_suffix(".png")
    plot_accuracy(figure, table, "ResNet-20 and attention", "CIFAR-10 top-1 (%)")
    return table


def summary(variant: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; the spread is the standard deviation over the seeds, 0 for one."""
    figures = cost(create_model("resnet20_attention", variant=variant).eval(), (torch.zeros(1, 3, 32, 32),), 128)
    mean, spread = mean_and_spread([each["top1"] for each in runs])
    return {
        "variant": variant,
        "what": VARIANTS[variant],
        "params": int(figures["params"]),
        "macs": int(figures["macs"]),
        "images_per_s": round(figures["images/s"]),
        "epochs": runs[0]["epochs"],
        "seeds": len(runs),
        "top1_mean": mean,
        "top1_spread": spread,
    }


if __name__ == "__main__":
    main()
