"""``transcnn models``: the networks of this package side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .errors import UserError
from .runs import build_model
from .variants import VARIANTS

__all__ = ["PAPER_TOP1", "describe", "models"]

# ImageNet-1K top-1 in percent as the papers report them (arXiv 2106.03180, v1 for TransCNN); not measured here.
PAPER_TOP1 = {
    "transcnn_tiny": 80.4,
    "transcnn_small": 83.1,
    "transcnn_medium": 83.8,
    "transcnn_large": 84.2,
    "hatnet_tiny": 79.8,
    "hatnet_small": 82.6,
    "hatnet_medium": 84.0,
    "hatnet_large": 84.2,
}
LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm)


def models(names: list[str] | None = None, *, img_size: int | None = None, csv: str | None = None) -> None:
    """List the networks: parameters, multiply-adds, input size, and the paper's ImageNet accuracy.

    Args:
        names: Networks to show, of this package or of timm; without it all of this package.
        img_size: Side of the images that multiply-adds are counted for; without it each network's own.
        csv: Also write a CSV file here.

    Raises:
        UserError: No such network.
    """
    from rich.console import Console
    from rich.table import Table

    rows = [describe(name, img_size) for name in names or VARIANTS]
    table = Table(box=None, header_style="bold")
    for column in ("name", "parameters", "multiply-adds", "of which layers", "input", "top-1 (paper)"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        top1 = "-" if row["paper_top1"] is None else f"{row['paper_top1']:.1f} %"
        size = "x".join(str(side) for side in row["input_size"])
        counts = [f"{row['params'] / 1e6:.2f} M", *(f"{row[key] / 1e9:.3f} G" for key in ("macs", "layer_macs"))]
        table.add_row(row["name"], *counts, size, top1)
    Console(highlight=False).print(table)
    print("Layers are what the paper counts: all but the products inside attention. Top-1 is the paper's figure on")
    print("ImageNet-1K; everything else was counted just now.")
    if csv:
        _write_csv(csv, rows)


def describe(name: str, img_size: int | None = None) -> dict[str, Any]:
    """A network's figures: ``name``, ``params``, ``macs``, ``layer_macs``, ``input_size`` and ``paper_top1``.

    ``macs`` are the multiply-adds of one image, ``layer_macs`` those of convolutions and linear layers alone, which is
    what the paper's FLOPs are.
    """
    # Nothing is computed on the meta device: shapes are all that counting needs.
    with torch.device("meta"):
        model = build_model(name).eval()
        config: Any = model.pretrained_cfg
        channels, *size = config["input_size"]
        size = [img_size, img_size] if img_size else size
        if min(size) < 1:
            raise UserError(f"img_size must be 1 or more, got {img_size}")
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.empty(1, channels, *size))
    operations = counter.get_flop_counts()["Global"]
    return {
        "name": name,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "layer_macs": sum(operations.get(op, 0) for op in LAYERS) // 2,
        "input_size": [channels, *size],
        "paper_top1": PAPER_TOP1.get(name),
    }


def _write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    import csv
    from pathlib import Path

    from .runs import write_whole

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "input_size": "x".join(map(str, row["input_size"]))} for row in rows)

    write_whole(Path(path), write)
