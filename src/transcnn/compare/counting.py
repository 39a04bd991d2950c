"""Parameters and multiply-adds of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UserError
from ..plugging.build import build_model
from ..variants import PAPER_TOP1

__all__ = ["describe"]

LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm)


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
